// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network device (VIRTIO 1.3, 5.1).
//!
//! It has up to [`MAX_PAIRS`] pairs of queues and a control queue behind them.
//! Frames go between the driver's buffers and a [`Backend`] without a copy of
//! the device's own; it chooses the queue for each frame (automatic steering,
//! or the driver's table for receive-side scaling), reports hashes, and keeps
//! out what the driver's filters do not let in.

pub mod bits;
mod config;
mod control;
mod counters;
mod filter;
mod flow;
mod hash;
mod lanes;
#[cfg(test)]
mod packets;
mod receive;
mod session;
mod sink;
mod steering;
mod transmit;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_net::{Backend, Closed, Guest, RxSink};
use vmsg_queue::ChainStorage;

use self::config::NetConfig;
use self::counters::Counters;
use self::session::Session;
use crate::device::{
    Device, DeviceError, Identity, Io, Monitor, Operation, Progress, QUEUE_SIZE, VENDOR_ID,
    transport_features,
};

pub use vmsg_net::Mac;

/// Device id of a network device.
pub const DEVICE_ID: u32 = 1;

/// Queue pairs that a device may have: with its control queue it fits what QEMU gives a device.
pub const MAX_PAIRS: u16 = 256;

/// How a network device looks to its driver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its MAC address.
    pub mac: Mac,
    /// The largest IP packet the driver is told to send, in bytes; `None`: not told.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MAX_PAIRS`]; no more than the back end has use for.
    pub queue_pairs: u16,
    /// Whether the cable is in at first.
    pub link_up: bool,
    /// What the driver is told about the line, in Mbit/s; `None`: nothing.
    pub speed: Option<u32>,
    /// With `speed`: the line carries one direction at a time.
    pub half_duplex: bool,
    /// Offer receive-side scaling, if there are several pairs.
    pub rss: bool,
    /// Offer to report the hash of each frame.
    pub hash_report: bool,
}

impl Settings {
    /// A device with one pair of queues and all that it can do.
    pub const fn new(mac: Mac) -> Self {
        Self {
            mac,
            mtu: None,
            queue_pairs: 1,
            link_up: true,
            speed: None,
            half_duplex: false,
            rss: true,
            hash_report: true,
        }
    }
}

/// Which queue of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Receive,
    Transmit,
}

/// The queue of a pair that goes to the driver, and the one that comes from it.
const fn receive_queue(pair: usize) -> usize {
    2 * pair
}

const fn transmit_queue(pair: usize) -> usize {
    2 * pair + 1
}

/// A network device and the back end it plugs into.
pub struct Net {
    settings: Settings,
    config: NetConfig,
    backend: Box<dyn Backend>,
    /// Pairs of queues that there are.
    pairs: u16,
    /// The operator has the cable in.
    link_wanted: bool,
    counters: Arc<Counters>,
    session: Session,
    /// Room for the buffers of pairs beyond the first, which has the worker's.
    storages: Vec<ChainStorage>,
    scratch: sink::Scratch,
    /// Room for the lengths of a batch.
    spare: Vec<u32>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.config.mac())
            .field("session", &self.session)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// A device that sends and receives through `backend`.
    pub fn new(settings: &Settings, backend: Box<dyn Backend>) -> Self {
        let pairs = settings
            .queue_pairs
            .min(backend.queue_pairs())
            .clamp(1, MAX_PAIRS);
        let mut device = Self {
            settings: settings.clone(),
            config: NetConfig::new(settings, pairs),
            pairs,
            link_wanted: settings.link_up,
            counters: Arc::new(Counters::new(pairs)),
            session: Session::none(),
            storages: Vec::new(),
            scratch: sink::Scratch::default(),
            spare: Vec::new(),
            backend,
        };
        device.update_link();
        device
    }

    /// Brings the link status up to date; returns what changed in the configuration.
    fn update_link(&mut self) -> Option<(usize, [u8; 2])> {
        let carrier = self.backend.link_is_up();
        self.counters
            .link
            .store(self.link_wanted, Ordering::Relaxed);
        self.counters.carrier.store(carrier, Ordering::Relaxed);
        self.config.set_link(self.link_wanted && carrier)
    }

    /// Tells the driver if the link has gone up or down.
    fn look_at_link(&mut self, io: &mut Io<'_>) {
        if let Some((offset, status)) = self.update_link() {
            self.counters.device.link_changes.add(1);
            io.config_changed(offset, &status);
        }
    }

    /// Asks the driver to announce itself, if it can.
    fn announce(&mut self, io: &mut Io<'_>) -> Result<(), String> {
        let session = &self.session;
        if !session.has(bits::GUEST_ANNOUNCE) || session.control.is_none() {
            return Err("no driver is there that announces itself when asked to".to_owned());
        }
        self.counters.device.announcements.add(1);
        if let Some((offset, status)) = self.config.set_announce(true) {
            io.config_changed(offset, &status);
        }
        Ok(())
    }

    /// Tells the back end what the driver wants, and makes room for its pairs.
    fn apply_session(&mut self) {
        self.backend.set_guest(&self.session.guest());
        let more = self.session.receiving_pairs() - 1;
        self.storages.resize_with(more, || {
            ChainStorage::with_capacity(usize::from(QUEUE_SIZE))
        });
    }

    /// Which queue of which pair has this index.
    fn queue_at(&self, queue: usize) -> Option<(usize, Direction)> {
        let pair = queue / 2;
        let direction = if queue.is_multiple_of(2) {
            Direction::Receive
        } else {
            Direction::Transmit
        };
        (pair < self.session.most_pairs()).then_some((pair, direction))
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
            bits::CTRL_VLAN,
            bits::CTRL_RX_EXTRA,
            bits::CTRL_MAC_ADDR,
            bits::GUEST_ANNOUNCE,
        ]));
        let can = self.backend.offloads();
        let several = self.pairs > 1;
        for (offered, bit) in [
            (self.settings.mtu.is_some(), bits::MTU),
            (self.settings.speed.is_some(), bits::SPEED_DUPLEX),
            (several, bits::MQ),
            (several && self.settings.rss, bits::RSS),
            (self.settings.hash_report, bits::HASH_REPORT),
            (can.csum, bits::CSUM),
            (can.csum && can.tso4, bits::HOST_TSO4),
            (can.csum && can.tso6, bits::HOST_TSO6),
            (can.csum && can.ecn, bits::HOST_ECN),
            (can.csum && can.ufo, bits::HOST_UFO),
            (can.csum && can.uso, bits::HOST_USO),
            (can.guest_csum, bits::GUEST_CSUM),
            (can.guest_csum, bits::CTRL_GUEST_OFFLOADS),
            (can.guest_csum && can.guest_tso4, bits::GUEST_TSO4),
            (can.guest_csum && can.guest_tso6, bits::GUEST_TSO6),
            (can.guest_csum && can.guest_ecn, bits::GUEST_ECN),
            (can.guest_csum && can.guest_ufo, bits::GUEST_UFO),
            (can.guest_csum && can.guest_uso4, bits::GUEST_USO4),
            (can.guest_csum && can.guest_uso6, bits::GUEST_USO6),
        ] {
            if offered {
                features.insert(bit);
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * usize::from(self.pairs) + 1]
    }

    fn config(&self) -> Vec<u8> {
        self.config.bytes().to_vec()
    }

    fn check_features(&self, features: &FeatureSet) -> Result<(), String> {
        bits::check(features)
    }

    fn activate(&mut self, features: &FeatureSet) {
        let offloads = self.backend.offloads();
        let mtu = self.settings.mtu.unwrap_or(offloads.mtu);
        self.session = Session::new(features, self.pairs, mtu.min(offloads.mtu));
        self.apply_session();
    }

    fn reset(&mut self) {
        let Self {
            settings: _,
            config,
            backend,
            pairs: _,
            link_wanted: _,
            counters: _,
            session,
            storages,
            scratch: _,
            spare: _,
        } = self;
        config.reset();
        backend.set_guest(&Guest::NONE);
        *session = Session::none();
        storages.clear();
    }

    fn queues_changed(&mut self, io: &mut Io<'_>, resumed: bool) {
        if self.session.pairs_as_set_up {
            let pairs = io
                .queues
                .chunks_exact(2)
                .take(self.session.most_pairs())
                .take_while(|pair| pair.iter().all(Option::is_some))
                .count();
            let pairs = u16::try_from(pairs.max(1)).expect("at most MAX_PAIRS");
            if pairs != self.session.pairs() {
                self.session.set_pairs(pairs);
                self.apply_session();
            }
        }
        if resumed {
            // What the driver has said over the control queue went with the process that heard it.
            // Without addresses and modes everything is let in, and the first pair is always used.
            self.session.filter.admit_all_vlans();
            // The network may have learnt another way to the guest while nobody was here. A driver
            // that cannot announce itself will be found by its next frame.
            let _ = self.announce(io);
        }
    }

    fn operate(&mut self, operation: Operation, io: &mut Io<'_>) -> Result<(), String> {
        match operation {
            Operation::SetLink(up) => {
                self.link_wanted = up;
                self.look_at_link(io);
                // Frames wait in the back end, or in the driver's queue.
                for queue in 0..io.queues.len() {
                    io.again(queue);
                }
                Ok(())
            }
            Operation::Announce => self.announce(io),
            Operation::Rescan => Err("the device has no disk".to_owned()),
        }
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        Some(Arc::<Counters>::clone(&self.counters))
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        if self.session.control == Some(queue) {
            return self.control(queue, io);
        }
        match self.queue_at(queue) {
            Some((_, Direction::Receive)) => {
                // Buffers that wait are no work: `receive` asks for a kick when there are too few.
                self.receive(io)?;
                Ok(Progress::Blocked)
            }
            Some((pair, Direction::Transmit)) => {
                let progress = self.transmit(pair, budget, io)?;
                // What was sent is often answered at once: an ARP request, a DHCP offer.
                self.receive(io)?;
                Ok(progress)
            }
            // A queue that does not exist with these features.
            None => Ok(Progress::Blocked),
        }
    }

    fn placed(&mut self, key: u64) {
        self.backend.set_key(key);
    }

    fn removed(&mut self) {
        self.backend.shutdown();
    }

    fn accept(
        &mut self,
        io: &mut Io<'_>,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<Result<(), Closed>, DeviceError> {
        self.take_in(io, fill)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.event_fd()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.backend.next_timeout()
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.backend.poll(io.now);
        self.look_at_link(io);
        for (pair, blocked) in self.session.blocked.iter().enumerate() {
            if *blocked {
                io.again(transmit_queue(pair));
            }
        }
        self.receive(io)
    }
}

#[cfg(test)]
mod tests;
