// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One device, from its first message to DRIVER_OK, in the order in which Linux does it.

use crate::feature;
use crate::feature_set::{FeatureSet, MAX_BLOCKS};
use crate::message::{DeviceInfo, FeatureBlocks, Message, VqueueConfig, VqueueInfo};
use crate::status::DeviceStatus;
use crate::types::QueueIndex;
use thiserror::Error;
use zerocopy::little_endian::U32;

/// Why a device was not brought up. After any of these the device wants a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BringupError {
    /// There is no device with this number.
    #[error("no such device")]
    Absent,
    /// The status is not 0 after a reset.
    #[error("the device did not reset: status {0}")]
    NotReset(DeviceStatus),
    /// The device does not have the features so.
    #[error("the device refused the features: status {0}")]
    FeaturesRefused(DeviceStatus),
    /// The queue is not as it was set up.
    #[error("the device did not set up queue {0}")]
    QueueRefused(QueueIndex),
    /// The device does not become ready.
    #[error("the device did not become ready: status {0}")]
    NotReady(DeviceStatus),
    /// The device answered something else than it was asked.
    #[error("unexpected answer of the device")]
    BadAnswer,
    /// The device did not answer.
    #[error("the device does not answer")]
    TimedOut,
}

/// What a [`Bringup`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BringupStep<'a> {
    /// Send this request to the device.
    Send(Message<'a>),
    /// The response is awaited.
    Wait,
    /// Choose among these features: [`Bringup::choose_features`].
    ChooseFeatures(FeatureSet),
    /// The features are settled. Configuration may be read, and it is time for [`Bringup::get_queue`], [`Bringup::set_queue`] and, when all
    /// queues are there, [`Bringup::finish`]. After `get_queue`, this is the queue.
    Queues(Option<VqueueInfo>),
    /// The device is ready.
    Ready,
    /// It did not work out.
    Failed(BringupError),
}

/// Brings one device up: information, reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, queues, DRIVER_OK.
#[derive(Clone, Debug)]
pub struct Bringup {
    state: State,
    sent: bool,
    info: DeviceInfo,
    offered: FeatureSet,
    features: FeatureSet,
    words: [U32; MAX_BLOCKS],
}

#[derive(Clone, Copy, Debug)]
enum State {
    Info,
    Status(DeviceStatus),
    GetFeatures,
    ChooseFeatures,
    SetFeatures,
    Queues(Option<VqueueInfo>),
    GetQueue(QueueIndex),
    SetQueue(VqueueConfig),
    CheckQueue(VqueueConfig),
    Ready,
    Failed(BringupError),
}

const ACKNOWLEDGED: DeviceStatus = DeviceStatus::ACKNOWLEDGE;
const DRIVER: DeviceStatus = ACKNOWLEDGED.union(DeviceStatus::DRIVER);
const SETTLED: DeviceStatus = DRIVER.union(DeviceStatus::FEATURES_OK);
const RUNNING: DeviceStatus = SETTLED.union(DeviceStatus::DRIVER_OK);

impl Default for Bringup {
    fn default() -> Self {
        Self::new()
    }
}

impl Bringup {
    /// At the start.
    pub fn new() -> Bringup {
        Bringup {
            state: State::Info,
            sent: false,
            info: DeviceInfo::ABSENT,
            offered: FeatureSet::EMPTY,
            features: FeatureSet::EMPTY,
            words: [U32::ZERO; MAX_BLOCKS],
        }
    }

    /// What the device is, once it has said so.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What was accepted, once it was.
    pub fn features(&self) -> FeatureSet {
        self.features
    }

    fn blocks(&self) -> u32 {
        // Eight blocks fit the smallest message.
        (self.info.feature_bits / 32).clamp(1, FeatureSet::BITS / 32)
    }

    /// What to do now.
    pub fn step(&mut self) -> BringupStep<'_> {
        match self.state {
            State::ChooseFeatures => return BringupStep::ChooseFeatures(self.offered),
            State::Queues(info) => return BringupStep::Queues(info),
            State::Ready => return BringupStep::Ready,
            State::Failed(error) => return BringupStep::Failed(error),
            _ => {}
        }
        if self.sent {
            return BringupStep::Wait;
        }
        self.sent = true;
        let count = self.blocks();
        BringupStep::Send(match self.state {
            State::Info => Message::GetDeviceInfo,
            State::Status(status) => Message::SetDeviceStatus(status),
            State::GetFeatures => Message::GetDeviceFeatures { first: 0, count },
            State::SetFeatures => {
                for (i, word) in (0..).zip(self.words.iter_mut()) {
                    *word = self.features.block(i).into();
                }
                let used = usize::try_from(count).unwrap_or(MAX_BLOCKS).min(MAX_BLOCKS);
                Message::SetDriverFeatures(FeatureBlocks {
                    first: 0,
                    count,
                    words: &self.words[..used],
                })
            }
            State::GetQueue(index) => Message::GetVqueue(index),
            State::SetQueue(config) => Message::SetVqueue(config),
            State::CheckQueue(config) => Message::GetVqueue(config.index),
            State::ChooseFeatures | State::Queues(_) | State::Ready | State::Failed(_) => {
                return BringupStep::Wait;
            }
        })
    }

    /// Takes the response to the last request in.
    pub fn handle_response(&mut self, message: &Message<'_>) {
        if !self.sent {
            return;
        }
        self.sent = false;
        self.state = match self.after(message) {
            Ok(state) => state,
            Err(error) => State::Failed(error),
        };
    }

    /// The last request was not answered.
    pub fn handle_timeout(&mut self) {
        if self.sent {
            self.sent = false;
            self.state = State::Failed(BringupError::TimedOut);
        }
    }

    fn after(&mut self, message: &Message<'_>) -> Result<State, BringupError> {
        match (self.state, message) {
            (State::Info, Message::DeviceInfo(info)) => {
                if !info.is_present() {
                    return Err(BringupError::Absent);
                }
                self.info = *info;
                Ok(State::Status(DeviceStatus::RESET))
            }
            (State::Status(written), Message::DeviceStatusSet(status)) => {
                after_status(written, *status)
            }
            (State::GetFeatures, Message::DeviceFeatures(blocks)) => {
                if blocks.first != 0 || blocks.count != self.blocks() {
                    return Err(BringupError::BadAnswer);
                }
                blocks.store(&mut self.offered);
                Ok(State::ChooseFeatures)
            }
            (State::SetFeatures, Message::DriverFeaturesSet) => Ok(State::Status(SETTLED)),
            (State::GetQueue(index), Message::Vqueue(info)) if info.index == index => {
                Ok(State::Queues(Some(*info)))
            }
            (State::SetQueue(config), Message::VqueueSet) => Ok(State::CheckQueue(config)),
            (State::CheckQueue(config), Message::Vqueue(info)) if info.index == config.index => {
                let VqueueInfo {
                    index,
                    max_size: _,
                    size,
                    descriptor,
                    driver,
                    device,
                } = *info;
                if (VqueueConfig {
                    index,
                    size,
                    descriptor,
                    driver,
                    device,
                }) == config
                {
                    Ok(State::Queues(None))
                } else {
                    Err(BringupError::QueueRefused(config.index))
                }
            }
            _ => Err(BringupError::BadAnswer),
        }
    }

    /// Accepts features; what is not offered is left out. ACCESS_PLATFORM is accepted whenever it is offered: on a bus every
    /// address is a bus address anyway, and QEMU aborts without it.
    pub fn choose_features(&mut self, features: FeatureSet) {
        if matches!(self.state, State::ChooseFeatures) {
            self.features = features
                .with(feature::ACCESS_PLATFORM)
                .intersection(&self.offered);
            self.state = State::SetFeatures;
        }
    }

    /// Asks for a queue.
    pub fn get_queue(&mut self, index: QueueIndex) {
        if matches!(self.state, State::Queues(_)) {
            self.state = State::GetQueue(index);
        }
    }

    /// Sets a queue up, and looks whether the device has done so.
    pub fn set_queue(&mut self, config: VqueueConfig) {
        if matches!(self.state, State::Queues(_)) {
            self.state = State::SetQueue(config);
        }
    }

    /// Makes the device ready. Queues that were not set up stay out of use.
    pub fn finish(&mut self) {
        if matches!(self.state, State::Queues(_)) {
            self.state = State::Status(RUNNING);
        }
    }
}

fn after_status(written: DeviceStatus, status: DeviceStatus) -> Result<State, BringupError> {
    match written {
        DeviceStatus::RESET if status == DeviceStatus::RESET => Ok(State::Status(ACKNOWLEDGED)),
        DeviceStatus::RESET => Err(BringupError::NotReset(status)),
        _ if status.intersects(DeviceStatus::NEEDS_RESET | DeviceStatus::FAILED) => {
            Err(BringupError::NotReady(status))
        }
        ACKNOWLEDGED => Ok(State::Status(DRIVER)),
        DRIVER => Ok(State::GetFeatures),
        SETTLED if status.contains(DeviceStatus::FEATURES_OK) => Ok(State::Queues(None)),
        SETTLED => Err(BringupError::FeaturesRefused(status)),
        _ if status.contains(RUNNING) => Ok(State::Ready),
        _ => Err(BringupError::NotReady(status)),
    }
}

#[cfg(test)]
#[path = "bringup_test.rs"]
mod tests;
