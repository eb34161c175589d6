// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ordinary memory that somebody else can write at any time.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// Notes a copy of `n` bytes, in debug builds.
#[inline]
fn note(n: usize) {
    #[cfg(all(feature = "std", debug_assertions))]
    COPIED.with(|copied| copied.set(copied.get() + n as u64));
    #[cfg(not(all(feature = "std", debug_assertions)))]
    let _ = n;
}

#[cfg(all(feature = "std", debug_assertions))]
std::thread_local! {
    static COPIED: core::cell::Cell<u64> = const { core::cell::Cell::new(0) };
}

/// Bytes that this thread has copied from and to [`RamSlice`]s so far, in debug builds: for tests that a path copies no more
/// than it must. A copy from one slice to another counts once.
#[cfg(all(feature = "std", debug_assertions))]
pub fn copied() -> u64 {
    COPIED.with(core::cell::Cell::get)
}

/// A piece of ordinary (cacheable, not device) shared memory, of known length.
///
/// `'m` is how long the memory stays mapped. The contents are never reachable
/// as a Rust reference: bytes are copied in and out, and words that both
/// sides use at the same time are atomics.
///
/// Copies may be unaligned and of any width, which Device memory does not bear.
/// Ordinary memory that is not cacheable (arm64's Normal Non-cacheable) does, as
/// long as words are only loaded and stored: whether exclusive and atomic
/// read-modify-write instructions work there is not defined.
#[derive(Clone, Copy)]
pub struct RamSlice<'m> {
    ptr: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

// SAFETY: the slice owns nothing. It is a bounded pointer to memory that is shared with other
// processes anyway; every access goes through atomics or raw copies, on any thread.
unsafe impl Send for RamSlice<'_> {}
// SAFETY: as for `Send`; no method relies on being called by one thread only.
unsafe impl Sync for RamSlice<'_> {}

impl<'m> RamSlice<'m> {
    /// A slice of no bytes.
    pub const EMPTY: RamSlice<'static> = RamSlice {
        ptr: NonNull::dangling(),
        len: 0,
        memory: PhantomData,
    };

    /// Wraps `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// The whole range must stay mapped, readable and writable (readable only,
    /// if nothing is ever written through the slice) for `'m`, and no Rust
    /// reference to any of it may be alive in this process meanwhile.
    pub const unsafe fn from_raw_parts(ptr: NonNull<u8>, len: usize) -> Self {
        Self {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// Treats `words` as shared memory: for tests, and for memory that only
    /// ever is accessed through atomics.
    pub fn from_atomics(words: &'m [AtomicU64]) -> Self {
        let ptr = NonNull::from(words).cast::<u8>();
        // SAFETY: the words are borrowed for 'm and atomics may be written through a shared
        // borrow; references to atomics do not claim that their contents stay the same.
        unsafe { Self::from_raw_parts(ptr, size_of_val(words)) }
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for a slice of no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the bytes lie in this process, for system calls that take addresses.
    pub const fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The `len` bytes from `offset`, or `None` if they are not all inside.
    #[inline]
    pub fn get(&self, offset: usize, len: usize) -> Option<RamSlice<'m>> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: offset + len lies inside this slice, whose memory is valid for 'm.
        Some(unsafe { Self::from_raw_parts(self.ptr.add(offset), len) })
    }

    /// Splits at `mid` bytes; a `mid` past the end leaves the second part empty.
    #[inline]
    pub fn split_at(&self, mid: usize) -> (RamSlice<'m>, RamSlice<'m>) {
        let mid = mid.min(self.len);
        // SAFETY: mid ≤ len, so both parts lie inside this slice.
        unsafe {
            (
                Self::from_raw_parts(self.ptr, mid),
                Self::from_raw_parts(self.ptr.add(mid), self.len - mid),
            )
        }
    }

    /// Copies bytes from `offset` into `into`; returns how many there were.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        let Some(left) = self.len.checked_sub(offset) else {
            return 0;
        };
        let n = left.min(into.len());
        note(n);
        // SAFETY: offset + n ≤ len; `into` is ours alone, so the ranges cannot overlap. The peer
        // may write meanwhile: then the copy holds a mix, which callers must check as any input.
        unsafe { ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), into.as_mut_ptr(), n) };
        n
    }

    /// The `N` bytes from `offset` on, or `None` if there are fewer. A number that is known beforehand is copied in a few
    /// instructions.
    #[inline]
    pub fn read_array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if self.len.checked_sub(offset)? < N {
            return None;
        }
        let mut bytes = [0; N];
        note(N);
        // SAFETY: as in `read`, with offset + N ≤ len.
        unsafe {
            ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), bytes.as_mut_ptr(), N);
        }
        Some(bytes)
    }

    /// Copies `bytes` to `offset`, as [`write`](Self::write) does; false, and nothing is copied, if they do not fit.
    #[inline]
    pub fn write_array<const N: usize>(&self, offset: usize, bytes: &[u8; N]) -> bool {
        if self.len.checked_sub(offset).is_none_or(|left| left < N) {
            return false;
        }
        note(N);
        // SAFETY: as in `write`, with offset + N ≤ len.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr.as_ptr().add(offset), N);
        }
        true
    }

    /// Copies `from` to `offset`; returns how many bytes fitted.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let Some(left) = self.len.checked_sub(offset) else {
            return 0;
        };
        let n = left.min(from.len());
        note(n);
        // SAFETY: offset + n ≤ len, the memory is writable by the constructor's promise, and a
        // `&[u8]` never lies in shared memory.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.ptr.as_ptr().add(offset), n) };
        n
    }

    /// Copies the beginning of this slice to the beginning of `to`, as far as
    /// both reach; returns the number of bytes. The slices may overlap.
    #[inline]
    pub fn copy_to(&self, to: RamSlice<'_>) -> usize {
        let n = self.len.min(to.len);
        note(n);
        // SAFETY: n bytes are inside both slices; `copy` allows overlap.
        unsafe { ptr::copy(self.ptr.as_ptr(), to.ptr.as_ptr(), n) };
        n
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        // SAFETY: the whole slice is writable by the constructor's promise.
        unsafe { ptr::write_bytes(self.ptr.as_ptr(), value, self.len) };
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let part = self.get(offset, size_of::<T>())?;
        let word = part.ptr.cast::<T>();
        word.is_aligned().then_some(word)
    }

    /// The aligned 16-bit word at `offset`; `None` outside or misaligned.
    #[inline]
    pub fn atomic_u16(&self, offset: usize) -> Option<&'m AtomicU16> {
        // SAFETY: in bounds, aligned, mapped for 'm; only accessed as an atomic or by raw copies.
        self.word::<AtomicU16>(offset)
            .map(|word| unsafe { word.as_ref() })
    }

    /// The aligned 32-bit word at `offset`; `None` outside or misaligned.
    #[inline]
    pub fn atomic_u32(&self, offset: usize) -> Option<&'m AtomicU32> {
        // SAFETY: as for `atomic_u16`.
        self.word::<AtomicU32>(offset)
            .map(|word| unsafe { word.as_ref() })
    }

    /// The aligned 64-bit word at `offset`; `None` outside or misaligned.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> Option<&'m AtomicU64> {
        // SAFETY: as for `atomic_u16`.
        self.word::<AtomicU64>(offset)
            .map(|word| unsafe { word.as_ref() })
    }
}

impl fmt::Debug for RamSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The contents belong to the peer: show where, not what.
        write!(f, "RamSlice({:p}+{})", self.ptr, self.len)
    }
}
