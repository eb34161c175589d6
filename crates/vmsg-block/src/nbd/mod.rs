// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk that an NBD server has.

mod config;
mod connect;
mod disk;
mod error;
mod jobs;
mod link;
mod negotiate;
mod replies;
mod stream;
mod unflushed;
mod uri;
mod wire;

pub use config::{NbdConfig, NbdOpenError};
pub use disk::NbdDisk;
pub use error::ProtocolError;
pub use negotiate::{Export, Negotiation, Refusal};
pub use replies::{Event, Expected, LONGEST_HEAD, Replies, UnderWay};
pub use uri::{NbdAddress, NbdUri, NbdUriError};
