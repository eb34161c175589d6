// SPDX-License-Identifier: Apache-2.0 OR MIT
//! r1 messages: from bytes to values and back.

use super::{SIZE, fields};
use crate::message::{DecodeError, EncodeError, Kind, VqueueConfig};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize};
use crate::wire::header::{TYPE_BUS, TYPE_RESPONSE};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Message ids.
pub mod id {
    /// DEVICE_INFO.
    pub const DEVICE_INFO: u8 = 0x03;
    /// GET_FEATURES.
    pub const GET_FEATURES: u8 = 0x04;
    /// SET_FEATURES.
    pub const SET_FEATURES: u8 = 0x05;
    /// GET_CONFIG.
    pub const GET_CONFIG: u8 = 0x06;
    /// SET_CONFIG.
    pub const SET_CONFIG: u8 = 0x07;
    /// GET_CONFIG_GEN.
    pub const GET_CONFIG_GEN: u8 = 0x08;
    /// GET_DEVICE_STATUS.
    pub const GET_DEVICE_STATUS: u8 = 0x09;
    /// SET_DEVICE_STATUS: no response.
    pub const SET_DEVICE_STATUS: u8 = 0x0a;
    /// GET_VQUEUE.
    pub const GET_VQUEUE: u8 = 0x0b;
    /// SET_VQUEUE: no response.
    pub const SET_VQUEUE: u8 = 0x0c;
    /// RESET_VQUEUE: no response.
    pub const RESET_VQUEUE: u8 = 0x0d;
    /// EVENT_CONFIG, from the device.
    pub const EVENT_CONFIG: u8 = 0x10;
    /// EVENT_AVAIL, from the driver.
    pub const EVENT_AVAIL: u8 = 0x11;
    /// EVENT_USED, from the device.
    pub const EVENT_USED: u8 = 0x12;
    /// IOMMU_ENABLE, from the driver: no response. QEMU only.
    pub const IOMMU_ENABLE: u8 = 0x20;
    /// IOMMU_TRANSLATE: a request of the device. QEMU only.
    pub const IOMMU_TRANSLATE: u8 = 0x21;
}

/// An r1 message. Variants come in pairs of request and response where there is one.
///
/// `Display` writes what a trace shows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// DEVICE_INFO: what is this device?
    GetDeviceInfo,
    /// Response of [`GetDeviceInfo`](Message::GetDeviceInfo).
    DeviceInfo {
        /// [`VERSION`](super::VERSION).
        version: u32,
        /// Virtio device id (virtio 1.3 §5).
        device_id: u32,
        /// Vendor id.
        vendor_id: u32,
    },
    /// Which features does the device offer?
    GetFeatures {
        /// Which 64 bits; QEMU knows 0 only.
        index: u32,
    },
    /// Response of [`GetFeatures`](Message::GetFeatures).
    Features {
        /// Which 64 bits.
        index: u32,
        /// The bits.
        features: u64,
    },
    /// The driver accepts these features.
    SetFeatures {
        /// Which 64 bits.
        index: u32,
        /// The bits.
        features: u64,
    },
    /// Response of [`SetFeatures`](Message::SetFeatures): the same again.
    FeaturesSet {
        /// Which 64 bits.
        index: u32,
        /// The bits.
        features: u64,
    },
    /// Read from the configuration space.
    GetConfig {
        /// Offset, bytes; 24 bits.
        offset: u32,
        /// Bytes: 1, 2 or 4. QEMU ends itself on anything else.
        size: u8,
    },
    /// Response of [`GetConfig`](Message::GetConfig).
    Config {
        /// Offset, bytes; 24 bits.
        offset: u32,
        /// Bytes.
        size: u8,
        /// The bytes, the lowest first.
        data: u64,
    },
    /// Write to the configuration space.
    SetConfig {
        /// Offset, bytes; 24 bits.
        offset: u32,
        /// Bytes: 1, 2 or 4. QEMU ends itself on anything else.
        size: u8,
        /// The bytes, the lowest first.
        data: u64,
    },
    /// Response of [`SetConfig`](Message::SetConfig): the same again.
    ConfigSet {
        /// Offset, bytes; 24 bits.
        offset: u32,
        /// Bytes.
        size: u8,
        /// The bytes, the lowest first.
        data: u64,
    },
    /// Read the configuration generation.
    GetConfigGen,
    /// Response of [`GetConfigGen`](Message::GetConfigGen).
    ConfigGen(Generation),
    /// Read the device status.
    GetDeviceStatus,
    /// Response of [`GetDeviceStatus`](Message::GetDeviceStatus).
    DeviceStatus(DeviceStatus),
    /// Write the device status; 0 resets the device. No response.
    SetDeviceStatus(DeviceStatus),
    /// How large can this virtqueue be?
    GetVqueue(QueueIndex),
    /// Response of [`GetVqueue`](Message::GetVqueue).
    Vqueue {
        /// Queue index.
        index: QueueIndex,
        /// Largest size; 0: there is no such queue.
        max_size: QueueSize,
    },
    /// Set a virtqueue up. No response.
    SetVqueue(VqueueConfig),
    /// Reset one virtqueue. No response; QEMU ignores it.
    ResetVqueue(QueueIndex),
    /// From the device: configuration or status has changed.
    EventConfig {
        /// The device status.
        status: DeviceStatus,
        /// Offset of what changed, bytes; 24 bits.
        offset: u32,
        /// Bytes that changed, at most 16; 0: they are to be read. QEMU sends 0 only.
        size: u8,
        /// The new bytes, as many as `size` says.
        value: [u8; 16],
    },
    /// From the driver: buffers are available.
    EventAvail {
        /// Queue.
        queue: QueueIndex,
        /// Next offset; 0 unless NOTIFICATION_DATA was negotiated.
        next_offset: u64,
        /// Wrap counter; 0 unless NOTIFICATION_DATA was negotiated.
        next_wrap: u64,
    },
    /// From the device: buffers were used.
    EventUsed {
        /// Queue.
        queue: QueueIndex,
    },
    /// From the driver: addresses are (`true`) to be translated by the driver's side before use. No response.
    IommuEnable(bool),
    /// From the device: what is the bus address of this page?
    IommuTranslate {
        /// Address of the page.
        va: u64,
        /// [`PROT_READ`](super::PROT_READ) and [`PROT_WRITE`](super::PROT_WRITE).
        prot: u8,
    },
    /// Response of [`IommuTranslate`](Message::IommuTranslate), from the driver.
    IommuTranslated {
        /// Address of the page, as asked.
        va: u64,
        /// Bus address of the page.
        pa: u64,
        /// What may be done with it; 0: nothing.
        prot: u8,
    },
}

impl Message {
    /// The message id on the wire.
    pub fn id(&self) -> u8 {
        match self {
            Message::GetDeviceInfo | Message::DeviceInfo { .. } => id::DEVICE_INFO,
            Message::GetFeatures { .. } | Message::Features { .. } => id::GET_FEATURES,
            Message::SetFeatures { .. } | Message::FeaturesSet { .. } => id::SET_FEATURES,
            Message::GetConfig { .. } | Message::Config { .. } => id::GET_CONFIG,
            Message::SetConfig { .. } | Message::ConfigSet { .. } => id::SET_CONFIG,
            Message::GetConfigGen | Message::ConfigGen(_) => id::GET_CONFIG_GEN,
            Message::GetDeviceStatus | Message::DeviceStatus(_) => id::GET_DEVICE_STATUS,
            Message::SetDeviceStatus(_) => id::SET_DEVICE_STATUS,
            Message::GetVqueue(_) | Message::Vqueue { .. } => id::GET_VQUEUE,
            Message::SetVqueue(_) => id::SET_VQUEUE,
            Message::ResetVqueue(_) => id::RESET_VQUEUE,
            Message::EventConfig { .. } => id::EVENT_CONFIG,
            Message::EventAvail { .. } => id::EVENT_AVAIL,
            Message::EventUsed { .. } => id::EVENT_USED,
            Message::IommuEnable(_) => id::IOMMU_ENABLE,
            Message::IommuTranslate { .. } | Message::IommuTranslated { .. } => id::IOMMU_TRANSLATE,
        }
    }

    /// The name in the specification of that time, the same for request and response.
    pub fn name(&self) -> &'static str {
        match self.id() {
            id::DEVICE_INFO => "DEVICE_INFO",
            id::GET_FEATURES => "GET_FEATURES",
            id::SET_FEATURES => "SET_FEATURES",
            id::GET_CONFIG => "GET_CONFIG",
            id::SET_CONFIG => "SET_CONFIG",
            id::GET_CONFIG_GEN => "GET_CONFIG_GEN",
            id::GET_DEVICE_STATUS => "GET_DEVICE_STATUS",
            id::SET_DEVICE_STATUS => "SET_DEVICE_STATUS",
            id::GET_VQUEUE => "GET_VQUEUE",
            id::SET_VQUEUE => "SET_VQUEUE",
            id::RESET_VQUEUE => "RESET_VQUEUE",
            id::EVENT_CONFIG => "EVENT_CONFIG",
            id::EVENT_AVAIL => "EVENT_AVAIL",
            id::EVENT_USED => "EVENT_USED",
            id::IOMMU_ENABLE => "IOMMU_ENABLE",
            _ => "IOMMU_TRANSLATE",
        }
    }

    /// Whether this is a request that is answered, a response, or stands alone ([`Kind::Event`]: the requests without response, too).
    pub fn kind(&self) -> Kind {
        match self {
            Message::DeviceInfo { .. }
            | Message::Features { .. }
            | Message::FeaturesSet { .. }
            | Message::Config { .. }
            | Message::ConfigSet { .. }
            | Message::ConfigGen(_)
            | Message::DeviceStatus(_)
            | Message::Vqueue { .. }
            | Message::IommuTranslated { .. } => Kind::Response,
            Message::SetDeviceStatus(_)
            | Message::SetVqueue(_)
            | Message::ResetVqueue(_)
            | Message::EventConfig { .. }
            | Message::EventAvail { .. }
            | Message::EventUsed { .. }
            | Message::IommuEnable(_) => Kind::Event,
            _ => Kind::Request,
        }
    }
}

/// A message with its address. `Display` is the line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Device number. QEMU sends 0 and looks at none.
    pub dev_num: DevNum,
    /// The message.
    pub message: Message,
}

/// The payload's first bytes as one struct.
fn at<T: FromBytes + KnownLayout + Immutable + Unaligned>(payload: &[u8]) -> Option<&T> {
    T::ref_from_prefix(payload).ok().map(|(t, _)| t)
}

/// Reads one message from the start of `bytes`; what follows the 40 bytes there is left out.
///
/// Total: whatever the bytes, the result is a frame or an error. Bits of the type that have no meaning, and bytes that belong to no field, are not
/// looked at.
///
/// # Errors
/// [`DecodeError::TooShort`], [`DecodeError::Unknown`] (bus messages, too): drop the message, count it, do not answer.
pub fn decode(bytes: &[u8]) -> Result<Frame, DecodeError> {
    let too_short = DecodeError::TooShort {
        have: bytes.len(),
        need: SIZE,
    };
    let bytes = bytes.get(..SIZE).ok_or(too_short)?;
    let (header, p) = fields::Header::ref_from_prefix(bytes).map_err(|_| too_short)?;
    let unknown = DecodeError::Unknown {
        msg_type: header.msg_type,
        msg_id: header.msg_id,
    };
    if header.msg_type & TYPE_BUS != 0 {
        return Err(unknown);
    }
    let message = if header.msg_type & TYPE_RESPONSE != 0 {
        response(header.msg_id, p)
    } else {
        request(header.msg_id, p)
    };
    Ok(Frame {
        dev_num: DevNum(header.dev_id.get()),
        message: message.ok_or(unknown)?,
    })
}

fn word(p: &[u8]) -> Option<u32> {
    at::<fields::Word>(p).map(|w| w.value.get())
}

fn request(msg_id: u8, p: &[u8]) -> Option<Message> {
    Some(match msg_id {
        id::DEVICE_INFO => Message::GetDeviceInfo,
        id::GET_FEATURES => Message::GetFeatures { index: word(p)? },
        id::SET_FEATURES => {
            let f = at::<fields::Features>(p)?;
            Message::SetFeatures {
                index: f.index.get(),
                features: f.features.get(),
            }
        }
        id::GET_CONFIG => {
            let range = at::<fields::ConfigRange>(p)?;
            Message::GetConfig {
                offset: range.offset(),
                size: range.size,
            }
        }
        id::SET_CONFIG => {
            let c = at::<fields::Config>(p)?;
            Message::SetConfig {
                offset: c.range.offset(),
                size: c.range.size,
                data: c.data.get(),
            }
        }
        id::GET_CONFIG_GEN => Message::GetConfigGen,
        id::GET_DEVICE_STATUS => Message::GetDeviceStatus,
        id::SET_DEVICE_STATUS => Message::SetDeviceStatus(DeviceStatus::from_bits_retain(word(p)?)),
        id::GET_VQUEUE => Message::GetVqueue(QueueIndex(word(p)?)),
        id::SET_VQUEUE => {
            let q = at::<fields::SetVqueue>(p)?;
            Message::SetVqueue(VqueueConfig {
                index: QueueIndex(q.index.get()),
                size: QueueSize(q.size.get()),
                descriptor: q.descriptor.get(),
                driver: q.driver.get(),
                device: q.device.get(),
            })
        }
        id::RESET_VQUEUE => Message::ResetVqueue(QueueIndex(word(p)?)),
        id::EVENT_CONFIG => {
            let e = at::<fields::ConfigEvent>(p)?;
            Message::EventConfig {
                status: DeviceStatus::from_bits_retain(e.status.get()),
                offset: e.range.offset(),
                size: e.range.size,
                value: e.value,
            }
        }
        id::EVENT_AVAIL => {
            let a = at::<fields::Avail>(p)?;
            Message::EventAvail {
                queue: QueueIndex(a.index.get()),
                next_offset: a.next_offset.get(),
                next_wrap: a.next_wrap.get(),
            }
        }
        id::EVENT_USED => Message::EventUsed {
            queue: QueueIndex(word(p)?),
        },
        id::IOMMU_ENABLE => Message::IommuEnable(at::<fields::Enable>(p)?.enable != 0),
        id::IOMMU_TRANSLATE => {
            let t = at::<fields::Translate>(p)?;
            Message::IommuTranslate {
                va: t.va.get(),
                prot: t.prot,
            }
        }
        _ => return None,
    })
}

fn response(msg_id: u8, p: &[u8]) -> Option<Message> {
    Some(match msg_id {
        id::DEVICE_INFO => {
            let i = at::<fields::DeviceInfo>(p)?;
            Message::DeviceInfo {
                version: i.version.get(),
                device_id: i.device_id.get(),
                vendor_id: i.vendor_id.get(),
            }
        }
        id::GET_FEATURES | id::SET_FEATURES => {
            let f = at::<fields::Features>(p)?;
            let (index, features) = (f.index.get(), f.features.get());
            if msg_id == id::GET_FEATURES {
                Message::Features { index, features }
            } else {
                Message::FeaturesSet { index, features }
            }
        }
        id::GET_CONFIG | id::SET_CONFIG => {
            let c = at::<fields::Config>(p)?;
            let (offset, size, data) = (c.range.offset(), c.range.size, c.data.get());
            if msg_id == id::GET_CONFIG {
                Message::Config { offset, size, data }
            } else {
                Message::ConfigSet { offset, size, data }
            }
        }
        id::GET_CONFIG_GEN => Message::ConfigGen(Generation(word(p)?)),
        id::GET_DEVICE_STATUS => Message::DeviceStatus(DeviceStatus::from_bits_retain(word(p)?)),
        id::GET_VQUEUE => {
            let q = at::<fields::Vqueue>(p)?;
            Message::Vqueue {
                index: QueueIndex(q.index.get()),
                max_size: QueueSize(q.max_size.get()),
            }
        }
        id::IOMMU_TRANSLATE => {
            let t = at::<fields::Translated>(p)?;
            Message::IommuTranslated {
                va: t.va.get(),
                pa: t.pa.get(),
                prot: t.prot,
            }
        }
        _ => return None,
    })
}

impl Frame {
    /// A message about a device.
    pub fn new(dev_num: DevNum, message: Message) -> Frame {
        Frame { dev_num, message }
    }

    /// The 40 bytes. Offsets above 24 bits are cut to them.
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let msg_type = if self.message.kind() == Kind::Response {
            TYPE_RESPONSE
        } else {
            0
        };
        let header = fields::Header {
            msg_type,
            msg_id: self.message.id(),
            dev_id: self.dev_num.0.into(),
        };
        let (head, payload) = bytes.split_at_mut(size_of::<fields::Header>());
        head.copy_from_slice(header.as_bytes());
        self.message.put(payload);
        bytes
    }

    /// Writes the 40 bytes to the start of `out` and gives their number.
    ///
    /// # Errors
    /// [`EncodeError`] if `out` is shorter; then nothing was written.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, EncodeError> {
        let room = out.len();
        out.get_mut(..SIZE)
            .ok_or(EncodeError { size: SIZE, room })?
            .copy_from_slice(&self.to_bytes());
        Ok(SIZE)
    }
}

fn range(offset: u32, size: u8) -> fields::ConfigRange {
    let offset = offset & 0x00ff_ffff;
    fields::ConfigRange::new(offset, size).expect("24 bits")
}

impl Message {
    fn put(&self, payload: &mut [u8]) {
        let mut set = |bytes: &[u8]| payload[..bytes.len()].copy_from_slice(bytes);
        match *self {
            Message::GetDeviceInfo | Message::GetConfigGen | Message::GetDeviceStatus => {}
            Message::DeviceInfo {
                version,
                device_id,
                vendor_id,
            } => set(fields::DeviceInfo {
                version: version.into(),
                device_id: device_id.into(),
                vendor_id: vendor_id.into(),
            }
            .as_bytes()),
            Message::Features { index, features }
            | Message::SetFeatures { index, features }
            | Message::FeaturesSet { index, features } => set(fields::Features {
                index: index.into(),
                features: features.into(),
            }
            .as_bytes()),
            Message::GetConfig { offset, size } => set(range(offset, size).as_bytes()),
            Message::Config { offset, size, data }
            | Message::SetConfig { offset, size, data }
            | Message::ConfigSet { offset, size, data } => set(fields::Config {
                range: range(offset, size),
                data: data.into(),
            }
            .as_bytes()),
            Message::ConfigGen(generation) => set(&generation.0.to_le_bytes()),
            Message::DeviceStatus(status) | Message::SetDeviceStatus(status) => {
                set(&status.bits().to_le_bytes());
            }
            Message::GetFeatures { index } => set(&index.to_le_bytes()),
            Message::GetVqueue(queue)
            | Message::ResetVqueue(queue)
            | Message::EventUsed { queue } => set(&queue.0.to_le_bytes()),
            Message::Vqueue { index, max_size } => set(fields::Vqueue {
                index: index.0.into(),
                max_size: max_size.0.into(),
            }
            .as_bytes()),
            Message::SetVqueue(q) => set(fields::SetVqueue {
                index: q.index.0.into(),
                size: q.size.0.into(),
                descriptor: q.descriptor.into(),
                driver: q.driver.into(),
                device: q.device.into(),
            }
            .as_bytes()),
            Message::EventConfig {
                status,
                offset,
                size,
                value,
            } => set(fields::ConfigEvent {
                status: status.bits().into(),
                range: range(offset, size),
                value,
            }
            .as_bytes()),
            Message::EventAvail {
                queue,
                next_offset,
                next_wrap,
            } => set(fields::Avail {
                index: queue.0.into(),
                next_offset: next_offset.into(),
                next_wrap: next_wrap.into(),
            }
            .as_bytes()),
            Message::IommuEnable(enable) => set(&[enable.into()]),
            Message::IommuTranslate { va, prot } => set(fields::Translate {
                va: va.into(),
                prot,
            }
            .as_bytes()),
            Message::IommuTranslated { va, pa, prot } => set(fields::Translated {
                va: va.into(),
                pa: pa.into(),
                prot,
            }
            .as_bytes()),
        }
    }
}
