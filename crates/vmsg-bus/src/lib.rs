// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses that carry virtio-msg.
//!
//! A bus joins a driver's end, [`DriverBus`], and a device host's end,
//! [`DeviceBus`]: a [`Channel`](virtio_msg::Channel) each, with doorbells to sleep on, and messages
//! that lend memory and eventfds ([`control`]). What a bus can do is data, [`Capabilities`].
//!
//! * [`loopback`]: both ends in one process, also for simulation.
//! * [`unix`]: two processes on one host, docs/bus-unix.md.
//! * [`linux_user`]: the same, as QEMU does it, docs/bus-linux-user.md.
//! * [`ivshmem`]: two machines that share memory and doorbells and nothing else, docs/bus-ivshmem.md.
//! * [`tap`] and [`fault`] wrap any end; [`trace`] records what goes over it.
//! * [`ending`]: locks and sockets of processes that are being killed.
//! * [`BusSpec`] names a bus on a command line; [`keyval`] reads such lines into any serde type.
#![forbid(unsafe_code)]

#[cfg(any(feature = "loopback", feature = "unix"))]
mod bell;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod bus;
mod capabilities;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod carrier;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod common;
pub mod control;
pub mod fault;
#[cfg(feature = "ivshmem")]
pub mod ivshmem;
#[cfg(feature = "unix")]
mod join;
pub mod keyval;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod line;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod link;
#[cfg(feature = "linux-user")]
pub mod linux_user;
#[cfg(feature = "unix")]
mod lock;
#[cfg(feature = "loopback")]
pub mod loopback;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod memory;
#[cfg(any(feature = "loopback", feature = "unix"))]
mod queue;
#[cfg(any(feature = "linux-user", feature = "ivshmem"))]
mod room_wait;
mod spec;
#[cfg(any(feature = "linux-user", feature = "ivshmem"))]
mod taken;
pub mod tap;
pub mod trace;
#[cfg(feature = "linux-user")]
mod translation;
#[cfg(feature = "unix")]
pub mod unix;

#[cfg(feature = "ivshmem")]
pub use self::ivshmem::IvshmemSpec;
#[cfg(any(feature = "loopback", feature = "unix"))]
pub use bus::{Bus, Counters, DeviceBus, DriverBus, WakeFds};
pub use capabilities::{Capabilities, Peer};
#[cfg(any(feature = "loopback", feature = "unix"))]
pub use common::{CommonFile, CommonMode, CommonRam, CommonRamError, Physical, Vectors};
#[cfg(feature = "unix")]
pub use join::{Connecting, Connector, Listener, Watch};
#[cfg(any(feature = "loopback", feature = "unix"))]
pub use link::MAX_FDS;
#[cfg(feature = "linux-user")]
pub use linux_user::{LinuxUserSpec, StaticRam, StaticRamError, StaticWindow};
pub use spec::{BusSpec, MessageSize, Mode, UnixSpec};
#[cfg(feature = "unix")]
pub use unix::{BindError, ConnectError};
#[cfg(feature = "unix")]
pub use vmsg_mem::ending;

/// Longest message where nothing else is asked for: 256 bytes of configuration with its headers, rounded up to 64 bytes.
pub const DEFAULT_MESSAGE_SIZE: usize = 320;

/// Slots each way where nothing else is asked for.
pub const DEFAULT_SLOTS: u32 = 256;

/// Message sizes a bus can have. The shortest is that of SET_VQUEUE.
pub const MESSAGE_SIZES: std::ops::RangeInclusive<usize> = 48..=65536;

/// How many slots a queue can have.
pub const SLOTS: std::ops::RangeInclusive<u32> = 2..=65536;

/// Size of a slot for messages of up to `max_message_size` bytes: a multiple of 64.
pub const fn slot_size(max_message_size: usize) -> usize {
    max_message_size.next_multiple_of(64)
}
