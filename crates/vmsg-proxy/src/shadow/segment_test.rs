// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;
use std::os::fd::AsFd;
use vmsg_bus::CommonMode;

fn common(len: u64) -> Arc<Common> {
    let (mapping, file) = Mapping::memfd("common", len, false).unwrap();
    Arc::new(Common::new(Arc::new(mapping), Arc::new(file), 0, 1 << 30).unwrap())
}

fn places(parts: &[Part]) -> Vec<Range<u64>> {
    parts.iter().map(Part::place).collect()
}

#[test]
fn parts_follow_each_other_in_whole_pages_and_are_the_same_each_time() {
    let common = common(1 << 20);
    let wanted = [Some(0x1_0001), None, Some(0x8000), None];
    let parts = common.divide(0x1001..0x10_0000, &wanted).unwrap();
    let share = (0xfe000 - 0x11000 - 0x8000) / 2 / PAGE * PAGE;
    let at = 0x2000 + 0x11000;
    assert_eq!(
        places(&parts),
        [
            0x2000..at,
            at..at + share,
            at + share..at + share + 0x8000,
            at + share + 0x8000..at + 2 * share + 0x8000,
        ]
    );
    let again = common.divide(0x1001..0x10_0000, &wanted).unwrap();
    assert_eq!(places(&again), places(&parts));
}

#[test]
fn memory_that_is_too_small_is_refused_with_numbers() {
    let common = common(1 << 20);
    let error = common.divide(0..1 << 20, &[Some(1 << 20), None]);
    assert_eq!(
        error.unwrap_err(),
        DivideError {
            have: 1 << 20,
            need: (1 << 20) + 4096,
            fronts: 2
        }
    );
    for wanted in [Some(u64::MAX), Some((1 << 20) + 1), Some(u64::MAX - 4096)] {
        common.divide(0..u64::MAX, &[wanted]).unwrap_err();
    }
    common.divide(1 << 21..1 << 22, &[None]).unwrap_err();
    assert!(common.divide(0..0, &[]).unwrap().is_empty());
}

#[test]
fn nobody_gets_more_than_64_mib_unasked() {
    let parts = divide(0..1 << 30, &[None]).unwrap();
    assert_eq!(parts, vec![0..64 << 20; 1]);
}

#[test]
fn a_part_is_wiped_when_it_is_known_taken_and_given_back_and_has_one_segment_at_a_time() {
    let common = common(0x4000);
    let ram = common.mapping.ram();
    let is = |at: usize| {
        let mut byte = [0];
        ram.read(at, &mut byte);
        byte[0]
    };
    let dirty = || ram.fill(7);
    dirty();
    let parts = Parts::new(vec![Some(0x1000), Some(0x1000)]);
    assert!(matches!(
        Source::Common {
            parts: Arc::new(Parts::new(vec![None])),
            front: 0
        }
        .segment(),
        Err(NewError::NotKnown)
    ));
    parts.provide(&common, 0x1000..0x4000).unwrap();
    assert_eq!([0, 0x1000, 0x2fff, 0x3000].map(is), [7, 0, 0, 7]);
    dirty();
    // The same memory again.
    parts.provide(&common, 0x1000..0x4000).unwrap();
    assert_eq!(is(0x1000), 7);
    let part = parts.get(1).unwrap();
    let plot = Plot::new("test", &Segment::Given(part.clone())).unwrap();
    assert_eq!([0x1fff, 0x2000, 0x2fff, 0x3000].map(is), [7, 0, 0, 7]);
    let window = plot.window();
    assert_eq!(
        (window.base, window.len, window.file_offset),
        ((1 << 30) + 0x2000, 0x1000, 0x2000)
    );
    assert!(matches!(
        Plot::new("test", &Segment::Given(part.clone())),
        Err(NewError::InUse)
    ));
    dirty();
    drop(plot);
    assert_eq!([0x1fff, 0x2000, 0x2fff, 0x3000].map(is), [7, 0, 0, 7]);
    drop(Plot::new("test", &Segment::Given(part)).unwrap());
}

#[test]
fn another_memory_is_divided_anew() {
    let parts = Parts::new(vec![None]);
    let (one, two) = (common(0x2000), common(0x4000));
    parts.provide(&one, 0..0x2000).unwrap();
    parts.provide(&two, 0..0x4000).unwrap();
    assert_eq!(parts.get(0).unwrap().place(), 0..0x4000);
    // Too small: then there is none.
    parts.provide(&one, 0..1).unwrap_err();
    assert!(parts.get(0).is_none());
}

#[test]
fn memory_that_was_truncated_meanwhile_is_other_memory() {
    vmsg_mem::fault::install().unwrap();
    let file = tempfile::tempfile().unwrap();
    let ram = || {
        file.set_len(1 << 20).unwrap();
        let mapping = Mapping::of_fd(file.as_fd(), 0, 1 << 20, Access::ReadWrite).unwrap();
        CommonRam::of_mapping(CommonMode::Bounce, Arc::new(mapping), "bar")
    };
    let parts = Parts::new(vec![None]);
    let first = ram();
    parts.provide_ram(&first).unwrap();
    let before = parts.get(0).unwrap();
    parts.provide_ram(&first).unwrap();
    assert!(Arc::ptr_eq(&before.common, &parts.get(0).unwrap().common));
    file.set_len(0).unwrap();
    first.mapping.as_ref().unwrap().ram().write(0, b"gone");
    parts.provide_ram(&ram()).unwrap();
    assert!(!Arc::ptr_eq(&before.common, &parts.get(0).unwrap().common));
}
