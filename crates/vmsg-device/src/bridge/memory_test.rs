// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::os::fd::AsFd;

use virtio_msg::FeatureSet;
use vmsg_mem::{BusAddr, Mapping, TableEntry};
use vmsg_queue::QueueConfig;

use super::*;

const PAGE: u64 = 4096;

/// Windows: base, offset in the file, length, in pages each; for reading only or not.
fn table(windows: &[(u64, u64, u64, Access)]) -> WindowTable {
    let (_, file) = Mapping::memfd("test", 64 * PAGE, true).expect("memory");
    let entries = windows.iter().map(|(base, offset, len, access)| {
        // Each window comes with a descriptor of its own.
        let file = file.try_clone().expect("a descriptor");
        let mapping = Mapping::of_fd(file.as_fd(), offset * PAGE, len * PAGE, Access::ReadWrite);
        let mapping = mapping.expect("mapped");
        TableEntry {
            base: BusAddr(base * PAGE),
            mapping: Arc::new(mapping.with_file(Arc::new(file), offset * PAGE)),
            offset: 0,
            len: usize::try_from(len * PAGE).expect("64 bits"),
            access: *access,
        }
    });
    WindowTable::new(entries.collect()).expect("windows")
}

fn seen(table: &WindowTable, most: usize, whole: bool) -> Result<Vec<(u64, u64, u64)>, String> {
    let regions = regions(table, most, whole)?;
    let seen = regions.iter().map(|region| {
        assert_eq!(region.guest, region.user);
        (region.guest / PAGE, region.offset / PAGE, region.len / PAGE)
    });
    Ok(seen.collect())
}

const RW: Access = Access::ReadWrite;

#[test]
fn windows_that_continue_each_other_are_one_region_where_all_memory_is_told_at_once() {
    let table = table(&[
        (0, 0, 4, RW),
        (4, 4, 2, RW),
        // Another place of the file; a gap; what may only be read.
        (6, 20, 2, RW),
        (9, 22, 1, RW),
        (10, 23, 1, Access::Read),
        (11, 24, 1, RW),
        (12, 25, 1, RW),
    ]);
    let parts = [(0, 0, 6), (6, 20, 2), (9, 22, 1), (11, 24, 2)];
    assert_eq!(seen(&table, 4, true), Ok(parts.to_vec()));
    seen(&table, 3, true).expect_err("too many");
    let all = [
        (0, 0, 4),
        (4, 4, 2),
        (6, 20, 2),
        (9, 22, 1),
        (11, 24, 1),
        (12, 25, 1),
    ];
    assert_eq!(seen(&table, 6, false), Ok(all.to_vec()));
    seen(&table, 5, false).expect_err("too many");
}

#[test]
fn a_queue_is_there_if_each_part_lies_in_one_region() {
    // 256 entries: 4096 bytes, 518 with the index at the end, 2054.
    let start = |desc: u64, driver: u64, device: u64, features: &[u32]| QueueStart {
        queue: 0,
        config: QueueConfig {
            size: 256,
            desc: BusAddr(desc),
            driver: BusAddr(driver),
            device: BusAddr(device),
        },
        features: FeatureSet::from_bits(features),
        resume: None,
        record: None,
    };
    let table = table(&[(4, 0, 1, RW), (5, 1, 1, RW), (8, 8, 1, RW)]);
    let parts = regions(&table, 8, false).expect("regions");
    let whole = regions(&table, 8, true).expect("regions");
    let (a, b, c) = (4 * PAGE, 5 * PAGE, 8 * PAGE);
    for (desc, driver, device, in_parts, in_whole) in [
        (a, b, c, true, true),
        (a, c, c + 1024, true, true),
        (a + 16, b + 512, c, false, true),
        (c, b, a, true, true),
        (c + 16, b, a, false, false),
        (a, b - 512, c, false, true),
        (a, b, c - 4, false, false),
        (a, b, c + 2052, false, false),
        (0, b, c, false, false),
        (a, 0, c, false, false),
        (a, b, u64::MAX - 3, false, false),
        // Two bytes less without the indexes at the end.
        (a, b, c + PAGE - 2052, true, true),
    ] {
        let start = start(desc, driver, device, &[]);
        let found = (hold(&parts, &start), hold(&whole, &start));
        assert_eq!(found, (in_parts, in_whole), "{start:?}");
    }
    assert!(!hold(&parts, &start(a, b, c + PAGE - 2052, &[29])));
    assert!(!hold(&[], &start(a, b, c, &[])));
}
