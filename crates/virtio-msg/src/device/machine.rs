// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state machine of one device number.

use super::queues::{QueueSlot, Queues};
use super::{
    Action, ActionResult, Busy, Counters, Handled, Identity, Ignored, MAX_REGIONS, Options,
};
use crate::feature;
use crate::feature_set::FeatureSet;
use crate::message::{Frame, Message, ShmInfo, VqueueConfig};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, Instant, QueueIndex, Token};

/// The device side of one device number: see the [module](super).
///
/// `Q` is the storage of the queues: `[QueueSlot; N]`, `Vec<QueueSlot>`, `Box<[QueueSlot]>`; its length is the number of virtqueues
/// (65534 at most; more are left out). `C` is the configuration space likewise: `[u8; N]`, `Vec<u8>`, `Box<[u8]>`. It is stored twice, the second
/// time for a write on its way to the device.
#[derive(Clone, Debug)]
pub struct DeviceMachine<Q, C> {
    pub(super) dev_num: DevNum,
    pub(super) identity: Identity,
    pub(super) options: Options,
    pub(super) offered: FeatureSet,
    /// What the driver wrote; settled once FEATURES_OK is set.
    wanted: FeatureSet,
    /// The driver set a bit that no set can hold.
    wanted_foreign: bool,
    pub(super) status: DeviceStatus,
    pub(super) queues: Queues<Q>,
    pub(super) config: C,
    pub(super) staged: C,
    pub(super) generation: Generation,
    pub(super) config_event: ConfigChange,
    pub(super) stage: Stage,
    /// Regions without length are none.
    pub(super) regions: [ShmInfo; MAX_REGIONS],
    last_message: Option<Instant>,
    pub(super) counters: Counters,
}

/// Where the present request is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    /// There is none.
    Idle,
    /// The owner has to do something first.
    Acting { token: Token, op: Op, polled: bool },
    /// The response waits to be sent.
    Answering { token: Token, reply: Reply },
}

/// What the owner has to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Reset,
    /// One step on the way to the status that the driver wrote.
    Status(StatusStep, DeviceStatus),
    SetQueue(VqueueConfig),
    ResetQueue(QueueIndex),
    WriteConfig {
        offset: u32,
        len: u32,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum StatusStep {
    Features,
    Driver,
    Failed,
}

/// A response. The values are filled in when it is sent, so that none is older than an event sent before.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reply {
    Info,
    Features { first: u32, count: u32 },
    FeaturesSet,
    Config { offset: u32, len: u32 },
    ConfigSet { offset: u32, len: u32 },
    Status,
    StatusSet,
    Vqueue(QueueIndex),
    VqueueSet,
    VqueueReset,
    Shm(u32),
}

/// What the driver has not been told about the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConfigChange {
    None,
    /// The status has changed, the configuration has not.
    Status,
    /// Bytes `start` to `end` have changed.
    Bytes {
        start: u32,
        end: u32,
    },
}

/// Features that are tolerated although they were not offered: Linux sets both without looking.
const TOLERATED: [u32; 2] = [feature::VERSION_1, feature::ACCESS_PLATFORM];

impl<Q, C> DeviceMachine<Q, C>
where
    Q: AsRef<[QueueSlot]> + AsMut<[QueueSlot]>,
    C: AsRef<[u8]> + AsMut<[u8]> + Clone,
{
    /// A device that was never used: status 0, generation 0.
    pub fn new(
        dev_num: DevNum,
        identity: Identity,
        offered: FeatureSet,
        queues: Q,
        config: C,
        options: Options,
    ) -> DeviceMachine<Q, C> {
        let offered = if options.notification_data {
            offered
        } else {
            offered.without(feature::NOTIFICATION_DATA)
        };
        DeviceMachine {
            dev_num,
            identity,
            options: options.clamped(),
            offered,
            wanted: FeatureSet::EMPTY,
            wanted_foreign: false,
            status: DeviceStatus::RESET,
            queues: Queues::new(queues),
            staged: config.clone(),
            config,
            generation: Generation(0),
            config_event: ConfigChange::None,
            stage: Stage::Idle,
            regions: [ShmInfo::default(); MAX_REGIONS],
            last_message: None,
            counters: Counters::default(),
        }
    }

    /// Gives the device a shared-memory region, or another one with its index, for GET_SHM. False: there are [`MAX_REGIONS`] already.
    pub fn set_region(&mut self, region: ShmInfo) -> bool {
        let place = self
            .regions
            .iter()
            .position(|other| other.len != 0 && other.index == region.index);
        let place = place.or_else(|| self.regions.iter().position(|other| other.len == 0));
        if let Some(place) = place {
            self.regions[place] = region;
        }
        place.is_some()
    }

    /// Takes one message in. Requests are answered through [`poll_transmit`](Self::poll_transmit), at once or after an action.
    ///
    /// # Errors
    /// [`Busy`]: a request came before the response of the one before was fetched; nothing has happened, offer it again. Never for events.
    pub fn handle_message(&mut self, now: Instant, frame: &Frame<'_>) -> Result<Handled, Busy> {
        if frame.dev_num != self.dev_num || frame.message.is_bus() {
            let why = if frame.message.is_bus() {
                Ignored::NotForDevices
            } else {
                Ignored::OtherDevice
            };
            return Ok(self.ignore(why));
        }
        if let Message::EventAvail { queue, next } = frame.message {
            self.last_message = Some(now);
            return Ok(self.kick(queue, next));
        }
        if frame.message.kind() != crate::Kind::Request {
            return Ok(self.ignore(Ignored::NotForDevices));
        }
        if !matches!(self.stage, Stage::Idle) {
            return Err(Busy);
        }
        self.last_message = Some(now);
        Ok(self.request(frame.token, &frame.message))
    }

    fn ignore(&mut self, why: Ignored) -> Handled {
        self.counters.ignored = self.counters.ignored.wrapping_add(1);
        Handled::Ignored(why)
    }

    fn kick(&mut self, queue: QueueIndex, next: u32) -> Handled {
        let stopping = match self.stage {
            Stage::Acting { op: Op::Reset, .. } => true,
            Stage::Acting {
                op: Op::ResetQueue(q),
                ..
            } => q == queue,
            _ => false,
        };
        let next = if self.features().bit(feature::NOTIFICATION_DATA) {
            next
        } else {
            0
        };
        // A kick before DRIVER_OK is kept: the request that sets it may still be waiting with the owner.
        if stopping || !self.queues.mark_avail(queue, next) {
            return self.ignore(Ignored::QueueNotReady);
        }
        self.counters.avail_events = self.counters.avail_events.wrapping_add(1);
        Handled::Event
    }

    fn request(&mut self, token: Token, message: &Message<'_>) -> Handled {
        let max = self.options.max_message_size.min(usize::from(u16::MAX));
        let fits = |fixed: usize, len: u32, unit: usize| {
            usize::try_from(len)
                .ok()
                .and_then(|n| n.checked_mul(unit))
                .and_then(|n| n.checked_add(fixed))
                .is_some_and(|n| n <= max)
        };
        let reply = match *message {
            Message::GetDeviceInfo => Reply::Info,
            Message::GetDeviceFeatures { first, count } => {
                if !fits(16, count, 4) {
                    return self.ignore(Ignored::ResponseTooLong);
                }
                Reply::Features { first, count }
            }
            Message::SetDriverFeatures(blocks) => {
                if self.status.contains(DeviceStatus::FEATURES_OK) {
                    self.counters.late_features = self.counters.late_features.wrapping_add(1);
                } else {
                    self.wanted_foreign |= blocks.store(&mut self.wanted);
                }
                Reply::FeaturesSet
            }
            Message::GetConfig { offset, len } => {
                if !fits(20, len, 1) {
                    return self.ignore(Ignored::ResponseTooLong);
                }
                if len != 0 && self.config_range(offset, len).is_none() {
                    self.counters.config_reads_outside =
                        self.counters.config_reads_outside.wrapping_add(1);
                }
                Reply::Config { offset, len }
            }
            Message::SetConfig(data) => return self.write_config(token, &data),
            Message::GetDeviceStatus => Reply::Status,
            Message::SetDeviceStatus(status) => {
                self.accept();
                self.write_status(token, status);
                return Handled::Request;
            }
            Message::GetVqueue(queue) => Reply::Vqueue(queue),
            Message::SetVqueue(config) => return self.set_queue(token, &config),
            Message::ResetVqueue(queue) => return self.reset_queue(token, queue),
            Message::GetShm { index } => Reply::Shm(index),
            _ => return self.ignore(Ignored::NotForDevices),
        };
        self.accept();
        self.answer(token, reply);
        Handled::Request
    }

    pub(super) fn accept(&mut self) {
        self.counters.requests = self.counters.requests.wrapping_add(1);
    }

    pub(super) fn answer(&mut self, token: Token, reply: Reply) {
        self.stage = Stage::Answering { token, reply };
    }

    pub(super) fn act(&mut self, token: Token, op: Op) {
        self.stage = Stage::Acting {
            token,
            op,
            polled: false,
        };
    }

    fn set_queue(&mut self, token: Token, config: &VqueueConfig) -> Handled {
        self.accept();
        let usable = self.status.contains(DeviceStatus::FEATURES_OK)
            && !self
                .status
                .intersects(DeviceStatus::FAILED | DeviceStatus::NEEDS_RESET);
        let present = self.queues.config(config.index);
        // The same again is a repetition after a lost response.
        let repeated = present == Some(*config);
        let packed = self.features().bit(feature::RING_PACKED);
        if usable
            && present.is_none()
            && self
                .queues
                .is_possible(config, packed, self.options.tolerated_queue_size)
        {
            self.act(token, Op::SetQueue(*config));
        } else {
            if !repeated {
                self.counters.bad_queue_setups = self.counters.bad_queue_setups.wrapping_add(1);
            }
            self.answer(token, Reply::VqueueSet);
        }
        Handled::Request
    }

    /// Also without RING_RESET: Linux of 2025 takes its queues down so.
    fn reset_queue(&mut self, token: Token, queue: QueueIndex) -> Handled {
        self.accept();
        if self.queues.config(queue).is_some() {
            self.act(token, Op::ResetQueue(queue));
        } else {
            if !self.queues.exists(queue) {
                self.counters.bad_queue_resets = self.counters.bad_queue_resets.wrapping_add(1);
            }
            self.answer(token, Reply::VqueueReset);
        }
        Handled::Request
    }

    /// A driver can only add bits, or reset. NEEDS_RESET is the device's, SUSPEND is not offered.
    fn write_status(&mut self, token: Token, target: DeviceStatus) {
        if target == DeviceStatus::RESET {
            return self.act(token, Op::Reset);
        }
        self.status |= target & (DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        self.next_status_step(token, target);
    }

    fn next_status_step(&mut self, token: Token, target: DeviceStatus) {
        let new = target & !self.status;
        if new.contains(DeviceStatus::FAILED) {
            return self.act(token, Op::Status(StatusStep::Failed, target));
        }
        if !new.intersects(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK) {
            return self.answer(token, Reply::StatusSet);
        }
        if self
            .status
            .intersects(DeviceStatus::FAILED | DeviceStatus::NEEDS_RESET)
        {
            return self.refuse_status(token);
        }
        if new.contains(DeviceStatus::FEATURES_OK) {
            if self.features_acceptable() {
                self.act(token, Op::Status(StatusStep::Features, target));
            } else {
                self.refuse_status(token);
            }
        } else if self.status.contains(DeviceStatus::FEATURES_OK) {
            self.act(token, Op::Status(StatusStep::Driver, target));
        } else {
            self.refuse_status(token);
        }
    }

    fn refuse_status(&mut self, token: Token) {
        self.counters.refused_status = self.counters.refused_status.wrapping_add(1);
        self.answer(token, Reply::StatusSet);
    }

    fn features_acceptable(&self) -> bool {
        !self.wanted_foreign
            && self
                .wanted
                .is_subset(&self.offered.union(&FeatureSet::from_bits(&TOLERATED)))
    }

    /// What the owner has to do next. Call until `None` after each message and each [`complete`](Self::complete).
    pub fn poll_action(&mut self) -> Option<Action> {
        if let Stage::Acting { op, polled, .. } = &mut self.stage {
            if !*polled {
                *polled = true;
                return Some(match *op {
                    Op::Reset => Action::Reset,
                    Op::Status(StatusStep::Features, _) => {
                        Action::FeaturesOk(self.wanted.intersection(&self.offered))
                    }
                    Op::Status(StatusStep::Driver, _) => Action::DriverOk,
                    Op::Status(StatusStep::Failed, _) => Action::Failed,
                    Op::SetQueue(config) => Action::SetQueue(config.index, config),
                    Op::ResetQueue(queue) => Action::ResetQueue(queue),
                    Op::WriteConfig { offset, len } => Action::WriteConfig { offset, len },
                });
            }
            if matches!(op, Op::Reset) {
                return None;
            }
        }
        if !self.is_live() {
            return None;
        }
        self.queues
            .pop_avail()
            .map(|(queue, next)| Action::Avail { queue, next })
    }

    /// Whether kicks are to be acted upon.
    fn is_live(&self) -> bool {
        self.status.contains(DeviceStatus::DRIVER_OK)
            && !self
                .status
                .intersects(DeviceStatus::FAILED | DeviceStatus::NEEDS_RESET)
    }

    /// Says how the action went that [`poll_action`](Self::poll_action) gave out. Without such an action, nothing happens.
    pub fn complete(&mut self, result: ActionResult) {
        let Stage::Acting {
            token,
            op,
            polled: true,
        } = self.stage
        else {
            return;
        };
        let done = result == ActionResult::Done;
        match op {
            Op::Reset => {
                self.forget_driver();
                self.answer(token, Reply::StatusSet);
            }
            Op::Status(StatusStep::Failed, target) => {
                self.status |= DeviceStatus::FAILED;
                self.next_status_step(token, target);
            }
            Op::Status(StatusStep::Features, target) if done => {
                self.status |= DeviceStatus::FEATURES_OK;
                self.next_status_step(token, target);
            }
            Op::Status(StatusStep::Features, _) => self.refuse_status(token),
            Op::Status(StatusStep::Driver, _) if done => {
                self.status |= DeviceStatus::DRIVER_OK;
                self.answer(token, Reply::StatusSet);
            }
            Op::Status(StatusStep::Driver, _) => {
                self.status |= DeviceStatus::NEEDS_RESET;
                self.refuse_status(token);
            }
            Op::SetQueue(config) => {
                if done {
                    self.queues.set(&config);
                } else {
                    self.counters.bad_queue_setups = self.counters.bad_queue_setups.wrapping_add(1);
                }
                self.answer(token, Reply::VqueueSet);
            }
            Op::ResetQueue(queue) => {
                self.queues.reset(queue);
                self.answer(token, Reply::VqueueReset);
            }
            Op::WriteConfig { offset, .. } if !done => self.reject_config(token, offset),
            Op::WriteConfig { offset, len } => {
                self.apply_config(offset, len);
                self.answer(token, Reply::ConfigSet { offset, len });
            }
        }
    }

    /// What a reset takes back. The configuration and its generation stay, and so do the counters.
    fn forget_driver(&mut self) {
        self.wanted = FeatureSet::EMPTY;
        self.wanted_foreign = false;
        self.status = DeviceStatus::RESET;
        self.queues.reset_all();
        self.config_event = ConfigChange::None;
    }

    /// Tells the driver that buffers of this queue were used. Nothing happens unless the queue is set up and the driver is ready.
    pub fn notify_used(&mut self, queue: QueueIndex) {
        if self.status.contains(DeviceStatus::DRIVER_OK)
            && !matches!(self.stage, Stage::Acting { op: Op::Reset, .. })
        {
            self.queues.mark_used(queue);
        }
    }

    /// The device cannot go on until it is reset; a driver that is ready is told so.
    pub fn set_needs_reset(&mut self) {
        if self.status.contains(DeviceStatus::NEEDS_RESET) {
            return;
        }
        self.status |= DeviceStatus::NEEDS_RESET;
        if self.config_event == ConfigChange::None {
            self.config_event = ConfigChange::Status;
        }
    }

    /// The device number.
    pub fn dev_num(&self) -> DevNum {
        self.dev_num
    }

    /// The device status.
    pub fn status(&self) -> DeviceStatus {
        self.status
    }

    /// What was negotiated; empty before FEATURES_OK.
    pub fn features(&self) -> FeatureSet {
        if self.status.contains(DeviceStatus::FEATURES_OK) {
            self.wanted.intersection(&self.offered)
        } else {
            FeatureSet::EMPTY
        }
    }

    /// What the device offers.
    pub fn offered(&self) -> FeatureSet {
        self.offered
    }

    /// How the driver has set this queue up; `None` if it has not.
    pub fn queue(&self, queue: QueueIndex) -> Option<VqueueConfig> {
        self.queues.config(queue)
    }

    /// The number of queues.
    pub fn queue_count(&self) -> u32 {
        self.queues.len()
    }

    /// Whether the next request would find the machine [`Busy`].
    pub fn is_busy(&self) -> bool {
        !matches!(self.stage, Stage::Idle)
    }

    /// When the driver last sent something for this device.
    pub fn last_message(&self) -> Option<Instant> {
        self.last_message
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}
