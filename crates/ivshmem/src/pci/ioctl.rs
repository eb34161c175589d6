// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The system calls of VFIO (linux/vfio.h).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Numbers of the calls: ';' and 100 plus.
const fn number(plus: u32) -> u32 {
    0x3b << 8 | (100 + plus)
}

const GET_API_VERSION: u32 = number(0);
const CHECK_EXTENSION: u32 = number(1);
const SET_IOMMU: u32 = number(2);
const GROUP_GET_STATUS: u32 = number(3);
const GROUP_SET_CONTAINER: u32 = number(4);
const GROUP_GET_DEVICE_FD: u32 = number(6);
const DEVICE_GET_REGION_INFO: u32 = number(8);
const DEVICE_GET_IRQ_INFO: u32 = number(9);
const DEVICE_SET_IRQS: u32 = number(10);

/// The version that `GET_API_VERSION` answers.
pub(super) const API_VERSION: i32 = 0;

/// Kinds of IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Iommu {
    Type1 = 1,
    Type1v2 = 3,
    /// None: only for groups that are marked so.
    Unprotected = 8,
}

/// Indices of regions and of kinds of interrupts of a PCI function.
pub(super) const BAR0: u32 = 0;
pub(super) const BAR2: u32 = 2;
pub(super) const CONFIG: u32 = 7;
pub(super) const MSI_X: u32 = 2;

/// `struct vfio_group_status`.
#[repr(C)]
#[derive(Default)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

/// All functions of the group are bound to VFIO or to nothing.
const VIABLE: u32 = 1;

/// `struct vfio_region_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Region {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    pub(super) size: u64,
    pub(super) offset: u64,
}

impl Region {
    /// Whether it can be mapped.
    pub(super) fn can_map(&self) -> bool {
        self.flags & 4 != 0
    }
}

/// `struct vfio_irq_info`.
#[repr(C)]
#[derive(Default)]
struct IrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}

/// `struct vfio_irq_set` with room for the eventfds of all vectors that MSI-X can have.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    fds: [i32; MAX_VECTORS],
}

const MAX_VECTORS: usize = 2048;
/// The data are eventfds, to be signalled.
const EVENTFD_TRIGGER: u32 = 4 | 32;

/// A call whose argument is a number or nothing.
fn by_value(fd: impl AsFd, request: u32, argument: u64) -> io::Result<i32> {
    // SAFETY: the requests that come here take a number and touch no memory of this process.
    answer(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, argument) })
}

/// A call whose argument is a structure that begins with its size, or a string.
///
/// # Safety
///
/// The kernel may read and write as much at `argument` as `request` says.
unsafe fn by_address<T>(fd: impl AsFd, request: u32, argument: *mut T) -> io::Result<i32> {
    // SAFETY: by the promise of the caller.
    answer(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, argument) })
}

fn answer(result: libc::c_int) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// The version of VFIO.
pub(super) fn api_version(container: impl AsFd) -> io::Result<i32> {
    by_value(container, GET_API_VERSION, 0)
}

/// Whether a container knows a kind of IOMMU.
pub(super) fn knows(container: impl AsFd, iommu: Iommu) -> bool {
    by_value(container, CHECK_EXTENSION, iommu as u64).is_ok_and(|answer| answer > 0)
}

/// Chooses the kind of IOMMU, once a group is in the container.
pub(super) fn set_iommu(container: impl AsFd, iommu: Iommu) -> io::Result<()> {
    by_value(container, SET_IOMMU, iommu as u64).map(drop)
}

/// Whether all functions of a group may be used.
pub(super) fn is_viable(group: impl AsFd) -> io::Result<bool> {
    let mut status = GroupStatus {
        argsz: size::<GroupStatus>(),
        ..GroupStatus::default()
    };
    // SAFETY: the structure of this request, with its size.
    unsafe { by_address(group, GROUP_GET_STATUS, &raw mut status)? };
    Ok(status.flags & VIABLE != 0)
}

/// Puts a group into a container.
pub(super) fn set_container(group: impl AsFd, container: impl AsFd) -> io::Result<()> {
    let mut container: RawFd = container.as_fd().as_raw_fd();
    // SAFETY: this request reads one descriptor.
    unsafe { by_address(group, GROUP_SET_CONTAINER, &raw mut container) }.map(drop)
}

/// Opens a function of a group.
pub(super) fn device(group: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: this request reads a string that ends with a zero.
    let fd = unsafe { by_address(group, GROUP_GET_DEVICE_FD, name.as_ptr().cast_mut())? };
    // SAFETY: a new descriptor, which nobody else has. The kernel opens it with O_CLOEXEC.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where a region of a device is in its file.
pub(super) fn region(device: impl AsFd, index: u32) -> io::Result<Region> {
    let mut region = Region {
        argsz: size::<Region>(),
        index,
        ..Region::default()
    };
    // SAFETY: the structure of this request, with its size.
    unsafe { by_address(device, DEVICE_GET_REGION_INFO, &raw mut region)? };
    Ok(region)
}

/// How many interrupts of a kind a device has.
pub(super) fn interrupts(device: impl AsFd, index: u32) -> io::Result<u32> {
    let mut info = IrqInfo {
        argsz: size::<IrqInfo>(),
        index,
        ..IrqInfo::default()
    };
    // SAFETY: the structure of this request, with its size.
    unsafe { by_address(device, DEVICE_GET_IRQ_INFO, &raw mut info)? };
    Ok(info.count)
}

/// Has MSI-X vectors from 0 on signal eventfds. If the machine has fewer interrupts to spare nothing is done, and the
/// answer is how many it has.
pub(super) fn set_eventfds(device: impl AsFd, eventfds: &[OwnedFd]) -> io::Result<Option<u32>> {
    let mut fds = [-1; MAX_VECTORS];
    if eventfds.len() > fds.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in fds.iter_mut().zip(eventfds) {
        *to = from.as_raw_fd();
    }
    let count = u32::try_from(eventfds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut set = IrqSet {
        argsz: 20 + 4 * count,
        flags: EVENTFD_TRIGGER,
        index: MSI_X,
        start: 0,
        count,
        fds,
    };
    // SAFETY: the structure of this request; its size is not more than it has.
    let answer = unsafe { by_address(device, DEVICE_SET_IRQS, &raw mut set)? };
    // The answer is positive, if any.
    Ok(u32::try_from(answer).ok().filter(|fewer| *fewer > 0))
}

/// The size that a structure begins with.
fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("these structures are small")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_that_the_kernel_has() {
        assert_eq!(size::<GroupStatus>(), 8);
        assert_eq!(size::<Region>(), 32);
        assert_eq!(size::<IrqInfo>(), 16);
        assert_eq!(size::<IrqSet>(), 20 + 4 * 2048);
        // As `_IO(';', 100 + 10)` of linux/ioctl.h.
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
    }

    #[test]
    fn what_is_no_vfio_is_an_error() {
        let file = std::fs::File::open("/dev/null").expect("there");
        assert!(api_version(&file).is_err());
        assert!(!knows(&file, Iommu::Type1));
        assert!(region(&file, BAR0).is_err());
        assert!(device(&file, "0000:00:04.0").is_err());
        assert!(device(&file, "a\0b").is_err());
        assert!(set_eventfds(&file, &[]).is_err());
    }
}
