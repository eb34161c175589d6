// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages as values: what every layout decodes to, and what the machines speak.

use crate::feature_set::FeatureSet;
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize, Token};
use thiserror::Error;
use zerocopy::little_endian::U32;

/// Why bytes are no message. Such a message is dropped without an answer, counted and logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Fewer bytes than the header, or than its size field says.
    #[error("message of {need} bytes cut off after {have}")]
    TooShort {
        /// Bytes there are.
        have: usize,
        /// Bytes there should be.
        need: usize,
    },
    /// The size field is above the message size of the bus.
    #[error("message of {size} bytes on a bus that carries {max}")]
    TooLong {
        /// What the header says.
        size: usize,
        /// What the bus carries.
        max: usize,
    },
    /// No message of this kind is known.
    #[error("unknown message type {msg_type:#04x}, id {msg_id:#04x}")]
    Unknown {
        /// Type byte.
        msg_type: u8,
        /// Id byte.
        msg_id: u8,
    },
    /// The payload has not the size that this message has.
    #[error("message type {msg_type:#04x}, id {msg_id:#04x} of {size} bytes: wrong size")]
    WrongSize {
        /// Type byte.
        msg_type: u8,
        /// Id byte.
        msg_id: u8,
        /// What the header says.
        size: u16,
    },
}

/// The message does not fit the buffer it was to be written to, or no message at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("message of {size} bytes does not fit {room}")]
pub struct EncodeError {
    /// Bytes the message takes.
    pub size: usize,
    /// Bytes there are.
    pub room: usize,
}

/// What a device is: the answer to GET_DEVICE_INFO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Virtio device id (virtio 1.3 §5): 1 network, 2 block … 0: there is no device.
    pub device_id: u32,
    /// Vendor id.
    pub vendor_id: u32,
    /// Number of feature bits, a multiple of 32.
    pub feature_bits: u32,
    /// Bytes of configuration space.
    pub config_size: u32,
    /// Number of virtqueues, without administration queues.
    pub max_queues: u32,
    /// Index of the first administration queue.
    pub admin_first: u16,
    /// Number of administration queues.
    pub admin_count: u16,
}

impl DeviceInfo {
    /// What is answered for a device number without a device: all zero.
    pub const ABSENT: DeviceInfo = DeviceInfo {
        device_id: 0,
        vendor_id: 0,
        feature_bits: 0,
        config_size: 0,
        max_queues: 0,
        admin_first: 0,
        admin_count: 0,
    };

    /// Whether there is a device.
    pub fn is_present(&self) -> bool {
        self.device_id != 0
    }
}

/// Blocks of 32 feature bits: `count` of them from block `first` on. Blocks that `words` does not reach are zero.
#[derive(Clone, Copy, Debug)]
pub struct FeatureBlocks<'a> {
    /// Number of the first block: bits `32 × first` and up.
    pub first: u32,
    /// How many blocks.
    pub count: u32,
    /// The blocks, at most `count`.
    pub words: &'a [U32],
}

impl FeatureBlocks<'_> {
    /// The blocks with their numbers. A hostile `first` ends the walk where numbers end.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (0..self.count).map_while(|i| Some((self.first.checked_add(i)?, self.get(i))))
    }

    /// The `i`th block, 0 where there is none.
    pub fn get(&self, i: u32) -> u32 {
        if i >= self.count {
            return 0;
        }
        usize::try_from(i)
            .ok()
            .and_then(|i| self.words.get(i))
            .map_or(0, |w| w.get())
    }

    /// Puts the blocks into a set, over what the set has there. Says whether a bit was set that no [`FeatureSet`] can hold.
    pub fn store(&self, set: &mut FeatureSet) -> bool {
        let mut foreign = false;
        // Past the words everything is zero, and past the set nothing can be stored.
        for (number, word) in self.iter().take(self.words.len().max(crate::MAX_BLOCKS)) {
            if !set.set_block(number, word) {
                foreign |= word != 0;
            }
        }
        foreign
    }
}

impl PartialEq for FeatureBlocks<'_> {
    fn eq(&self, other: &Self) -> bool {
        let words = self.words.len().max(other.words.len());
        self.first == other.first
            && self.count == other.count
            && (0..self.count)
                .take(words)
                .all(|i| self.get(i) == other.get(i))
    }
}

impl Eq for FeatureBlocks<'_> {}

/// A piece of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigData<'a> {
    /// Configuration generation.
    pub generation: Generation,
    /// Offset in the configuration space, bytes.
    pub offset: u32,
    /// Length of the piece, bytes. 0 in the response of SET_CONFIG: rejected.
    pub len: u32,
    /// The bytes: `len` of them. The response of SET_CONFIG may leave them out. What is missing in the response of GET_CONFIG is
    /// sent as zeros.
    pub data: &'a [u8],
}

/// A virtqueue as the device describes it: the answer to GET_VQUEUE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VqueueInfo {
    /// Queue index.
    pub index: QueueIndex,
    /// Largest size the queue can have; 0: there is no such queue.
    pub max_size: QueueSize,
    /// Size the queue has; 0: it is not set up.
    pub size: QueueSize,
    /// Bus address of the descriptor area.
    pub descriptor: u64,
    /// Bus address of the driver area (split: available ring).
    pub driver: u64,
    /// Bus address of the device area (split: used ring).
    pub device: u64,
}

/// A virtqueue as the driver sets it up: SET_VQUEUE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VqueueConfig {
    /// Queue index.
    pub index: QueueIndex,
    /// Size in entries.
    pub size: QueueSize,
    /// Bus address of the descriptor area.
    pub descriptor: u64,
    /// Bus address of the driver area (split: available ring).
    pub driver: u64,
    /// Bus address of the device area (split: used ring).
    pub device: u64,
}

/// A shared-memory region: the answer to GET_SHM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmInfo {
    /// Region index.
    pub index: u32,
    /// Bytes; 0: there is no such region.
    pub len: u32,
    /// Bus address.
    pub address: u32,
}

/// A change of the configuration or the status: EVENT_CONFIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigEvent<'a> {
    /// The device status.
    pub status: DeviceStatus,
    /// Configuration generation.
    pub generation: Generation,
    /// Offset of what changed, bytes.
    pub offset: u32,
    /// Length of what changed, bytes; may be 0.
    pub len: u32,
    /// The new bytes: `len`, or none (then they are to be read).
    pub data: &'a [u8],
}

/// Which device numbers are there: the answer to GET_DEVICES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBitmap<'a> {
    /// First device number.
    pub offset: u16,
    /// How many device numbers, a multiple of 8.
    pub count: u16,
    /// Where to ask next; 0: there are no more devices.
    pub next: u16,
    /// `count / 8` bytes, the least significant bit first.
    pub bitmap: &'a [u8],
}

impl DeviceBitmap<'_> {
    /// The numbers of the devices that are there.
    pub fn iter(&self) -> impl Iterator<Item = DevNum> + '_ {
        (0..self.count).filter_map(|i| {
            let byte = self.bitmap.get(usize::from(i / 8))?;
            if byte >> (i % 8) & 1 == 0 {
                return None;
            }
            self.offset.checked_add(i).map(DevNum)
        })
    }
}

/// What happened to a device: EVENT_DEVICE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// It is there.
    Ready,
    /// It is gone.
    Removed,
    /// Something else: 0x8000 and up belong to the bus, the others are reserved.
    Other(u16),
}

impl From<u16> for DeviceState {
    fn from(state: u16) -> DeviceState {
        match state {
            1 => DeviceState::Ready,
            2 => DeviceState::Removed,
            other => DeviceState::Other(other),
        }
    }
}

impl From<DeviceState> for u16 {
    fn from(state: DeviceState) -> u16 {
        match state {
            DeviceState::Ready => 1,
            DeviceState::Removed => 2,
            DeviceState::Other(other) => other,
        }
    }
}

/// A message of the protocol, of whichever layout. Variants come in pairs of request and response, then the events.
///
/// `Display` writes what a trace shows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message<'a> {
    /// What is this device?
    GetDeviceInfo,
    /// Response of [`GetDeviceInfo`](Message::GetDeviceInfo).
    DeviceInfo(DeviceInfo),
    /// Which features does the device offer?
    GetDeviceFeatures {
        /// First block of 32 bits.
        first: u32,
        /// Number of blocks.
        count: u32,
    },
    /// Response of [`GetDeviceFeatures`](Message::GetDeviceFeatures).
    DeviceFeatures(FeatureBlocks<'a>),
    /// The driver accepts these features.
    SetDriverFeatures(FeatureBlocks<'a>),
    /// Response of [`SetDriverFeatures`](Message::SetDriverFeatures).
    DriverFeaturesSet,
    /// Read from the configuration space.
    GetConfig {
        /// Offset, bytes.
        offset: u32,
        /// Bytes; 0 reads the generation only.
        len: u32,
    },
    /// Response of [`GetConfig`](Message::GetConfig).
    Config(ConfigData<'a>),
    /// Write to the configuration space.
    SetConfig(ConfigData<'a>),
    /// Response of [`SetConfig`](Message::SetConfig): the new generation and what is there now. Length 0: rejected.
    ConfigSet(ConfigData<'a>),
    /// Read the device status.
    GetDeviceStatus,
    /// Response of [`GetDeviceStatus`](Message::GetDeviceStatus).
    DeviceStatus(DeviceStatus),
    /// Write the device status; 0 resets the device.
    SetDeviceStatus(DeviceStatus),
    /// Response of [`SetDeviceStatus`](Message::SetDeviceStatus): the status that resulted.
    DeviceStatusSet(DeviceStatus),
    /// How is this virtqueue?
    GetVqueue(QueueIndex),
    /// Response of [`GetVqueue`](Message::GetVqueue).
    Vqueue(VqueueInfo),
    /// Set a virtqueue up.
    SetVqueue(VqueueConfig),
    /// Response of [`SetVqueue`](Message::SetVqueue).
    VqueueSet,
    /// Reset one virtqueue.
    ResetVqueue(QueueIndex),
    /// Response of [`ResetVqueue`](Message::ResetVqueue).
    VqueueReset,
    /// Where is this shared-memory region?
    GetShm {
        /// Region index.
        index: u32,
    },
    /// Response of [`GetShm`](Message::GetShm).
    Shm(ShmInfo),
    /// From the device: configuration or status has changed.
    EventConfig(ConfigEvent<'a>),
    /// From the driver: buffers are available.
    EventAvail {
        /// Queue.
        queue: QueueIndex,
        /// Next offset (bits 0–30) and wrap (bit 31); 0 unless NOTIFICATION_DATA was negotiated.
        next: u32,
    },
    /// From the device: buffers were used.
    EventUsed {
        /// Queue.
        queue: QueueIndex,
    },
    /// Bus: which device numbers are there?
    GetDevices {
        /// First device number, a multiple of 8.
        offset: u16,
        /// How many, a multiple of 8.
        count: u16,
    },
    /// Response of [`GetDevices`](Message::GetDevices).
    Devices(DeviceBitmap<'a>),
    /// Bus, from either side: are you there?
    Ping {
        /// Any number.
        data: u32,
    },
    /// Response of [`Ping`](Message::Ping).
    Pong {
        /// The number of the request.
        data: u32,
    },
    /// Bus, from the device side: a device came or went.
    EventDevice {
        /// Which one.
        device: DevNum,
        /// What happened to it.
        state: DeviceState,
    },
    /// Bus: a message of this kind of bus only.
    BusSpecific {
        /// Message id, 0x80 and up.
        id: u8,
        /// Whether it is a response.
        response: bool,
        /// What the bus makes of it.
        payload: &'a [u8],
    },
}

/// What part a message plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It wants a response.
    Request,
    /// It is a response.
    Response,
    /// It stands alone.
    Event,
}

/// A message with its address: what one transfer over a bus carries.
///
/// `Display` is the line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Device number; 0 for bus messages.
    pub dev_num: DevNum,
    /// Correlation of request and response; 0 in events.
    pub token: Token,
    /// The message.
    pub message: Message<'a>,
}

impl<'a> Frame<'a> {
    /// A message about a device.
    pub fn new(dev_num: DevNum, token: Token, message: Message<'a>) -> Frame<'a> {
        Frame {
            dev_num,
            token,
            message,
        }
    }

    /// A bus message.
    pub fn bus(token: Token, message: Message<'a>) -> Frame<'a> {
        Frame {
            dev_num: DevNum(0),
            token,
            message,
        }
    }

    /// `message` as the response to this frame: same device, same token.
    pub fn response<'b>(&self, message: Message<'b>) -> Frame<'b> {
        Frame {
            dev_num: self.dev_num,
            token: self.token,
            message,
        }
    }
}

/// Reads one message in the layout of revision 1 from the start of `bytes`; what follows it there is left out.
/// `max` is the message size of the bus.
///
/// Total: whatever the bytes, the result is a frame or an error.
///
/// # Errors
/// [`DecodeError`]: drop the message, count it, do not answer.
pub fn decode(bytes: &[u8], max: usize) -> Result<Frame<'_>, DecodeError> {
    crate::codec::decode(bytes, max)
}

impl Frame<'_> {
    /// Writes the frame in the layout of revision 1 to the start of `out` and gives its size in bytes.
    ///
    /// # Errors
    /// [`EncodeError`] if it does not fit `out`; then nothing of use is in `out`.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, EncodeError> {
        crate::codec::encode(self, out)
    }
}
