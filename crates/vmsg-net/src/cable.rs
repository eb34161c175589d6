// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two devices of one process, back to back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::checksum::Sum;
use crate::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Frames on the way in one direction.
const LENGTH: usize = 256;

/// Longest frame that is taken.
const LONGEST: usize = 65535 + 18;

/// Frames for one end.
#[derive(Debug)]
struct Lane {
    frames: Mutex<VecDeque<Vec<u8>>>,
    /// Readable while there are frames, or when there is room again.
    event: OwnedFd,
}

impl Lane {
    fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            frames: Mutex::new(VecDeque::new()),
            event: eventfd(0, flags)?,
        })
    }

    fn frames(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Full: then it is readable anyhow.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// One end of a cable between two devices, for tests and small setups. Partial checksums are
/// completed, large segments are not offered.
#[derive(Debug)]
pub struct Cable {
    from: Arc<Lane>,
    to: Arc<Lane>,
}

impl Cable {
    /// Both ends.
    ///
    /// # Errors
    ///
    /// If the system has no descriptors left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let one = Arc::new(Lane::new()?);
        let two = Arc::new(Lane::new()?);
        let far = Self {
            from: Arc::clone(&two),
            to: Arc::clone(&one),
        };
        Ok((Self { from: one, to: two }, far))
    }
}

/// Completes a partial checksum; leaves the frame alone if it points outside.
fn complete(header: &VnetHeader, frame: &mut [u8]) {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    if !header.needs_csum() || at + 2 > frame.len() {
        return;
    }
    let mut sum = Sum::default();
    sum.add(&frame[start..]);
    frame[at..at + 2].copy_from_slice(&sum.finish().to_be_bytes());
}

impl Backend for Cable {
    fn queue_pairs(&self) -> u16 {
        u16::MAX
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            csum: true,
            guest_csum: true,
            mtu: u16::MAX,
            ..Offloads::NONE
        }
    }

    fn set_guest(&mut self, _: &Guest) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.from.event.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    fn poll(&mut self, _: Instant) {
        // Not readable: then there is nothing to clear.
        let _ = rustix::io::read(&self.from.event, &mut [0; 8]);
    }

    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut lane = self.to.frames();
        let mut taken = 0;
        for frame in frames {
            if lane.len() >= LENGTH {
                break;
            }
            taken += 1;
            if frame.payload.len() <= LONGEST {
                let mut bytes = vec![0; frame.payload.len()];
                frame.payload.read(&mut bytes);
                complete(&frame.header, &mut bytes);
                lane.push_back(bytes);
            }
        }
        drop(lane);
        if taken > 0 {
            self.to.wake();
        }
        taken
    }

    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut received = 0;
        let mut lane = self.from.frames();
        while let Some(frame) = lane.front() {
            let head = &frame[..frame.len().min(Target::HEAD)];
            let Some(room) = sink.offer(Target::Head(head), frame.len()) else {
                break;
            };
            room.write(frame);
            sink.commit(&VnetHeader::default(), frame.len());
            lane.pop_front();
            received += 1;
        }
        drop(lane);
        if received > 0 {
            // The other end may wait for room.
            self.to.wake();
        }
        received
    }

    fn has_frames(&self) -> bool {
        !self.from.frames().is_empty()
    }

    fn shutdown(&mut self) {
        self.from.frames().clear();
    }
}
