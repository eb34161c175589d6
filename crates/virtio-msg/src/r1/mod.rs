// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 40-byte messages of February 2025 ("r1"), as QEMU spoke them in the first public demonstrations, and adapters to revision 1.
//!
//! Every message is 40 bytes: type, id, device number, 36 bytes of payload, little-endian and packed, zero where nothing is said. There is no
//! size and no token: one request is in flight at a time, and its response has its id. Some requests have no response at all
//! (SET_DEVICE_STATUS, SET_VQUEUE, RESET_VQUEUE).
//!
//! * [`decode`] and [`Frame::to_bytes`]: bytes to [`Message`] and back; `Display` of a [`Frame`] is the line of a trace.
//! * [`DriverAdapter`] stands between a driver that speaks revision 1 and an r1 device.
//! * [`DeviceAdapter`] stands between an r1 driver and devices that speak revision 1.
//!
//! Both adapters take messages in on either side and give them out on either side; they hold a bounded number of them and say [`Busy`]
//! when there is no room. Whatever the peer sends, they neither panic nor grow.
//!
//! Source of the layout: Linux `include/uapi/linux/virtio_msg.h` of that tree, QEMU's `include/hw/virtio/virtio-msg-prot.h`, and recorded messages.

mod codec;
mod device;
mod display;
mod driver;
mod fields;
mod outcome;
mod ring;

pub use codec::{Frame, Message, decode, id};
pub use device::{DeviceAdapter, DeviceAdapterCounters};
pub use driver::{DriverAdapter, DriverAdapterCounters, DriverOptions, Translate, config_size};
pub use outcome::{Busy, Ignored, Outcome};

/// Bytes of every r1 message.
pub const SIZE: usize = 40;

/// The message size of revision 1 on the other side of an adapter, bytes: the smallest there is. A buffer for
/// [`DriverAdapter::poll_message`] or [`DeviceAdapter::poll_message`] has as many.
pub const MESSAGE_SIZE: usize = crate::wire::MIN_MESSAGE_SIZE;

/// What [`Message::DeviceInfo`] has as version.
pub const VERSION: u32 = 1;

/// Bits of `prot` in [`Message::IommuTranslate`]: the page is to be read.
pub const PROT_READ: u8 = 1;

/// Bits of `prot` in [`Message::IommuTranslate`]: the page is to be written.
pub const PROT_WRITE: u8 = 2;

/// Bytes of a page in [`Message::IommuTranslate`].
pub const PAGE_SIZE: u64 = 4096;
