// SPDX-License-Identifier: Apache-2.0 OR MIT
//! virtio-mmio, version 2 (virtio 1.3 §4.2.2).

use super::core::{Address, Register};
use super::registers::{Slot, read, slot, write};
use super::{Backend, Core, Options};
use virtio_msg::QueueIndex;

/// Where the configuration space begins.
const CONFIG: u64 = 0x100;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;

/// Interrupt status: a queue has used buffers.
const USED: u32 = 1;
/// Interrupt status: the configuration has changed.
const CONFIG_CHANGED: u32 = 2;

#[derive(Clone, Copy, Debug)]
enum Reg {
    Magic,
    Version,
    DeviceId,
    VendorId,
    InterruptStatus,
    InterruptAck,
    Notify,
    ShmSelect,
    ShmLenLow,
    ShmLenHigh,
    ShmBaseLow,
    ShmBaseHigh,
    /// Read and written.
    Core(Register),
    /// Only written: reads as 0.
    Write(Register),
}

const REGISTERS: [Slot<Reg>; 29] = [
    slot(0x00, 4, Reg::Magic),
    slot(0x04, 4, Reg::Version),
    slot(0x08, 4, Reg::DeviceId),
    slot(0x0c, 4, Reg::VendorId),
    slot(0x10, 4, Reg::Core(Register::DeviceFeature)),
    slot(0x14, 4, Reg::Write(Register::DeviceFeatureSelect)),
    slot(0x20, 4, Reg::Write(Register::DriverFeature)),
    slot(0x24, 4, Reg::Write(Register::DriverFeatureSelect)),
    slot(0x30, 4, Reg::Write(Register::QueueSelect)),
    slot(0x34, 4, Reg::Core(Register::QueueSizeMax)),
    slot(0x38, 4, Reg::Write(Register::QueueSize)),
    slot(0x44, 4, Reg::Core(Register::QueueReady)),
    slot(0x50, 4, Reg::Notify),
    slot(0x60, 4, Reg::InterruptStatus),
    slot(0x64, 4, Reg::InterruptAck),
    slot(0x70, 4, Reg::Core(Register::Status)),
    slot(
        0x80,
        4,
        Reg::Write(Register::Address(Address::DESCRIPTOR_LOW)),
    ),
    slot(
        0x84,
        4,
        Reg::Write(Register::Address(Address::DESCRIPTOR_HIGH)),
    ),
    slot(0x90, 4, Reg::Write(Register::Address(Address::DRIVER_LOW))),
    slot(0x94, 4, Reg::Write(Register::Address(Address::DRIVER_HIGH))),
    slot(0xa0, 4, Reg::Write(Register::Address(Address::DEVICE_LOW))),
    slot(0xa4, 4, Reg::Write(Register::Address(Address::DEVICE_HIGH))),
    slot(0xac, 4, Reg::ShmSelect),
    slot(0xb0, 4, Reg::ShmLenLow),
    slot(0xb4, 4, Reg::ShmLenHigh),
    slot(0xb8, 4, Reg::ShmBaseLow),
    slot(0xbc, 4, Reg::ShmBaseHigh),
    slot(0xc0, 4, Reg::Core(Register::QueueReset)),
    slot(0xfc, 4, Reg::Core(Register::Generation)),
];

/// Where in the guest's memory a shared-memory region of the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedAt {
    /// Its number among those of the device.
    pub id: u8,
    /// Guest physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

/// A register bank with one level-triggered interrupt line.
#[derive(Debug)]
pub struct Mmio<B> {
    core: Core<B>,
    interrupts: u32,
    shared: Vec<SharedAt>,
    shared_select: u32,
}

impl<B: Backend> Mmio<B> {
    /// The bank of a device that was reset. `shared`: what of its shared memory the guest has, and where.
    pub fn new(backend: B, options: Options, shared: Vec<SharedAt>) -> Mmio<B> {
        Mmio {
            core: Core::new(backend, options),
            interrupts: 0,
            shared,
            shared_select: 0,
        }
    }

    /// The registers that all layouts have.
    pub fn core(&self) -> &Core<B> {
        &self.core
    }

    /// What stands behind.
    pub fn backend_mut(&mut self) -> &mut B {
        self.core.backend_mut()
    }

    /// Bytes of the bank, configuration included.
    pub fn size(&self) -> u64 {
        CONFIG + u64::from(self.core.config_size())
    }

    /// Whether the interrupt line is raised: until the driver has acknowledged all that the interrupt status says.
    pub fn line(&self) -> bool {
        self.interrupts != 0
    }

    /// The driver reads.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (registers, config) = split(offset, data.len());
        let (head, tail) = data.split_at_mut(registers);
        let Mmio {
            core,
            interrupts,
            shared,
            shared_select,
        } = self;
        let chosen = shared.iter().find(|at| u32::from(at.id) == *shared_select);
        // "All ones" is what there is not (§4.2.2).
        let (len, base) = chosen.map_or((u64::MAX, u64::MAX), |at| (at.len, at.base));
        read(&REGISTERS, offset, head, |register| match register {
            Reg::Magic => MAGIC,
            Reg::Version => VERSION,
            Reg::DeviceId => core.device_id(),
            Reg::VendorId => core.backend().facts().info.vendor_id,
            Reg::InterruptStatus => *interrupts,
            Reg::ShmLenLow => low(len),
            Reg::ShmLenHigh => low(len >> 32),
            Reg::ShmBaseLow => low(base),
            Reg::ShmBaseHigh => low(base >> 32),
            Reg::Core(register) => core.read(register),
            Reg::Write(_) | Reg::InterruptAck | Reg::Notify | Reg::ShmSelect => 0,
        });
        if let Some(at) = config {
            core.read_config(at, tail);
        }
        self.settle();
    }

    /// The driver writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (registers, config) = split(offset, data.len());
        let (head, tail) = data.split_at(registers);
        let Mmio {
            core,
            interrupts,
            shared: _,
            shared_select,
        } = self;
        write(&REGISTERS, offset, head, |register, value| match register {
            Reg::InterruptAck => *interrupts &= !value,
            // With NOTIFICATION_DATA the upper half says where in the queue.
            Reg::Notify => core.notify(value & 0xffff),
            Reg::ShmSelect => *shared_select = value,
            Reg::Core(register) | Reg::Write(register) => core.write(register, value),
            Reg::Magic
            | Reg::Version
            | Reg::DeviceId
            | Reg::VendorId
            | Reg::InterruptStatus
            | Reg::ShmLenLow
            | Reg::ShmLenHigh
            | Reg::ShmBaseLow
            | Reg::ShmBaseHigh => {}
        });
        if let Some(at) = config {
            core.write_config(at, tail);
        }
        self.settle();
    }

    /// The device has used buffers of `queue`.
    pub fn queue_used(&mut self, queue: QueueIndex) {
        if self.core.is_live(queue) {
            self.interrupts |= USED;
        }
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

    /// Resets the device and the bank.
    pub fn reset(&mut self) {
        self.core.reset();
        self.settle();
    }

    fn settle(&mut self) {
        if self.core.take_reset() {
            self.interrupts = 0;
            self.shared_select = 0;
        }
        if self.core.take_config_interrupt() {
            self.interrupts |= CONFIG_CHANGED;
        }
    }
}

/// How many bytes of an access are before the configuration space, and where in that the others begin.
fn split(offset: u64, len: usize) -> (usize, Option<u64>) {
    let before = CONFIG.saturating_sub(offset);
    let before = usize::try_from(before).unwrap_or(usize::MAX).min(len);
    (
        before,
        (before < len).then(|| offset.saturating_sub(CONFIG)),
    )
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn low(value: u64) -> u32 {
    value as u32
}
