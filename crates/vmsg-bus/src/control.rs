// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of our own buses: windows, views, eventfds and vectors per queue, claims, names, memory of devices.
//!
//! docs/bus-unix.md §5, docs/bus-ivshmem.md. On the wire these are bus messages with ids from 0x80
//! ([`Message::BusSpecific`](virtio_msg::Message)); here are their payloads,
//! as they come after the 8 bytes of header. Decoding is total: any bytes give
//! a value or an error.

mod display;
mod memory;
mod response;
mod vectors;

pub use display::name;
pub use memory::{
    BackingAdd, COMMON_BACKING, SharedMemory, ViewAdd, device_of_window, window_of_device,
};
pub use response::Response;
pub use vectors::QueueVectors;

use std::fmt;
use virtio_msg::{DevNum, QueueIndex};
use vmsg_mem::BusAddr;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Ids of the messages.
pub mod id {
    /// Lends a window, with one file descriptor.
    pub const WINDOW_ADD: u8 = 0x80;
    /// Takes a window back.
    pub const WINDOW_REMOVE: u8 = 0x81;
    /// Gives a queue eventfds for kick and call.
    pub const QUEUE_NOTIFY: u8 = 0x82;
    /// Says where a queue goes on at its next set-up.
    pub const QUEUE_RESUME: u8 = 0x83;
    /// Claims or releases a device.
    pub const CLAIM: u8 = 0x84;
    /// Asks for the name of a device.
    pub const DEVICE_NAME: u8 = 0x85;
    /// Lends the record of what is in flight in a queue, with one file descriptor.
    pub const QUEUE_INFLIGHT: u8 = 0x86;
    /// Lends a file for views, with it as only file descriptor.
    pub const BACKING_ADD: u8 = 0x87;
    /// Takes a file for views back.
    pub const BACKING_REMOVE: u8 = 0x88;
    /// Makes a window of a part of such a file.
    pub const VIEW_ADD: u8 = 0x89;
    /// Asks for memory of a device; the answer has a file descriptor.
    pub const SHARED_MEMORY: u8 = 0x8a;
    /// Says which doorbell vectors a queue is kicked and calls by.
    pub const QUEUE_VECTORS: u8 = 0x8b;
    /// Stands in a queue for a message that came over the socket; never seen above the bus.
    pub const MARKER: u8 = 0xC0;
}

/// The longest name in a response, in bytes.
pub const MAX_NAME: usize = 200;

/// Bytes of the longest payload of a request (VIEW_ADD); with the header it fits the smallest message of 48 bytes.
pub const MAX_PAYLOAD: usize = 40;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u32);

impl Status {
    /// Done.
    pub const OK: Self = Self(0);
    /// The request is malformed.
    pub const MALFORMED: Self = Self(1);
    /// No such device, queue, window, backing or region.
    pub const NOT_FOUND: Self = Self(2);
    /// The id is taken, or the range overlaps another window.
    pub const EXISTS: Self = Self(3);
    /// More than the other side admits.
    pub const TOO_MANY: Self = Self(4);
    /// Another driver holds the device.
    pub const HELD: Self = Self(5);
    /// A file descriptor is missing or cannot be used.
    pub const BAD_FD: Self = Self(6);
    /// Not something the other side can do.
    pub const UNSUPPORTED: Self = Self(7);
    /// Not permitted.
    pub const DENIED: Self = Self(8);
    /// Not in the present state.
    pub const BAD_STATE: Self = Self(9);

    /// Whether the request was done.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// `Err(self)` unless done.
    pub const fn ok(self) -> Result<(), Status> {
        if self.is_ok() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::OK => "done",
            Self::MALFORMED => "malformed request",
            Self::NOT_FOUND => "no such device, queue, window, backing or region",
            Self::EXISTS => "exists already or overlaps",
            Self::TOO_MANY => "too many",
            Self::HELD => "held by another driver",
            Self::BAD_FD => "the file descriptor is missing or cannot be used",
            Self::UNSUPPORTED => "not supported",
            Self::DENIED => "not permitted",
            Self::BAD_STATE => "not in this state",
            Self(other) => return write!(f, "status {other}"),
        })
    }
}

impl std::error::Error for Status {}

/// Why bytes are not one of these messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No message has this id.
    #[error("unknown bus message {0:#04x}")]
    UnknownId(u8),
    /// The payload has another length than the message.
    #[error("bus message {id:#04x} with {len} bytes of payload")]
    BadLength {
        /// Which message.
        id: u8,
        /// Bytes of payload found.
        len: usize,
    },
    /// A field has a value that means nothing.
    #[error("bus message {0:#04x} with a field out of range")]
    BadField(u8),
    /// A name is not UTF-8 or longer than [`MAX_NAME`].
    #[error("bus message {0:#04x} with a bad name")]
    BadName(u8),
    /// The buffer to encode into is too short.
    #[error("no room for the message")]
    NoRoom,
}

/// WINDOW_ADD: memory of the driver, with the file it lies in as only descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowAdd {
    /// Name of the window on this connection.
    pub id: u32,
    /// Whether the device may write.
    pub writable: bool,
    /// Where it lies on the bus.
    pub base: BusAddr,
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins in the file, in bytes.
    pub file_offset: u64,
    /// More changes follow: all are applied together with the first that does not say so.
    pub more: bool,
}

/// QUEUE_NOTIFY: eventfds of a queue. Descriptors: kick, then call, those that are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueNotify {
    /// The device.
    pub dev: DevNum,
    /// Its queue.
    pub queue: QueueIndex,
    /// A kick eventfd comes with the message; otherwise there is none from now on.
    pub kick: bool,
    /// A call eventfd comes with the message; otherwise there is none from now on.
    pub call: bool,
}

impl QueueNotify {
    /// How many descriptors come with it.
    pub fn fds(&self) -> usize {
        usize::from(self.kick) + usize::from(self.call)
    }
}

/// From where a queue goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At these indices.
    At {
        /// The next available entry to be taken.
        avail_idx: u16,
        /// The next used entry to be written.
        used_idx: u16,
    },
    /// At the used index that stands in the ring, for both.
    UsedInRing,
}

/// QUEUE_INFLIGHT: where the device keeps what is in flight in a queue, with the file it lies in as only descriptor.
/// The form of the record is that of vhost-user; `vmsg_queue::Inflight` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueInflight {
    /// The device.
    pub dev: DevNum,
    /// Its queue.
    pub queue: QueueIndex,
    /// The queue goes on with what the record says; otherwise the record is begun anew.
    pub resume: bool,
    /// Where the record begins in the file, in bytes; a multiple of 8.
    pub offset: u64,
    /// Its length in bytes: 16, and 16 for each entry of the queue.
    pub len: u64,
}

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Lend a window.
    WindowAdd(WindowAdd),
    /// Take a window back.
    WindowRemove {
        /// Which one.
        id: u32,
        /// More changes follow, as in [`WindowAdd::more`].
        more: bool,
    },
    /// Give a queue eventfds.
    QueueNotify(QueueNotify),
    /// The next SET_VQUEUE of this queue goes on from there.
    QueueResume {
        /// The device.
        dev: DevNum,
        /// Its queue.
        queue: QueueIndex,
        /// From where.
        from: Resume,
    },
    /// Hold a device, or let go of it.
    Claim {
        /// The device.
        dev: DevNum,
        /// Let go.
        release: bool,
    },
    /// What is this device called?
    DeviceName(DevNum),
    /// The next SET_VQUEUE of this queue keeps its requests in flight there.
    QueueInflight(QueueInflight),
    /// Lend a file for views.
    BackingAdd(BackingAdd),
    /// Take a file for views back. Refused with [`Status::BAD_STATE`] while views of it exist or wait to be applied.
    BackingRemove {
        /// Which one.
        id: u32,
    },
    /// Make a window of a part of such a file.
    ViewAdd(ViewAdd),
    /// Lend a shared-memory region of a device to its driver.
    SharedMemory {
        /// The device.
        dev: DevNum,
        /// The region's id, as in GET_SHM.
        id: u32,
    },
    /// Kick and call a queue by doorbell vectors of its own.
    QueueVectors(QueueVectors),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WindowAddWire {
    id: U32,
    flags: U32,
    base: U64,
    len: U64,
    file_offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WindowRemoveWire {
    id: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct QueueNotifyWire {
    dev: U16,
    flags: U16,
    queue: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct QueueResumeWire {
    dev: U16,
    mode: U16,
    queue: U32,
    avail_idx: U16,
    used_idx: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DeviceWire {
    dev: U16,
    flags: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct QueueInflightWire {
    dev: U16,
    flags: U16,
    queue: U32,
    offset: U64,
    len: U64,
}

const WRITABLE: u32 = 1;
const MORE: u32 = 2;
const KICK: u16 = 1;
const CALL: u16 = 2;
const RELEASE: u16 = 1;
const FROM_RING: u16 = 1;
const RESUME: u16 = 1;

fn wire<T: FromBytes + Unaligned + KnownLayout + Immutable>(
    id: u8,
    payload: &[u8],
) -> Result<T, ControlError> {
    T::read_from_bytes(payload).map_err(|_| ControlError::BadLength {
        id,
        len: payload.len(),
    })
}

fn put(wire: &(impl IntoBytes + Immutable), out: &mut [u8]) -> Result<usize, ControlError> {
    let bytes = wire.as_bytes();
    out.get_mut(..bytes.len())
        .ok_or(ControlError::NoRoom)?
        .copy_from_slice(bytes);
    Ok(bytes.len())
}

impl Request {
    /// Whether `id` is one of these messages.
    pub const fn is_known(id: u8) -> bool {
        matches!(id, id::WINDOW_ADD..=id::QUEUE_VECTORS)
    }

    /// The id of the message.
    pub const fn id(&self) -> u8 {
        match self {
            Self::WindowAdd(_) => id::WINDOW_ADD,
            Self::WindowRemove { .. } => id::WINDOW_REMOVE,
            Self::QueueNotify(_) => id::QUEUE_NOTIFY,
            Self::QueueResume { .. } => id::QUEUE_RESUME,
            Self::Claim { .. } => id::CLAIM,
            Self::DeviceName(_) => id::DEVICE_NAME,
            Self::QueueInflight(_) => id::QUEUE_INFLIGHT,
            Self::BackingAdd(_) => id::BACKING_ADD,
            Self::BackingRemove { .. } => id::BACKING_REMOVE,
            Self::ViewAdd(_) => id::VIEW_ADD,
            Self::SharedMemory { .. } => id::SHARED_MEMORY,
            Self::QueueVectors(_) => id::QUEUE_VECTORS,
        }
    }

    /// The [`Response::subject`] of the answer to this request.
    pub fn subject(&self) -> u32 {
        match *self {
            Self::WindowAdd(WindowAdd { id, .. })
            | Self::WindowRemove { id, .. }
            | Self::BackingAdd(BackingAdd { id, .. })
            | Self::BackingRemove { id }
            | Self::ViewAdd(ViewAdd { id, .. }) => id,
            Self::QueueNotify(n) => u32::from(n.dev.0) | u32::from(notify_flags(&n)) << 16,
            Self::QueueResume { dev, from, .. } => {
                let mode = if from == Resume::UsedInRing {
                    FROM_RING
                } else {
                    0
                };
                u32::from(dev.0) | u32::from(mode) << 16
            }
            Self::Claim { dev, .. } | Self::DeviceName(dev) | Self::SharedMemory { dev, .. } => {
                u32::from(dev.0)
            }
            Self::QueueInflight(i) => u32::from(i.dev.0) | u32::from(inflight_flags(&i)) << 16,
            Self::QueueVectors(v) => u32::from(v.dev.0) | u32::from(v.queue_wire()) << 16,
        }
    }

    /// Reads the payload of the message `id`.
    ///
    /// # Errors
    /// [`ControlError`]: what is wrong with it. Unknown flag bits are ignored.
    pub fn decode(id: u8, payload: &[u8]) -> Result<Self, ControlError> {
        Ok(match id {
            id::WINDOW_ADD => {
                let w: WindowAddWire = wire(id, payload)?;
                Self::WindowAdd(WindowAdd {
                    id: w.id.get(),
                    writable: w.flags.get() & WRITABLE != 0,
                    base: BusAddr(w.base.get()),
                    len: w.len.get(),
                    file_offset: w.file_offset.get(),
                    more: w.flags.get() & MORE != 0,
                })
            }
            id::WINDOW_REMOVE => {
                let w: WindowRemoveWire = wire(id, payload)?;
                Self::WindowRemove {
                    id: w.id.get(),
                    more: w.flags.get() & MORE != 0,
                }
            }
            id::QUEUE_NOTIFY => {
                let w: QueueNotifyWire = wire(id, payload)?;
                Self::QueueNotify(QueueNotify {
                    dev: DevNum(w.dev.get()),
                    queue: QueueIndex(w.queue.get()),
                    kick: w.flags.get() & KICK != 0,
                    call: w.flags.get() & CALL != 0,
                })
            }
            id::QUEUE_RESUME => {
                let w: QueueResumeWire = wire(id, payload)?;
                let from = match w.mode.get() {
                    0 => Resume::At {
                        avail_idx: w.avail_idx.get(),
                        used_idx: w.used_idx.get(),
                    },
                    FROM_RING => Resume::UsedInRing,
                    _ => return Err(ControlError::BadField(id)),
                };
                Self::QueueResume {
                    dev: DevNum(w.dev.get()),
                    queue: QueueIndex(w.queue.get()),
                    from,
                }
            }
            id::CLAIM => {
                let w: DeviceWire = wire(id, payload)?;
                Self::Claim {
                    dev: DevNum(w.dev.get()),
                    release: w.flags.get() & RELEASE != 0,
                }
            }
            id::DEVICE_NAME => Self::DeviceName(DevNum(wire::<DeviceWire>(id, payload)?.dev.get())),
            id::QUEUE_INFLIGHT => {
                let w: QueueInflightWire = wire(id, payload)?;
                Self::QueueInflight(QueueInflight {
                    dev: DevNum(w.dev.get()),
                    queue: QueueIndex(w.queue.get()),
                    resume: w.flags.get() & RESUME != 0,
                    offset: w.offset.get(),
                    len: w.len.get(),
                })
            }
            id::BACKING_ADD => {
                Self::BackingAdd(wire::<memory::BackingAddWire>(id, payload)?.into())
            }
            id::BACKING_REMOVE => Self::BackingRemove {
                id: wire::<WindowRemoveWire>(id, payload)?.id.get(),
            },
            id::VIEW_ADD => Self::ViewAdd(wire::<memory::ViewAddWire>(id, payload)?.into()),
            id::SHARED_MEMORY => {
                let w: memory::SharedMemoryWire = wire(id, payload)?;
                Self::SharedMemory {
                    dev: DevNum(w.dev.get()),
                    id: w.id.get(),
                }
            }
            id::QUEUE_VECTORS => {
                Self::QueueVectors(wire::<vectors::QueueVectorsWire>(id, payload)?.into())
            }
            _ => return Err(ControlError::UnknownId(id)),
        })
    }

    /// Writes the payload to `out` and returns its length; [`MAX_PAYLOAD`] bytes are enough for all.
    ///
    /// # Errors
    /// [`ControlError::NoRoom`].
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, ControlError> {
        match *self {
            Self::WindowAdd(w) => put(
                &WindowAddWire {
                    id: w.id.into(),
                    flags: U32::new(
                        if w.writable { WRITABLE } else { 0 } | if w.more { MORE } else { 0 },
                    ),
                    base: w.base.0.into(),
                    len: w.len.into(),
                    file_offset: w.file_offset.into(),
                },
                out,
            ),
            Self::WindowRemove { id, more } => put(
                &WindowRemoveWire {
                    id: id.into(),
                    flags: U32::new(if more { MORE } else { 0 }),
                },
                out,
            ),
            Self::QueueNotify(n) => put(
                &QueueNotifyWire {
                    dev: n.dev.0.into(),
                    flags: notify_flags(&n).into(),
                    queue: n.queue.0.into(),
                },
                out,
            ),
            Self::QueueResume { dev, queue, from } => {
                let (mode, avail_idx, used_idx) = match from {
                    Resume::At {
                        avail_idx,
                        used_idx,
                    } => (0, avail_idx, used_idx),
                    Resume::UsedInRing => (FROM_RING, 0, 0),
                };
                put(
                    &QueueResumeWire {
                        dev: dev.0.into(),
                        mode: mode.into(),
                        queue: queue.0.into(),
                        avail_idx: avail_idx.into(),
                        used_idx: used_idx.into(),
                    },
                    out,
                )
            }
            Self::Claim { dev, release } => put(
                &DeviceWire {
                    dev: dev.0.into(),
                    flags: U16::new(if release { RELEASE } else { 0 }),
                },
                out,
            ),
            Self::DeviceName(dev) => put(
                &DeviceWire {
                    dev: dev.0.into(),
                    flags: U16::ZERO,
                },
                out,
            ),
            Self::QueueInflight(i) => put(
                &QueueInflightWire {
                    dev: i.dev.0.into(),
                    flags: inflight_flags(&i).into(),
                    queue: i.queue.0.into(),
                    offset: i.offset.into(),
                    len: i.len.into(),
                },
                out,
            ),
            Self::BackingAdd(b) => put(&memory::BackingAddWire::from(b), out),
            Self::BackingRemove { id } => put(
                &WindowRemoveWire {
                    id: id.into(),
                    flags: U32::ZERO,
                },
                out,
            ),
            Self::ViewAdd(v) => put(&memory::ViewAddWire::from(v), out),
            Self::SharedMemory { dev, id } => put(&memory::SharedMemoryWire::new(dev, id), out),
            Self::QueueVectors(v) => put(&vectors::QueueVectorsWire::from(v), out),
        }
    }

    /// The answer to this request.
    pub fn response<'a>(&self, status: Status, name: &'a str) -> Response<'a> {
        Response {
            subject: self.subject(),
            status,
            name,
            memory: None,
        }
    }
}

fn notify_flags(n: &QueueNotify) -> u16 {
    (if n.kick { KICK } else { 0 }) | (if n.call { CALL } else { 0 })
}

fn inflight_flags(i: &QueueInflight) -> u16 {
    if i.resume { RESUME } else { 0 }
}

#[cfg(test)]
#[path = "control_test.rs"]
mod tests;
