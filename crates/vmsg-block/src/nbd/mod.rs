// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk that an NBD server has.

mod config;
mod error;
mod uri;

pub use config::{NbdConfig, NbdOpenError};
pub use error::ProtocolError;
pub use uri::{NbdAddress, NbdUri, NbdUriError};
