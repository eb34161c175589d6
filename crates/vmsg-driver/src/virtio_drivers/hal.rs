// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `Hal` over a pool of DMA memory.
//!
//! `virtio-drivers` names its platform by a type with static functions, so the pool must be reachable from a type: [`StaticPool`].
#![allow(
    unsafe_code,
    reason = "`Hal` is an unsafe trait whose functions get raw pointers"
)]

use core::marker::PhantomData;
use core::ptr::NonNull;

use ::virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmsg_mem::{BusAddr, RamSlice};

use crate::dma::DmaPool;

const _: () = assert!(PAGE_SIZE == crate::dma::PAGE_SIZE);

/// A type that stands for a pool.
///
/// ```
/// use std::sync::LazyLock;
/// use vmsg_driver::{DmaPool, virtio_drivers::{PoolHal, StaticPool}};
/// use vmsg_mem::BusAddr;
///
/// struct Memory;
///
/// impl StaticPool for Memory {
///     fn pool() -> &'static DmaPool {
///         static POOL: LazyLock<DmaPool> =
///             LazyLock::new(|| DmaPool::new("drivers", BusAddr(0x1000_0000), 1 << 20).expect("memory"));
///         &POOL
///     }
/// }
///
/// type MyHal = PoolHal<Memory>;
/// ```
pub trait StaticPool {
    /// The pool: always the same one.
    fn pool() -> &'static DmaPool;
}

/// The platform of drivers whose devices see the pool `P` and nothing else: each buffer is copied into the pool when it is
/// shared and back when it is unshared, through whole pages.
///
/// `share` cannot fail by its interface. It panics when the pool is used up, which no device can bring about: a driver
/// shares no more than fits its queues.
#[derive(Debug)]
pub struct PoolHal<P>(PhantomData<P>);

impl<P: StaticPool> PoolHal<P> {
    fn offset(paddr: PhysAddr) -> Option<usize> {
        usize::try_from(paddr.checked_sub(P::pool().base().0)?).ok()
    }

    fn address(offset: usize) -> PhysAddr {
        P::pool().base().0 + offset as u64
    }

    /// The memory behind an address that was given out.
    fn ram(paddr: PhysAddr, len: usize) -> Option<RamSlice<'static>> {
        P::pool().ram().get(Self::offset(paddr)?, len)
    }
}

// SAFETY: `dma_alloc` gives pages of a mapping that lives as long as the program, which the pool gives to nobody else until
// they come back; they are page-aligned because mapping and pages are, and zeroed.
unsafe impl<P: StaticPool> Hal for PoolHal<P> {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let nothing = (0, NonNull::dangling());
        let Some(offset) = P::pool().take_pages(pages) else {
            return nothing;
        };
        let Some(ram) = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|len| P::pool().ram().get(offset, len))
        else {
            return nothing;
        };
        ram.fill(0);
        let Some(start) = NonNull::new(ram.as_ptr()) else {
            return nothing;
        };
        (Self::address(offset), start)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _vaddr: NonNull<u8>, pages: usize) -> i32 {
        let given = Self::offset(paddr).is_some_and(|offset| P::pool().give_pages(offset, pages));
        if given { 0 } else { -1 }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("there are no registers at {paddr:#x}: a transport over messages has none")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let len = buffer.len();
        let offset = P::pool()
            .take_pages(len.div_ceil(PAGE_SIZE).max(1))
            .unwrap_or_else(|| panic!("the pool has no room to share {len} bytes"));
        let paddr = Self::address(offset);
        let ram = Self::ram(paddr, len).expect("the pages are in the pool");
        if direction == BufferDirection::DeviceToDriver {
            // What was in these pages before is not for this device's driver.
            ram.fill(0);
        } else {
            // SAFETY: the caller promises that the buffer is valid and nobody else's during this call.
            let bytes = unsafe { buffer.as_ref() };
            ram.write(0, bytes);
        }
        paddr
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        let len = buffer.len();
        if direction != BufferDirection::DriverToDevice {
            if let Some(ram) = Self::ram(paddr, len) {
                // SAFETY: as in `share`.
                ram.read(0, unsafe { buffer.as_mut() });
            }
        }
        let given = Self::offset(paddr)
            .is_some_and(|offset| P::pool().give_pages(offset, len.div_ceil(PAGE_SIZE).max(1)));
        debug_assert!(
            given,
            "unshared {:#x}, which was not shared",
            BusAddr(paddr)
        );
    }
}
