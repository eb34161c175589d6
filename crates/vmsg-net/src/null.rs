// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A cable that ends nowhere.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::{Backend, Offloads, RxSink, TxFrame};

/// Swallows every frame and never has one.
#[derive(Debug, Default)]
pub struct Null {
    frames: u64,
    bytes: u64,
}

impl Null {
    /// Frames and bytes swallowed so far.
    pub const fn swallowed(&self) -> (u64, u64) {
        (self.frames, self.bytes)
    }
}

impl Backend for Null {
    fn offloads(&self) -> Offloads {
        Offloads {
            csum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            guest_csum: true,
            guest_tso4: true,
            guest_tso6: true,
            guest_ecn: true,
            mtu: u16::MAX,
        }
    }

    fn set_guest_offloads(&mut self, _: Offloads) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    fn poll(&mut self, _: Instant) {}

    fn transmit(&mut self, _: Instant, frames: &[TxFrame<'_>]) -> usize {
        self.frames += frames.len() as u64;
        self.bytes += frames
            .iter()
            .map(|frame| frame.payload.len() as u64)
            .sum::<u64>();
        frames.len()
    }

    fn receive(&mut self, _: Instant, _: &mut dyn RxSink) -> usize {
        0
    }

    fn has_frames(&self) -> bool {
        false
    }

    fn shutdown(&mut self) {}
}
