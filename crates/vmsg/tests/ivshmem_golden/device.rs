// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device as a recorded one showed itself.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_msg::{DevNum, DeviceInfo, FeatureSet, Message, VqueueInfo};
use vmsg_device::device::{Device, DeviceError, Identity, Io, Progress};
use vmsg_net::{Backend, Guest, Offloads, RxSink, TxFrame};

use super::recording::{Direction, Recording};

pub(crate) const NET: u32 = 1;

/// What is known of a device from its answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    pub(crate) info: Option<DeviceInfo>,
    offered: FeatureSet,
    queues: BTreeMap<u32, u16>,
    config: BTreeMap<u32, u8>,
}

impl Shown {
    fn learn(&mut self, message: &Message<'_>) {
        match *message {
            Message::DeviceInfo(info) => self.info = Some(info),
            Message::DeviceFeatures(blocks) => assert!(!blocks.store(&mut self.offered)),
            Message::Vqueue(VqueueInfo {
                index, max_size, ..
            }) => {
                let size = u16::try_from(max_size.0).expect("a queue size");
                self.queues.insert(index.0, size);
            }
            Message::Config(data) => self
                .config
                .extend((data.offset..).zip(data.data.iter().copied())),
            _ => {}
        }
    }
}

/// All devices of a recording, by number.
pub(crate) fn shown(recording: &Recording) -> BTreeMap<DevNum, Shown> {
    let mut found = BTreeMap::<DevNum, Shown>::new();
    for line in &recording.lines {
        if line.direction == Direction::FromDevice
            && let Ok(frame) = virtio_msg::decode(&line.bytes, 274)
            && !frame.message.is_bus()
        {
            let device = found.entry(frame.dev_num).or_default();
            device.learn(&frame.message);
        }
    }
    found.retain(|_, shown| shown.info.is_some());
    found
}

/// Answers with what was recorded and fills what it is given. A network device gives back a frame for each one that its driver asked for in the first
/// byte of a frame that it sent: when the recorded one had something to say was up to its network.
pub(crate) struct Recorded {
    info: DeviceInfo,
    shown: Shown,
}

impl Recorded {
    pub(crate) fn new(shown: Shown) -> Self {
        let info = shown.info.expect("only those that were asked are kept");
        Self { info, shown }
    }

    /// Uses up to `most` chains of a queue; what the first byte of each one that can be read was.
    fn work(
        io: &mut Io<'_>,
        queue: usize,
        most: usize,
        read: bool,
    ) -> Result<Vec<u8>, DeviceError> {
        let failed = |source| DeviceError::Queue { queue, source };
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Vec::new());
        };
        let ring = active.ring();
        let batch = ring.pop(io.space, io.storage, most).map_err(failed)?;
        let mut bytes = Vec::new();
        for chain in batch.iter() {
            let mut first = [0];
            if read {
                chain.readable().read(&mut first);
            }
            bytes.push(first[0]);
            let written = chain.writable().write(&[0x5a; 64]);
            let written = u32::try_from(written).expect("64 at most");
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
        }
        Ok(bytes)
    }
}

impl Device for Recorded {
    fn identity(&self) -> Identity {
        Identity {
            device_id: self.info.device_id,
            vendor_id: self.info.vendor_id,
        }
    }

    fn features(&self) -> FeatureSet {
        self.shown.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        (0..self.info.max_queues)
            .map(|index| self.shown.queues.get(&index).copied().unwrap_or(256))
            .collect()
    }

    fn config(&self) -> Vec<u8> {
        (0..self.info.config_size)
            .map(|at| self.shown.config.get(&at).copied().unwrap_or(0))
            .collect()
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {}

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        if self.info.device_id == NET && queue == 0 {
            return Ok(Progress::Idle);
        }
        let sent = Self::work(io, queue, budget.min(8), true)?;
        if self.info.device_id == NET {
            let wanted: usize = sent.iter().map(|&byte| usize::from(byte)).sum();
            if wanted > 0 {
                let filled = Self::work(io, 0, wanted, false)?;
                assert_eq!(filled.len(), wanted, "the driver offered buffers");
                io.publish(0)?;
            }
        }
        io.publish(queue)?;
        Ok(if sent.is_empty() {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}

/// A network that sends every frame back.
#[derive(Default)]
pub(crate) struct Echo {
    frames: VecDeque<Vec<u8>>,
}

impl Backend for Echo {
    fn queue_pairs(&self) -> u16 {
        1
    }
    fn offloads(&self) -> Offloads {
        Offloads::NONE
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
        for frame in frames {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            self.frames.push_back(bytes);
        }
        frames.len()
    }
    fn receive(&mut self, _: Instant, _: &mut dyn RxSink) -> usize {
        self.frames.clear();
        0
    }
    fn has_frames(&self) -> bool {
        false
    }
    fn shutdown(&mut self) {}
}
