// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Records that a signal handler or another thread can walk at any time.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// A list that only grows: records are handed out, given back and handed out
/// again, but never freed, so walking it needs no lock.
pub(crate) struct Pool<T: 'static> {
    first: AtomicPtr<Record<T>>,
}

/// One record of a [`Pool`].
pub(crate) struct Record<T: 'static> {
    used: AtomicBool,
    next: *const Record<T>,
    pub(crate) value: T,
}

impl<T: Default + Sync + Send> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self {
            first: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// A record that nobody else has claimed; it holds whatever its last owner left.
    pub(crate) fn claim(&self) -> &'static Record<T> {
        for record in self.iter() {
            if record
                .used
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return record;
            }
        }
        let record = Box::into_raw(Box::new(Record {
            used: AtomicBool::new(true),
            next: ptr::null(),
            value: T::default(),
        }));
        let mut first = self.first.load(Ordering::Relaxed);
        loop {
            // SAFETY: nobody else knows the record yet.
            unsafe { (*record).next = first };
            // Release: who walks the list finds the record complete.
            match self.first.compare_exchange_weak(
                first,
                record,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                // SAFETY: never freed, and from now on only borrowed shared.
                Ok(_) => return unsafe { &*record },
                Err(now) => first = now,
            }
        }
    }

    /// All records, claimed or not. Async-signal-safe.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'static Record<T>> {
        let mut next: *const Record<T> = self.first.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null, or a record that was leaked when it was made and published with
            // release; `next` does not change after that.
            let record: &'static Record<T> = unsafe { next.as_ref() }?;
            next = record.next;
            Some(record)
        })
    }
}

impl<T> Record<T> {
    /// Gives the record back; the caller must not use it any more.
    pub(crate) fn give_back(&self) {
        self.used.store(false, Ordering::Release);
    }
}
