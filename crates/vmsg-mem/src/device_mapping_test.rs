// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::fd::AsFd;

use super::*;
use crate::spsc::{Consumer, Layout, Producer};

#[test]
fn a_small_bar_lies_anywhere_in_a_page_and_the_length_of_its_file_says_nothing() {
    let (memory, fd) = Mapping::memfd("test", 4096, false).unwrap();
    memory.ram().write(0x300, &[1, 2, 3, 4]);
    let bar = DeviceMapping::of_fd(fd.as_fd(), 0x300, 256).unwrap();
    assert_eq!((bar.len(), bar.is_empty()), (256, false));
    assert_eq!(bar.region().read_u32(0), Some(0x0403_0201));
    assert_eq!(bar.region().read_u32(256), None);
    assert!(DeviceMapping::of_fd(fd.as_fd(), 0, 1 << 20).is_ok());
    assert!(DeviceMapping::of_fd(fd.as_fd(), 0, 0).is_err());
}

#[test]
fn a_device_that_is_taken_away_leaves_zeroes_and_says_so() {
    crate::fault::install().unwrap();
    let (memory, fd) = Mapping::memfd("test", 4096, false).unwrap();
    memory.ram().fill(7);
    let bar = Arc::new(DeviceMapping::of_fd(fd.as_fd(), 0, 4096).unwrap());
    let part = DeviceSlice::new(bar.clone(), 64, 64).unwrap();
    assert_eq!(part.load_relaxed(0), 0x0707_0707);
    File::from(fd).set_len(0).unwrap();
    assert_eq!(part.load_relaxed(0), 0);
    assert!(part.is_lost() && bar.is_lost());
}

#[test]
fn parts_keep_to_their_bounds_and_their_mapping_alive() {
    let (memory, fd) = Mapping::memfd("test", 4096, false).unwrap();
    let bar = Arc::new(DeviceMapping::of_fd(fd.as_fd(), 0, 4096).unwrap());
    let part = DeviceSlice::new(bar.clone(), 1024, 1024).unwrap();
    assert!(DeviceSlice::new(bar.clone(), 4000, 97).is_none());
    assert!(DeviceSlice::new(bar, usize::MAX, 2).is_none());
    assert!(part.get(1000, 25).is_none());
    let inner = part.get(1000, 24).unwrap();
    drop((part, fd));
    inner.store_release(0, 0x0403_0201);
    inner.write(22, &[9; 8]);
    let mut bytes = [0; 4];
    memory.ram().read(2024, &mut bytes);
    assert_eq!(bytes, [1, 2, 3, 4]);
    memory.ram().read(2024 + 22, &mut bytes);
    assert_eq!(bytes, [9, 9, 0, 0]);
    assert_eq!(inner.load_acquire(24), 0, "outside");
}

#[test]
fn ordinary_memory_may_be_treated_like_a_devices_but_not_if_it_is_read_only() {
    let (memory, fd) = Mapping::memfd("test", 4096, false).unwrap();
    let read_only = Mapping::of_fd(fd.as_fd(), 0, 4096, Access::Read).unwrap();
    assert!(DeviceSlice::of_ram(Arc::new(read_only), 0, 64).is_none());
    let memory = Arc::new(memory);
    let queue = || DeviceSlice::of_ram(memory.clone(), 0, 4096).unwrap();
    let mut producer = Producer::new(queue(), Layout::PLAIN).unwrap();
    let mut consumer = Consumer::new(queue(), Layout::PLAIN).unwrap();
    producer.try_push(b"message").unwrap();
    assert!(producer.publish());
    let mut message = [0; 7];
    assert_eq!(consumer.try_pop(&mut message), Ok(true));
    assert_eq!(&message, b"message");
}

#[test]
fn what_the_memory_is_nothing_without_lives_as_long_as_the_last_part_of_it() {
    let (_memory, fd) = Mapping::memfd("test", 4096, false).unwrap();
    let keeper = Arc::new(());
    let bar = DeviceMapping::of_fd(fd.as_fd(), 0, 4096).unwrap();
    let bar = bar.keeping(keeper.clone());
    let part = DeviceSlice::new(Arc::new(bar), 0, 64).unwrap();
    assert_eq!(Arc::strong_count(&keeper), 2);
    let inner = part.get(0, 8).unwrap();
    drop(part);
    assert_eq!(Arc::strong_count(&keeper), 2);
    drop(inner);
    assert_eq!(Arc::strong_count(&keeper), 1);
}
