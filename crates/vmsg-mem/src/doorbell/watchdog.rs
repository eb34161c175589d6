// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts system calls that should not block but do.

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use crate::pool::{Pool, Record};

/// A call found in progress twice, so far apart, is interrupted.
const PATIENCE: Duration = Duration::from_millis(10);
/// After so many looks at which nothing had happened, the watchdog goes to sleep.
const IDLE_LOOKS: u32 = 10;

/// What one thread is doing.
#[derive(Default)]
struct Watched {
    /// Counts up when a call begins and when it ends: odd during a call.
    turn: AtomicU32,
    /// Kernel's id of the thread.
    thread: AtomicI32,
}

static THREADS: Pool<Watched> = Pool::new();
static WATCHDOG: OnceLock<Result<Watchdog, i32>> = OnceLock::new();
/// The watchdog sleeps until it is unparked.
static ASLEEP: AtomicBool = AtomicBool::new(false);

struct Watchdog {
    thread: Thread,
    signal: libc::c_int,
}

/// This thread's record, given back when the thread ends.
struct Own(Cell<Option<&'static Record<Watched>>>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(record) = self.0.get() {
            THREADS.give_back(record);
        }
    }
}

thread_local! {
    static OWN: Own = const { Own(Cell::new(None)) };
}

/// Runs `call`, one system call, which returns EINTR if it blocks for more than
/// about 10 to 20 ms.
#[inline]
pub(super) fn guard<R>(call: impl FnOnce() -> R) -> io::Result<R> {
    let own = OWN
        .try_with(|own| own.0.get())
        // Only a destructor of another thread-local can come so late.
        .map_err(|_| io::Error::other("a doorbell was rung by a thread that is ending"))?;
    let watched = match own {
        Some(record) => &record.value,
        None => enroll()?,
    };
    let turn = watched.turn.load(Ordering::Relaxed);
    watched.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
    if ASLEEP.load(Ordering::Relaxed) {
        wake();
    }
    let result = call();
    watched.turn.store(turn.wrapping_add(2), Ordering::Relaxed);
    Ok(result)
}

/// Makes this thread known to the watchdog, which it starts if need be.
#[cold]
fn enroll() -> io::Result<&'static Watched> {
    let watchdog = WATCHDOG
        .get_or_init(|| start().map_err(|error| error.raw_os_error().unwrap_or(libc::EAGAIN)))
        .as_ref()
        .map_err(|code| io::Error::from_raw_os_error(*code))?;
    change_mask(libc::SIG_UNBLOCK, |set| {
        // SAFETY: an initialized set and a valid signal.
        unsafe { libc::sigaddset(set, watchdog.signal) };
    })?;
    let record = THREADS.claim();
    // SAFETY: gettid has no preconditions.
    let thread = unsafe { libc::gettid() };
    record.value.thread.store(thread, Ordering::Relaxed);
    OWN.with(|own| own.0.set(Some(record)));
    Ok(&record.value)
}

#[cold]
fn wake() {
    if ASLEEP.swap(false, Ordering::Relaxed) {
        if let Some(Ok(watchdog)) = WATCHDOG.get() {
            watchdog.thread.unpark();
        }
    }
}

/// Whether the watchdog sleeps.
#[cfg(test)]
pub(super) fn is_asleep() -> bool {
    ASLEEP.load(Ordering::Relaxed)
}

fn start() -> io::Result<Watchdog> {
    let signal = take_signal()?;
    let handle = thread::Builder::new()
        .name("vmsg-doorbell".into())
        .stack_size(64 << 10)
        .spawn(move || {
            // Signals of the process are for others. If this fails, they merely may come here.
            let _ = change_mask(libc::SIG_BLOCK, |set| {
                // SAFETY: an initialized set.
                unsafe { libc::sigfillset(set) };
            });
            watch(signal)
        })?;
    Ok(Watchdog {
        thread: handle.thread().clone(),
        signal,
    })
}

fn watch(signal: libc::c_int) -> ! {
    // SAFETY: getpid has no preconditions.
    let process = unsafe { libc::getpid() };
    let mut seen = HashMap::new();
    let mut idle = 0;
    loop {
        thread::park_timeout(PATIENCE);
        let mut quiet = true;
        for record in THREADS.iter() {
            let watched = &record.value;
            let turn = watched.turn.load(Ordering::Relaxed);
            let before = seen.insert(ptr::from_ref(watched), turn);
            if before != Some(turn) {
                quiet = false;
            } else if turn % 2 == 1 {
                quiet = false;
                // It may be just about to enter the call, where the signal comes too early, so
                // this is repeated while it lasts. It may also just have left, and then gets a
                // signal that does nothing.
                let thread = watched.thread.load(Ordering::Relaxed);
                // SAFETY: the signal has a handler that does nothing; a thread that has ended
                // gets none.
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
            }
        }
        idle = if quiet { idle + 1 } else { 0 };
        match idle {
            ..IDLE_LOOKS => {}
            // Who began a call without seeing this flag wrote its turn before, which will have
            // come through at the next look, much later. So the flag goes up one look before
            // the sleep.
            IDLE_LOOKS => ASLEEP.store(true, Ordering::Relaxed),
            _ => {
                while ASLEEP.load(Ordering::Relaxed) {
                    thread::park();
                }
                idle = 0;
            }
        }
        if !quiet {
            ASLEEP.store(false, Ordering::Relaxed);
        }
    }
}

/// Finds a real-time signal that nobody uses and gives it a handler that does
/// nothing, without SA_RESTART: calls end with EINTR.
fn take_signal() -> io::Result<libc::c_int> {
    extern "C" fn nothing(_: libc::c_int) {}
    for signal in (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev() {
        // SAFETY: sigaction is plain data for which zeros are valid.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: a null action only asks.
        let asked = unsafe { libc::sigaction(signal, ptr::null(), &mut action) };
        if asked != 0 || action.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        action.sa_sigaction = nothing as extern "C" fn(_) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        // SAFETY: the action is complete and its handler does nothing.
        if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } == 0 {
            return Ok(signal);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Changes the signal mask of this thread.
fn change_mask(how: libc::c_int, fill: impl FnOnce(*mut libc::sigset_t)) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: initializes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    fill(set.as_mut_ptr());
    // SAFETY: an initialized set; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, set.as_ptr(), ptr::null_mut()) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}
