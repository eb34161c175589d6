// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files whose parts become windows without being mapped anew, and memory of devices.

use super::{MORE, WRITABLE};
use virtio_msg::DevNum;
use vmsg_mem::BusAddr;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// BACKING_ADD: a file that the device side maps once, and that has no bus address of its own; with the file as only descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingAdd {
    /// Name of the backing on this connection. Backings and windows have names of their own.
    pub id: u32,
    /// Whether views may be writable.
    pub writable: bool,
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins in the file, in bytes.
    pub file_offset: u64,
}

/// The backing that is there from the start on a bus whose ends have memory in common ([`Capabilities::views`](crate::Capabilities::views)
/// without [`passes_fds`](crate::Capabilities::passes_fds)): that memory. It is neither added nor removed.
pub const COMMON_BACKING: u32 = u32::MAX;

/// On such a bus each device has windows and bus addresses of its own, and their ids say whose they are.
///
/// `number` is one of the window's own, below 0x10000.
pub const fn window_of_device(dev: DevNum, number: u32) -> u32 {
    (dev.0 as u32) << 16 | number & 0xffff
}

/// The number of the device that a window belongs to, on such a bus.
pub const fn device_of_window(id: u32) -> u16 {
    let [.., low, high] = id.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// VIEW_ADD: a window that is a part of a backing. [`Request::WindowRemove`](super::Request::WindowRemove) removes it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewAdd {
    /// Name of the window on this connection; windows and views share their names.
    pub id: u32,
    /// Whether the device may write.
    pub writable: bool,
    /// The backing that it is a part of, or [`COMMON_BACKING`].
    pub backing: u32,
    /// Where it lies on the bus.
    pub base: BusAddr,
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins in the backing, in bytes.
    pub offset: u64,
    /// More changes follow, as in [`WindowAdd::more`](super::WindowAdd::more).
    pub more: bool,
}

/// A shared-memory region of a device: the part of a file that comes as the answer's only descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins in the file, in bytes.
    pub file_offset: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct BackingAddWire {
    id: U32,
    flags: U32,
    len: U64,
    file_offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ViewAddWire {
    id: U32,
    flags: U32,
    backing: U32,
    zero: U32,
    base: U64,
    len: U64,
    offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct SharedMemoryWire {
    pub(super) dev: U16,
    zero: U16,
    pub(super) id: U32,
}

impl SharedMemoryWire {
    pub(super) fn new(dev: DevNum, id: u32) -> Self {
        Self {
            dev: dev.0.into(),
            zero: U16::ZERO,
            id: id.into(),
        }
    }
}

impl From<BackingAdd> for BackingAddWire {
    fn from(b: BackingAdd) -> Self {
        Self {
            id: b.id.into(),
            flags: U32::new(if b.writable { WRITABLE } else { 0 }),
            len: b.len.into(),
            file_offset: b.file_offset.into(),
        }
    }
}

impl From<BackingAddWire> for BackingAdd {
    fn from(w: BackingAddWire) -> Self {
        Self {
            id: w.id.get(),
            writable: w.flags.get() & WRITABLE != 0,
            len: w.len.get(),
            file_offset: w.file_offset.get(),
        }
    }
}

impl From<ViewAdd> for ViewAddWire {
    fn from(v: ViewAdd) -> Self {
        Self {
            id: v.id.into(),
            flags: U32::new(if v.writable { WRITABLE } else { 0 } | if v.more { MORE } else { 0 }),
            backing: v.backing.into(),
            zero: U32::ZERO,
            base: v.base.0.into(),
            len: v.len.into(),
            offset: v.offset.into(),
        }
    }
}

impl From<ViewAddWire> for ViewAdd {
    fn from(w: ViewAddWire) -> Self {
        Self {
            id: w.id.get(),
            writable: w.flags.get() & WRITABLE != 0,
            backing: w.backing.get(),
            base: BusAddr(w.base.get()),
            len: w.len.get(),
            offset: w.offset.get(),
            more: w.flags.get() & MORE != 0,
        }
    }
}
