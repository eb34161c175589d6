// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can only be asked of block devices by ioctl(2): the numbers of include/uapi/linux/fs.h.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Opcode, opcode};

/// The type of the numbers, in linux/fs.h.
const GROUP: u8 = 0x12;
const BLKDISCARD: Opcode = opcode::none(GROUP, 119);
const BLKIOOPT: Opcode = opcode::none(GROUP, 121);
const BLKALIGNOFF: Opcode = opcode::none(GROUP, 122);

/// Tells a device that `len` bytes from `offset` on are not needed any more (BLKDISCARD). Waits until that is done.
///
/// # Errors
///
/// Those of the device; `EOPNOTSUPP` if it has no use for it, `EINVAL` if the range is not made of its blocks.
pub fn discard(device: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers; on other files it fails.
    unsafe { call(device, BLKDISCARD, range.as_ptr().cast_mut().cast()) }
}

/// Bytes that requests are best a multiple of, or 0 (BLKIOOPT).
///
/// # Errors
///
/// Those of ioctl(2).
pub fn optimal_io_size(device: impl AsFd) -> io::Result<u32> {
    let mut size: libc::c_uint = 0;
    // SAFETY: BLKIOOPT writes an unsigned int.
    unsafe { call(device, BLKIOOPT, (&raw mut size).cast()) }?;
    Ok(size)
}

/// Bytes from the beginning to the first of the medium's own blocks (BLKALIGNOFF); `None` if none of them begins at one of the
/// device's.
///
/// # Errors
///
/// Those of ioctl(2).
pub fn alignment_offset(device: impl AsFd) -> io::Result<Option<u32>> {
    let mut offset: libc::c_int = 0;
    // SAFETY: BLKALIGNOFF writes an int.
    unsafe { call(device, BLKALIGNOFF, (&raw mut offset).cast()) }?;
    Ok(u32::try_from(offset).ok())
}

/// # Safety
///
/// `argument` is what `request` takes.
unsafe fn call(device: impl AsFd, request: Opcode, argument: *mut libc::c_void) -> io::Result<()> {
    let fd = device.as_fd().as_raw_fd();
    loop {
        // SAFETY: the caller's promise. The request's type depends on the C library.
        if unsafe { libc::ioctl(fd, request as _, argument) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
