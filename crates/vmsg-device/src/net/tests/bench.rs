// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network device in a worker, its driver, and its back end, all in one thread.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

use crate::device::Device;
use crate::net::{Mac, Net, Settings};
use crate::stand::{Driver, Stand, counter, is_also, start};
use crate::worker::{Command, QueueStart, Resume};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const SIZE: u16 = 64;

/// A frame on its way to the guest.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    /// The pair that the back end has chosen, if it does.
    pub(super) pair: Option<u16>,
    pub(super) header: VnetHeader,
    pub(super) bytes: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self {
            pair: None,
            header: VnetHeader::default(),
            bytes: bytes.to_vec(),
        }
    }

    pub(super) fn on(pair: u16, bytes: &[u8]) -> Self {
        Self {
            pair: Some(pair),
            ..Self::new(bytes)
        }
    }
}

/// What the back end holds.
pub(super) struct State {
    pub(super) incoming: VecDeque<Incoming>,
    /// Pair, header and bytes of what the guest has sent.
    pub(super) sent: Vec<(u16, VnetHeader, Vec<u8>)>,
    /// Frames that are still taken from the guest.
    pub(super) patience: usize,
    pub(super) guest: Guest,
    pub(super) link: bool,
    pub(super) pairs: u16,
    pub(super) offloads: Offloads,
}

#[derive(Clone)]
pub(super) struct Wire(Arc<Mutex<State>>);

impl Wire {
    pub(super) fn new(pairs: u16) -> Self {
        Self(Arc::new(Mutex::new(State {
            incoming: VecDeque::new(),
            sent: Vec::new(),
            patience: usize::MAX,
            guest: Guest::NONE,
            link: true,
            pairs,
            offloads: Offloads::ALL,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics here")
    }

    pub(super) fn push(&self, frame: Incoming) {
        self.state().incoming.push_back(frame);
    }
}

impl Backend for Wire {
    fn queue_pairs(&self) -> u16 {
        self.state().pairs
    }
    fn offloads(&self) -> Offloads {
        self.state().offloads
    }
    fn set_guest(&mut self, guest: &Guest) {
        self.state().guest = *guest;
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn link_is_up(&self) -> bool {
        self.state().link
    }
    fn transmit(&mut self, _: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut state = self.state();
        let taken = frames.len().min(state.patience);
        state.patience -= taken;
        for frame in &frames[..taken] {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            state.sent.push((pair, frame.header, bytes));
        }
        taken
    }
    /// Goes past frames for which there is no room.
    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut state = self.state();
        let mut kept = VecDeque::new();
        let mut count = 0;
        while let Some(frame) = state.incoming.pop_front() {
            let target = match frame.pair {
                Some(pair) => Target::Pair(pair),
                None => Target::Head(&frame.bytes[..frame.bytes.len().min(Target::HEAD)]),
            };
            match sink.offer(target, frame.bytes.len()) {
                Some(room) => {
                    room.write(&frame.bytes);
                    sink.commit(&frame.header, frame.bytes.len());
                    count += 1;
                }
                None => kept.push_back(frame),
            }
        }
        state.incoming = kept;
        count
    }
    fn has_frames(&self) -> bool {
        !self.state().incoming.is_empty()
    }
    fn shutdown(&mut self) {}
}

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) header: Vec<u8>,
    pub(super) bytes: Vec<u8>,
    /// Buffers it was spread over.
    pub(super) buffers: usize,
}

pub(super) struct Bench {
    stand: Stand,
    driver: Driver,
    pub(super) wire: Wire,
    pub(super) header: usize,
}

is_also!(Bench, stand: Stand);

impl Bench {
    /// A device with all that it can do, and memory that its driver has lent.
    pub(super) fn new(pairs: u16) -> Self {
        Self::with(&Settings {
            queue_pairs: pairs,
            ..Settings::new(Mac(MAC))
        })
    }

    pub(super) fn with(settings: &Settings) -> Self {
        let wire = Wire::new(u16::MAX);
        let device = Net::new(settings, Box::new(wire.clone()));
        let driver = Driver::new(device.queue_sizes().len(), SIZE, true);
        let mut stand = Stand::new(Box::new(device));
        let table = Arc::clone(&driver.table);
        stand.tell(Command::SetMemory(table)).expect("memory");
        Self {
            stand,
            driver,
            wire,
            header: 12,
        }
    }

    /// A device that has been brought up with `features` and `queues`.
    pub(super) fn running(pairs: u16, features: &[u32], queues: &[usize]) -> Self {
        let mut bench = Self::new(pairs);
        bench.bring_up(features, queues);
        bench
    }

    pub(super) fn bring_up(&mut self, features: &[u32], queues: &[usize]) {
        self.negotiate(features).expect("features that go together");
        for queue in queues {
            self.set_up(*queue, None).expect("a queue");
        }
        self.driver_ok();
    }

    pub(super) fn negotiate(&mut self, features: &[u32]) -> Result<(), String> {
        self.header = if features.contains(&crate::net::bits::HASH_REPORT) {
            20
        } else {
            12
        };
        self.stand.negotiate(features)
    }

    pub(super) fn set_up(&mut self, index: usize, resume: Option<Resume>) -> Result<(), String> {
        let start = QueueStart {
            resume,
            ..start(index, self.driver.set_up(index))
        };
        self.tell(Command::StartQueue(start))
    }

    /// Gives the device `count` receive buffers of `len` bytes.
    pub(super) fn give(&mut self, queue: usize, count: usize, len: usize) {
        for _ in 0..count {
            self.driver.add(queue, &[], len);
        }
        self.kick(queue);
    }

    /// What has come in a receive queue.
    pub(super) fn received(&mut self, queue: usize) -> Vec<Received> {
        let mut frames = Vec::new();
        while let Some(first) = self.driver.pop(queue) {
            let header = first[..self.header].to_vec();
            let mut bytes = first[self.header..].to_vec();
            let buffers = usize::from(u16::from_le_bytes([header[10], header[11]]));
            for _ in 1..buffers {
                bytes.extend(
                    self.driver
                        .pop(queue)
                        .expect("all buffers of a frame at once"),
                );
            }
            frames.push(Received {
                header,
                bytes,
                buffers,
            });
        }
        frames
    }

    /// The frames alone.
    pub(super) fn frames(&mut self, queue: usize) -> Vec<Vec<u8>> {
        self.received(queue)
            .into_iter()
            .map(|frame| frame.bytes)
            .collect()
    }

    /// Chains that the device has not used yet.
    pub(super) fn outstanding(&self, queue: usize) -> u16 {
        self.driver.outstanding(queue)
    }

    /// Sends a frame without offloads.
    pub(super) fn send(&mut self, queue: usize, frame: &[u8]) {
        let mut bytes = vec![0; self.header];
        bytes.extend(frame);
        self.send_raw(queue, &bytes);
    }

    pub(super) fn send_raw(&mut self, queue: usize, bytes: &[u8]) {
        self.driver.add(queue, bytes, 0);
        self.kick(queue);
    }

    /// Frames of which the device has said that it took them.
    pub(super) fn reclaim(&mut self, queue: usize) -> usize {
        let mut count = 0;
        while self.driver.pop(queue).is_some() {
            count += 1;
        }
        count
    }

    /// A command on the control queue; what the device acknowledges.
    pub(super) fn control(&mut self, queue: usize, class: u8, code: u8, data: &[u8]) -> u8 {
        let mut bytes = vec![class, code];
        bytes.extend(data);
        self.control_raw(queue, &bytes)
    }

    pub(super) fn control_raw(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        self.driver.add(queue, bytes, 1);
        self.kick(queue);
        let ack = self.driver.pop(queue).expect("every command is used");
        assert_eq!(ack.len(), 1);
        ack[0]
    }

    /// A counter of a pair.
    pub(super) fn pair_counter(&self, pair: usize, name: &str) -> u64 {
        let monitor = self.monitor.as_ref().expect("counters");
        counter(&monitor.snapshot().pairs[pair], name)
    }
}
