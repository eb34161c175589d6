// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers of the block device (VIRTIO 1.3, 5.2.3, 5.2.4 and 5.2.6; linux/virtio_blk.h).

/// Feature: the longest segment is in the configuration.
pub const SIZE_MAX: u32 = 1;
/// Feature: the most segments of a request are in the configuration.
pub const SEG_MAX: u32 = 2;
/// Feature: the disk cannot be written.
pub const RO: u32 = 5;
/// Feature: the block size is in the configuration.
pub const BLK_SIZE: u32 = 6;
/// Feature: there are flushes.
pub const FLUSH: u32 = 9;
/// Feature: what is best for the medium is in the configuration.
pub const TOPOLOGY: u32 = 10;
/// Feature: the driver chooses between write-back and write-through.
pub const CONFIG_WCE: u32 = 11;
/// Feature: several queues.
pub const MQ: u32 = 12;
/// Feature: discard.
pub const DISCARD: u32 = 13;
/// Feature: write zeroes.
pub const WRITE_ZEROES: u32 = 14;

/// Requests.
pub(super) mod request {
    pub(in super::super) const IN: u32 = 0;
    pub(in super::super) const OUT: u32 = 1;
    pub(in super::super) const FLUSH: u32 = 4;
    pub(in super::super) const GET_ID: u32 = 8;
    pub(in super::super) const DISCARD: u32 = 11;
    pub(in super::super) const WRITE_ZEROES: u32 = 13;
}

/// What a request came to, as the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// Flag of a segment of [`request::WRITE_ZEROES`].
pub(super) const UNMAP: u32 = 1;

/// Sectors are the unit of the protocol, whatever the block size is.
pub(super) const SECTOR: u64 = 512;

/// Bytes of a serial number.
pub const SERIAL_BYTES: usize = 20;

/// Segments of a request that drivers are told to have at most: what fits into a queue of 128, which is what QEMU gives a device
/// that does not say otherwise.
pub(super) const MAX_SEGMENTS: u32 = 126;

/// Bytes of a segment that drivers are told to have at most.
pub(super) const MAX_SEGMENT: u32 = 1 << 20;

/// Bytes that a request may read or write, whatever drivers are told: firmware is known not to look. No more than one system call
/// moves.
pub(super) const MAX_DATA: u64 = 1 << 30;

/// Likewise for writes. They are what drivers are told, or less, and disks may have to keep copies of them.
pub(super) const MAX_WRITE: u64 = 128 << 20;

/// Sectors that one segment of a discard, or of a writing of zeroes, has at most: 2 GiB.
pub(super) const MAX_RANGE: u32 = 1 << 22;

/// Segments of a discard, or of a writing of zeroes.
pub(super) const MAX_RANGES: usize = 32;
