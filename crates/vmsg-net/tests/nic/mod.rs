// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network device of a guest made of smoltcp's stack: two lines of frames.
#![allow(unreachable_pub, reason = "part of test programs")]

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant as GuestInstant;

/// The guest's network device.
pub struct Nic {
    pub rx: VecDeque<Vec<u8>>,
    pub tx: VecDeque<Vec<u8>>,
    verify: bool,
    mtu: usize,
}

impl Nic {
    /// Takes IP packets of `mtu` bytes; whether it looks at the checksums of what it gets is `verify`.
    pub fn new(mtu: usize, verify: bool) -> Nic {
        Nic {
            rx: VecDeque::new(),
            tx: VecDeque::new(),
            verify,
            mtu,
        }
    }
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: GuestInstant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Rx(frame), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: GuestInstant) -> Option<Tx<'_>> {
        (self.tx.len() < 64).then_some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 14 + self.mtu;
        if !self.verify {
            capabilities.checksum.tcp = Checksum::Tx;
            capabilities.checksum.udp = Checksum::Tx;
        }
        capabilities
    }
}
