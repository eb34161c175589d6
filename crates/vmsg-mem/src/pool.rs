// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Records that a signal handler or another thread can walk at any time.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A list that only grows: records are handed out, given back and handed out
/// again, but never freed, so walking it needs no lock.
pub(crate) struct Pool<T: 'static> {
    first: AtomicPtr<Record<T>>,
    /// Those that were given back. Not for signal handlers.
    free: Mutex<Vec<&'static Record<T>>>,
}

/// One record of a [`Pool`].
pub(crate) struct Record<T: 'static> {
    /// Does not change once the record can be found.
    next: AtomicPtr<Record<T>>,
    pub(crate) value: T,
}

impl<T: Default + Sync + Send> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self {
            first: AtomicPtr::new(ptr::null_mut()),
            free: Mutex::new(Vec::new()),
        }
    }

    fn free(&self) -> MutexGuard<'_, Vec<&'static Record<T>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record that nobody else has claimed; it holds whatever its last owner left.
    pub(crate) fn claim(&self) -> &'static Record<T> {
        if let Some(record) = self.free().pop() {
            return record;
        }
        let record: &'static Record<T> = Box::leak(Box::new(Record {
            next: AtomicPtr::new(ptr::null_mut()),
            value: T::default(),
        }));
        let mut first = self.first.load(Ordering::Relaxed);
        loop {
            record.next.store(first, Ordering::Relaxed);
            // Release: who walks the list finds the record complete.
            match self.first.compare_exchange_weak(
                first,
                ptr::from_ref(record).cast_mut(),
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return record,
                Err(now) => first = now,
            }
        }
    }

    /// Takes a record back; the caller must not use it any more.
    pub(crate) fn give_back(&self, record: &'static Record<T>) {
        self.free().push(record);
    }

    /// All records, claimed or not. Async-signal-safe.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'static Record<T>> {
        let mut next = self.first.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null, or a record that was leaked when it was made and published with
            // release.
            let record: &'static Record<T> = unsafe { next.as_ref() }?;
            next = record.next.load(Ordering::Relaxed);
            Some(record)
        })
    }
}
