// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of modern virtio, each once, whatever the layout.

mod config;
mod queues;

use super::Backend;
use crate::log_limit::LogLimit;
use crate::session::{DeviceFacts, OpError, QueueSetup, ResumeAt};
use config::Seen;
pub(super) use queues::Address;
use queues::Queue;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex, feature};

/// The most queues shown; a session looks at fewer.
const MAX_QUEUES: usize = 1024;
/// Feature blocks of 32 bits that a driver can select.
const FEATURE_BLOCKS: u32 = 4;

/// What a driver may write to the status register. NEEDS_RESET is the device's.
const WRITABLE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::DRIVER_OK)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::FAILED);

/// Features of the device that need what these registers do not have.
const WITHHELD: [u32; 3] = [
    feature::SR_IOV,
    feature::NOTIF_CONFIG_DATA,
    feature::ADMIN_VQ,
];

/// Between driver and registers, never passed on.
const OWN: [u32; 2] = [feature::ACCESS_PLATFORM, feature::NOTIFICATION_DATA];

/// What a core can be told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Offer ACCESS_PLATFORM: what the driver writes into queues are bus addresses, which an IOMMU may translate. Drivers that do not accept
    /// it are served, too.
    pub access_platform: bool,
    /// Offer NOTIFICATION_DATA.
    pub notification_data: bool,
    /// How long a reset that has failed is left alone. After that the next read of the register in which the driver waits for its end
    /// tries once more.
    pub retry: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            access_platform: true,
            notification_data: true,
            retry: Duration::from_millis(500),
        }
    }
}

/// A register that all layouts have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    QueueCount,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueSizeMax,
    /// 1 starts the queue, 0 stops it, and reads tell.
    QueueReady,
    /// 1 starts the queue, and only a reset stops it.
    QueueEnable,
    QueueReset,
    Address(Address),
}

/// How the device is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Health {
    Well,
    /// An operation has failed: the backend is only asked to stop queues until the driver resets the device.
    Broken,
    /// The reset has failed, too, and it is not known what the device does. Tried again now and then.
    ResetDue(Instant),
}

/// The registers of one device over a backend.
///
/// * **Status** is what the device has. Bits once set stay until a reset. FEATURES_OK shows only if the device took the features.
///   After a reset it reads 0 when the backend has done it, and NEEDS_RESET until then.
/// * **An operation that fails** makes the device read NEEDS_RESET, and asks for a configuration interrupt, as virtio 1.3 §2.1.2 has it. What
///   the driver does then is taken and goes nowhere; a reset by the driver heals.
/// * **Queues** are set up when they are enabled; what was written before is only remembered. Enabling what cannot be (no such size, an address that
///   is missing or not aligned, no FEATURES_OK) has no effect, and reads back so.
/// * **Configuration** is read live. The generation goes up when bytes that the driver has seen are others, and when the device says so.
#[derive(Debug)]
pub struct Core<B> {
    backend: B,
    options: Options,
    device_id: u32,
    offered: FeatureSet,
    device_select: u32,
    driver_select: u32,
    accepted: FeatureSet,
    /// As the device has it, without NEEDS_RESET.
    status: DeviceStatus,
    /// The device itself says so.
    needs_reset: bool,
    health: Health,
    /// The driver has written DRIVER_OK: it may be interrupted.
    driver_ready: bool,
    queue_select: u32,
    queues: Vec<Queue>,
    config: Seen,
    config_interrupt: bool,
    was_reset: bool,
    /// A driver can do what fails again and again.
    limit: Arc<LogLimit>,
}

impl<B: Backend> Core<B> {
    /// The registers of a device that was reset.
    pub fn new(backend: B, options: Options) -> Core<B> {
        let facts = backend.facts();
        let device_id = facts.info.device_id;
        let queues = facts.queue_sizes.iter().take(MAX_QUEUES);
        let queues = queues.map(|&max| Queue::new(max)).collect();
        let offered = offer(facts, &options);
        Core {
            backend,
            options,
            device_id,
            offered,
            device_select: 0,
            driver_select: 0,
            accepted: FeatureSet::EMPTY,
            status: DeviceStatus::RESET,
            needs_reset: false,
            health: Health::Well,
            driver_ready: false,
            queue_select: 0,
            queues,
            config: Seen::default(),
            config_interrupt: false,
            was_reset: false,
            limit: Arc::default(),
        }
    }

    /// What is said about the device counts here, so that drivers that come after this one cannot say all of it again.
    pub(crate) fn log_with(&mut self, limit: Arc<LogLimit>) {
        self.limit = limit;
    }

    /// What stands behind.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What stands behind. What is done to it here does not show in the registers.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What the device is: the virtio device id stays the same, whatever comes back behind it.
    pub fn device_id(&self) -> u32 {
        self.device_id
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The status register as the driver reads it, without trying anything again.
    pub fn status(&self) -> DeviceStatus {
        let trouble = self.needs_reset || self.health != Health::Well;
        if trouble {
            self.status | DeviceStatus::NEEDS_RESET
        } else {
            self.status
        }
    }

    /// What the driver has accepted, or is about to.
    pub fn accepted(&self) -> FeatureSet {
        self.accepted
    }

    /// What the driver is offered.
    pub fn offered(&self) -> FeatureSet {
        self.offered
    }

    /// Whether the driver may be told that this queue has used buffers.
    pub fn is_live(&self, queue: QueueIndex) -> bool {
        let enabled = self
            .queues
            .get(queue.to_usize())
            .is_some_and(|queue| queue.enabled);
        self.driver_ready && enabled
    }

    /// How many bytes of configuration space there are.
    pub fn config_size(&self) -> u32 {
        self.backend.facts().info.config_size
    }

    /// The device says that its configuration is another.
    pub fn config_changed(&mut self) {
        self.config.generation = self.config.generation.wrapping_add(1);
        self.ask_for_config_interrupt();
    }

    /// The device says that it needs a reset.
    pub fn needs_reset(&mut self) {
        // A device that was reset meanwhile has nothing to mend.
        if !self.status.is_empty() && !self.needs_reset {
            self.needs_reset = true;
            self.ask_for_config_interrupt();
        }
    }

    /// True once after something happened of which a configuration interrupt tells.
    pub(super) fn take_config_interrupt(&mut self) -> bool {
        std::mem::take(&mut self.config_interrupt)
    }

    /// True once after the registers were reset.
    pub(super) fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.was_reset)
    }

    fn ask_for_config_interrupt(&mut self) {
        self.config_interrupt |= self.driver_ready;
    }

    fn fail(&mut self, what: &'static str, error: &OpError) {
        if let Some(unsaid) = self.limit.admit() {
            tracing::warn!(what, %error, unsaid, "the device needs a reset");
        }
        if self.health == Health::Well {
            self.health = Health::Broken;
            self.ask_for_config_interrupt();
        }
    }

    fn is_well(&self) -> bool {
        self.health == Health::Well
    }

    // The device as a whole

    /// Resets the device, as a driver does with status 0.
    pub fn reset(&mut self) {
        let Core {
            backend,
            options: _,
            device_id,
            offered: _,
            device_select,
            driver_select,
            accepted,
            status,
            needs_reset,
            health,
            driver_ready,
            queue_select,
            queues,
            config,
            config_interrupt,
            was_reset,
            limit,
        } = self;
        let done = backend.set_status(DeviceStatus::RESET).and_then(|status| {
            let same = backend.facts().info.device_id == *device_id;
            if !status.is_empty() {
                Err(OpError::BadAnswer("a status after a reset"))
            } else if !same {
                Err(OpError::Invalid("the device is of another type now"))
            } else {
                Ok(())
            }
        });
        *device_select = 0;
        *driver_select = 0;
        *accepted = FeatureSet::EMPTY;
        *status = DeviceStatus::RESET;
        *needs_reset = false;
        *driver_ready = false;
        *queue_select = 0;
        config.forget();
        *config_interrupt = false;
        *was_reset = true;
        let sizes = &backend.facts().queue_sizes;
        for (index, queue) in queues.iter_mut().enumerate() {
            *queue = Queue::new(sizes.get(index).copied().unwrap_or(0));
        }
        match done {
            Ok(()) => *health = Health::Well,
            Err(error) => {
                if let Some(unsaid) = limit.admit() {
                    tracing::warn!(%error, unsaid, "the device was not reset; tried again later");
                }
                *health = Health::ResetDue(Instant::now());
            }
        }
        self.offered = offer(self.backend.facts(), &self.options);
    }

    fn read_status(&mut self) -> u32 {
        if let Health::ResetDue(since) = self.health
            && since.elapsed() >= self.options.retry
        {
            self.reset();
        }
        self.status().bits() & 0xff
    }

    fn write_status(&mut self, value: u32) {
        // One byte in one layout, four in the other.
        let written = DeviceStatus::from_bits_retain(value & 0xff);
        if written.is_empty() {
            self.reset();
            return;
        }
        let mut asked = (written & WRITABLE) | self.status;
        let new = asked & !self.status;
        match self.health {
            Health::Well => {}
            Health::Broken => {
                // What the driver says of itself.
                self.status |= new & !(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
                return;
            }
            Health::ResetDue(_) => return,
        }
        if new.is_empty() {
            return;
        }
        if new.contains(DeviceStatus::FEATURES_OK) && !self.settle_features() {
            asked.remove(DeviceStatus::FEATURES_OK);
        }
        if !asked.contains(DeviceStatus::FEATURES_OK) {
            asked.remove(DeviceStatus::DRIVER_OK);
        }
        if !self.is_well() || asked == self.status {
            return;
        }
        // Drivers do not look whether DRIVER_OK was taken, but wait for interrupts.
        let ready = asked.contains(DeviceStatus::DRIVER_OK);
        match self.backend.set_status(asked) {
            Ok(status) => {
                self.status = status & asked;
                self.driver_ready |= ready && status.contains(DeviceStatus::FEATURES_OK);
                if status.contains(DeviceStatus::NEEDS_RESET) && !self.needs_reset {
                    self.needs_reset = true;
                    self.ask_for_config_interrupt();
                }
            }
            Err(error) => {
                self.driver_ready |= ready;
                self.fail("setting the status", &error);
            }
        }
    }

    /// Whether the device can be asked for FEATURES_OK.
    fn settle_features(&mut self) -> bool {
        let foreign = self.accepted.difference(&self.offered);
        let modern = self.accepted.bit(feature::VERSION_1) || !self.offered.bit(feature::VERSION_1);
        if !foreign.is_empty() || !modern {
            return false;
        }
        let passed = OWN.iter().fold(self.accepted, |set, &bit| set.without(bit));
        match self.backend.set_features(passed) {
            Ok(()) => true,
            // Between the offer and now another build of the device may have come.
            Err(OpError::NotOffered(_)) => false,
            Err(error) => {
                self.fail("setting the features", &error);
                false
            }
        }
    }

    // Registers

    pub(super) fn read(&mut self, register: Register) -> u32 {
        match register {
            Register::DeviceFeatureSelect => self.device_select,
            Register::DeviceFeature => block(&self.offered, self.device_select),
            Register::DriverFeatureSelect => self.driver_select,
            Register::DriverFeature => block(&self.accepted, self.driver_select),
            Register::QueueCount => u32::try_from(self.queues.len()).unwrap_or(0),
            Register::Status => self.read_status(),
            Register::Generation => self.read_generation(),
            Register::QueueSelect => self.queue_select,
            Register::QueueSize => self.selected().map_or(0, |queue| queue.size.into()),
            Register::QueueSizeMax => self.selected().map_or(0, |queue| queue.max.into()),
            Register::QueueReady | Register::QueueEnable => {
                self.retry_stop();
                self.selected().map_or(0, |queue| queue.enabled.into())
            }
            Register::QueueReset => {
                self.retry_stop();
                self.selected()
                    .map_or(0, |queue| queue.stop_due.is_some().into())
            }
            Register::Address(address) => self.selected().map_or(0, |queue| queue.half(address)),
        }
    }

    pub(super) fn write(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeatureSelect => self.device_select = value,
            Register::DriverFeatureSelect => self.driver_select = value,
            Register::DriverFeature => {
                let settled = self.status.contains(DeviceStatus::FEATURES_OK);
                if !settled && self.driver_select < FEATURE_BLOCKS {
                    self.accepted.set_block(self.driver_select, value);
                }
            }
            Register::Status => self.write_status(value),
            Register::QueueSelect => self.queue_select = value,
            Register::QueueSize => {
                // What is too large for every queue is kept as such.
                let size = u16::try_from(value).unwrap_or(u16::MAX);
                if let Some(queue) = self.changeable() {
                    queue.size = size;
                }
            }
            Register::QueueReady => match value {
                1 => self.start_selected(),
                0 => self.stop_selected(),
                _ => {}
            },
            Register::QueueEnable if value == 1 => self.start_selected(),
            Register::QueueReset if value == 1 && self.accepted.bit(feature::RING_RESET) => {
                if self.status.contains(DeviceStatus::FEATURES_OK) {
                    self.stop_selected();
                }
            }
            Register::Address(address) => {
                if let Some(queue) = self.changeable() {
                    queue.set_half(address, value);
                }
            }
            Register::DeviceFeature
            | Register::QueueCount
            | Register::Generation
            | Register::QueueSizeMax
            | Register::QueueEnable
            | Register::QueueReset => {}
        }
    }

    /// The driver says that there are buffers.
    pub(super) fn notify(&mut self, queue: u32) {
        let enabled = usize::try_from(queue)
            .ok()
            .and_then(|index| self.queues.get(index))
            .is_some_and(|queue| queue.enabled);
        if enabled && self.is_well() {
            self.backend.kick(QueueIndex(queue));
        }
    }

    // Queues

    fn selected_index(&self) -> Option<usize> {
        usize::try_from(self.queue_select)
            .ok()
            .filter(|&index| index < self.queues.len())
    }

    /// The index of the selected queue, if there is such a queue.
    pub(super) fn selected_queue(&self) -> Option<usize> {
        self.selected().and(self.selected_index())
    }

    /// The selected queue; one with a largest size of 0 does not exist.
    fn selected(&self) -> Option<&Queue> {
        self.queues
            .get(self.selected_index()?)
            .filter(|queue| queue.max != 0)
    }

    /// The selected queue, if its registers can be written now.
    fn changeable(&mut self) -> Option<&mut Queue> {
        let index = self.selected_index()?;
        self.queues
            .get_mut(index)
            .filter(|queue| queue.max != 0 && !queue.enabled)
    }

    fn start_selected(&mut self) {
        let packed = self.accepted.bit(feature::RING_PACKED);
        let settled = self.status.contains(DeviceStatus::FEATURES_OK);
        let Some((index, queue)) = self.selected_index().zip(self.selected()) else {
            return;
        };
        if queue.enabled || !settled || !queue.can_start(packed) || !self.is_well() {
            return;
        }
        let setup = QueueSetup {
            size: queue.size,
            descriptor: queue.descriptor,
            driver: queue.driver,
            device: queue.device,
            resume: ResumeAt::Start,
        };
        let name = QueueIndex(self.queue_select);
        match self.backend.start_queue(name, setup) {
            Ok(()) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.enabled = true;
                }
            }
            Err(error) => self.fail("setting a queue up", &error),
        }
    }

    fn stop_selected(&mut self) {
        let Some((index, queue)) = self.selected_index().zip(self.selected()) else {
            return;
        };
        if matches!(self.health, Health::ResetDue(_)) {
            return;
        }
        if !queue.enabled {
            // Nothing uses it, but what was written to it goes.
            let max = queue.max;
            if let Some(queue) = self.queues.get_mut(index) {
                *queue = Queue::new(max);
            }
            return;
        }
        self.stop(index);
    }

    fn stop(&mut self, index: usize) {
        let name = QueueIndex(u32::try_from(index).unwrap_or(u32::MAX));
        let stopped = self.backend.stop_queue(name);
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        match stopped {
            Ok(()) => *queue = Queue::new(queue.max),
            Err(error) => {
                // The device may use it still, and so the queue goes on reading as enabled.
                queue.stop_due = Some(Instant::now());
                self.fail("resetting a queue", &error);
            }
        }
    }

    /// A driver waits for the end of the selected queue.
    fn retry_stop(&mut self) {
        let due = self
            .selected()
            .and_then(|queue| queue.stop_due)
            .is_some_and(|since| since.elapsed() >= self.options.retry);
        if let Some(index) = self.selected_index().filter(|_| due) {
            self.stop(index);
        }
    }
}

/// What a driver is offered of what a device has.
fn offer(facts: &DeviceFacts, options: &Options) -> FeatureSet {
    let mut offered = FeatureSet::EMPTY;
    for block in 0..FEATURE_BLOCKS {
        offered.set_block(block, facts.offered.block(block));
    }
    for bit in WITHHELD {
        offered.remove(bit);
    }
    offered.set(feature::ACCESS_PLATFORM, options.access_platform);
    offered.set(feature::NOTIFICATION_DATA, options.notification_data);
    offered
}

/// The selected block of features.
fn block(features: &FeatureSet, select: u32) -> u32 {
    if select < FEATURE_BLOCKS {
        features.block(select)
    } else {
        0
    }
}
