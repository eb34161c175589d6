// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses that pass no descriptors: both sides have some memory from the start, and a guest's memory must be that, at addresses that both know
//! as well, or in places that the driver side finds and the device side is told.
//!
//! Memory of the guest that is not in common is left out: ROMs, for example. It is no use to a device there, so no queue may lie in it.

use super::machine::Session;
use super::types::{CommonMemory, FileId, OpError, OtherMemory, QueueSetup, Window};
use crate::places::{Found, Places};
use std::os::fd::AsFd;
use std::sync::Arc;

/// Of another file, over what both have in common, and at least so long: not a ROM, but the guest's memory itself.
const NO_ROM: u64 = 1 << 20;

impl Session {
    /// Where each of `windows` is in what the bus has in common; `None`: not there, it has to be lent. Nothing for all of them on a bus that lends
    /// memory. `some`: they are only some of the guest's.
    pub(super) fn find_places(
        &mut self,
        windows: &[Window],
        some: bool,
    ) -> Result<Vec<Option<Arc<Found>>>, OpError> {
        let mut any = some;
        let mut none = None;
        let mut all = Vec::with_capacity(windows.len());
        for window in windows {
            let found = match find(window, self.places.as_deref()) {
                None => {
                    any = true;
                    None
                }
                Some(Ok(found)) => {
                    any = true;
                    Some(found)
                }
                Some(Err(other)) if window.len >= NO_ROM => {
                    return Err(OpError::OtherMemory(other));
                }
                Some(Err(other)) => {
                    if matches!(&other, OtherMemory::NoPlace { why, .. } if !why.is_of_file()) {
                        return Err(OpError::OtherMemory(other));
                    }
                    self.tell_left_out(window);
                    none = Some(other);
                    Some(Found::default())
                }
            };
            all.push(found.map(Arc::new));
        }
        match none {
            Some(other) if !any => Err(OpError::OtherMemory(other)),
            _ => Ok(all),
        }
    }
}

/// `None`: it has to be lent.
fn find(window: &Window, places: Option<&dyn Places>) -> Option<Result<Found, OtherMemory>> {
    if window.file == FileId::COMMON {
        return Some(Ok(Found::at(window.file_offset, window.len)));
    }
    let found = places?.places(
        window.fd.as_fd(),
        window.file,
        window.file_offset,
        window.len,
    );
    Some(found.map_err(|why| OtherMemory::NoPlace {
        base: window.base,
        why,
    }))
}

/// Whether `window` is the same bytes at the same addresses.
fn is_common(window: &Window, common: &CommonMemory) -> bool {
    let Some(into) = window.base.checked_sub(common.base) else {
        return false;
    };
    window.file == common.file
        && into
            .checked_add(window.len)
            .is_some_and(|end| end <= common.len)
        && common.file_offset.checked_add(into) == Some(window.file_offset)
}

fn overlap(window: &Window, common: &CommonMemory) -> u64 {
    let end = |base: u64, len: u64| base.saturating_add(len);
    end(window.base, window.len)
        .min(end(common.base, common.len))
        .saturating_sub(window.base.max(common.base))
}

/// The windows that are not in common and can be done without. `some`: they are only some of the guest's, and may all be of that kind.
///
/// # Errors
/// [`OtherMemory`] if the guest's memory is not the one that the bus has.
pub(super) fn left_out<'a>(
    windows: impl IntoIterator<Item = &'a Window>,
    common: &[CommonMemory],
    some: bool,
) -> Result<Vec<&'a Window>, OtherMemory> {
    let Some(first) = common.first() else {
        return Ok(Vec::new());
    };
    let mut left_out = Vec::new();
    let mut any = some;
    let mut none = None;
    for window in windows {
        if common.iter().any(|common| is_common(window, common)) {
            any = true;
            continue;
        }
        if let Some(same) = common.iter().find(|common| common.file == window.file) {
            return Err(OtherMemory::Misplaced {
                path: same.path.to_string(),
                base: window.base,
                file_offset: window.file_offset,
            });
        }
        let other = OtherMemory::OtherFile {
            path: first.path.to_string(),
            size: file_size(common),
            base: window.base,
        };
        if common
            .iter()
            .any(|common| overlap(window, common) >= NO_ROM)
        {
            return Err(other);
        }
        none = Some(other);
        left_out.push(window);
    }
    match none {
        Some(other) if !any => Err(other),
        _ => Ok(left_out),
    }
}

/// Whether all parts of a split queue lie in the memory in common.
pub(super) fn holds(setup: &QueueSetup, common: &[CommonMemory]) -> bool {
    let n = u64::from(setup.size);
    // Descriptors; flags, index, entries, event index (virtio 1.3 §2.7).
    let parts = [
        (setup.descriptor, 16 * n),
        (setup.driver, 6 + 2 * n),
        (setup.device, 6 + 8 * n),
    ];
    let within = |(at, len): (u64, u64)| {
        common.iter().any(|c| {
            at.checked_sub(c.base)
                .and_then(|into| into.checked_add(len))
                .is_some_and(|end| end <= c.len)
        })
    };
    parts.into_iter().all(within)
}

/// The bytes of the first file, as far as they are in common.
fn file_size(common: &[CommonMemory]) -> u64 {
    let Some(first) = common.first() else {
        return 0;
    };
    let ends = common
        .iter()
        .filter(|c| c.file == first.file)
        .map(|c| c.file_offset.saturating_add(c.len));
    ends.max().unwrap_or(0)
}

#[cfg(test)]
#[path = "common_memory_test.rs"]
mod tests;
