// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hub as other threads see it.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use vmsg_mem::Doorbell;

/// What a hub and its handles have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) socket: Option<PathBuf>,
    pub(super) pty: Option<PathBuf>,
    pub(super) bell: Doorbell,
    pub(super) orders: Mutex<Orders>,
    /// There are new orders.
    pub(super) ordered: AtomicBool,
    pub(super) counters: Counters,
    /// Columns in the upper half, rows in the lower one; 0: nobody has said.
    pub(super) size: AtomicU32,
    pub(super) clients: AtomicUsize,
    pub(super) guest_open: AtomicBool,
    /// The hub is no more.
    pub(super) ended: AtomicBool,
}

/// What a handle wants of its hub, and what the hub goes by.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// Another log, or none.
    pub(super) log: Option<Option<File>>,
    /// Where output is logged.
    pub(super) log_path: Option<PathBuf>,
}

/// Bytes.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) output: AtomicU64,
    pub(super) input: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) log_failed: AtomicU64,
}

/// How many columns and rows a terminal has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// How a console does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// The socket of its clients, as an absolute path.
    pub socket: Option<PathBuf>,
    /// The link to its pseudoterminal, as an absolute path.
    pub pty: Option<PathBuf>,
    /// The file that its output is appended to.
    pub log: Option<PathBuf>,
    /// Clients on the socket.
    pub clients: usize,
    /// Bytes from the guest.
    pub output: u64,
    /// Bytes to the guest.
    pub input: u64,
    /// Bytes that clients have not read in time, each client counted.
    pub lost: u64,
    /// Bytes that could not be logged.
    pub log_failed: u64,
    /// The guest has it open.
    pub guest_open: bool,
    /// The terminal's size, if somebody has said it.
    pub size: Option<Size>,
}

/// A way to a [`Hub`](super::Hub) from any thread; it never waits for the hub, nor the hub for it.
#[derive(Clone, Debug)]
pub struct Handle(pub(super) Arc<Shared>);

impl Shared {
    pub(super) fn orders(&self) -> MutexGuard<'_, Orders> {
        // Held for assignments only.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn size(&self) -> Option<Size> {
        let [a, b, c, d] = self.size.load(Ordering::Relaxed).to_be_bytes();
        let size = Size {
            cols: u16::from_be_bytes([a, b]),
            rows: u16::from_be_bytes([c, d]),
        };
        (size.cols > 0 || size.rows > 0).then_some(size)
    }
}

impl Handle {
    /// The console's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether the hub has ended.
    pub fn is_ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    /// How it does. The numbers need not be of the very same moment.
    pub fn report(&self) -> Report {
        let shared = &self.0;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Report {
            name: shared.name.clone(),
            socket: shared.socket.clone(),
            pty: shared.pty.clone(),
            log: shared.orders().log_path.clone(),
            clients: shared.clients.load(Ordering::Relaxed),
            output: count(&shared.counters.output),
            input: count(&shared.counters.input),
            lost: count(&shared.counters.lost),
            log_failed: count(&shared.counters.log_failed),
            guest_open: shared.guest_open.load(Ordering::Relaxed),
            size: shared.size(),
        }
    }

    /// Has the output appended to the file at `path`, or to none: whatever the guest writes after this has returned.
    ///
    /// # Errors
    ///
    /// The file cannot be opened for appending; then nothing changes.
    pub fn set_log(&self, path: Option<&Path>) -> io::Result<()> {
        let file = path.map(open_log).transpose()?;
        let mut orders = self.0.orders();
        orders.log = Some(file);
        orders.log_path = path.map(absolute);
        self.0.ordered.store(true, Ordering::Release);
        drop(orders);
        self.ring();
        Ok(())
    }

    /// Tells the guest how large the terminal is.
    pub fn set_size(&self, size: Size) {
        let size_word = u32::from(size.cols) << 16 | u32::from(size.rows);
        if self.0.size.swap(size_word, Ordering::Relaxed) != size_word {
            self.ring();
        }
    }

    fn ring(&self) {
        // Only its own two ends have it: it cannot be stuck.
        let _ = self.0.bell.ring();
    }
}

/// Opens a log. Something that blocks, such as a pipe that nobody reads, is refused or loses what it has no room for.
pub(super) fn open_log(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(i32::from_ne_bytes(flags.bits().to_ne_bytes()))
        .open(path)
}

/// `path` for a process with another working directory.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
