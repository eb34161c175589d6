// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Survives files that shrink under a mapping.
//!
//! Touching a mapped page that its file no longer has raises SIGBUS, and
//! whoever lent the file can truncate it at any time unless it is sealed.
//! After [`install`], such a fault in a [`Mapping`](crate::Mapping) puts zeroed
//! private memory in place of the rest of the mapping and marks it lost
//! ([`Mapping::is_lost`](crate::Mapping::is_lost)); the access then goes on.
//! All other SIGBUS go to the handler that was there before, those for
//! misaligned accesses to a mapping (`BUS_ADRALN`) too.
//!
//! System calls never raise SIGBUS: given such memory, they fail with EFAULT.
//! A thread that blocks SIGBUS is not protected.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};

use crate::pool::{Pool, Record};

/// A mapped range, under a sequence lock since the handler cannot wait.
#[derive(Default)]
pub(crate) struct Range {
    /// Odd while the other fields change.
    version: AtomicU32,
    start: AtomicUsize,
    /// Zero: not in use.
    len: AtomicUsize,
    page_size: AtomicUsize,
    writable: AtomicBool,
    lost: AtomicBool,
}

static RANGES: Pool<Range> = Pool::new();
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A registered range; must be given back before the memory is unmapped.
pub(crate) struct Guard(&'static Record<Range>);

impl Guard {
    /// Puts `len` bytes at `start` under protection. Both are multiples of
    /// `page_size`, the size of the pages that back the range.
    pub(crate) fn new(start: usize, len: usize, page_size: usize, writable: bool) -> Self {
        let record = RANGES.claim();
        let range = &record.value;
        range.change(|| {
            range.start.store(start, Ordering::Relaxed);
            range.len.store(len, Ordering::Relaxed);
            range.page_size.store(page_size, Ordering::Relaxed);
            range.writable.store(writable, Ordering::Relaxed);
            range.lost.store(false, Ordering::Relaxed);
        });
        Self(record)
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.0.value.lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let range = &self.0.value;
        range.change(|| range.len.store(0, Ordering::Relaxed));
        RANGES.give_back(self.0);
    }
}

impl Range {
    /// Only the owner of the record calls this.
    fn change(&self, fields: impl FnOnce()) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        fields();
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Whether `address` is inside; then start, length, page size, writable.
    /// A range that changes meanwhile is not the one that somebody just touched.
    fn holds(&self, address: usize) -> Option<(usize, usize, usize, bool)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let page_size = self.page_size.load(Ordering::Relaxed);
        let writable = self.writable.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stable = version % 2 == 0 && self.version.load(Ordering::Relaxed) == version;
        (stable && address >= start && address - start < len)
            .then_some((start, len, page_size, writable))
    }
}

/// Installs the handler, once per process; later calls do nothing. To be called
/// early by a program that maps files of others.
///
/// # Errors
///
/// The handler could not be installed.
pub fn install() -> io::Result<()> {
    INSTALLED
        .get_or_init(|| set_handler().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(io::Error::from_raw_os_error)
}

fn set_handler() -> io::Result<()> {
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null action only asks; `previous` has room for the answer.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled in by the successful call; all zeros would be valid too.
    let previous = unsafe { previous.assume_init() };
    // Before the handler can run, which needs it.
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: sigaction is plain data for which zeros are valid.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the action is complete, and the handler only does what a signal handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs on the thread that touched the page, in the middle of anything: only
/// atomics and system calls.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: errno of this thread.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; for SIGBUS with a positive
    // code, which is a fault and not sent by a process, it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Not BUS_ADRALN and BUS_OBJERR: an access that the memory of a device does not bear would only
    // be repeated, on memory that nobody else sees.
    let gone = code == libc::BUS_ADRERR || code == libc::BUS_MCEERR_AR;
    if gone && replace(address, code) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    pass_on(signal, info, context, code);
}

/// True if `address` is in one of our mappings and now has memory.
fn replace(address: usize, code: libc::c_int) -> bool {
    for record in RANGES.iter() {
        let Some((start, len, page_size, writable)) = record.value.holds(address) else {
            continue;
        };
        let page = (address - start) / page_size * page_size;
        // A file that has lost this page has lost all that follow, and replacing them together
        // keeps the number of mappings at two, whatever the order in which they are touched.
        // Broken hardware takes single pages.
        let bytes = if code == libc::BUS_MCEERR_AR {
            page_size
        } else {
            len - page
        };
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: the range lies inside a mapping of ours, which the thread that touched it keeps
        // alive, and which is only ever accessed as memory that anybody can change.
        let mapped = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(start + page),
                bytes,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        record.value.lost.store(true, Ordering::Release);
        return true;
    }
    false
}

/// Does what would have happened without us.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    code: libc::c_int,
) {
    let handler = PREVIOUS.get().map_or(libc::SIG_DFL, |old| old.sa_sigaction);
    let with_info = PREVIOUS
        .get()
        .is_some_and(|old| old.sa_flags & libc::SA_SIGINFO != 0);
    match handler {
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: zeros are a valid sigaction: the default action, no flags. The signal is
            // blocked while its handler runs, so it strikes when we return.
            unsafe {
                let action: libc::sigaction = MaybeUninit::zeroed().assume_init();
                libc::sigaction(signal, &action, ptr::null_mut());
                libc::raise(signal);
            }
        }
        handler if with_info => {
            // SAFETY: the address of a handler that was installed with SA_SIGINFO.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: the address of a handler that was installed without SA_SIGINFO.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
#[path = "fault_test.rs"]
mod tests;
