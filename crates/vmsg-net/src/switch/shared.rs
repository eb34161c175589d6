// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the worker and control share: a mailbox, and a few words for each port.
//!
//! Neither waits for the other. Control leaves requests in the mailbox and listens for the answer; the worker looks into it
//! when it begins a batch, unless somebody is just putting something there.

use std::fs::File;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use rustix::event::{EventfdFlags, eventfd};

use super::bucket::Bucket;
use super::counters::Counters;
use super::fabric::FabricPort;
use super::ports::Tables;
use super::table::{Entry, Key};
use crate::Guest;
use crate::capture::PcapWriter;

/// A new eventfd.
pub(super) fn event() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an eventfd readable.
pub(super) fn ring(event: &OwnedFd) {
    // Full: then it is readable anyhow.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable.
pub(super) fn hush(event: &OwnedFd) {
    // Not readable: then there is nothing to clear.
    let _ = rustix::io::read(event, &mut [0; 8]);
}

/// What the device behind a port has said; it may do so before the worker has heard of the port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) key: Option<u64>,
    pub(super) guest: Guest,
}

impl Place {
    pub(super) const NONE: Self = Self {
        key: None,
        guest: Guest::NONE,
    };
}

/// A port, as both sides see it.
#[derive(Debug)]
pub(super) struct PortShared {
    pub(super) counters: Counters,
    /// Its cable is in.
    pub(super) link: AtomicBool,
    /// Nobody is behind it any more: control will remove it.
    pub(super) gone: AtomicBool,
    /// The worker knows it.
    pub(super) known: AtomicBool,
    /// A driver runs it, or its uplink has a carrier.
    pub(super) running: AtomicBool,
    /// Its frames are recorded.
    pub(super) capturing: AtomicBool,
    /// Only its worker touches this, but nothing says so to the compiler.
    place: Mutex<Place>,
    /// Tells the device behind the port to look after its link and its frames.
    pub(super) event: OwnedFd,
}

impl PortShared {
    pub(super) fn new(link: bool) -> std::io::Result<Self> {
        Ok(Self {
            counters: Counters::default(),
            link: AtomicBool::new(link),
            gone: AtomicBool::new(false),
            known: AtomicBool::new(false),
            running: AtomicBool::new(false),
            capturing: AtomicBool::new(false),
            place: Mutex::new(Place::NONE),
            event: event()?,
        })
    }

    pub(super) fn place(&self) -> Place {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_place(&self, change: impl FnOnce(&mut Place)) {
        change(&mut self.place.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Settings of a port that the worker needs.
#[derive(Debug)]
pub(super) struct Limits {
    pub(super) macs: usize,
    pub(super) storm: Option<Option<Bucket>>,
    pub(super) rate_in: Option<Option<Bucket>>,
    pub(super) rate_out: Option<Option<Bucket>>,
    pub(super) link: bool,
}

/// How the worker sees the VLANs of a port; whether one may pass stands in [`Tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tagging {
    Plain,
    Access(u16),
    Trunk { native: Option<u16> },
}

/// Something that is to be different from now on.
pub(super) enum Change {
    AddPort(u16, Box<FabricPort>),
    RemovePort(u16),
    Tables(Arc<Tables>),
    /// With new limits for a port.
    Limits(u16, Limits),
    /// With the VLANs of a port, whether it is pinned, and all addresses that are fixed at it. What was learned there goes.
    Addresses(u16, Tagging, bool, Vec<Key>),
    Capture(u16, Option<Box<PcapWriter<File>>>),
    /// What was learned goes, at one port or at all.
    Flush(Option<u16>),
    /// All entries of the table are wanted.
    List,
}

/// What control gets for its changes. What was replaced is in it, so that it is let go of by control.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) entries: Vec<(Entry, u32)>,
    pub(super) port: Option<Box<FabricPort>>,
    pub(super) tables: Option<Arc<Tables>>,
    pub(super) capture: Option<Box<PcapWriter<File>>>,
}

/// Changes that belong together, and who waits for them.
pub(super) struct Request {
    pub(super) changes: Vec<Change>,
    pub(super) reply: Option<SyncSender<Answer>>,
}

/// What the worker is to do.
pub(super) struct Mailbox {
    requests: Mutex<Vec<Request>>,
    waiting: AtomicBool,
    /// The pump is to look: something is in the mailbox, or an uplink wants it.
    event: OwnedFd,
    rung: AtomicBool,
    /// Requests that were carried out.
    done: AtomicU64,
}

/// More requests than control can have waiting: the worker is gone.
const MOST_REQUESTS: usize = 8192;

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            requests: Mutex::new(Vec::with_capacity(64)),
            waiting: AtomicBool::new(false),
            event: event()?,
            rung: AtomicBool::new(false),
            done: AtomicU64::new(0),
        })
    }

    pub(super) const fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Leaves a request; false if there are too many.
    pub(super) fn put(&self, request: Request) -> bool {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if requests.len() >= MOST_REQUESTS {
            return false;
        }
        requests.push(request);
        self.waiting.store(true, Ordering::Release);
        drop(requests);
        self.ring();
        true
    }

    /// Takes all requests in exchange for the empty `room`; false if there are none, or somebody is just putting one there.
    #[inline]
    pub(super) fn take(&self, room: &mut Vec<Request>) -> bool {
        if !self.waiting.load(Ordering::Acquire) {
            return false;
        }
        let mut requests = match self.requests.try_lock() {
            Ok(requests) => requests,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                // Whoever it is will have finished when the pump looks.
                self.ring();
                return false;
            }
        };
        self.waiting.store(false, Ordering::Relaxed);
        mem::swap(&mut *requests, room);
        true
    }

    /// Has the pump look.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            ring(&self.event);
        }
    }

    /// The pump looks.
    pub(super) fn hush(&self) {
        hush(&self.event);
        // In this order: who rings in between has left what he rings for, and it is looked at after this.
        self.rung.swap(false, Ordering::AcqRel);
    }

    pub(super) fn note_done(&self, requests: usize) {
        self.done.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// Requests carried out so far.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}
