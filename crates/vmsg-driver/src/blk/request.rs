// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests and what becomes of them (virtio 1.3 §5.2.6).

use vmsg_queue::Buffer;

/// Values of the field `type`.
pub mod kind {
    /// VIRTIO_BLK_T_IN: read.
    pub const IN: u32 = 0;
    /// VIRTIO_BLK_T_OUT: write.
    pub const OUT: u32 = 1;
    /// VIRTIO_BLK_T_FLUSH.
    pub const FLUSH: u32 = 4;
    /// VIRTIO_BLK_T_GET_ID.
    pub const GET_ID: u32 = 8;
    /// VIRTIO_BLK_T_DISCARD.
    pub const DISCARD: u32 = 11;
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Bytes of a device's name (VIRTIO_BLK_ID_BYTES).
pub const ID_LEN: usize = 20;

/// What is wanted of a disk. Sectors are of 512 bytes, whatever the block size; buffers are in memory that was lent to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'b> {
    /// Fill `to` with what is at `sector`.
    Read {
        /// First sector.
        sector: u64,
        /// Where to, in order.
        to: &'b [Buffer],
    },
    /// Put what is in `from` at `sector`.
    Write {
        /// First sector.
        sector: u64,
        /// What, in order.
        from: &'b [Buffer],
    },
    /// What was told as written is on the medium when this is told as done.
    Flush,
    /// What is there is not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Zeroes are read there afterwards.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
        /// The space may be given up.
        unmap: bool,
    },
    /// The name of the device, 20 bytes: it comes in [`Completion::id`].
    GetId,
    /// A request of any type, to see what the device makes of it: a header, `readable` after it, and `writable` before the status.
    Other {
        /// The field `type`.
        kind: u32,
        /// The field `sector`.
        sector: u64,
        /// What the device reads after the header.
        readable: &'b [Buffer],
        /// What the device writes before the status.
        writable: &'b [Buffer],
    },
}

impl Request<'_> {
    /// The field `type`.
    pub const fn kind(&self) -> u32 {
        match self {
            Request::Read { .. } => kind::IN,
            Request::Write { .. } => kind::OUT,
            Request::Flush => kind::FLUSH,
            Request::Discard { .. } => kind::DISCARD,
            Request::WriteZeroes { .. } => kind::WRITE_ZEROES,
            Request::GetId => kind::GET_ID,
            Request::Other { kind, .. } => *kind,
        }
    }
}

/// Why the device has not done a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// VIRTIO_BLK_S_IOERR: the medium could not, or the request was wrong.
    #[error("I/O error (IOERR)")]
    IoErr,
    /// VIRTIO_BLK_S_UNSUPP: the device does not know such requests.
    #[error("not supported (UNSUPP)")]
    Unsupp,
    /// A status that does not exist; 255 also stands for none at all.
    #[error("status {0}, which does not exist")]
    BadStatus(u8),
}

/// Status bytes.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What stands in the place of the status before the device has written it.
pub(super) const NO_STATUS: u8 = 0xff;

/// What a status byte means.
///
/// # Errors
/// [`Failure`], for any but 0.
pub(super) const fn status(byte: u8) -> Result<(), Failure> {
    match byte {
        OK => Ok(()),
        IOERR => Err(Failure::IoErr),
        UNSUPP => Err(Failure::Unsupp),
        other => Err(Failure::BadStatus(other)),
    }
}

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which request: what it was submitted with.
    pub tag: u64,
    /// How it went.
    pub result: Result<(), Failure>,
    /// Bytes that the device says it has written, the status among them; never more than there was room for. Devices are not agreed on it.
    pub written: u32,
    /// Bytes there was room for, the status among them: what `written` is of a read that went well.
    pub writable: u32,
    /// The name of the device, if that was asked for and told: ASCII, the rest 0.
    pub id: Option<[u8; ID_LEN]>,
}

impl Completion {
    /// Whether the request went well and the device says that all of its buffers are filled.
    pub fn is_whole(&self) -> bool {
        self.result.is_ok() && self.written == self.writable
    }
}
