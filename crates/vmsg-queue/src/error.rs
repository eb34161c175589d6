// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can go wrong with a queue.

use vmsg_mem::BusAddr;

/// An error of this crate. [`QueueError::is_peer_fault`] tells whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A ring, a table or a buffer is not where the peer says.
    #[error(transparent)]
    Mem(#[from] vmsg_mem::Error),
    /// The size of a split queue must be a power of two.
    #[error("a queue cannot have {size} descriptors: no power of two")]
    BadSize {
        /// The size asked for.
        size: u16,
    },
    /// The index of the available ring is behind the device, or so far ahead
    /// that the driver would have more chains in flight than there are descriptors.
    #[error(
        "the available index {avail} is impossible: {next} comes next, {in_flight} chains of a queue of {size} are in flight"
    )]
    BadAvailIndex {
        /// The index found in the ring.
        avail: u16,
        /// The index that the device takes next.
        next: u16,
        /// Chains taken and not yet released.
        in_flight: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("descriptor {head}, the head of a chain, is outside the table of {size}")]
    BadHead {
        /// The descriptor named.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A descriptor leads to one that does not exist.
    #[error("descriptor {next} follows in a chain, but is outside the table of {len}")]
    BadNext {
        /// The descriptor named.
        next: u16,
        /// Number of descriptors in the table.
        len: u32,
    },
    /// A chain has more descriptors than its table: it must run in a circle.
    #[error("the chain of descriptor {head} has no end")]
    Loop {
        /// First descriptor of the chain, as the available ring names it.
        head: u16,
    },
    /// A chain has more pieces than the caller's storage.
    #[error("the chain of descriptor {head} has more than {capacity} pieces")]
    ChainTooLong {
        /// First descriptor of the chain.
        head: u16,
        /// Pieces that the storage holds.
        capacity: usize,
    },
    /// The buffers of a chain add up to more than 2^32 bytes (section 2.7.5.2).
    #[error("the chain of descriptor {head} is longer than 4 GiB")]
    ChainTooLarge {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2).
    #[error("the chain of descriptor {head} has a readable buffer after a writable one")]
    ReadableAfterWritable {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A descriptor stands for no bytes at all.
    #[error("the chain of descriptor {head} has a buffer of no bytes at {addr}")]
    ZeroLength {
        /// First descriptor of the chain.
        head: u16,
        /// The address in the descriptor.
        addr: BusAddr,
    },
    /// An indirect descriptor without `VIRTIO_F_INDIRECT_DESC`, inside an
    /// indirect table, or with `VIRTQ_DESC_F_NEXT` (section 2.7.5.3.1).
    #[error("the chain of descriptor {head} has an indirect descriptor where none may be")]
    MisplacedIndirect {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The length of an indirect table is no multiple of 16, zero, or more
    /// than 65,536 entries, which is all that a descriptor could name.
    #[error("the chain of descriptor {head} has an indirect table of {len} bytes at {addr}")]
    BadIndirectTable {
        /// First descriptor of the chain.
        head: u16,
        /// Address of the table.
        addr: BusAddr,
        /// Its length in bytes.
        len: u32,
    },
    /// A queue cannot be taken up at these indices: more chains would be in
    /// flight than there are descriptors.
    #[error("a queue of {size} cannot go on at available index {avail} and used index {used}")]
    BadResume {
        /// Available index asked for.
        avail: u16,
        /// Used index asked for.
        used: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The record of what is in flight cannot be used.
    #[error("a record of requests in flight {0}")]
    BadRecord(&'static str),
    /// The index of the used ring is ahead of what the device was given.
    #[error("the used index {used} is impossible: {next} comes next, {outstanding} chains are out")]
    BadUsedIndex {
        /// The index found in the ring.
        used: u16,
        /// The index that the driver takes next.
        next: u16,
        /// Chains that the device has.
        outstanding: u16,
    },
    /// The device gave back a chain that it does not have.
    #[error("the device used chain {id}, which it does not have")]
    BadUsedId {
        /// Identity in the used element.
        id: u32,
    },
    /// The device claims to have written more than there was room for.
    #[error("the device wrote {len} bytes into chain {id}, which has room for {writable}")]
    BadUsedLength {
        /// Identity in the used element.
        id: u32,
        /// Length in the used element.
        len: u32,
        /// Bytes of writable buffers in the chain.
        writable: u32,
    },
    /// There are not enough free descriptors at the moment; take used chains first.
    #[error("the queue is full")]
    Full,
    /// A chain without buffers, with an empty one, with more than the queue or
    /// its indirect tables ever hold, or of more than 2^32 bytes.
    #[error(
        "this queue cannot hold a chain of {buffers} buffers and {bytes} bytes, or one is empty"
    )]
    BadChain {
        /// Number of buffers.
        buffers: usize,
        /// Bytes in all buffers.
        bytes: u64,
    },
    /// The memory given for a queue is too short or not aligned, or the slots
    /// are not as many as the queue has descriptors.
    #[error("the memory or the slots do not suit a queue of {size}")]
    BadMemory {
        /// Size of the queue.
        size: u16,
    },
    /// The peer broke the queue earlier on; it has to be set up anew.
    #[error("the queue is broken")]
    Broken,
}

impl QueueError {
    /// True when the peer did something impossible: the device shows
    /// `DEVICE_NEEDS_RESET`, or the driver gives the device up. False for
    /// local mistakes and for the echo of an earlier fault
    /// ([`QueueError::Broken`]), so that each fault is counted once.
    pub fn is_peer_fault(&self) -> bool {
        match self {
            Self::Mem(error) => error.is_peer_fault(),
            Self::BadSize { .. }
            | Self::BadAvailIndex { .. }
            | Self::BadHead { .. }
            | Self::BadNext { .. }
            | Self::Loop { .. }
            | Self::ChainTooLong { .. }
            | Self::ChainTooLarge { .. }
            | Self::ReadableAfterWritable { .. }
            | Self::ZeroLength { .. }
            | Self::MisplacedIndirect { .. }
            | Self::BadIndirectTable { .. }
            | Self::BadResume { .. }
            | Self::BadRecord(_)
            | Self::BadUsedIndex { .. }
            | Self::BadUsedId { .. }
            | Self::BadUsedLength { .. } => true,
            Self::Full | Self::BadChain { .. } | Self::BadMemory { .. } | Self::Broken => false,
        }
    }
}
