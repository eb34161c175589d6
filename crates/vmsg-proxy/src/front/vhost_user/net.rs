// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is special about network devices.
//!
//! QEMU's vhost-user netdev keeps the configuration and the control queue to itself and passes on pairs of rings only. To its guest the link
//! is down while the chardev is not connected, and that is the only way to say so: it never looks at the device's own status.
//! Front ends that read the configuration (QEMU's generic vhost-user-test-device) get the device whole, and hear of changes as for any
//! other type.

use super::guest::{Guest, GuestError, op};
use super::wire::protocol;
use crate::session::{Op, Outcome};
use std::time::{Duration, Instant};
use virtio_msg::FeatureSet;

/// Virtio id of network devices.
const ID: u32 = 1;

/// VIRTIO_NET_F_MTU.
pub(crate) const F_MTU: u32 = 3;
/// VIRTIO_NET_F_STATUS.
pub(super) const F_STATUS: u32 = 16;
/// VIRTIO_NET_F_MQ.
pub(crate) const F_MQ: u32 = 22;

/// Features that are of use only to whoever reaches the control queue: CTRL_GUEST_OFFLOADS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA,
/// GUEST_ANNOUNCE, CTRL_MAC_ADDR, HASH_REPORT, RSS (virtio 1.3 §5.1.3).
const OF_CONTROL_QUEUE: [u32; 9] = [2, 17, 18, 19, 20, 21, 23, 57, 60];

/// Where `status` and `mtu` are in the configuration, two bytes each (virtio 1.3 §5.1.4).
const STATUS_AT: u32 = 6;
const MTU_AT: u32 = 10;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// How long a front end must have said nothing before it is told of a link that is down. One that is in the middle of a start would take
/// the end of the connection for a failure.
const QUIET: Duration = Duration::from_millis(300);
/// The same while features are set and the device does not run yet: there is more to come.
const QUIET_AT_START: Duration = Duration::from_secs(2);

impl Guest {
    /// When to look whether the link is down, if the front end says nothing until then.
    ///
    /// Not before its guest's driver has chosen features: QEMU 7.2 goes on, once connected again, with those of the time when the
    /// connection ended, and a driver that started meanwhile would have a device that knows none of its features.
    pub(super) fn looks_at_link_at(&self) -> Option<Instant> {
        let quiet = if self.is_live() {
            QUIET
        } else {
            QUIET_AT_START
        };
        (self.look_at_link && self.is_negotiated()).then(|| self.last_request + quiet)
    }

    pub(super) fn is_net(&self) -> bool {
        self.facts.info.device_id == ID
    }

    /// Whether the front end sees nothing but pairs of rings.
    pub(super) fn is_pairs(&self) -> bool {
        self.is_net() && self.protocol & protocol::CONFIG == 0
    }

    /// Whether several pairs can be used: how many is told over the control queue, which the front end does not pass on. Our own hosts
    /// take the pairs that are set up for those in use.
    fn has_pairs(&self) -> bool {
        self.facts.offered.bit(F_MQ) && self.facts.is_ours()
    }

    /// Rings that the front end may use.
    pub(super) fn ring_count(&self) -> usize {
        match self.rings.len() {
            all if !self.is_pairs() => all,
            all if self.has_pairs() => all & !1,
            all => all.min(2),
        }
    }

    /// What GET_QUEUE_NUM answers.
    pub(super) fn queue_num(&self) -> u64 {
        let per_unit = if self.is_pairs() { 2 } else { 1 };
        self.ring_count() as u64 / per_unit
    }

    /// Takes out what does not work behind such a front end.
    pub(super) fn mask(&self, offered: &mut FeatureSet) {
        if !self.is_pairs() {
            return;
        }
        for bit in OF_CONTROL_QUEUE {
            offered.remove(bit);
        }
        if !self.has_pairs() {
            offered.remove(F_MQ);
        }
    }

    /// Two bytes of the configuration; `None` if the device does not have them.
    fn config_u16(&self, offset: u32) -> Result<Option<u16>, GuestError> {
        if offset + 2 > self.facts.info.config_size {
            return Ok(None);
        }
        let read = Op::ReadConfig { offset, len: 2 };
        match self
            .session
            .call(read)
            .map_err(op("reading the configuration"))?
        {
            Outcome::Config(data) => Ok(data.first_chunk().copied().map(u16::from_le_bytes)),
            _ => Ok(None),
        }
    }

    /// Whether the guest has to be told that the link is down by ending the connection.
    pub(super) fn link_is_down(&self) -> Result<bool, GuestError> {
        if !self.is_pairs() || !self.facts.offered.bit(F_STATUS) {
            return Ok(false);
        }
        let status = self.config_u16(STATUS_AT)?;
        Ok(status.is_some_and(|status| status & LINK_UP == 0))
    }

    pub(super) fn has_mtu(&self) -> bool {
        self.is_net() && self.facts.offered.bit(F_MTU)
    }

    /// NET_SET_MTU: what the front end has told its guest must not be more than the device takes.
    pub(super) fn check_mtu(&self, mtu: u64) -> Result<(), GuestError> {
        let most = if self.has_mtu() {
            self.config_u16(MTU_AT)?
        } else {
            None
        };
        match most {
            Some(most) if mtu > most.into() => Err(GuestError::Invalid(
                "a larger MTU than the device has (host_mtu= of QEMU's device)",
            )),
            _ => Ok(()),
        }
    }
}
