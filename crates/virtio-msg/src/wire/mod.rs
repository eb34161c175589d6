// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes of revision 1: header, sizes and payload structs, all little-endian and packed.
//!
//! Everything about the byte layout of revision 1 is in this module: [`header`] has the header and the size rules, [`transport`] and
//! [`bus`] have the payloads. An older layout becomes another module that makes [`Message`](crate::Message)s.

pub mod bus;
pub mod header;
pub mod transport;

pub use header::{HEADER_SIZE, Header, MAX_MESSAGE_SIZE, MIN_MESSAGE_SIZE};
