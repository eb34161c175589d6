// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of vhost-user, back-end side (QEMU, docs/interop/vhost-user.rst). Numbers are in the byte order of the machine.
//!
//! Decoding is total: whatever the bytes, the result is a request or an error.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub(super) const HEADER: usize = 12;
/// The longest payload accepted: a configuration access of 4 KiB with its 12 bytes in front.
pub(super) const MAX_PAYLOAD: usize = 4096 + 12;
/// The most descriptors with one message.
pub(super) const MAX_FDS: usize = 32;

/// Feature bit 30: there are protocol features.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features, by bit.
pub(super) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const NET_MTU: u64 = 1 << 4;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// Ids of the requests of front ends.
pub(super) mod id {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SEND_RARP: u32 = 19;
    pub(crate) const NET_SET_MTU: u32 = 20;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    /// From back end to front end.
    pub(crate) const CONFIG_CHANGE_MSG: u32 = 2;
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// SET_VRING_KICK and its like: no descriptor comes along.
const NO_FD: u64 = 1 << 8;

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The header has another version, or is that of a reply.
    #[error("not a vhost-user request (flags {0:#x})")]
    NotARequest(u32),
    /// The size is above what any request has.
    #[error("request {request} of {size} bytes")]
    TooLong {
        /// Id.
        request: u32,
        /// Bytes it claims to have.
        size: u32,
    },
    /// The payload has not the size the request has.
    #[error("request {request} with a payload of {size} bytes")]
    WrongSize {
        /// Id.
        request: u32,
        /// Bytes of payload.
        size: usize,
    },
    /// A field has a value that means nothing.
    #[error("request {0} with a field out of range")]
    BadField(u32),
    /// A descriptor is missing, or there is one too many.
    #[error("request {request} with {have} descriptors")]
    Descriptors {
        /// Id.
        request: u32,
        /// How many came.
        have: usize,
    },
    /// More descriptors than any message carries.
    #[error("too many descriptors")]
    TooManyDescriptors,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C, packed)]
pub(super) struct Header {
    pub(super) request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Header, WireError> {
        let header: Header = zerocopy::transmute!(*bytes);
        let Header {
            request,
            flags,
            size,
        } = header;
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(WireError::NotARequest(flags));
        }
        if header.payload() > MAX_PAYLOAD {
            return Err(WireError::TooLong { request, size });
        }
        Ok(header)
    }

    pub(super) fn payload(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }

    pub(super) fn wants_ack(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// A reply, or with `request` one of ours a message to the front end.
pub(super) fn message(request: u32, is_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if is_reply { REPLY } else { 0 };
    let size = u32::try_from(payload.len()).expect("payloads are a few KiB at most");
    let mut bytes = Header {
        request,
        flags,
        size,
    }
    .as_bytes()
    .to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// A piece of the front end's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawRegion {
    /// Guest physical address.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Address in the front end's process, used in ring addresses.
    pub(super) user: u64,
    /// Where the region begins in its file.
    pub(super) offset: u64,
}

/// Where the parts of a ring are, as addresses of the front end's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) descriptor: u64,
    pub(super) used: u64,
    pub(super) avail: u64,
}

/// Memory for records of what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawInflight {
    /// Bytes.
    pub(super) size: u64,
    /// Where it begins in its file.
    pub(super) offset: u64,
    /// How many rings have a record.
    pub(super) rings: u16,
    /// Entries of each.
    pub(super) entries: u16,
    pub(super) padding: u32,
}

/// A request of a front end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RawRegion>),
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        addresses: RingAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
    },
    SetVringCall {
        index: u32,
    },
    SetVringErr {
        index: u32,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        on: bool,
    },
    /// Harmless to ignore.
    SendRarp,
    /// What the guest was told.
    NetSetMtu(u64),
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        data: Vec<u8>,
    },
    GetInflightFd(RawInflight),
    SetInflightFd(RawInflight),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RawRegion),
    RemMemReg(RawRegion),
    /// Of a protocol feature that is not offered, or unknown.
    Other(u32),
}

impl Request {
    /// Reads the payload of `request`, which came with `fds` descriptors.
    pub(super) fn parse(request: u32, payload: &[u8], fds: usize) -> Result<Request, WireError> {
        let size = payload.len();
        let wrong = || WireError::WrongSize { request, size };
        let bad = || WireError::BadField(request);
        let words = |n: usize| if size == n { Ok(()) } else { Err(wrong()) };
        let u32_at = |at: usize| {
            payload
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .map(u32::from_ne_bytes)
                .ok_or_else(wrong)
        };
        let u64_at = |at: usize| {
            payload
                .get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map(u64::from_ne_bytes)
                .ok_or_else(wrong)
        };
        let region_at = |at: usize| -> Result<RawRegion, WireError> {
            let bytes = payload.get(at..).ok_or_else(wrong)?;
            let (region, _) = RawRegion::read_from_prefix(bytes).map_err(|_| wrong())?;
            let fits = |start: u64| start.checked_add(region.size).is_some();
            if region.size == 0 || !fits(region.guest) || !fits(region.user) || !fits(region.offset)
            {
                return Err(bad());
            }
            Ok(region)
        };
        let parsed = match request {
            id::GET_FEATURES => Request::GetFeatures,
            id::SET_FEATURES => Request::SetFeatures(u64_at(0)?),
            id::SET_OWNER => Request::SetOwner,
            id::RESET_OWNER => Request::ResetOwner,
            id::SET_MEM_TABLE => {
                let count = usize::try_from(u32_at(0)?).map_err(|_| bad())?;
                if count > MAX_FDS {
                    return Err(bad());
                }
                words(8 + count * size_of::<RawRegion>())?;
                let regions = (0..count).map(|i| region_at(8 + i * size_of::<RawRegion>()));
                return Ok(Request::SetMemTable(regions.collect::<Result<_, _>>()?));
            }
            id::SET_VRING_NUM => Request::SetVringNum {
                index: u32_at(0)?,
                num: u32_at(4)?,
            },
            id::SET_VRING_ADDR => {
                words(40)?;
                let addresses = RingAddresses {
                    descriptor: u64_at(8)?,
                    used: u64_at(16)?,
                    avail: u64_at(24)?,
                };
                Request::SetVringAddr {
                    index: u32_at(0)?,
                    addresses,
                }
            }
            id::SET_VRING_BASE => Request::SetVringBase {
                index: u32_at(0)?,
                base: u32_at(4)?,
            },
            id::GET_VRING_BASE => Request::GetVringBase { index: u32_at(0)? },
            id::SET_VRING_KICK | id::SET_VRING_CALL | id::SET_VRING_ERR => {
                words(8)?;
                let word = u64_at(0)?;
                let expected = usize::from(word & NO_FD == 0);
                if fds != expected {
                    return Err(WireError::Descriptors { request, have: fds });
                }
                let index = u32::from(word.to_le_bytes()[0]);
                return Ok(match request {
                    id::SET_VRING_KICK => Request::SetVringKick { index },
                    id::SET_VRING_CALL => Request::SetVringCall { index },
                    _ => Request::SetVringErr { index },
                });
            }
            id::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            id::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(u64_at(0)?),
            id::GET_QUEUE_NUM => Request::GetQueueNum,
            id::SET_VRING_ENABLE => match u32_at(4)? {
                on @ (0 | 1) => Request::SetVringEnable {
                    index: u32_at(0)?,
                    on: on == 1,
                },
                _ => return Err(bad()),
            },
            id::SEND_RARP => Request::SendRarp,
            id::NET_SET_MTU => Request::NetSetMtu(u64_at(0)?),
            id::SET_BACKEND_REQ_FD => match fds {
                1 => return Ok(Request::SetBackendReqFd),
                have => return Err(WireError::Descriptors { request, have }),
            },
            id::GET_CONFIG | id::SET_CONFIG => {
                let (offset, len, flags) = (u32_at(0)?, u32_at(4)?, u32_at(8)?);
                let data = payload.get(12..).ok_or_else(wrong)?;
                if usize::try_from(len) != Ok(data.len()) {
                    return Err(wrong());
                }
                if len == 0 || offset.checked_add(len).is_none_or(|end| end > 4096) {
                    return Err(bad());
                }
                match request {
                    id::GET_CONFIG => Request::GetConfig {
                        offset,
                        size: len,
                        flags,
                    },
                    _ => Request::SetConfig {
                        offset,
                        flags,
                        data: data.to_vec(),
                    },
                }
            }
            id::GET_INFLIGHT_FD | id::SET_INFLIGHT_FD => {
                let raw = RawInflight::read_from_bytes(payload).map_err(|_| wrong())?;
                let get = request == id::GET_INFLIGHT_FD;
                if fds != usize::from(!get) {
                    return Err(WireError::Descriptors { request, have: fds });
                }
                return Ok(if get {
                    Request::GetInflightFd(raw)
                } else {
                    Request::SetInflightFd(raw)
                });
            }
            id::RESET_DEVICE => Request::ResetDevice,
            id::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            id::ADD_MEM_REG => {
                words(40)?;
                match fds {
                    1 => return Ok(Request::AddMemReg(region_at(8)?)),
                    have => return Err(WireError::Descriptors { request, have }),
                }
            }
            id::REM_MEM_REG => {
                words(40)?;
                // One descriptor may come by mistake of the front end: it is closed.
                return Ok(Request::RemMemReg(region_at(8)?));
            }
            other => return Ok(Request::Other(other)),
        };
        if fds != 0 {
            return Err(WireError::Descriptors { request, have: fds });
        }
        Ok(parsed)
    }
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod tests;
