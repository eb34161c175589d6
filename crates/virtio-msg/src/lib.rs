// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtio-msg protocol: messages, device and driver state machines.
//!
//! virtio-msg carries virtio over a bus that moves small messages and shares some memory. This crate is revision 1 of it, without I/O:
//! no operating system, no allocator, no clock, no unsafe code. Bytes and time go in, messages and actions come out.
//!
//! * [`decode`] and [`Frame::encode`] turn bytes into [`Message`]s and back; `Display` of a [`Frame`] is the line of a trace.
//! * [`Channel`] is what a bus offers.
//! * [`device::DeviceMachine`] is the device side of one device number.
//! * [`driver::Requester`] is the driver side of a bus; [`driver::Bringup`], [`driver::Enumeration`] and others run on top of it.
//! * [`bus`] answers the bus messages.
//! * [`feature`] names the feature bits.
//! * [`r1`] has the 40-byte messages from before revision 1, and adapters to revision 1; [`short`] reads
//!   those in between.

#![no_std]
#![forbid(unsafe_code)]

pub mod bus;
mod channel;
mod codec;
pub mod device;
mod display;
pub mod driver;
pub mod feature;
mod feature_set;
mod message;
pub mod r1;
pub mod short;
mod status;
mod types;
pub mod wire;

pub use channel::{Channel, ChannelError};
pub use core::time::Duration;
pub use feature_set::{FeatureSet, MAX_BLOCKS};
pub use message::{
    ConfigData, ConfigEvent, DecodeError, DeviceBitmap, DeviceInfo, DeviceState, EncodeError,
    FeatureBlocks, Frame, Kind, Message, ShmInfo, VqueueConfig, VqueueInfo, decode,
};
pub use status::DeviceStatus;
pub use types::{DevNum, Generation, Instant, QueueIndex, QueueSize, Token};
pub use wire::{HEADER_SIZE, Header, MAX_MESSAGE_SIZE, MIN_MESSAGE_SIZE};
pub use zerocopy::little_endian::U32;
