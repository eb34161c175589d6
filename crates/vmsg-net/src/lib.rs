// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a virtio network device plugs into: user-mode stack, capture.
//!
//! A device hands the frames of its guest to a [`Backend`] as they lie in the guest's memory
//! ([`TxFrame`]) and offers it the guest's buffers for frames in the other direction ([`RxSink`]).
//!
//! * [`user`]: the user-mode stack, as QEMU's `-netdev user`.
//! * [`Null`]: a cable that ends nowhere.
#![deny(unsafe_code)]

mod backend;
mod checksum;
mod frame;
mod io;
mod null;
mod sys;
pub mod user;

pub use backend::Backend;
pub use frame::{Offloads, RxSink, TxFrame, VnetHeader};
pub use null::Null;
