// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One front end being served: its requests, turned into operations of the session.
//!
//! vhost-user has no device status; it is made up here. Features negotiated: ACKNOWLEDGE, DRIVER, FEATURES_OK. The first rings that have all
//! they need: their SET_VQUEUE, then DRIVER_OK. Rings that come later are set up on the live device. GET_VRING_BASE stops a ring,
//! and the last one that stops resets the device, so that the next driver of the guest negotiates anew.

use super::copies::Copies;
use super::memory::{GuestMemory, MemoryError};
use super::ring::Ring;
use super::socket::{ConnectionError, Incoming};
use super::wire::{F_PROTOCOL_FEATURES, Request, protocol};
use super::write_cache::WriteCache;
use crate::link::SessionHandle;
use crate::log_limit::LogLimit;
use crate::session::{DeviceFacts, Op, OpError, Outcome, QueueSetup, ResumeAt};
use crate::shadow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex, feature};

const ACCEPTED: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK);
const LIVE: DeviceStatus = ACCEPTED.union(DeviceStatus::DRIVER_OK);

/// Of the bits that are not the device type's (virtio 1.3 §6), those that hold for a guest behind this front. The others are between driver
/// and device over messages, or need what vhost-user or our queues do not have: ACCESS_PLATFORM, RING_PACKED, NOTIFICATION_DATA, RING_RESET…
const PASSED: [u32; 7] = [
    24, // NOTIFY_ON_EMPTY
    27, // ANY_LAYOUT
    feature::RING_INDIRECT_DESC,
    feature::RING_EVENT_IDX,
    feature::VERSION_1,
    feature::IN_ORDER,
    feature::ORDER_PLATFORM,
];

/// Types whose configuration VMMs keep themselves, with warnings about back ends that offer theirs: network, SCSI, file system.
const KEPT_BY_VMM: [u32; 3] = [1, 8, 26];

/// Bits of all device types.
const RESERVED: std::ops::Range<u32> = 24..50;

/// Why a request was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The device side did not do its part.
    #[error("{what}: {error}")]
    Op {
        /// What was to be done.
        what: &'static str,
        /// What came of it.
        error: OpError,
    },
    /// The memory table cannot be used.
    #[error("memory table: {0}")]
    Memory(#[from] MemoryError),
    /// There is no memory for copies.
    #[error("there is no memory for copies: {0}")]
    Copies(#[from] shadow::NewError),
    /// A ring cannot be copied.
    #[error("a ring cannot be copied: {0}")]
    Ring(#[from] shadow::StartError),
    /// The front end asks for something that cannot be.
    #[error("{0}")]
    Invalid(&'static str),
    /// An address of a ring is in no region.
    #[error("ring {0} lies outside of the memory table")]
    OutOfMemoryTable(u32),
    /// The driver did not accept what the device insists on.
    #[error("the device did not take the features {0}")]
    FeaturesRefused(FeatureSet),
    /// The connection broke while it was answered.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// What a request comes to.
pub(super) enum Reply {
    /// Nothing to say but an acknowledgement, if one is wanted.
    Done,
    /// A number.
    Number(u64),
    /// Other bytes.
    Bytes(Vec<u8>),
    /// Bytes and a descriptor.
    Memory(Vec<u8>, Arc<OwnedFd>),
}

pub(super) fn op<'a>(what: &'static str) -> impl Fn(OpError) -> GuestError + 'a {
    move |error| GuestError::Op { what, error }
}

/// A front end being served.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) session: SessionHandle,
    pub(super) facts: DeviceFacts,
    /// Whether GET_CONFIG and SET_CONFIG are offered.
    pub(super) config: bool,
    pub(super) protocol: u64,
    /// What SET_FEATURES said last, with bit 30.
    pub(super) features: Option<u64>,
    /// Whether the session has these features and FEATURES_OK.
    pub(super) negotiated: bool,
    pub(super) live: bool,
    pub(super) memory: GuestMemory,
    /// If the guest's memory is kept from the device host.
    pub(super) copies: Option<Copies>,
    pub(super) rings: Vec<Ring>,
    pub(super) backend_channel: Option<OwnedFd>,
    /// When features were set without a memory table yet.
    pub(super) waits_for_memory: Option<Instant>,
    /// The configuration has changed, and the front end was not told yet.
    pub(super) changed: bool,
    pub(super) changes_told: Option<Instant>,
    pub(super) since: Instant,
    pub(super) write_cache: WriteCache,
    /// The link of a network device may have gone down.
    pub(super) look_at_link: bool,
    /// When the front end has said something last.
    pub(super) last_request: Instant,
    /// How long it is waited for a device that does not stop.
    pub(super) stop_patience: Duration,
    /// Since it was asked to stop and did not: until when it is waited for.
    pub(super) stops_until: Option<Instant>,
    pub(super) limit: Arc<LogLimit>,
}

impl Guest {
    pub(super) fn new(
        session: SessionHandle,
        (config, stop_patience): (Option<bool>, Duration),
        copies: Option<Copies>,
        limit: Arc<LogLimit>,
    ) -> Result<Guest, GuestError> {
        let facts = match session
            .call(Op::Describe)
            .map_err(op("looking at the device"))?
        {
            Outcome::Device(facts) => facts,
            _ => return Err(GuestError::Invalid("the session does not know its device")),
        };
        let queues = facts.queue_sizes.len();
        let mut guest = Guest {
            session,
            config: false,
            protocol: 0,
            features: None,
            negotiated: false,
            live: false,
            memory: GuestMemory::default(),
            copies,
            // The wire has eight bits for the index.
            rings: (0..queues.min(256)).map(|_| Ring::default()).collect(),
            backend_channel: None,
            waits_for_memory: None,
            changed: false,
            changes_told: None,
            since: Instant::now(),
            write_cache: WriteCache::default(),
            look_at_link: false,
            last_request: Instant::now(),
            stop_patience,
            stops_until: None,
            limit,
            facts,
        };
        let kept = KEPT_BY_VMM.contains(&guest.facts.info.device_id);
        guest.config = config.unwrap_or(!kept) && guest.facts.info.config_size != 0;
        Ok(guest)
    }

    fn offered(&self) -> u64 {
        let mut offered = match &self.copies {
            Some(_) => shadow::offered(&self.facts.offered),
            None => self.facts.offered,
        };
        for bit in RESERVED.filter(|bit| !PASSED.contains(bit)) {
            offered.remove(bit);
        }
        self.mask(&mut offered);
        offered.low_u64() & !F_PROTOCOL_FEATURES | F_PROTOCOL_FEATURES
    }

    /// The number of the feature bits that front ends ask for.
    fn offered_protocol(&self) -> u64 {
        let config = if self.config { protocol::CONFIG } else { 0 };
        let mtu = if self.has_mtu() { protocol::NET_MTU } else { 0 };
        protocol::MQ
            | protocol::REPLY_ACK
            | protocol::BACKEND_REQ
            | protocol::INFLIGHT_SHMFD
            | protocol::RESET_DEVICE
            | protocol::CONFIGURE_MEM_SLOTS
            | config
            | mtu
    }

    pub(super) fn acks(&self) -> bool {
        self.protocol & protocol::REPLY_ACK != 0
    }

    /// Whether the driver's features are set, and were taken.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether the device has come to DRIVER_OK.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    pub(super) fn has_memory(&self) -> bool {
        !self.memory.is_empty()
    }

    pub(super) fn handle(&mut self, incoming: Incoming) -> Result<Reply, GuestError> {
        let mut fds = incoming.fds;
        match incoming.request {
            Request::GetFeatures => return Ok(Reply::Number(self.offered())),
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetOwner => self.claim()?,
            Request::ResetOwner | Request::ResetDevice => self.reset()?,
            Request::SetMemTable(regions) => {
                let memory = GuestMemory::of_table(regions, fds)?;
                self.set_memory(memory)?;
            }
            Request::AddMemReg(region) => {
                let fd = fds
                    .pop()
                    .ok_or(GuestError::Invalid("a region without its file"))?;
                // QEMU 7.2 says it once for each pair of rings.
                if let Some(memory) = self.memory.with(region, fd)? {
                    self.set_memory(memory)?;
                }
            }
            Request::RemMemReg(region) => {
                match self.memory.without(&region) {
                    // As well; the first one has done it.
                    Err(MemoryError::NoSuchRegion) if self.queue_num() > 1 => {}
                    memory => self.set_memory(memory?)?,
                }
            }
            Request::SetVringNum { index, num } => {
                let ring = self.ring(index)?;
                ring.size = u16::try_from(num)
                    .map_err(|_| GuestError::Invalid("a ring of more than 32768 entries"))?;
            }
            Request::SetVringAddr { index, addresses } => {
                self.ring(index)?.addresses = Some(addresses);
                self.try_start(index)?;
            }
            Request::SetVringBase { index, base } => {
                let ring = self.ring(index)?;
                // Split queues: an index of 16 bits.
                ring.base = Some(
                    u16::try_from(base)
                        .map_err(|_| GuestError::Invalid("a base of more than 16 bits"))?,
                );
            }
            Request::GetVringBase { index } => {
                let base = self.stop(index)?;
                let mut bytes = index.to_ne_bytes().to_vec();
                bytes.extend_from_slice(&u32::from(base).to_ne_bytes());
                return Ok(Reply::Bytes(bytes));
            }
            Request::SetVringKick { index } => {
                let with_protocol = self.features.is_none_or(|f| f & F_PROTOCOL_FEATURES != 0);
                let ring = self.ring(index)?;
                ring.kick = fds.pop().map(Arc::new);
                ring.polled = ring.kick.is_none();
                // Without protocol features rings begin enabled.
                ring.enabled |= !with_protocol;
                self.notify_changed(index)?;
                self.try_start(index)?;
            }
            Request::SetVringCall { index } => {
                self.ring(index)?.call = fds.pop().map(Arc::new);
                self.notify_changed(index)?;
            }
            Request::SetVringErr { index } => self.ring(index)?.err = fds.pop(),
            Request::GetProtocolFeatures => return Ok(Reply::Number(self.offered_protocol())),
            Request::SetProtocolFeatures(features) => {
                if features & !self.offered_protocol() != 0 {
                    return Err(GuestError::Invalid(
                        "protocol features that were not offered",
                    ));
                }
                self.protocol = features;
            }
            Request::GetQueueNum => return Ok(Reply::Number(self.queue_num())),
            Request::SetVringEnable { index, on } => {
                self.ring(index)?.enabled = on;
                if on {
                    self.try_start(index)?;
                } else {
                    self.pause(index)?;
                }
            }
            Request::SendRarp => {}
            Request::NetSetMtu(mtu) => self.check_mtu(mtu)?,
            Request::SetBackendReqFd => self.backend_channel = fds.pop(),
            Request::GetConfig {
                offset,
                size,
                flags,
            } => return Ok(Reply::Bytes(self.get_config(offset, size, flags))),
            Request::SetConfig {
                offset,
                flags,
                data,
            } => self.set_config(offset, flags, data)?,
            Request::GetInflightFd(wanted) => return self.make_inflight(wanted),
            Request::SetInflightFd(kept) => {
                let fd = fds
                    .pop()
                    .ok_or(GuestError::Invalid("in-flight memory without its file"))?;
                self.keep_inflight(kept, fd)?;
            }
            Request::GetMaxMemSlots => return Ok(Reply::Number(super::memory::MAX_REGIONS as u64)),
            Request::Other(_) => return Err(GuestError::Invalid("a request that was not offered")),
        }
        Ok(Reply::Done)
    }

    pub(super) fn ring(&mut self, index: u32) -> Result<&mut Ring, GuestError> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let count = self.ring_count();
        self.rings[..count]
            .get_mut(index)
            .ok_or(GuestError::Invalid("no such ring"))
    }

    pub(super) fn claim(&self) -> Result<(), GuestError> {
        self.session
            .call(Op::Claim)
            .map(drop)
            .map_err(op("claiming the device"))
    }

    // Features and status

    fn set_features(&mut self, features: u64) -> Result<(), GuestError> {
        if self.features == Some(features) && self.negotiated {
            // Front ends say it once per pair of rings.
            return Ok(());
        }
        let foreign = features & !self.offered();
        if foreign != 0 {
            let error = OpError::NotOffered(FeatureSet::from_u64(foreign));
            return Err(GuestError::Op {
                what: "setting features",
                error,
            });
        }
        if self.live {
            return Err(GuestError::Invalid("other features while rings run"));
        }
        self.features = Some(features);
        self.negotiated = false;
        if self.memory.is_empty() && self.waits_for_memory.is_none() {
            self.waits_for_memory = Some(Instant::now());
        }
        self.negotiate()
    }

    pub(super) fn set_status(&self, status: DeviceStatus) -> Result<DeviceStatus, GuestError> {
        match self
            .session
            .call(Op::SetStatus(status))
            .map_err(op("setting the device status"))?
        {
            Outcome::Status(status) => Ok(status),
            _ => Ok(status),
        }
    }

    fn negotiate(&mut self) -> Result<(), GuestError> {
        let Some(features) = self.features else {
            return Err(GuestError::Invalid("rings before features"));
        };
        if self.negotiated {
            return Ok(());
        }
        self.claim()?;
        self.prepare_copies()?;
        let mut accepted = FeatureSet::from_u64(features & !F_PROTOCOL_FEATURES);
        if let Some(copies) = &self.copies {
            accepted = copies.towards_device(accepted);
        }
        self.write_cache.reset();
        self.accept(accepted)?;
        self.negotiated = true;
        // Changes of before were not told.
        self.look_at_link = self.is_net();
        Ok(())
    }

    // Memory

    fn set_memory(&mut self, memory: GuestMemory) -> Result<(), GuestError> {
        for (index, ring) in (0..).zip(&self.rings) {
            if ring.running && ring.setup(&memory) != ring.setup(&self.memory) {
                return Err(GuestError::OutOfMemoryTable(index));
            }
        }
        self.claim()?;
        self.lend(&memory)?;
        self.memory = memory;
        self.waits_for_memory = None;
        for index in 0..self.ring_count() {
            self.try_start(u32::try_from(index).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    // Rings

    /// Sets a ring up if it has all it needs, and then the device to work.
    fn try_start(&mut self, index: u32) -> Result<(), GuestError> {
        if self.memory.is_empty() || self.features.is_none() || !self.ring(index)?.is_complete() {
            return Ok(());
        }
        self.negotiate()?;
        let memory = self.memory.clone();
        let ring = self.ring(index)?;
        let ((size, descriptor, driver, device), used_at) = ring
            .setup(&memory)
            .ok_or(GuestError::OutOfMemoryTable(index))?;
        let used = memory.read_u16(used_at);
        let base = ring.base.unwrap_or(0);
        let resume = where_to_begin(base, used, size);
        self.restore_write_cache(resume != ResumeAt::Start)?;
        let setup = QueueSetup {
            size,
            descriptor,
            driver,
            device,
            resume,
        };
        self.start_ring(index, setup, used)?;
        self.ring(index)?.running = true;
        if !self.live && self.enough_to_begin(index) {
            self.set_status(LIVE)?;
            self.live = true;
            self.stops_until = None;
            self.run_copies();
        }
        tracing::debug!(ring = index, size, ?resume, live = self.live, "ring set up");
        Ok(())
    }

    /// Drivers set their queues up before DRIVER_OK; how many there will be is not told. A network device has at least a pair.
    fn enough_to_begin(&self, index: u32) -> bool {
        let other = usize::try_from(index ^ 1).unwrap_or(usize::MAX);
        !self.is_pairs() || self.rings.get(other).is_some_and(|ring| ring.running)
    }

    pub(super) fn notify(&mut self, index: u32) -> Result<(), GuestError> {
        let ring = self.ring(index)?;
        let op_notify = Op::SetNotify {
            queue: QueueIndex(index),
            kick: ring.kick.clone(),
            call: ring.call.clone(),
        };
        self.session
            .call(op_notify)
            .map(drop)
            .map_err(op("passing kick and call on"))
    }

    fn notify_changed(&mut self, index: u32) -> Result<(), GuestError> {
        if self.ring(index)?.running {
            self.renotify(index)
        } else {
            Ok(())
        }
    }

    /// Stops the device and takes the memory back, but holds on to the device, as a driver without queues: only who has come to DRIVER_OK
    /// hears of changes of the configuration.
    pub(super) fn suspend(&mut self) -> Result<(), GuestError> {
        self.reset()?;
        self.session
            .call(Op::SetWindows(Vec::new()))
            .map_err(op("taking the memory back"))?;
        if let Some(copies) = &mut self.copies {
            copies.end();
        }
        let mut features = FeatureSet::from_bits(&[feature::VERSION_1, super::net::F_STATUS]);
        features = features.intersection(&self.facts.offered);
        self.accept(features)?;
        self.set_status(LIVE).map(drop)
    }

    /// From the beginning to FEATURES_OK.
    pub(super) fn accept(&self, features: FeatureSet) -> Result<(), GuestError> {
        self.set_status(DeviceStatus::RESET)?;
        self.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER)?;
        self.session
            .call(Op::SetFeatures(features))
            .map_err(op("setting features"))?;
        if !self
            .set_status(ACCEPTED)?
            .contains(DeviceStatus::FEATURES_OK)
        {
            return Err(GuestError::FeaturesRefused(features));
        }
        Ok(())
    }

    /// The front end is gone, or is sent away: nothing of it stays. `patient`: a device that has requests under way is waited for as when it is stopped.
    pub(super) fn release(self, patient: bool) -> Result<(), OpError> {
        let until = self.stops_until;
        let until = until.unwrap_or_else(|| Instant::now() + self.stop_patience);
        loop {
            let result = self.session.call(Op::Release).map(drop);
            let waits = matches!(result, Err(OpError::Busy | OpError::StillInUse));
            if !(waits && patient && Instant::now() < until) {
                return result;
            }
        }
    }
}

/// Where a split ring of `size` entries goes on, with the available index `base` that the front end gives and the used index in the ring.
fn where_to_begin(base: u16, used: Option<u16>, size: u16) -> ResumeAt {
    let Some(used) = used else {
        return ResumeAt::Explicit {
            avail: base,
            used: base,
        };
    };
    if base == 0 && used == 0 {
        ResumeAt::Start
    } else if used.wrapping_sub(base) <= size {
        // A front end that lost its back end takes the base from the used index. The device may have given back more after that, before it
        // was told to stop: what stands in the ring when the queue is set up is right.
        ResumeAt::UsedIndex
    } else {
        // The front end says that somebody else has the chains in between.
        ResumeAt::Explicit { avail: base, used }
    }
}

#[cfg(test)]
#[path = "guest_test.rs"]
mod tests;
