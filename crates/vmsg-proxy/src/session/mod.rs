// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session: everything one guest has negotiated with one device, kept so that it can be replayed to another device host.
//!
//! A [`Session`] does no I/O and has no clock. In go operations of a front, messages of the bus, time, and whether the bus is connected.
//! Out come messages (some with file descriptors), results of operations and news for the front, and the next moment to be called at.
//!
//! * **Attaching.** After [`handle_link_up`](Session::handle_link_up) the session looks for its device by number or by name, reads what it
//!   is, and, if a guest has negotiated anything, replays that: claim, windows, reset, features, queues with their notification
//!   descriptors and resume position, DRIVER_OK, one kick per queue.
//! * **What may change under a guest.** Nothing that the guest could see: the host must offer at least the negotiated features, the same device
//!   id, the same number of queues, no smaller ones, the same size of configuration. Otherwise the device needs a reset, with a named
//!   [`ResetReason`].
//! * **While the link is down** operations are recorded and answered at once where the record is enough to be right, and wait for a bounded
//!   time where it is not: before the device was ever seen, and for writes to the configuration.
//! * **While a device does not let go** of its queues, though its host lives, operations that need it end with [`OpError::Busy`]: a reset is
//!   never said to be done before the device has done it, or its host is gone.
//! * **While the host of a lost connection may live**, nothing that it may still write to is said to be taken back, and no other guest gets the
//!   device: until its process has ended, or it has answered on the next connection.
//! * **The peer is not trusted.** One request is outstanding at a time, each with a time-out. Late, malformed and unasked-for
//!   messages are counted and dropped; an answer that does not fit its request, or none, ends the connection
//!   ([`Event::LinkFault`]) and the replay starts over on the next one.

mod answers;
mod changes;
mod common_memory;
mod inflight;
mod letting_go;
mod machine;
mod operations;
mod overdue;
mod pump;
mod record;
mod script;
mod time;
mod types;
mod windows;

pub use inflight::InflightMemory;
pub use machine::Session;
pub use record::QueueVectors;
pub(crate) use types::FAULTLESS;
pub use types::{
    Bell, CommonMemory, Counters, DeviceFacts, Event, FileId, Op, OpError, OpId, Options,
    OtherMemory, Outcome, Outgoing, QueueSetup, ResetReason, ResumeAt, SharedRegion, Target,
    Window,
};
