// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's memory, as regions that a daemon may map.

use std::sync::Arc;

use rustix::fs::fstat;
use vmsg_mem::{Access, WindowTable};
use vmsg_queue::{Layout, QueueFeatures};
use vmsg_vhost_user::Region;

use crate::worker::QueueStart;

/// The windows of `table` as at most `most` regions. Windows that the driver has lent for reading only are left out: the daemon would map
/// them to write. With `whole`, windows that continue each other in the same file are one region: where a daemon is told of all memory at
/// once.
///
/// # Errors
/// Why the daemon cannot have this memory.
pub(super) fn regions(
    table: &WindowTable,
    most: usize,
    whole: bool,
) -> Result<Vec<Region>, String> {
    let page = rustix::param::page_size() as u64;
    let mut regions: Vec<Region> = Vec::new();
    for place in table.places() {
        if place.access == Access::Read {
            continue;
        }
        let base = place.base.0;
        let Some((file, begin)) = place.mapping.file() else {
            return Err(format!(
                "the memory at {base:#x} has no file that a daemon could map: this bus does not lend it"
            ));
        };
        let offset = begin + place.offset as u64;
        if !offset.is_multiple_of(page) {
            return Err(format!(
                "the window at {base:#x} does not begin at a page of its file, and a daemon cannot map it"
            ));
        }
        let region = Region {
            guest: base,
            // What the rings' addresses are in. To the daemon it is somebody else's address space.
            user: base,
            len: place.len as u64,
            offset,
            file: Arc::clone(file),
        };
        match regions.last_mut().filter(|_| whole) {
            Some(last) if continues(last, &region) => last.len += region.len,
            // Where regions come and go one by one, a longer one would have to go, and to come as another, when something comes beside it.
            _ => regions.push(region),
        }
        if regions.len() > most {
            return Err(format!(
                "the driver's memory has more windows than the {most} regions that the daemon takes"
            ));
        }
    }
    Ok(regions)
}

/// Whether `next` is what follows `last`, in the driver's memory and in its file.
fn continues(last: &Region, next: &Region) -> bool {
    let end = |begin: u64| begin.checked_add(last.len);
    let id = |region: &Region| {
        let stat = fstat(&region.file).ok();
        stat.map(|stat| (stat.st_dev, stat.st_ino))
    };
    end(last.guest) == Some(next.guest)
        && end(last.offset) == Some(next.offset)
        && (Arc::ptr_eq(&last.file, &next.file) || id(last).is_some_and(|of| id(next) == Some(of)))
}

/// Whether a daemon that has `regions` finds all of the queue there, each part in one of them.
pub(super) fn hold(regions: &[Region], start: &QueueStart) -> bool {
    let config = start.config;
    let Ok(layout) = Layout::new(config.size, 0) else {
        return false;
    };
    // Both rings end with an index at which the other side wants to be notified, if there are such.
    let less = match QueueFeatures::from_bits(start.features.low_u64()).event_idx {
        true => 0,
        false => 2,
    };
    let parts = [
        (config.desc, layout.desc_len()),
        (config.driver, layout.driver_len() - less),
        (config.device, layout.device_len() - less),
    ];
    parts.iter().all(|(addr, len)| {
        regions.iter().any(|region| {
            let at = addr.0.checked_sub(region.guest);
            at.is_some_and(|at| at < region.len && *len as u64 <= region.len - at)
        })
    })
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
