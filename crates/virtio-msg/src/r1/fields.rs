// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The payloads as they lie in memory: little-endian, packed, at the start of 36 bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $t:ty),* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $t),* }
        const _: () = assert!(size_of::<$name>() <= super::SIZE);
    )*};
}

fields! {
    /// The first four bytes.
    Header { msg_type: u8, msg_id: u8, dev_id: U16 }
    DeviceInfo { version: U32, device_id: U32, vendor_id: U32 }
    Features { index: U32, features: U64 }
    /// Bits 0 to 15 of the offset, bits 16 to 23, bytes.
    ConfigRange { offset: U16, offset_high: u8, size: u8 }
    Config { range: ConfigRange, data: U64 }
    Word { value: U32 }
    Vqueue { index: U32, max_size: U32 }
    SetVqueue { index: U32, size: U32, descriptor: U64, driver: U64, device: U64 }
    ConfigEvent { status: U32, range: ConfigRange, value: [u8; 16] }
    Avail { index: U32, next_offset: U64, next_wrap: U64 }
    Enable { enable: u8 }
    Translate { va: U64, prot: u8 }
    Translated { va: U64, pa: U64, prot: u8 }
}

impl ConfigRange {
    /// `None` if the offset does not fit 24 bits.
    pub(super) fn new(offset: u32, size: u8) -> Option<ConfigRange> {
        let [b0, b1, b2, b3] = offset.to_le_bytes();
        (b3 == 0).then_some(ConfigRange {
            offset: U16::from_bytes([b0, b1]),
            offset_high: b2,
            size,
        })
    }

    pub(super) fn offset(&self) -> u32 {
        u32::from(self.offset.get()) | u32::from(self.offset_high) << 16
    }
}
