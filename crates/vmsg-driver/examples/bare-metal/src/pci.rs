// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's ivshmem function: its memory and its doorbell. Without firmware nobody has given it addresses; this does.
//!
//! Registers: PCI Local Bus Specification 3.0 §6.1, QEMU's docs/specs/ivshmem-spec.

use core::ptr::NonNull;

use vmsg_mem::DeviceRegion;

/// The configuration space of bus 0 on a machine with `highmem=off`, 32 KiB for each slot.
const CONFIG: usize = 0x3f00_0000;
const SLOTS: usize = 32;
const SLOT: usize = 32 << 10;

/// Where functions may have memory there: registers, then what is shared.
const REGISTERS: usize = 0x1000_0000;
const VECTORS: usize = 0x1000_1000;
const SHARED: usize = 0x1800_0000;
const SHARED_END: usize = 0x3800_0000;

/// Vendor 1af4, device 1110.
const IVSHMEM: u32 = 0x1110_1af4;

/// In the configuration space: command, and the first BAR.
const COMMAND: usize = 0x04;
const MEMORY: u32 = 1 << 1;
const BAR: usize = 0x10;

/// In BAR0: the doorbell. The high half is whom, the low half which vector.
const DOORBELL: usize = 12;
/// The device host that listens has this id, and its bus this vector.
const HOST: u32 = 0;

fn region(at: usize, len: usize) -> Option<DeviceRegion<'static>> {
    let start = NonNull::new(at as *mut u8)?;
    // SAFETY: below 1 GiB there are devices only, mapped as such for good, and nothing of this program.
    Some(unsafe { DeviceRegion::from_raw_parts(start, len) })
}

/// The memory that the ivshmem function shares; after this [`ring`] works. `None` if there is no such function or its memory does not fit.
pub fn shared_memory() -> Option<DeviceRegion<'static>> {
    let function = (0..SLOTS)
        .filter_map(|slot| region(CONFIG + slot * SLOT, 4096))
        .find(|config| config.read_u32(0) == Some(IVSHMEM))?;
    // What is not writable of all ones says how long it is; the low bits are of another kind.
    let shared = BAR + 8;
    set(&function, shared, !0)?;
    let mask = function.read_u32(shared)? & !0xf;
    let len = usize::try_from(mask.wrapping_neg()).ok()?;
    let start = SHARED.next_multiple_of(len.max(1));
    if len == 0 || start.checked_add(len)? > SHARED_END {
        return None;
    }
    set(&function, BAR, low(REGISTERS))?;
    set(&function, BAR + 4, low(VECTORS))?;
    set(&function, shared, low(start))?;
    set(&function, shared + 4, 0)?;
    set(&function, COMMAND, MEMORY)?;
    region(start, len)
}

fn low(address: usize) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

fn set(function: &DeviceRegion<'_>, at: usize, value: u32) -> Option<()> {
    function.write_u32(at, value).then_some(())
}

/// Rings the device host.
pub fn ring() {
    if let Some(registers) = region(REGISTERS, 256) {
        // There is such a register.
        let _ = registers.write_u32(DOORBELL, HOST << 16);
    }
}
