// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::os::fd::AsFd;

use vmsg_mem::{Access, Mapping};

use super::*;

/// Records for queues of `size` entries at these places of one file.
fn records(len: u64, size: u16, places: &[u64]) -> Vec<Record> {
    let (_, file) = Mapping::memfd("test", len, true).expect("memory");
    let file = Arc::new(file);
    let bytes = Form::bytes_for(size) as u64;
    let record = |offset: &u64| {
        let mapping = Mapping::of_fd(file.as_fd(), *offset, bytes, Access::ReadWrite);
        let mapping = mapping
            .expect("mapped")
            .with_file(Arc::clone(&file), *offset);
        Record {
            memory: Arc::new(mapping),
            resume: false,
        }
    };
    places.iter().map(record).collect()
}

fn seen(size: u16, queues: &[u16], records: &[Record]) -> Option<(u64, u64, u16, u16)> {
    let all = queues.iter().zip(records);
    let all: Vec<_> = all.map(|(queue, record)| (*queue, size, record)).collect();
    let region = region(&all)?;
    Some((region.offset, region.len, region.queues, region.queue_size))
}

#[test]
fn records_as_a_front_end_lays_them_out_are_one_region() {
    for size in [1u16, 2, 128, 256, 1024, 1 << 15] {
        let apart = stride(size);
        let len = 3 * apart + 4096;
        let all = records(len, size, &[4096, 4096 + apart, 4096 + 2 * apart]);
        let (offset, bytes, queues, of) = seen(size, &[0, 1, 2], &all).expect("a region");
        assert_eq!((offset, bytes, queues), (4096, 3 * apart, 3), "{size}");
        // What the daemon makes of it is the same distance.
        assert_eq!(stride(of), apart, "{size}");
    }
}

#[test]
fn small_queues_lie_in_records_for_large_ones() {
    let apart = stride(1 << 15);
    let all = records(2 * apart, 64, &[0, apart]);
    assert_eq!(seen(64, &[0, 1], &all), Some((0, 2 * apart, 2, 1 << 15)));
}

#[test]
fn records_that_lie_in_another_way_are_none() {
    let apart = stride(256);
    let len = 16 * 4096;
    for (queues, places) in [
        // Not equally far apart; backwards; not on a page; the first is not there, and nothing says how far apart they are.
        (&[0, 1, 2][..], &[0, apart, 3 * apart][..]),
        (&[0, 1], &[8192, 0]),
        (&[0, 1], &[64, 64 + apart]),
        (&[1], &[4096]),
    ] {
        assert_eq!(
            seen(256, queues, &records(len, 256, places)),
            None,
            "{places:?}"
        );
    }
    // Of two files.
    let mut two = records(len, 256, &[0]);
    two.extend(records(len, 256, &[apart]));
    assert_eq!(seen(256, &[0, 1], &two), None);
}
