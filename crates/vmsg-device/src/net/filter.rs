// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which frames the driver wants (VIRTIO 1.3, 5.1.6.5.1 to 5.1.6.5.3).

use std::collections::HashSet;

use vmsg_net::Mac;

/// Bytes of a frame that tell whether it is wanted: addresses, type, VLAN tag.
pub(super) const LOOK: usize = 16;

/// Addresses of each kind that a driver may list; of more, all are let in.
pub(super) const TABLE_LIMIT: usize = 1024;

const VLANS: usize = 4096;
const TAGGED: [u8; 2] = [0x81, 0x00];
const BROADCAST: [u8; 6] = [0xff; 6];

/// The modes of class `VIRTIO_NET_CTRL_RX`, by the numbers of their commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// A table of addresses, as one of the two in `VIRTIO_NET_CTRL_MAC_TABLE_SET`.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) addresses: Vec<[u8; 6]>,
    /// The driver has more than are remembered.
    pub(super) overflow: bool,
}

/// What is let through to the driver.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// The driver has said something about addresses or modes. One that never does gets everything.
    told: bool,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    table: HashSet<[u8; 6]>,
    unicast_overflow: bool,
    multicast_overflow: bool,
    /// A bit for each VLAN; `None` without `VIRTIO_NET_F_CTRL_VLAN`.
    vlans: Option<Box<[u64; VLANS / 64]>>,
}

impl Filter {
    /// The filter of a driver that has said nothing yet.
    pub(super) fn new(vlans: bool) -> Self {
        Self {
            vlans: vlans.then(|| Box::new([0; VLANS / 64])),
            ..Self::default()
        }
    }

    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        self.told = true;
        *match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    pub(super) fn set_tables(&mut self, unicast: Table, multicast: Table) {
        self.told = true;
        self.unicast_overflow = unicast.overflow;
        self.multicast_overflow = multicast.overflow;
        self.table.clear();
        self.table.extend(unicast.addresses);
        self.table.extend(multicast.addresses);
    }

    /// Lets a VLAN in or keeps it out; false if there is no such VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, admitted: bool) -> bool {
        let Some(vlans) = &mut self.vlans else {
            return false;
        };
        let Some(word) = vlans.get_mut(usize::from(vlan / 64)) else {
            return false;
        };
        let bit = 1 << (vlan % 64);
        if admitted {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        true
    }

    /// Lets all VLANs in: which of them the driver has added is not known any more.
    pub(super) fn admit_all_vlans(&mut self) {
        if let Some(vlans) = &mut self.vlans {
            vlans.fill(u64::MAX);
        }
    }

    /// Whether nothing is kept out.
    pub(super) fn is_open(&self) -> bool {
        self.promiscuous || (!self.told && self.vlans.is_none())
    }

    /// Whether the driver, whose address is `own`, wants the frame that begins with `head`:
    /// [`LOOK`] bytes, or all of a shorter one.
    pub(super) fn wants(&self, own: Mac, head: &[u8]) -> bool {
        self.is_open() || (self.wants_vlan(head) && self.wants_address(own, head))
    }

    fn wants_address(&self, own: Mac, head: &[u8]) -> bool {
        let Some(to) = head.first_chunk::<6>() else {
            return false;
        };
        if !self.told {
            return true;
        }
        if *to == BROADCAST {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            !self.no_multicast
                && (self.all_multicast || self.multicast_overflow || self.table.contains(to))
        } else {
            !self.no_unicast
                && (*to == own.0
                    || self.all_unicast
                    || self.unicast_overflow
                    || self.table.contains(to))
        }
    }

    fn wants_vlan(&self, head: &[u8]) -> bool {
        let (Some(vlans), Some(&TAGGED)) = (
            &self.vlans,
            head.get(12..).and_then(|rest| rest.first_chunk()),
        ) else {
            return true;
        };
        let Some(tag) = head.get(14..16) else {
            return false;
        };
        let vlan = usize::from(u16::from_be_bytes([tag[0], tag[1]]) & 0xfff);
        vlans[vlan / 64] >> (vlan % 64) & 1 != 0
    }
}

#[cfg(test)]
#[path = "filter_test.rs"]
mod tests;
