// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one driver has negotiated and asked for; gone when it resets the device.

use virtio_msg::FeatureSet;
use vmsg_net::{Guest, Offloads};

use super::bits;
use super::filter::Filter;
use super::hash::Hasher;
use super::steering::Steering;

/// The offloads that `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` switches, by their features.
pub(super) const GUEST_OFFLOADS: [u32; 7] = [
    bits::GUEST_CSUM,
    bits::GUEST_TSO4,
    bits::GUEST_TSO6,
    bits::GUEST_ECN,
    bits::GUEST_UFO,
    bits::GUEST_USO4,
    bits::GUEST_USO6,
];

/// Bytes of `struct virtio_net_hdr_v1`, and of `struct virtio_net_hdr_v1_hash`.
pub(super) const HEADER: usize = 12;
pub(super) const HASH_HEADER: usize = 20;

/// An Ethernet header with a VLAN tag, which the MTU does not include.
const ETHERNET: usize = 18;

/// A driver's session.
#[derive(Debug)]
pub(super) struct Session {
    features: u64,
    /// There is a driver.
    running: bool,
    /// Bytes before each frame.
    pub(super) header: usize,
    pub(super) mergeable: bool,
    /// The longest frame that is not segmented, if the driver knows the MTU.
    pub(super) longest: usize,
    /// Where the control queue is.
    pub(super) control: Option<usize>,
    /// Queue pairs that the driver uses.
    pairs: u16,
    /// Without a control queue the pairs that are set up are those that are used.
    pub(super) pairs_as_set_up: bool,
    /// Bits of [`GUEST_OFFLOADS`] that are on.
    pub(super) guest_offloads: u64,
    mtu: u16,
    steering: Steering,
    pub(super) hasher: Option<Hasher>,
    pub(super) filter: Filter,
    /// For each pair: the back end refused a frame, transmission goes on after it was polled.
    pub(super) blocked: Vec<bool>,
    /// There has been a receive queue: what comes while there is none is lost.
    pub(super) has_received: bool,
}

impl Session {
    /// Nobody is there.
    pub(super) fn none() -> Self {
        Self {
            features: 0,
            running: false,
            header: HEADER,
            mergeable: false,
            longest: usize::MAX,
            control: None,
            pairs: 1,
            pairs_as_set_up: false,
            guest_offloads: 0,
            mtu: Offloads::NONE.mtu,
            steering: Steering::default(),
            hasher: None,
            filter: Filter::default(),
            blocked: Vec::new(),
            has_received: false,
        }
    }

    /// A driver that has negotiated `features`, of a device with `pairs` queue pairs; packets may
    /// have up to `mtu` bytes.
    pub(super) fn new(features: &FeatureSet, pairs: u16, mtu: u16) -> Self {
        let has = |bit| features.contains(bit);
        let several = has(bits::MQ) || has(bits::RSS);
        let control = has(bits::CTRL_VQ);
        let guest_offloads = GUEST_OFFLOADS
            .into_iter()
            .filter(|bit| has(*bit))
            .fold(0, |all, bit| all | 1 << bit);
        Self {
            features: features.low_u64(),
            running: true,
            header: if has(bits::HASH_REPORT) {
                HASH_HEADER
            } else {
                HEADER
            },
            mergeable: has(bits::MRG_RXBUF),
            longest: if has(bits::MTU) {
                usize::from(mtu) + ETHERNET
            } else {
                usize::MAX
            },
            control: control.then(|| 2 * usize::from(if several { pairs } else { 1 })),
            pairs_as_set_up: several && !control,
            guest_offloads,
            mtu,
            filter: Filter::new(has(bits::CTRL_VLAN)),
            blocked: vec![false; usize::from(if several { pairs } else { 1 })],
            ..Self::none()
        }
    }

    /// Whether a feature below 64 was negotiated.
    pub(super) fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Queue pairs that the driver uses.
    pub(super) fn pairs(&self) -> u16 {
        self.pairs
    }

    pub(super) fn set_pairs(&mut self, pairs: u16) {
        self.pairs = pairs.max(1);
    }

    /// Queue pairs that the driver may set up.
    pub(super) fn most_pairs(&self) -> usize {
        self.blocked.len()
    }

    /// Queue pairs to which frames may go.
    pub(super) fn receiving_pairs(&self) -> usize {
        let highest = match &self.steering {
            Steering::Automatic(_) => 0,
            Steering::Rss(indirection) => usize::from(indirection.highest()) + 1,
        };
        usize::from(self.pairs).max(highest).min(self.most_pairs())
    }

    pub(super) fn steering(&self) -> &Steering {
        &self.steering
    }

    pub(super) fn steering_mut(&mut self) -> &mut Steering {
        &mut self.steering
    }

    /// Chooses pairs in another way from now on; what is known of flows stays if it is the same way.
    pub(super) fn steer(&mut self, steering: Steering) {
        if !matches!(
            (&self.steering, &steering),
            (Steering::Automatic(_), Steering::Automatic(_))
        ) {
            self.steering = steering;
        }
    }

    /// What the back end goes by.
    pub(super) fn guest(&self) -> Guest {
        let on = |bit: u32| self.guest_offloads >> bit & 1 != 0;
        let csum = self.has(bits::CSUM);
        let guest_csum = on(bits::GUEST_CSUM);
        let rss = matches!(self.steering, Steering::Rss(_));
        Guest {
            offloads: Offloads {
                csum,
                tso4: csum && self.has(bits::HOST_TSO4),
                tso6: csum && self.has(bits::HOST_TSO6),
                ecn: csum && self.has(bits::HOST_ECN),
                ufo: csum && self.has(bits::HOST_UFO),
                uso: csum && self.has(bits::HOST_USO),
                guest_csum,
                guest_tso4: guest_csum && on(bits::GUEST_TSO4),
                guest_tso6: guest_csum && on(bits::GUEST_TSO6),
                guest_ecn: guest_csum && on(bits::GUEST_ECN),
                guest_ufo: guest_csum && on(bits::GUEST_UFO),
                guest_uso4: guest_csum && on(bits::GUEST_USO4),
                guest_uso6: guest_csum && on(bits::GUEST_USO6),
                mtu: self.mtu,
            },
            pairs: self.pairs,
            running: self.running,
            heads: rss || (self.has(bits::HASH_REPORT) && self.hasher.is_some()),
        }
    }
}
