// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network driver that a guest's TCP uses.

use std::time::Duration;

use virtio_msg::FeatureSet;
use vmsg_bus::DriverBus;
use vmsg_device::net::bits;
use vmsg_driver::Sleep;
use vmsg_driver::net::{HEADER_LEN, NetDriver, NetOptions};

use crate::PATIENCE;
use crate::guest_tcp::{Frame, HEADERS, Wire};

/// Features for large segments both ways.
pub(crate) const LARGE: [u32; 4] = [
    bits::CSUM,
    bits::HOST_TSO4,
    bits::GUEST_CSUM,
    bits::GUEST_TSO4,
];

/// How the driver of these benchmarks is set up.
pub(crate) fn options() -> NetOptions {
    let defaults = NetOptions::default();
    NetOptions {
        buffer_len: 64 << 10,
        // What Linux uses with MRG_RXBUF when frames are large.
        rx_buffer_len: Some(4096),
        features: defaults.features.union(&FeatureSet::from_bits(&LARGE)),
        ..defaults
    }
}

/// The guest's TCP on a network driver. As in a guest's kernel, payload is copied once: into the
/// driver's buffers, or out of them.
pub(crate) struct Driver<'p> {
    pub(crate) net: NetDriver<'p, DriverBus, Sleep, Vec<u8>>,
    pub(crate) outgoing: Vec<Vec<u8>>,
    pub(crate) incoming: Vec<u8>,
}

impl Wire for Driver<'_> {
    fn send(&mut self, frames: &[Frame]) {
        for (frame, bytes) in frames.iter().zip(&mut self.outgoing) {
            bytes[..frame.head().len()].copy_from_slice(frame.head());
        }
        let mut sent = 0;
        while sent < frames.len() {
            let rest = frames.iter().zip(&self.outgoing).skip(sent);
            let rest = rest.map(|(frame, bytes)| {
                let mut header = [0; HEADER_LEN];
                let vnet = frame.vnet.to_bytes();
                header[..vnet.len()].copy_from_slice(&vnet);
                (header, &bytes[..frame.head().len() + frame.payload])
            });
            let count = self.net.transmit_with(rest).expect("sent");
            sent += count;
            if count == 0 {
                self.net.wait_sent(PATIENCE).expect("a live device");
            }
        }
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS])) {
        let incoming = &mut self.incoming;
        let count = self.net.receive(64, |frame| {
            if let Some(head) = frame.copy_to(incoming).first_chunk() {
                each(head);
            }
        });
        if count.expect("a sound queue") == 0 {
            let timeout = Duration::from_millis(5);
            self.net.wait(timeout).expect("a live device");
        }
    }
}
