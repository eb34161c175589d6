// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver side of a bus.
//!
//! A [`Requester`] gives requests their tokens, finds the request of a response, and tells which requests have waited too long. The
//! sequences stand on their own and need nobody in particular to send for them: each has a `step` that gives the next message to send
//! and a `handle_response` for what came back.
//!
//! * [`Enumeration`]: which devices are there.
//! * [`Bringup`]: one device, from its first message to DRIVER_OK.
//! * [`ConfigReader`], [`ConfigWriter`]: configuration space through messages of limited size.

mod bringup;
mod config;
mod enumeration;
mod requester;

pub use bringup::{Bringup, BringupError, BringupStep};
pub use config::{ConfigError, ConfigReader, ConfigStep, ConfigWriter};
pub use enumeration::{Enumeration, EnumerationStep, SCANNED_DEVICES};
pub use requester::{Received, RequestError, RequestId, Requester, RequesterCounters, Unexpected};
