// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that devices see: all of it, at the addresses that it has here.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmsg_mem::{BusAddr, RamSlice};

const PAGES: usize = 64;

#[repr(C, align(4096))]
struct Pages([AtomicU64; PAGES * PAGE_SIZE / 8]);

static POOL: Pages = Pages([const { AtomicU64::new(0) }; PAGES * PAGE_SIZE / 8]);
/// Pages given out. None comes back: a program that goes on needs more than this.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// So many zeroed pages in a row, and where they are on the bus; `None` if there are no more.
pub fn pages(count: usize) -> Option<(RamSlice<'static>, BusAddr)> {
    let first = TAKEN.fetch_add(count, Ordering::Relaxed);
    if first.checked_add(count)? > PAGES {
        return None;
    }
    let ram = RamSlice::from_atomics(&POOL.0).get(first * PAGE_SIZE, count * PAGE_SIZE)?;
    Some((ram, BusAddr(ram.as_ptr().addr() as u64)))
}

/// The platform of `virtio-drivers`, on which every address is the same for all.
pub struct Identity;

// SAFETY: `pages` gives each page once, aligned and zeroed, for as long as the program runs.
unsafe impl Hal for Identity {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let Some((ram, base)) = pages(count) else {
            return (0, NonNull::dangling());
        };
        let start = NonNull::new(ram.as_ptr()).unwrap_or(NonNull::dangling());
        (base.0, start)
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, _vaddr: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("there are no registers at {paddr:#x}: a transport over messages has none")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.addr().get() as u64
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
