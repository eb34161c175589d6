// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a back end puts frames into other devices.

use crate::RxSink;

/// Other devices that the same thread serves: a switch puts the frames of one straight into the buffers of another, which is
/// the one copy that a frame needs.
pub trait Outlets {
    /// Calls `fill` with the buffers of the device that was given `key`
    /// ([`Backend::set_key`](crate::Backend::set_key)); what it committed is published, and the driver notified, before this
    /// returns.
    ///
    /// # Errors
    ///
    /// [`Closed`]: why the device takes no frames now; then `fill` was not called, or what it committed is lost with the
    /// device's queues ([`Closed::Broken`]).
    fn fill(&mut self, key: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed>;

    /// As [`fill`](Self::fill), by somebody who knows how much it will be: the device need not look at more buffers than `wanted`
    /// takes, and may have no room for more.
    ///
    /// # Errors
    ///
    /// As for [`fill`](Self::fill).
    fn fill_with(
        &mut self,
        key: u64,
        wanted: Wanted,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<(), Closed> {
        let _ = wanted;
        self.fill(key, fill)
    }
}

/// How much somebody is about to put into a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Frames.
    pub frames: usize,
    /// Bytes of all of them at most.
    pub bytes: usize,
    /// Bytes of the longest at most.
    pub longest: usize,
}

/// Why a device takes no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// There is no such device, or it takes no frames at all.
    #[error("the device is gone")]
    Gone,
    /// No driver has brought it up, or its receive queues are being reset.
    #[error("no driver is there")]
    NoDriver,
    /// Its cable is out.
    #[error("the link is down")]
    LinkDown,
    /// Its driver has put something impossible into a queue: it needs a reset.
    #[error("the device needs a reset")]
    Broken,
}

/// Nobody else.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoOutlets;

impl Outlets for NoOutlets {
    fn fill(&mut self, _: u64, _: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        Err(Closed::Gone)
    }
}
