// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of vfio-user (QEMU, docs/interop/vfio-user.rst; `<linux/vfio.h>` for structures that it imports). Numbers are in the byte order of the machine.
//!
//! Decoding is total: whatever the bytes, the result is a message or an error.

use thiserror::Error;

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;
/// Bytes of an entry of REGION_WRITE_MULTI.
const MULTI_ENTRY: usize = 24;
/// The longest write in REGION_WRITE_MULTI.
const MULTI_DATA: usize = 8;

/// Ids of commands.
pub(crate) mod id {
    pub(crate) const VERSION: u16 = 1;
    pub(crate) const DMA_MAP: u16 = 2;
    pub(crate) const DMA_UNMAP: u16 = 3;
    pub(crate) const DEVICE_GET_INFO: u16 = 4;
    pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(crate) const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub(crate) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(crate) const DEVICE_SET_IRQS: u16 = 8;
    pub(crate) const REGION_READ: u16 = 9;
    pub(crate) const REGION_WRITE: u16 = 10;
    /// Server to client.
    pub(crate) const DMA_READ: u16 = 11;
    /// Server to client.
    pub(crate) const DMA_WRITE: u16 = 12;
    pub(crate) const DEVICE_RESET: u16 = 13;
    pub(crate) const DIRTY_PAGES: u16 = 14;
    pub(crate) const REGION_WRITE_MULTI: u16 = 15;
    pub(crate) const DEVICE_FEATURE: u16 = 16;
    pub(crate) const MIG_DATA_READ: u16 = 17;
    pub(crate) const MIG_DATA_WRITE: u16 = 18;
}

const TYPE: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// `VFIO_DEVICE_FLAGS_*`.
pub(crate) mod device_flag {
    pub(crate) const RESET: u32 = 1 << 0;
    pub(crate) const PCI: u32 = 1 << 1;
}

/// `VFIO_REGION_INFO_FLAG_*`.
pub(crate) mod region_flag {
    pub(crate) const READ: u32 = 1 << 0;
    pub(crate) const WRITE: u32 = 1 << 1;
    pub(crate) const MMAP: u32 = 1 << 2;
    pub(crate) const CAPS: u32 = 1 << 3;
}

/// `VFIO_IRQ_INFO_*`.
pub(crate) mod irq_flag {
    pub(crate) const EVENTFD: u32 = 1 << 0;
    pub(crate) const MASKABLE: u32 = 1 << 1;
    pub(crate) const AUTOMASKED: u32 = 1 << 2;
    pub(crate) const NORESIZE: u32 = 1 << 3;
}

/// `VFIO_IRQ_SET_*`.
pub(crate) mod set_flag {
    pub(crate) const DATA_NONE: u32 = 1 << 0;
    pub(crate) const DATA_BOOL: u32 = 1 << 1;
    pub(crate) const DATA_EVENTFD: u32 = 1 << 2;
    pub(crate) const DATA: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
    pub(crate) const ACTION_MASK: u32 = 1 << 3;
    pub(crate) const ACTION_UNMASK: u32 = 1 << 4;
    pub(crate) const ACTION_TRIGGER: u32 = 1 << 5;
    pub(crate) const ACTION: u32 = ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER;
}

/// Bits 0 and 1 of the flags of DMA_MAP: readable, writable.
pub(crate) mod map_flag {
    pub(crate) const READ: u32 = 1 << 0;
    pub(crate) const WRITE: u32 = 1 << 1;
}

/// `VFIO_DMA_UNMAP_FLAG_*`.
pub(crate) mod unmap_flag {
    pub(crate) const GET_DIRTY_BITMAP: u32 = 1 << 0;
    pub(crate) const ALL: u32 = 1 << 1;
}

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`, and its version.
pub(crate) const CAP_SPARSE_MMAP: (u16, u16) = (1, 1);
/// Bytes of `struct vfio_region_info`, and of the payload of DMA_MAP.
pub(crate) const REGION_INFO: u32 = 32;
/// Bytes of `struct vfio_device_info` and `struct vfio_irq_info` as the protocol has them.
pub(crate) const INFO: u32 = 16;
/// Bytes of the payload of DMA_UNMAP.
pub(crate) const UNMAP: u32 = 24;

/// A header after which the stream makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// A message cannot be shorter than its header.
    #[error("a message of {0} bytes")]
    Size(u32),
    /// Neither a command nor a reply.
    #[error("a message that is neither command nor reply (flags {0:#x})")]
    Type(u32),
}

/// What is wrong with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub(crate) enum Malformed {
    #[error("cut short at {0} bytes of payload")]
    Short(usize),
    #[error("longer than anything accepted ({0} bytes)")]
    Long(u32),
    #[error("the byte count does not match the message")]
    Count,
    #[error("argsz is too small")]
    Argsz,
    #[error("flags that mean nothing ({0:#x})")]
    Flags(u32),
    #[error("an index or a range that the device does not have")]
    Range,
    #[error("an address range that is empty or does not fit")]
    Address,
    #[error("{0} descriptors where they do not belong")]
    Descriptors(usize),
    #[error("more descriptors than agreed on, or than there is room for")]
    LostDescriptors,
    #[error("the version data does not end in its only NUL")]
    Nul,
    #[error("the version data is not understood: {0:?} at column {1}")]
    Json(serde_json::error::Category, usize),
    #[error("a limit of 0 among the capabilities")]
    Capability,
    #[error("version {0}.x is not spoken here")]
    Version(u16),
    #[error("before the version was agreed on, or a second version")]
    Order,
    #[error("a command that does not exist")]
    Unknown,
    #[error("a command that is not served")]
    NotServed,
}

impl From<serde_json::Error> for Malformed {
    fn from(error: serde_json::Error) -> Malformed {
        Malformed::Json(error.classify(), error.column())
    }
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: u16,
    pub(crate) command: u16,
    /// Bytes of the message with its header.
    pub(crate) size: u32,
    flags: u32,
    error: u32,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Result<Header, HeaderError> {
        let mut fields = Fields(bytes);
        let mut header = Header {
            id: 0,
            command: 0,
            size: 0,
            flags: 0,
            error: 0,
        };
        // Never short: the array has all 16 bytes.
        if let (Ok(id), Ok(command), Ok(size), Ok(flags), Ok(error)) = (
            fields.u16(),
            fields.u16(),
            fields.u32(),
            fields.u32(),
            fields.u32(),
        ) {
            header = Header {
                id,
                command,
                size,
                flags,
                error,
            };
        }
        if header.len() < HEADER {
            return Err(HeaderError::Size(header.size));
        }
        match header.flags & TYPE {
            TYPE_COMMAND | TYPE_REPLY => Ok(header),
            _ => Err(HeaderError::Type(header.flags)),
        }
    }

    /// Bytes of the message with its header.
    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }

    pub(crate) fn is_reply(&self) -> bool {
        self.flags & TYPE == TYPE_REPLY
    }

    pub(crate) fn wants_reply(&self) -> bool {
        self.flags & NO_REPLY == 0
    }

    /// The error of a reply, 0 if it does not say which.
    pub(crate) fn error(&self) -> Option<u32> {
        (self.flags & ERROR != 0).then_some(self.error)
    }
}

fn put_header(out: &mut Vec<u8>, id: u16, command: u16, flags: u32, error: u32) {
    out.extend_from_slice(&id.to_ne_bytes());
    out.extend_from_slice(&command.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&error.to_ne_bytes());
}

/// A message without its size, which [`finish`] enters when all of it is there.
pub(crate) fn begin_command(out: &mut Vec<u8>, id: u16, command: u16) {
    out.clear();
    put_header(out, id, command, TYPE_COMMAND, 0);
}

/// As [`begin_command`], for the answer to a command.
pub(crate) fn begin_reply(out: &mut Vec<u8>, to: &Header) {
    out.clear();
    put_header(out, to.id, to.command, TYPE_REPLY, 0);
}

/// The whole of an answer that says no.
pub(crate) fn error_reply(out: &mut Vec<u8>, to: &Header, errno: u32) {
    out.clear();
    put_header(out, to.id, to.command, TYPE_REPLY | ERROR, errno);
    finish(out);
}

pub(crate) fn finish(out: &mut [u8]) {
    let size = u32::try_from(out.len()).expect("messages are a few MiB at most");
    if let Some(field) = out.get_mut(4..8) {
        field.copy_from_slice(&size.to_ne_bytes());
    }
}

/// Reads numbers off the front of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(Malformed::Short(self.0.len()))?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (front, rest) = self
            .0
            .split_first_chunk()
            .ok_or(Malformed::Short(self.0.len()))?;
        self.0 = rest;
        Ok(*front)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_ne_bytes)
    }
}

/// Where and how much of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) offset: u64,
    pub(crate) region: u32,
    pub(crate) count: u32,
}

impl Access {
    fn parse(fields: &mut Fields<'_>) -> Result<Access, Malformed> {
        Ok(Access {
            offset: fields.u64()?,
            region: fields.u32()?,
            count: fields.u32()?,
        })
    }

    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.count).unwrap_or(usize::MAX)
    }

    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_ne_bytes());
        out.extend_from_slice(&self.region.to_ne_bytes());
        out.extend_from_slice(&self.count.to_ne_bytes());
    }
}

/// A command of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command<'a> {
    Version {
        major: u16,
        minor: u16,
        data: &'a [u8],
    },
    DmaMap {
        flags: u32,
        offset: u64,
        address: u64,
        size: u64,
    },
    DmaUnmap {
        flags: u32,
        address: u64,
        size: u64,
    },
    GetInfo,
    GetRegionInfo {
        argsz: u32,
        index: u32,
    },
    GetIrqInfo {
        index: u32,
    },
    /// `data` is what follows the structure.
    SetIrqs {
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &'a [u8],
    },
    RegionRead(Access),
    /// As many bytes as the access says.
    RegionWrite(Access, &'a [u8]),
    RegionWriteMulti(Writes<'a>),
    Reset,
}

impl<'a> Command<'a> {
    pub(crate) fn parse(command: u16, payload: &'a [u8]) -> Result<Command<'a>, Malformed> {
        let mut fields = Fields(payload);
        let parsed = match command {
            id::VERSION => Command::Version {
                major: fields.u16()?,
                minor: fields.u16()?,
                data: fields.0,
            },
            id::DMA_MAP => {
                check_argsz(fields.u32()?, REGION_INFO)?;
                Command::DmaMap {
                    flags: fields.u32()?,
                    offset: fields.u64()?,
                    address: fields.u64()?,
                    size: fields.u64()?,
                }
            }
            id::DMA_UNMAP => {
                check_argsz(fields.u32()?, UNMAP)?;
                Command::DmaUnmap {
                    flags: fields.u32()?,
                    address: fields.u64()?,
                    size: fields.u64()?,
                }
            }
            id::DEVICE_GET_INFO => {
                check_argsz(fields.u32()?, INFO)?;
                Command::GetInfo
            }
            id::DEVICE_GET_REGION_INFO => {
                let argsz = fields.u32()?;
                check_argsz(argsz, REGION_INFO)?;
                fields.u32()?;
                Command::GetRegionInfo {
                    argsz,
                    index: fields.u32()?,
                }
            }
            id::DEVICE_GET_IRQ_INFO => {
                check_argsz(fields.u32()?, INFO)?;
                fields.u32()?;
                Command::GetIrqInfo {
                    index: fields.u32()?,
                }
            }
            // argsz says nothing that the message does not: QEMU gives that of the structure, the kernel's rule has the data in it.
            id::DEVICE_SET_IRQS => {
                fields.u32()?;
                Command::SetIrqs {
                    flags: fields.u32()?,
                    index: fields.u32()?,
                    start: fields.u32()?,
                    count: fields.u32()?,
                    data: fields.0,
                }
            }
            id::REGION_READ => Command::RegionRead(Access::parse(&mut fields)?),
            id::REGION_WRITE => {
                let access = Access::parse(&mut fields)?;
                if fields.0.len() != access.len() {
                    return Err(Malformed::Count);
                }
                Command::RegionWrite(access, fields.0)
            }
            id::REGION_WRITE_MULTI => Command::RegionWriteMulti(Writes::parse(&mut fields)?),
            id::DEVICE_RESET => Command::Reset,
            id::DEVICE_GET_REGION_IO_FDS
            | id::DMA_READ
            | id::DMA_WRITE
            | id::DIRTY_PAGES
            | id::DEVICE_FEATURE
            | id::MIG_DATA_READ
            | id::MIG_DATA_WRITE => return Err(Malformed::NotServed),
            _ => return Err(Malformed::Unknown),
        };
        Ok(parsed)
    }
}

fn check_argsz(argsz: u32, least: u32) -> Result<(), Malformed> {
    if argsz < least {
        return Err(Malformed::Argsz);
    }
    Ok(())
}

/// The writes of a REGION_WRITE_MULTI, each of 8 bytes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Writes<'a>(&'a [u8]);

impl<'a> Writes<'a> {
    fn parse(fields: &mut Fields<'a>) -> Result<Writes<'a>, Malformed> {
        let count = usize::try_from(fields.u64()?).map_err(|_| Malformed::Count)?;
        if count.checked_mul(MULTI_ENTRY) != Some(fields.0.len()) {
            return Err(Malformed::Count);
        }
        let writes = Writes(fields.0);
        if writes.iter().any(|(_, data)| data.is_none()) {
            return Err(Malformed::Count);
        }
        Ok(writes)
    }

    fn iter(self) -> impl Iterator<Item = (Access, Option<&'a [u8]>)> {
        self.0.chunks_exact(MULTI_ENTRY).filter_map(|entry| {
            let mut fields = Fields(entry);
            let access = Access::parse(&mut fields).ok()?;
            let data = fields.bytes(MULTI_DATA).ok()?;
            Some((access, data.get(..access.len())))
        })
    }

    pub(crate) fn writes(self) -> impl Iterator<Item = (Access, &'a [u8])> {
        self.iter()
            .filter_map(|(access, data)| Some((access, data?)))
    }
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod tests;
