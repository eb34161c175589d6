// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and headers of the NBD protocol (`doc/proto.md` of NetworkBlockDevice/nbd). All of it is big-endian.

/// What a server begins with.
pub(super) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// What follows in the newstyle negotiation, and what each option begins with.
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// What follows in the oldstyle one.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// What each answer to an option begins with.
pub(super) const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What each request begins with.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// What each part of a structured reply begins with.
pub(super) const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

/// Options are answered.
pub(super) const FIXED_NEWSTYLE: u16 = 1 << 0;
/// No zeroes behind the answer to [`OPT_EXPORT_NAME`].
pub(super) const NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR + 2;
pub(super) const REP_ERR_INVALID: u32 = REP_ERROR + 3;
pub(super) const REP_ERR_PLATFORM: u32 = REP_ERROR + 4;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;
pub(super) const REP_ERR_SHUTDOWN: u32 = REP_ERROR + 7;
pub(super) const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_ERROR + 8;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const FLAG_READ_ONLY: u16 = 1 << 1;
pub(super) const FLAG_SEND_FLUSH: u16 = 1 << 2;
pub(super) const FLAG_SEND_FUA: u16 = 1 << 3;
pub(super) const FLAG_SEND_TRIM: u16 = 1 << 5;
pub(super) const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

/// On the medium before it is answered.
pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
/// Zeroes with space behind them.
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// The last part of a reply.
pub(super) const REPLY_DONE: u16 = 1 << 0;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
/// All kinds of errors have this bit.
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

/// The server is about to end.
pub(super) const ESHUTDOWN: u32 = 108;

/// Bytes of a request without its data.
pub(super) const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply without its data.
pub(super) const SIMPLE_LEN: usize = 16;
/// Bytes of what each part of a structured reply begins with.
pub(super) const CHUNK_LEN: usize = 20;
/// Longest text, in bytes.
pub(super) const LONGEST_TEXT: usize = 4096;

/// A request without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RequestHeader {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl RequestHeader {
    pub(super) fn to_bytes(self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// The number at `at`; `None` if `bytes` is too short.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// As [`be16`].
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// As [`be16`].
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Words of a server, for logs: no control characters, not too many.
pub(super) fn words(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(LONGEST_TEXT)]);
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(300).collect::<String>().trim().to_owned()
}
