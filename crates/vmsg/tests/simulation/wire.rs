// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other end of a network device's cable: what the guest sends comes back to it. What has passed is noted beyond the end of a device host.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Bytes of the header in front of a frame in a buffer of the driver's.
pub(crate) const HEADER: usize = 12;
/// Bytes of a frame.
pub(crate) const FRAME: usize = 60;
/// Where in a frame its number is.
pub(crate) const NUMBER: usize = 14;

/// What has passed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traffic(Arc<Mutex<Passed>>);

#[derive(Debug, Default)]
struct Passed {
    last: u64,
    /// A frame that came after one that was sent later, or twice.
    late: Option<(u64, u64)>,
}

impl Traffic {
    fn note(&self, number: u64) {
        let mut passed = self.0.lock().expect("nobody panics in between");
        if number <= passed.last {
            passed.late = Some((number, passed.last));
        }
        passed.last = number;
    }

    /// # Panics
    /// If frames were sent out of order or twice.
    pub(crate) fn check(&self) {
        let passed = self.0.lock().expect("nobody panics in between");
        if let Some((number, before)) = passed.late {
            panic!("frame {number} was sent after {before}");
        }
    }
}

/// The back end.
#[derive(Debug)]
pub(crate) struct Wire {
    traffic: Traffic,
    coming: VecDeque<Vec<u8>>,
    /// A moment that has passed.
    due: Instant,
}

impl Wire {
    pub(crate) fn new(traffic: Traffic, due: Instant) -> Self {
        Self {
            traffic,
            coming: VecDeque::new(),
            due,
        }
    }
}

impl Backend for Wire {
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn set_guest(&mut self, _guest: &Guest) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn next_timeout(&self) -> Option<Instant> {
        (!self.coming.is_empty()).then_some(self.due)
    }

    fn poll(&mut self, _now: Instant) {}

    fn transmit(&mut self, _now: Instant, _pair: u16, frames: &[TxFrame<'_>]) -> usize {
        for frame in frames {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            let number = bytes[NUMBER..].first_chunk().expect("a whole frame");
            self.traffic.note(u64::from_le_bytes(*number));
            self.coming.push_back(bytes);
        }
        frames.len()
    }

    fn receive(&mut self, _now: Instant, sink: &mut dyn RxSink) -> usize {
        let mut count = 0;
        while let Some(frame) = self.coming.front() {
            let Some(room) = sink.offer(Target::Pair(0), frame.len()) else {
                break;
            };
            room.write(frame);
            sink.commit(&VnetHeader::default(), frame.len());
            self.coming.pop_front();
            count += 1;
        }
        count
    }

    fn has_frames(&self) -> bool {
        !self.coming.is_empty()
    }

    fn shutdown(&mut self) {}
}
