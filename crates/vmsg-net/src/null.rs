// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A cable that ends nowhere.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::{Backend, Guest, Offloads, RxSink, TxFrame};

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
    fn queue_pairs(&self) -> u16 {
        u16::MAX
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_guest(&mut self, _: &Guest) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    fn poll(&mut self, _: Instant) {}

    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
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
