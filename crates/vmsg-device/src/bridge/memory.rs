// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's memory, as regions that a daemon may map.

use std::sync::Arc;

use vmsg_mem::{Access, WindowTable};
use vmsg_vhost_user::Region;

/// The windows of `table` as at most `most` regions. Windows that the driver has lent for reading only are left out: the daemon would map
/// them to write.
///
/// # Errors
/// Why the daemon cannot have this memory.
pub(super) fn regions(table: &WindowTable, most: usize) -> Result<Vec<Region>, String> {
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
        // Not made one with what it continues: that would have to go, and to come as another, when something comes beside it.
        regions.push(region);
        if regions.len() > most {
            return Err(format!(
                "the driver's memory has more windows than the {most} regions that the daemon takes"
            ));
        }
    }
    Ok(regions)
}
