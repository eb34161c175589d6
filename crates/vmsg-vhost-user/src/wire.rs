// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and the header of messages. All fields are in the byte order of the machine.

/// Ids of requests of the front end.
pub(crate) mod id {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
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
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_STATUS: u32 = 39;
}

/// Version of all messages.
pub(crate) const VERSION: u32 = 1;
/// Bits of the version.
const VERSION_MASK: u32 = 3;
/// Set in answers.
pub(crate) const REPLY: u32 = 1 << 2;
/// An acknowledgement is wanted.
pub(crate) const NEED_REPLY: u32 = 1 << 3;
/// Bytes of a header.
pub(crate) const HEADER: usize = 12;
/// Bytes of the longest body that is received: a configuration of 256 bytes with its 12 of fields is the longest that has business here.
pub(crate) const MAX_BODY: usize = 1024;

/// Begins each message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: u32,
    pub(crate) flags: u32,
    pub(crate) len: u32,
}

impl Header {
    pub(crate) fn read(bytes: &[u8; HEADER]) -> Self {
        Self {
            id: word(bytes, 0),
            flags: word(bytes, 4),
            len: word(bytes, 8),
        }
    }

    pub(crate) const fn is_of_version(self) -> bool {
        self.flags & VERSION_MASK == VERSION
    }
}

/// The u32 at `at`, which must be inside.
pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// The u64 at `at`, which must be inside.
pub(crate) fn long(bytes: &[u8], at: usize) -> u64 {
    let mut long = [0; 8];
    long.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(long)
}

/// A message being written.
#[derive(Debug)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(id: u32, flags: u32) -> Self {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend(id.to_ne_bytes());
        bytes.extend((VERSION | flags).to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        Self(bytes)
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn half(&mut self, half: u16) -> &mut Self {
        self.bytes(&half.to_ne_bytes())
    }

    pub(crate) fn word(&mut self, word: u32) -> &mut Self {
        self.bytes(&word.to_ne_bytes())
    }

    pub(crate) fn long(&mut self, long: u64) -> &mut Self {
        self.bytes(&long.to_ne_bytes())
    }

    /// The message, with its length in the header.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len() - HEADER).expect("requests are short");
        self.0[8..HEADER].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}
