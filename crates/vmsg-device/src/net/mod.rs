// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network device (VIRTIO 1.3, 5.1).

mod config;
mod control;
mod receive;
mod transmit;

use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_net::{Backend, Guest, Offloads};

use self::config::NetConfig;
use crate::device::{
    Device, DeviceError, Identity, Io, Progress, QUEUE_SIZE, VENDOR_ID, transport_features,
};

pub use self::config::Mac;

/// Device id of a network device.
pub const DEVICE_ID: u32 = 1;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;

/// Bytes of `struct virtio_net_hdr_v1`, which stands before every frame.
const HEADER: usize = 12;

/// Feature bits of the network device (VIRTIO 1.3, 5.1.3).
pub mod bits {
    /// The device handles frames with a partial checksum.
    pub const CSUM: u32 = 0;
    /// The driver handles frames with a partial checksum.
    pub const GUEST_CSUM: u32 = 1;
    /// The configuration holds the largest frame.
    pub const MTU: u32 = 3;
    /// The configuration holds a MAC address.
    pub const MAC: u32 = 5;
    /// The driver takes large TCP segments over IPv4.
    pub const GUEST_TSO4: u32 = 7;
    /// The driver takes large TCP segments over IPv6.
    pub const GUEST_TSO6: u32 = 8;
    /// The device takes large TCP segments over IPv4.
    pub const HOST_TSO4: u32 = 11;
    /// The device takes large TCP segments over IPv6.
    pub const HOST_TSO6: u32 = 12;
    /// A frame may fill several receive buffers.
    pub const MRG_RXBUF: u32 = 15;
    /// The configuration holds the link status.
    pub const STATUS: u32 = 16;
    /// There is a control queue.
    pub const CTRL_VQ: u32 = 17;
    /// The control queue sets receive modes.
    pub const CTRL_RX: u32 = 18;
    /// The control queue sets the MAC address.
    pub const CTRL_MAC_ADDR: u32 = 23;
}

/// How a network device looks to its driver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its MAC address.
    pub mac: Mac,
    /// The largest IP packet the driver is told to send, in bytes; `None`: not told.
    pub mtu: Option<u16>,
}

/// What went through a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames taken from the driver.
    pub tx_frames: u64,
    /// Chains from the driver too short for a header and a frame.
    pub tx_malformed: u64,
    /// Frames given to the driver.
    pub rx_frames: u64,
    /// Frames that no buffer of the driver can hold.
    pub rx_too_big: u64,
}

/// A network device and the back end it plugs into.
pub struct Net {
    config: NetConfig,
    backend: Box<dyn Backend>,
    mergeable: bool,
    /// The back end refused a frame; transmission goes on after it was polled.
    blocked: bool,
    counters: Counters,
    scratch: receive::Scratch,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Net({}, {:?})", self.config.mac(), self.counters)
    }
}

impl Net {
    /// A device that sends and receives through `backend`.
    pub fn new(settings: &Settings, backend: Box<dyn Backend>) -> Self {
        Self {
            config: NetConfig::new(settings),
            backend,
            mergeable: false,
            blocked: false,
            counters: Counters::default(),
            scratch: receive::Scratch::default(),
        }
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Takes the cable out or puts it in; the driver is told.
    pub fn set_link(&mut self, up: bool, io: &mut Io<'_>) {
        if let Some((offset, bytes)) = self.config.set_link(up) {
            io.config_changed(offset, &bytes);
        }
    }
}

impl Device for Net {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        let mut features = transport_features().union(&FeatureSet::from_bits(&[
            bits::MAC,
            bits::STATUS,
            bits::MRG_RXBUF,
            bits::CTRL_VQ,
            bits::CTRL_RX,
            bits::CTRL_MAC_ADDR,
        ]));
        if self.config.has_mtu() {
            features.insert(bits::MTU);
        }
        let can = self.backend.offloads();
        for (offered, bit) in [
            (can.csum, bits::CSUM),
            (can.tso4, bits::HOST_TSO4),
            (can.tso6, bits::HOST_TSO6),
            (can.guest_csum, bits::GUEST_CSUM),
            (can.guest_tso4, bits::GUEST_TSO4),
            (can.guest_tso6, bits::GUEST_TSO6),
        ] {
            if offered {
                features.insert(bit);
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn config(&self) -> Vec<u8> {
        self.config.bytes().to_vec()
    }

    fn activate(&mut self, features: &FeatureSet) {
        self.mergeable = features.contains(bits::MRG_RXBUF);
        let offloads = Offloads {
            csum: features.contains(bits::CSUM),
            tso4: features.contains(bits::HOST_TSO4),
            tso6: features.contains(bits::HOST_TSO6),
            guest_csum: features.contains(bits::GUEST_CSUM),
            guest_tso4: features.contains(bits::GUEST_TSO4),
            guest_tso6: features.contains(bits::GUEST_TSO6),
            mtu: self.backend.offloads().mtu,
            ..Offloads::NONE
        };
        self.backend.set_guest(&Guest {
            offloads,
            running: true,
            ..Guest::NONE
        });
    }

    fn reset(&mut self) {
        let Self {
            config,
            backend,
            mergeable,
            blocked,
            counters: _,
            scratch: _,
        } = self;
        config.reset();
        backend.set_guest(&Guest::NONE);
        *mergeable = false;
        *blocked = false;
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        match queue {
            RECEIVE => {
                // Buffers that wait are no work: `receive` asks for a kick when there are too few.
                self.receive(io)?;
                Ok(Progress::Blocked)
            }
            TRANSMIT => {
                let progress = self.transmit(budget, io)?;
                // What was sent is often answered at once: an ARP request, a DHCP offer.
                self.receive(io)?;
                Ok(progress)
            }
            CONTROL => control::process(CONTROL, &mut self.config, io),
            _ => Ok(Progress::Idle),
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.event_fd()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.backend.next_timeout()
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.backend.poll(io.now);
        if self.blocked {
            io.again(TRANSMIT);
        }
        self.receive(io)
    }
}
