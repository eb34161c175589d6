// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a device is left alone until its driver resets it.

use std::any::Any;

use vmsg_mem::WindowTable;

use super::seat::has_lost_some;
use crate::device::{ActiveQueue, DeviceError};

/// What went wrong.
#[derive(Debug)]
pub(super) struct Fault {
    /// For the log.
    pub(super) why: String,
    /// It is about an address that no window has, or not for that use.
    pub(super) unmapped: bool,
}

impl Fault {
    fn new(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            unmapped: false,
        }
    }

    /// The device itself has said so.
    pub(super) fn of_device(error: &DeviceError) -> Self {
        Self {
            why: error.to_string(),
            unmapped: error.is_unmapped(),
        }
    }

    /// It has panicked.
    pub(super) fn of_panic(panic: &(dyn Any + Send)) -> Self {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        Self::new(format!("the device panicked: {text}"))
    }

    /// Memory is gone that the device has used, as far as that is looked at now: a few mappings after each turn, from `next` on.
    pub(super) fn of_memory(
        queues: &[Option<ActiveQueue>],
        table: &WindowTable,
        next: &mut usize,
    ) -> Option<Self> {
        if queues.iter().flatten().any(ActiveQueue::has_lost_record) {
            return Some(Self::new(
                "the record of what is in flight is gone: its file has shrunk",
            ));
        }
        has_lost_some(table, next).then(|| {
            Self::new(
                "memory that the driver has lent is gone: its file has shrunk, or its disk is full",
            )
        })
    }
}
