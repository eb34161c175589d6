// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function with a scripted device behind it, and a driver of it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use crate::scripted::{Call, Scripted};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use vmsg_proxy::transport::pci::{Function, Irq, Region};
use vmsg_proxy::transport::{Options, SharedMemory};

pub const VIRTIO: Region = Region::Bar(4);
pub const MSIX: Region = Region::Bar(1);
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
pub const STATUS: u64 = 0x14;
pub const SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const VECTOR: u64 = 0x1a;
pub const ENABLE: u64 = 0x1c;

/// A function and the driver of it.
pub struct Driver(pub Function<Scripted>);

pub fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// How often it was rung since the last time.
pub fn rings(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

impl Driver {
    pub fn of(device: Scripted, shared: Vec<SharedMemory>) -> Driver {
        let options = Options {
            retry: Duration::ZERO,
            ..Options::default()
        };
        Driver(Function::new(device, options, shared))
    }

    pub fn net() -> Driver {
        Driver::of(Scripted::net(), Vec::new())
    }

    pub fn get(&mut self, region: Region, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.0.read(region, at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    pub fn set(&mut self, region: Region, at: u64, width: usize, value: u64) {
        self.0.write(region, at, &value.to_le_bytes()[..width]);
    }

    pub fn config(&mut self, at: u64, width: usize) -> u64 {
        self.get(Region::Config, at, width)
    }

    pub fn calls(&mut self) -> Vec<Call> {
        self.0.backend_mut().take_calls()
    }

    /// Offsets of the capabilities of this kind; of virtio by their types.
    pub fn capabilities(&mut self) -> BTreeMap<(u64, u64), Vec<u64>> {
        let mut found: BTreeMap<_, Vec<u64>> = BTreeMap::new();
        assert_eq!(self.config(6, 2) & 0x10, 0x10);
        let mut at = self.config(0x34, 1);
        while at != 0 {
            assert!((0x40..0x100).contains(&at) && at.is_multiple_of(4));
            let id = self.config(at, 1);
            let kind = if id == 9 { self.config(at + 3, 1) } else { 0 };
            found.entry((id, kind)).or_default().push(at);
            at = self.config(at + 1, 1);
        }
        found
    }

    pub fn msix_capability(&mut self) -> u64 {
        self.capabilities()[&(0x11, 0)][0]
    }

    /// As a driver of the specification does it, up to DRIVER_OK.
    pub fn bring_up(&mut self, queues: u64, vectors: bool) {
        self.set(VIRTIO, STATUS, 1, 0);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0);
        self.set(VIRTIO, STATUS, 1, 1);
        self.set(VIRTIO, STATUS, 1, 3);
        self.set(VIRTIO, 0x0, 4, 1);
        assert_eq!(self.get(VIRTIO, 0x4, 4) & 1, 1);
        self.set(VIRTIO, 0x8, 4, 1);
        self.set(VIRTIO, 0xc, 4, 0x101);
        self.set(VIRTIO, STATUS, 1, 0xb);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0xb);
        if vectors {
            self.set(VIRTIO, 0x10, 2, 0);
            assert_eq!(self.get(VIRTIO, 0x10, 2), 0);
        }
        for queue in 0..queues {
            self.set(VIRTIO, SELECT, 2, queue);
            self.set(VIRTIO, QUEUE_SIZE, 2, 32);
            if vectors {
                self.set(VIRTIO, VECTOR, 2, queue + 1);
                assert_eq!(self.get(VIRTIO, VECTOR, 2), queue + 1);
            }
            // One as halves, the others whole.
            self.set(VIRTIO, 0x20, 4, 0x1000);
            self.set(VIRTIO, 0x24, 4, queue);
            self.set(VIRTIO, 0x28, 8, 0x2000);
            self.set(VIRTIO, 0x30, 8, 0x3000);
            self.set(VIRTIO, ENABLE, 2, 1);
            assert_eq!(self.get(VIRTIO, ENABLE, 2), 1);
        }
        self.set(VIRTIO, STATUS, 1, 0xf);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0xf);
    }

    pub fn enable_msix(&mut self, on: bool) {
        let at = self.msix_capability();
        self.set(Region::Config, at + 2, 2, u64::from(on) << 15);
    }

    pub fn with_vectors(&mut self) -> Vec<Arc<OwnedFd>> {
        let events: Vec<_> = (0..self.0.vectors()).map(|_| event()).collect();
        self.enable_msix(true);
        for (vector, event) in (0..).zip(&events) {
            let trigger = Some(event.clone());
            self.0.set_trigger(Irq::Msix(vector), trigger).unwrap();
        }
        events
    }
}
