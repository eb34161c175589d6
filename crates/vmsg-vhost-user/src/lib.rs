// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The front-end side of vhost-user (QEMU, docs/interop/vhost-user.rst): what a virtual machine monitor says to a daemon that is a
//! virtio device.
//!
//! * [`Request`]: everything that is asked; [`Answer`]: what comes back.
//! * [`FrontEnd`]: the conversation, without sockets or clocks: one request at a time, each confirmed, each answer checked.
//! * [`Greeting`]: how a conversation begins, and what is known of the daemon then ([`Offer`]).
//! * [`Stream`]: a socket that never blocks, with messages and descriptors in both directions.
//! * [`channel`]: what the daemon asks by itself, on a socket of its own.
//!
//! The daemon is not trusted: a message that is too long, not asked for, without its descriptor, or not there in time is a [`Fault`],
//! after which the connection is of no use. Nothing here knows what a queue or a bus is.
#![forbid(unsafe_code)]

pub mod channel;
mod fault;
mod front_end;
mod greeting;
mod request;
mod stream;
mod wire;

pub use fault::Fault;
pub use front_end::{Done, FrontEnd, Ticket};
pub use greeting::{Greeting, Offer, Wanted};
pub use request::{Answer, Inflight, Region, Request, RingAddresses};
pub use stream::{Incoming, Message, Stream};

/// VHOST_USER_F_PROTOCOL_FEATURES, among the virtio features: the daemon has features of the protocol, and rings are enabled one by one.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL, among the virtio features: the daemon notes which pages it writes.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

bitflags::bitflags! {
    /// Features of the protocol.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Protocol: u64 {
        /// It can be asked how many queues there are.
        const MQ = 1 << 0;
        /// Requests without an answer of their own can be acknowledged.
        const REPLY_ACK = 1 << 3;
        /// The daemon can ask by itself.
        const BACKEND_REQ = 1 << 5;
        /// The configuration can be read and written.
        const CONFIG = 1 << 9;
        /// What is in flight can be kept in memory that outlives the daemon.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE is known.
        const RESET_DEVICE = 1 << 13;
        /// Memory is given and taken back region by region.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The status of the virtio device is told.
        const STATUS = 1 << 16;
    }
}

/// Queues that a daemon may have at most: the protocol's messages for descriptors have eight bits for the index.
pub const MAX_QUEUES: u16 = 256;

/// Regions in SET_MEM_TABLE at most.
pub const TABLE_REGIONS: usize = 8;
