// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Turns any bytes into a story for the machines, and checks after each step what always has to hold. Property tests and fuzz targets share it.

mod device;
mod driver;
mod r1;

pub(crate) use device::device;
pub(crate) use driver::driver;
pub(crate) use r1::{r1_device, r1_driver};

use virtio_msg::{
    ConfigData, ConfigEvent, DevNum, DeviceBitmap, DeviceInfo, DeviceState, DeviceStatus,
    FeatureBlocks, Frame, Generation, Kind, Message, QueueIndex, QueueSize, ShmInfo, Token, U32,
    VqueueConfig, VqueueInfo, decode,
};

/// Bytes, until there are no more; then zeros.
pub(crate) struct Source<'a> {
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Source<'a> {
        Source { bytes }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.bytes.split_at(n.min(self.bytes.len()));
        self.bytes = rest;
        head
    }

    fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// Mostly small numbers, sometimes any.
    fn u32(&mut self) -> u32 {
        match self.u8() {
            0xff => u32::from_le_bytes([self.u8(), self.u8(), self.u8(), self.u8()]),
            0xfe => u32::MAX - u32::from(self.u8()),
            0xfd => 1 << (self.u8() % 32),
            n => u32::from(n % 72),
        }
    }

    fn u64(&mut self) -> u64 {
        match self.u8() {
            0xff => u64::MAX - u64::from(self.u8()),
            n => u64::from(n) << 12 | u64::from(self.u8() & 0x30),
        }
    }

    fn data(&mut self) -> &'a [u8] {
        let n = self.u8();
        self.take(usize::from(n % 80))
    }
}

/// Any message that revision 1 can say. `words` is where blocks of features live.
pub(crate) fn any_message<'s: 'w, 'w>(s: &mut Source<'s>, words: &'w mut [U32; 12]) -> Message<'w> {
    let kind = s.u8() % 32;
    let config = |s: &mut Source<'s>| {
        let (generation, offset, data) = (Generation(s.u32()), s.u32(), s.data());
        ConfigData {
            generation,
            offset,
            len: len_of(data),
            data,
        }
    };
    match kind {
        0 => Message::GetDeviceInfo,
        1 => Message::DeviceInfo(DeviceInfo {
            device_id: s.u32(),
            vendor_id: s.u32(),
            feature_bits: s.u32(),
            config_size: s.u32(),
            max_queues: s.u32(),
            admin_first: s.u16(),
            admin_count: s.u16(),
        }),
        2 => Message::GetDeviceFeatures {
            first: s.u32(),
            count: s.u32(),
        },
        3 | 4 => {
            for w in words.iter_mut() {
                *w = s.u32().into();
            }
            let n = s.u8() % 13;
            let first = s.u32();
            let blocks = FeatureBlocks {
                first,
                count: n.into(),
                words: &words[..n.into()],
            };
            if kind == 3 {
                Message::DeviceFeatures(blocks)
            } else {
                Message::SetDriverFeatures(blocks)
            }
        }
        5 => Message::DriverFeaturesSet,
        6 => Message::GetConfig {
            offset: s.u32(),
            len: s.u32(),
        },
        7 => Message::Config(config(s)),
        8 => Message::SetConfig(config(s)),
        9 => {
            let data = config(s);
            let mirrored = data.len == 0 || s.u8() & 1 != 0;
            Message::ConfigSet(if mirrored {
                data
            } else {
                ConfigData { data: &[], ..data }
            })
        }
        10 => Message::GetDeviceStatus,
        11 => Message::DeviceStatus(DeviceStatus::from_bits_retain(s.u32())),
        12 => Message::SetDeviceStatus(DeviceStatus::from_bits_retain(s.u32())),
        13 => Message::DeviceStatusSet(DeviceStatus::from_bits_retain(s.u32())),
        14 => Message::GetVqueue(QueueIndex(s.u32())),
        15 => Message::Vqueue(VqueueInfo {
            index: QueueIndex(s.u32()),
            max_size: QueueSize(s.u32()),
            size: QueueSize(s.u32()),
            descriptor: s.u64(),
            driver: s.u64(),
            device: s.u64(),
        }),
        16 => Message::SetVqueue(VqueueConfig {
            index: QueueIndex(s.u32()),
            size: QueueSize(s.u32()),
            descriptor: s.u64(),
            driver: s.u64(),
            device: s.u64(),
        }),
        17 => Message::VqueueSet,
        18 => Message::ResetVqueue(QueueIndex(s.u32())),
        19 => Message::VqueueReset,
        20 => Message::GetShm { index: s.u32() },
        21 => Message::Shm(ShmInfo {
            index: s.u32(),
            len: s.u32(),
            address: s.u32(),
        }),
        22 => {
            let (status, data) = (DeviceStatus::from_bits_retain(s.u32()), config(s));
            let ConfigData {
                generation,
                offset,
                len,
                data,
            } = data;
            let data = if s.u8() & 1 != 0 { data } else { &[] };
            Message::EventConfig(ConfigEvent {
                status,
                generation,
                offset,
                len,
                data,
            })
        }
        23 => Message::EventAvail {
            queue: QueueIndex(s.u32()),
            next: s.u32(),
        },
        24 => Message::EventUsed {
            queue: QueueIndex(s.u32()),
        },
        25 => Message::GetDevices {
            offset: s.u16(),
            count: s.u16(),
        },
        26 => {
            let bitmap = s.data();
            let count = u16::try_from(bitmap.len() * 8).expect("short");
            Message::Devices(DeviceBitmap {
                offset: s.u16(),
                count,
                next: s.u16(),
                bitmap,
            })
        }
        27 => Message::Ping { data: s.u32() },
        28 => Message::Pong { data: s.u32() },
        29 => Message::EventDevice {
            device: DevNum(s.u16()),
            state: DeviceState::from(s.u16()),
        },
        _ => {
            let id = 0x80 | s.u8();
            let response = id & 0x40 == 0 && s.u8() & 1 != 0;
            Message::BusSpecific {
                id,
                response,
                payload: s.data(),
            }
        }
    }
}

fn len_of(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("short")
}

/// Any frame goes over the wire and comes back the same, and decoding any bytes is total.
pub(crate) fn codec(bytes: &[u8]) {
    for max in [48, 65536] {
        if let Ok(frame) = decode(bytes, max) {
            let mut again = vec![0; bytes.len()];
            let size = frame.encode(&mut again).expect("it came out of a message");
            assert_eq!(decode(&again[..size], max), Ok(frame));
            assert!(!frame.to_string().is_empty());
            assert_eq!(frame.message.is_bus(), bytes[0] & 2 != 0);
        }
    }
    let mut words = [U32::new(0); 12];
    let mut source = Source::new(bytes);
    let (dev_num, token) = (DevNum(source.u16()), Token(source.u16()));
    let frame = Frame {
        dev_num,
        token,
        message: any_message(&mut source, &mut words),
    };
    let mut out = [0xee; 300];
    let size = frame.encode(&mut out).expect("all of these are short");
    assert_eq!(decode(&out, 300), Ok(frame), "{frame}");
    assert_eq!(out[size..], [0xee; 300][size..]);
    assert!(frame.encode(&mut out[..size - 1]).is_err());
    let header = virtio_msg::Header::split(&out[..size], size)
        .expect("own message")
        .0;
    assert_eq!(header.is_event(), frame.message.kind() == Kind::Event);
    assert_eq!(header.is_response(), frame.message.kind() == Kind::Response);
    assert_eq!(header.msg_id, frame.message.id());
}
