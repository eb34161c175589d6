// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a virtio network device plugs into: user-mode stack, capture.
//!
//! A device hands the frames of its guest to a [`Backend`] as they lie in the guest's memory
//! ([`TxFrame`]) and offers it the guest's buffers for frames in the other direction ([`RxSink`]).
//!
//! * [`user`]: the user-mode stack, as QEMU's `-netdev user`.
//! * [`socket`]: frames over sockets, to another virtual machine or passt.
//! * [`tap`]: a tap interface of the host.
//! * [`vhost_user`]: a port of Open vSwitch with DPDK, or of another vhost-user back end.
//! * [`switch`]: a switch between the devices of this process, with uplinks to any of the others.
//! * [`Capture`]: writes what passes another back end to a pcap file.
//! * [`Cable`]: two devices back to back; [`Null`]: a cable that ends nowhere.
#![deny(unsafe_code)]

mod backend;
mod cable;
mod capture;
mod checksum;
mod events;
mod frame;
mod io;
mod mac;
mod null;
mod outlet;
pub mod socket;
pub mod switch;
mod sys;
pub mod tap;
pub mod user;
pub mod vhost_user;

pub use backend::Backend;
pub use cable::Cable;
pub use capture::{Capture, CaptureConfig};
pub use frame::{Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};
pub use mac::{BadMac, Mac};
pub use null::Null;
pub use outlet::{Closed, NoOutlets, Outlets, Wanted};
