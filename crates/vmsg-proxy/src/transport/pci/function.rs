// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The function.

use super::super::trigger::{Trigger, TriggerError};
use super::super::{Backend, Core, Options, SharedMemory, registers};
use super::bars::{
    MSIX_BAR, Part, SHARED_BAR, SharedAt, VIRTIO_BAR, VIRTIO_BAR_SIZE, overlap, place, shared_size,
};
use super::common::{self, Common};
use super::config::{self, ConfigSpace, Facts};
use super::intx::Intx;
use super::msix::{Msix, NO_VECTOR};
use super::{Irq, Region, Route};
use crate::log_limit::LogLimit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::QueueIndex;

/// ISR: a queue has used buffers.
const USED: u8 = 1;
/// ISR: the configuration has changed.
const CONFIG_CHANGED: u8 = 2;

/// Which vector tells of what.
#[derive(Debug)]
struct Vectors {
    config: u16,
    queues: Vec<u16>,
}

impl Vectors {
    fn reset(&mut self) {
        self.config = NO_VECTOR;
        self.queues.fill(NO_VECTOR);
    }
}

/// A virtio device as a PCI function.
///
/// Accesses of any width at any offset are defined and end; what nobody answers reads as all ones.
#[derive(Debug)]
pub struct Function<B> {
    core: Core<B>,
    config: ConfigSpace,
    msix: Msix,
    intx: Intx,
    err: Option<Trigger>,
    req: Option<Trigger>,
    isr: u8,
    vectors: Vectors,
    shared: Vec<SharedAt>,
    /// The routes as they were told last.
    told: Vec<Route>,
    /// They may be others now.
    routes_stale: bool,
}

impl<B: Backend> Function<B> {
    /// The function of a device that was reset. Up to three shared-memory regions have room.
    pub fn new(backend: B, options: Options, shared: Vec<SharedMemory>) -> Function<B> {
        let core = Core::new(backend, options);
        let queues = core.queue_count();
        let msix = Msix::new(queues);
        let shared = place(shared, config::MAX_SHARED);
        let config = ConfigSpace::new(&Facts {
            device_id: core.device_id(),
            queues,
            config_size: core.config_size(),
            msix: &msix,
            shared: &shared,
        });
        Function {
            core,
            config,
            msix,
            intx: Intx::default(),
            err: None,
            req: None,
            isr: 0,
            vectors: Vectors {
                config: NO_VECTOR,
                queues: vec![NO_VECTOR; queues],
            },
            shared,
            told: vec![Route::Through; queues],
            routes_stale: false,
        }
    }

    /// What is said about the device counts here.
    pub(crate) fn log_with(&mut self, limit: Arc<LogLimit>) {
        self.core.log_with(limit);
    }

    /// The registers that all layouts have.
    pub fn core(&self) -> &Core<B> {
        &self.core
    }

    /// What stands behind.
    pub fn backend(&self) -> &B {
        self.core.backend()
    }

    /// What stands behind. What is done to it here does not show in the registers.
    pub fn backend_mut(&mut self) -> &mut B {
        self.core.backend_mut()
    }

    /// Number of MSI-X vectors.
    pub fn vectors(&self) -> u16 {
        self.msix.count()
    }

    /// Bytes of a region; 0: there is none.
    pub fn region_size(&self, region: Region) -> u64 {
        match region {
            Region::Config => config::SIZE as u64,
            Region::Bar(MSIX_BAR) => self.msix.bar_size(),
            Region::Bar(SHARED_BAR) => shared_size(&self.shared),
            Region::Bar(VIRTIO_BAR) => VIRTIO_BAR_SIZE,
            Region::Bar(_) => 0,
        }
    }

    /// The shared-memory regions with their places in BAR 2. They may be mapped.
    pub fn shared_layout(&self) -> &[SharedAt] {
        &self.shared
    }

    // Accesses

    /// The driver reads.
    pub fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Config => {
                let at = self.config.window_data();
                if overlap(offset, data.len(), at, 4).is_some() {
                    self.read_window();
                }
                self.config.read(offset, data, self.line());
            }
            Region::Bar(bar) => self.read_bar(bar, offset, data),
        }
        self.settle();
    }

    /// The driver writes.
    pub fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Config => {
                self.config.write(offset, data);
                let (enabled, masked) = self.config.msix();
                self.msix.set_control(enabled, masked);
                self.routes_stale = true;
                let at = self.config.window_data();
                if let Some((0, written)) = overlap(offset, data.len(), at, 4) {
                    self.write_window(written.len());
                }
            }
            Region::Bar(bar) => self.write_bar(bar, offset, data),
        }
        self.settle();
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let size = self.region_size(Region::Bar(bar));
        let Some(data) = overlap(offset, data.len(), 0, size).and_then(|(_, r)| data.get_mut(r))
        else {
            return;
        };
        data.fill(0);
        match bar {
            MSIX_BAR => self.msix.read(offset, data),
            SHARED_BAR => self.read_shared(offset, data),
            _ => {
                for part in Part::ALL {
                    let len = data.len();
                    if let Some((at, range)) = part.of_access(offset, len)
                        && let Some(data) = data.get_mut(range)
                    {
                        self.read_part(part, at, data);
                    }
                }
            }
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let size = self.region_size(Region::Bar(bar));
        let Some(data) = overlap(offset, data.len(), 0, size).and_then(|(_, r)| data.get(r)) else {
            return;
        };
        match bar {
            MSIX_BAR => {
                self.msix.write(offset, data);
                self.routes_stale = true;
            }
            SHARED_BAR => self.write_shared(offset, data),
            _ => {
                for part in Part::ALL {
                    if let Some((at, range)) = part.of_access(offset, data.len())
                        && let Some(data) = data.get(range)
                    {
                        self.write_part(part, at, data);
                    }
                }
            }
        }
    }

    fn read_part(&mut self, part: Part, at: u64, data: &mut [u8]) {
        match part {
            Part::Common => {
                let Function { core, vectors, .. } = self;
                registers::read(&common::REGISTERS, at, data, |register| match register {
                    Common::Core(register) => core.read(register),
                    Common::ConfigVector => vectors.config.into(),
                    Common::QueueVector => {
                        let queue = core.selected_queue();
                        let vector = queue.and_then(|queue| vectors.queues.get(queue));
                        vector.copied().unwrap_or(NO_VECTOR).into()
                    }
                    Common::NotifyOffset | Common::NotifyData => core
                        .selected_queue()
                        .and_then(|queue| u32::try_from(queue).ok())
                        .unwrap_or(0),
                });
            }
            Part::Isr => {
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = std::mem::take(&mut self.isr);
                }
            }
            Part::Device => self.core.read_config(at, data),
            // Only written.
            Part::Notify => {}
        }
    }

    fn write_part(&mut self, part: Part, at: u64, data: &[u8]) {
        match part {
            Part::Common => {
                let count = self.msix.count();
                let vector = |value: u32| {
                    u16::try_from(value)
                        .ok()
                        .filter(|&vector| vector < count)
                        .unwrap_or(NO_VECTOR)
                };
                let Function {
                    core,
                    vectors,
                    routes_stale,
                    ..
                } = self;
                registers::write(
                    &common::REGISTERS,
                    at,
                    data,
                    |register, value| match register {
                        Common::Core(register) => core.write(register, value),
                        Common::ConfigVector => vectors.config = vector(value),
                        Common::QueueVector => {
                            let queue = core.selected_queue();
                            if let Some(out) = queue.and_then(|q| vectors.queues.get_mut(q)) {
                                *out = vector(value);
                                *routes_stale = true;
                            }
                        }
                        Common::NotifyOffset | Common::NotifyData => {}
                    },
                );
            }
            // Only read.
            Part::Isr => {}
            Part::Device => self.core.write_config(at, data),
            Part::Notify => self.notify(at, data.len()),
        }
    }

    /// The place says which queue it is; with NOTIFICATION_DATA, what is written says where in it.
    fn notify(&mut self, at: u64, len: usize) {
        let end = at + len as u64;
        let first = at.div_ceil(super::bars::NOTIFY_MULTIPLIER.into());
        for queue in first.. {
            // The index takes two bytes.
            if queue * u64::from(super::bars::NOTIFY_MULTIPLIER) + 2 > end {
                return;
            }
            let Ok(queue) = u32::try_from(queue) else {
                return;
            };
            self.core.notify(queue);
        }
    }

    fn read_window(&mut self) {
        if let Some(window) = self.config.window()
            && self.is_structure(window.bar)
        {
            let mut data = [0; 4];
            if let Some(data) = data.get_mut(..window.len) {
                self.read_bar(window.bar, window.offset, data);
            }
            self.config.set_data(&data);
        }
    }

    fn write_window(&mut self, written: usize) {
        if let Some(window) = self.config.window()
            && self.is_structure(window.bar)
            && written >= window.len
        {
            let data = self.config.data();
            if let Some(data) = data.get(..window.len) {
                self.write_bar(window.bar, window.offset, data);
            }
        }
    }

    /// Whether a BAR holds what the capabilities of virtio tell of.
    fn is_structure(&self, bar: u8) -> bool {
        bar == VIRTIO_BAR || bar == SHARED_BAR
    }

    fn read_shared(&self, offset: u64, data: &mut [u8]) {
        for shared in &self.shared {
            if let Some((at, range)) = overlap(offset, data.len(), shared.offset, shared.memory.len)
                && let Some(data) = data.get_mut(range)
            {
                let Some(at) = shared.memory.file_offset.checked_add(at) else {
                    continue;
                };
                // What the file does not have, or refuses, reads as 0.
                let _ = rustix::io::pread(&shared.memory.file, data, at);
            }
        }
    }

    fn write_shared(&self, offset: u64, data: &[u8]) {
        for shared in &self.shared {
            if let Some((at, range)) = overlap(offset, data.len(), shared.offset, shared.memory.len)
                && let (Some(data), Some(at)) =
                    (data.get(range), shared.memory.file_offset.checked_add(at))
            {
                // A region that the device only lets read ignores what is written.
                let _ = rustix::io::pwrite(&shared.memory.file, data, at);
            }
        }
    }

    // Interrupts

    /// Whether the interrupt line is raised, as the status register says it.
    fn line(&self) -> bool {
        self.isr != 0 && !self.msix.is_active()
    }

    /// The eventfd of an interrupt from now on.
    ///
    /// # Errors
    /// [`TriggerError`]; the one before stays.
    pub fn set_trigger(
        &mut self,
        irq: Irq,
        file: Option<Arc<OwnedFd>>,
    ) -> Result<(), TriggerError> {
        let trigger = file.map(Trigger::new).transpose()?;
        match irq {
            Irq::Intx => self.intx.set_trigger(trigger),
            Irq::Msix(vector) => {
                if !self.msix.set_trigger(vector, trigger) {
                    return Err(TriggerError::NoSuchInterrupt);
                }
            }
            Irq::Err => self.err = trigger,
            Irq::Req => self.req = trigger,
        }
        self.routes_stale = true;
        self.settle();
        Ok(())
    }

    /// Holds an interrupt back.
    pub fn mask(&mut self, irq: Irq) {
        self.set_masked(irq, true);
    }

    /// Lets an interrupt through again; what was held back comes now.
    pub fn unmask(&mut self, irq: Irq) {
        self.set_masked(irq, false);
    }

    fn set_masked(&mut self, irq: Irq, masked: bool) {
        match irq {
            Irq::Intx => self.intx.set_masked(masked),
            Irq::Msix(vector) => {
                self.msix.set_masked(vector, masked);
                self.routes_stale = true;
            }
            Irq::Err | Irq::Req => {}
        }
        self.settle();
    }

    /// Rings an eventfd without anything having happened: a client tests it.
    pub fn trigger(&self, irq: Irq) {
        match irq {
            Irq::Intx => self.intx.ring(),
            Irq::Msix(vector) => self.msix.ring(vector),
            Irq::Err => self.err.iter().for_each(Trigger::ring),
            Irq::Req => self.req.iter().for_each(Trigger::ring),
        }
    }

    /// The device has used buffers of `queue`, and the driver is to be told.
    pub fn queue_used(&mut self, queue: QueueIndex) {
        if self.core.is_live(queue) {
            let vector = self.vectors.queues.get(queue.to_usize()).copied();
            self.raise(vector.unwrap_or(NO_VECTOR), USED);
        }
        self.settle();
    }

    /// The device has another configuration.
    pub fn config_changed(&mut self) {
        self.core.config_changed();
        self.settle();
    }

    /// The device needs a reset.
    pub fn needs_reset(&mut self) {
        self.core.needs_reset();
        self.settle();
    }

    /// A reset of the function: the device, the configuration space and the MSI-X table. Eventfds stay.
    pub fn reset(&mut self) {
        self.core.reset();
        self.config.reset();
        self.msix.reset();
        self.intx.set_masked(false);
        self.settle();
    }

    fn raise(&mut self, vector: u16, reason: u8) {
        if self.msix.is_active() {
            self.msix.raise(vector);
        } else {
            self.isr |= reason;
        }
    }

    /// Brings everything in line after anything happened.
    fn settle(&mut self) {
        if self.core.take_reset() {
            self.isr = 0;
            self.vectors.reset();
            self.msix.forget_pending();
            self.routes_stale = true;
        }
        if self.core.take_config_interrupt() {
            self.raise(self.vectors.config, CONFIG_CHANGED);
        }
        let raised = self.line() && !self.config.intx_disabled();
        self.intx.level(raised);
    }

    // Routes

    /// How the driver is told of used buffers in `queue`.
    pub fn route(&self, queue: QueueIndex) -> Route {
        if self.msix.is_active() {
            self.message_route(queue)
        } else {
            Route::Through
        }
    }

    /// The same while interrupts are messages.
    fn message_route(&self, queue: QueueIndex) -> Route {
        let vector = self.vectors.queues.get(queue.to_usize()).copied();
        match vector {
            None | Some(NO_VECTOR) => Route::Nobody,
            Some(vector) => match self.msix.open(vector) {
                Some(file) => Route::Direct(file.clone()),
                None => Route::Through,
            },
        }
    }

    /// The routes of all queues that are others than at the last call. At first each is [`Route::Through`].
    pub fn take_route_changes(&mut self) -> Vec<(QueueIndex, Route)> {
        let mut changes = Vec::new();
        if !std::mem::take(&mut self.routes_stale) {
            return changes;
        }
        // Looks at all vectors, of which there are as many as queues.
        let active = self.msix.is_active();
        for index in 0..self.told.len() {
            let queue = QueueIndex(u32::try_from(index).unwrap_or(u32::MAX));
            let route = if active {
                self.message_route(queue)
            } else {
                Route::Through
            };
            if let Some(told) = self.told.get_mut(index)
                && *told != route
            {
                *told = route.clone();
                changes.push((queue, route));
            }
        }
        changes
    }
}
