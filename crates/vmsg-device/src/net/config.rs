// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a network device (VIRTIO 1.3, 5.1.4).

use vmsg_net::Mac;

use super::Settings;
use super::hash;
use super::steering::Indirection;

const STATUS: usize = 6;
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
const SIZE: usize = 24;

/// The bytes: mac 6, status u16, max_virtqueue_pairs u16, mtu u16, speed u32, duplex u8,
/// rss_max_key_size u8, rss_max_indirection_table_length u16, supported_hash_types u32.
#[derive(Debug)]
pub(super) struct NetConfig {
    bytes: [u8; SIZE],
    /// The address before any driver has set another.
    original: Mac,
}

impl NetConfig {
    /// The space of a device with `pairs` queue pairs whose link is down.
    pub(super) fn new(settings: &Settings, pairs: u16) -> Self {
        let mut bytes = [0; SIZE];
        bytes[..6].copy_from_slice(&settings.mac.0);
        bytes[8..10].copy_from_slice(&pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&settings.mtu.unwrap_or(0).to_le_bytes());
        let (speed, duplex) = match settings.speed {
            Some(speed) => (speed, u8::from(!settings.half_duplex)),
            None => (u32::MAX, u8::MAX),
        };
        bytes[12..16].copy_from_slice(&speed.to_le_bytes());
        bytes[16] = duplex;
        bytes[17] = u8::try_from(hash::KEY_LEN).expect("forty");
        bytes[18..20].copy_from_slice(&Indirection::LONGEST.to_le_bytes());
        bytes[20..24].copy_from_slice(&hash::SUPPORTED.to_le_bytes());
        Self {
            bytes,
            original: settings.mac,
        }
    }

    pub(super) fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    pub(super) fn mac(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = self.bytes;
        Mac([a, b, c, d, e, f])
    }

    /// Forgets what a driver has set; the link stays as it is.
    pub(super) fn reset(&mut self) {
        self.set_mac(self.original);
        self.set_status(ANNOUNCE, false);
    }

    pub(super) fn set_mac(&mut self, mac: Mac) {
        self.bytes[..6].copy_from_slice(&mac.0);
    }

    pub(super) fn link_is_up(&self) -> bool {
        self.status() & LINK_UP != 0
    }

    /// Sets the link status; returns what changed, if anything.
    pub(super) fn set_link(&mut self, up: bool) -> Option<(usize, [u8; 2])> {
        self.set_status(LINK_UP, up)
    }

    /// Sets or clears the request to announce; returns what changed, if anything.
    pub(super) fn set_announce(&mut self, wanted: bool) -> Option<(usize, [u8; 2])> {
        self.set_status(ANNOUNCE, wanted)
    }

    fn status(&self) -> u16 {
        u16::from_le_bytes([self.bytes[STATUS], self.bytes[STATUS + 1]])
    }

    fn set_status(&mut self, bit: u16, on: bool) -> Option<(usize, [u8; 2])> {
        let before = self.status();
        let status = if on { before | bit } else { before & !bit };
        self.bytes[STATUS..STATUS + 2].copy_from_slice(&status.to_le_bytes());
        (status != before).then(|| (STATUS, status.to_le_bytes()))
    }
}
