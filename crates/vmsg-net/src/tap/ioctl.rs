// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ioctls of the tap driver (include/uapi/linux/if_tun.h).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of an interface name with the zero at its end.
pub(super) const IFNAMSIZ: usize = libc::IFNAMSIZ;

/// Flags of `TUNSETIFF` and `TUNGETIFF`.
pub(super) mod flag {
    use super::bits16;

    /// Ethernet frames.
    pub(crate) const TAP: u16 = bits16(libc::IFF_TAP);
    /// No `struct tun_pi` before frames.
    pub(crate) const NO_PI: u16 = bits16(libc::IFF_NO_PI);
    /// A vnet header before frames.
    pub(crate) const VNET_HDR: u16 = bits16(libc::IFF_VNET_HDR);
    /// Several descriptors, each with queues of its own.
    pub(crate) const MULTI_QUEUE: u16 = bits16(libc::IFF_MULTI_QUEUE);
    /// The carrier is off at first. Older kernels do not know it.
    pub(crate) const NO_CARRIER: u16 = bits16(libc::IFF_NO_CARRIER);
    /// For `TUNSETQUEUE`.
    pub(super) const ATTACH_QUEUE: u16 = bits16(libc::IFF_ATTACH_QUEUE);
    /// For `TUNSETQUEUE`.
    pub(super) const DETACH_QUEUE: u16 = bits16(libc::IFF_DETACH_QUEUE);
}

/// The flags are all 16 bits wide in `struct ifreq`.
const fn bits16(flag: libc::c_int) -> u16 {
    let [a, b, ..] = flag.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// What frames from the interface may carry, for `TUNSETOFFLOAD`.
pub(super) mod offload {
    pub(crate) const CSUM: u32 = libc::TUN_F_CSUM;
    pub(crate) const TSO4: u32 = libc::TUN_F_TSO4;
    pub(crate) const TSO6: u32 = libc::TUN_F_TSO6;
    pub(crate) const ECN: u32 = libc::TUN_F_TSO_ECN;
    pub(crate) const UFO: u32 = libc::TUN_F_UFO;
    /// Both, since Linux 6.2, which takes one only with the other.
    pub(crate) const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
}

/// An int that `TUNSET…` sets.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// `TUNSETVNETHDRSZ`: bytes of the vnet header.
    HeaderSize,
    /// `TUNSETVNETLE`: 1 if the vnet header is little endian.
    LittleEndian,
    /// `TUNSETCARRIER` (Linux 5.0).
    Carrier,
}

const _: () = assert!(size_of::<libc::c_int>() == size_of::<i32>());

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn empty_ifreq() -> libc::ifreq {
    // SAFETY: ifreq is a name and a union, all plain numbers and pointers that may be null.
    unsafe { std::mem::zeroed() }
}

/// The name in `request`, up to its zero.
fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.map(libc::c_char::to_ne_bytes);
    let name = bytes.as_flattened().split(|byte| *byte == 0).next();
    String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
}

const fn short(flags: u16) -> libc::c_short {
    flags.cast_signed()
}

/// `TUNSETIFF`: joins the interface `name`, which is created if it is not there; returns its name,
/// in which the kernel has put a number for `%d`.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, flags: u16) -> io::Result<String> {
    if name.len() >= IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut request = empty_ifreq();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = short(flags);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(name_of(&request))
}

/// `TUNGETIFF`: the name of the interface that `fd` has joined, and the flags.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, u16)> {
    let mut request = empty_ifreq();
    // SAFETY: TUNGETIFF writes one `struct ifreq`; so do other drivers with this number, or they refuse it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: the union was zeroed, and TUNGETIFF fills in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), flags.cast_unsigned()))
}

/// `SIOCGIFHWADDR`: the address of the interface that `fd` has joined.
pub(super) fn hardware_address(fd: BorrowedFd<'_>) -> io::Result<[u8; 6]> {
    let mut request = empty_ifreq();
    // The type of the number depends on the C library.
    let number = libc::SIOCGIFHWADDR as libc::Ioctl;
    // SAFETY: SIOCGIFHWADDR writes one `struct ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut request) })?;
    // SAFETY: the union was zeroed, and SIOCGIFHWADDR fills in the address.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let [a, b, c, d, e, f, ..] = address.sa_data.map(libc::c_char::to_ne_bytes);
    Ok([a, b, c, d, e, f].map(|[byte]| byte))
}

/// Sets one of the ints.
pub(super) fn set(fd: BorrowedFd<'_>, what: Value, value: i32) -> io::Result<()> {
    let number = match what {
        Value::HeaderSize => libc::TUNSETVNETHDRSZ,
        Value::LittleEndian => libc::TUNSETVNETLE,
        Value::Carrier => libc::TUNSETCARRIER,
    };
    // SAFETY: all of these read one int, and `value` is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw const value) })
}

/// `TUNSETOFFLOAD`: what frames that are read may carry; of the [`offload`] bits.
pub(super) fn set_offload(fd: BorrowedFd<'_>, bits: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its bits by value and touches no memory.
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(bits),
        )
    })
}

/// `TUNSETQUEUE`: lets a descriptor of a multiqueue interface take part, or not.
pub(super) fn set_queue(fd: BorrowedFd<'_>, takes_part: bool) -> io::Result<()> {
    let mut request = empty_ifreq();
    request.ifr_ifru.ifru_flags = short(match takes_part {
        true => flag::ATTACH_QUEUE,
        false => flag::DETACH_QUEUE,
    });
    // SAFETY: TUNSETQUEUE reads one `struct ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

/// A duplicate of a descriptor that this process was started with and that has no owner in it.
/// The descriptor itself stays open, and is not handed on to children any more.
pub(super) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes numbers only; for one that is not open it fails.
    let duplicate = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    check(duplicate)?;
    // SAFETY: the descriptor was made just now, for us alone.
    let duplicate = unsafe { OwnedFd::from_raw_fd(duplicate) };
    // SAFETY: F_SETFD takes numbers only.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(duplicate)
}
