// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ids and payloads of the transport messages, those about one device.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Message ids.
pub mod id {
    /// What the device is.
    pub const GET_DEVICE_INFO: u8 = 0x02;
    /// Feature bits that the device offers.
    pub const GET_DEVICE_FEATURES: u8 = 0x03;
    /// Feature bits that the driver accepts.
    pub const SET_DRIVER_FEATURES: u8 = 0x04;
    /// Read from the configuration space.
    pub const GET_CONFIG: u8 = 0x05;
    /// Write to the configuration space.
    pub const SET_CONFIG: u8 = 0x06;
    /// Read the device status.
    pub const GET_DEVICE_STATUS: u8 = 0x07;
    /// Write the device status.
    pub const SET_DEVICE_STATUS: u8 = 0x08;
    /// What a virtqueue can be and is.
    pub const GET_VQUEUE: u8 = 0x09;
    /// Set a virtqueue up.
    pub const SET_VQUEUE: u8 = 0x0a;
    /// Reset one virtqueue.
    pub const RESET_VQUEUE: u8 = 0x0b;
    /// Where a shared-memory region is.
    pub const GET_SHM: u8 = 0x0c;
    /// The configuration or the status has changed.
    pub const EVENT_CONFIG: u8 = 0x40;
    /// The driver has made buffers available.
    pub const EVENT_AVAIL: u8 = 0x41;
    /// The device has used buffers.
    pub const EVENT_USED: u8 = 0x42;
}

macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }
    };
}
pub(super) use wire_struct;

wire_struct! {
    /// Response of GET_DEVICE_INFO. All zero: there is no such device.
    DeviceInfo {
        /// Virtio device id.
        device_id: U32,
        /// Vendor id.
        vendor_id: U32,
        /// Number of feature bits, a multiple of 32.
        feature_bits: U32,
        /// Bytes of configuration space.
        config_size: U32,
        /// Number of virtqueues, administration queues left out.
        max_queues: U32,
        /// Index of the first administration queue.
        admin_first: U16,
        /// Number of administration queues.
        admin_count: U16,
    }
}

wire_struct! {
    /// Request GET_DEVICE_FEATURES; start of its response and of request SET_DRIVER_FEATURES.
    FeatureRange {
        /// First block of 32 bits.
        first: U32,
        /// Number of blocks.
        count: U32,
    }
}

wire_struct! {
    /// Request GET_CONFIG.
    ConfigRange {
        /// Offset in the configuration space, bytes.
        offset: U32,
        /// Bytes.
        len: U32,
    }
}

wire_struct! {
    /// Start of the response of GET_CONFIG, and of request and response SET_CONFIG. The data follow.
    ConfigData {
        /// Configuration generation.
        generation: U32,
        /// Offset in the configuration space, bytes.
        offset: U32,
        /// Bytes that follow.
        len: U32,
    }
}

wire_struct! {
    /// Request SET_DEVICE_STATUS and the responses with a status.
    Status {
        /// The device status.
        status: U32,
    }
}

wire_struct! {
    /// Requests GET_VQUEUE and RESET_VQUEUE, EVENT_USED.
    Queue {
        /// Queue index.
        index: U32,
    }
}

wire_struct! {
    /// Response of GET_VQUEUE and request SET_VQUEUE.
    Vqueue {
        /// Queue index.
        index: U32,
        /// Largest size (response); 0 in the request.
        max_size: U32,
        /// Size in entries; 0 = not set up.
        size: U32,
        /// 0.
        reserved: U32,
        /// Bus address of the descriptor area.
        descriptor: U64,
        /// Bus address of the driver area.
        driver: U64,
        /// Bus address of the device area.
        device: U64,
    }
}

wire_struct! {
    /// Request GET_SHM.
    ShmIndex {
        /// Region index.
        index: U32,
    }
}

wire_struct! {
    /// Response of GET_SHM.
    Shm {
        /// Region index.
        index: U32,
        /// Bytes; 0 = no such region.
        len: U32,
        /// Bus address.
        address: U32,
    }
}

wire_struct! {
    /// Start of EVENT_CONFIG. The data follow.
    ConfigEvent {
        /// The device status.
        status: U32,
        /// Configuration generation.
        generation: U32,
        /// Offset in the configuration space, bytes.
        offset: U32,
        /// Bytes that follow.
        len: U32,
    }
}

wire_struct! {
    /// EVENT_AVAIL.
    Avail {
        /// Queue index.
        index: U32,
        /// Next offset (bits 0 to 30) and wrap (bit 31); 0 unless NOTIFICATION_DATA was negotiated.
        next: U32,
    }
}
