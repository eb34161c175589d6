// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

const BASE: BusAddr = BusAddr(0x10_0000);

fn pool(pages: usize) -> DmaPool {
    DmaPool::new("test", BASE, pages * PAGE_SIZE).unwrap()
}

#[test]
fn buffers_are_apart_zeroed_and_where_the_bus_says() {
    let pool = pool(8);
    let one = pool.alloc(1).unwrap();
    let two = pool.alloc(PAGE_SIZE + 1).unwrap();
    assert_eq!((one.addr(), two.addr()), (BASE, BusAddr(BASE.0 + 4096)));
    assert_eq!((one.len(), two.len()), (1, 4097));
    two.ram().fill(0xff);
    let mut byte = [1];
    one.ram().read(0, &mut byte);
    assert_eq!(byte, [0]);
    let at = two.ram().as_ptr();
    drop(two);
    // All of the rest, which includes what was given back.
    let three = pool.alloc(7 * PAGE_SIZE).unwrap();
    assert_eq!(three.ram().as_ptr(), at);
    let mut bytes = [1; 4097];
    three.ram().read(0, &mut bytes);
    assert_eq!(bytes, [0; 4097]);
}

#[test]
fn what_is_not_there_is_not_given() {
    let pool = pool(4);
    assert!(matches!(pool.alloc(5 * PAGE_SIZE), Err(Error::NoMemory(_))));
    let buffers: Vec<_> = (0..4).map(|_| pool.alloc(1).unwrap()).collect();
    assert!(matches!(pool.alloc(1), Err(Error::NoMemory(1))));
    assert_eq!(pool.free_bytes(), 0);
    drop(buffers);
    assert_eq!(pool.free_bytes(), 4 * PAGE_SIZE);
}

#[test]
fn a_run_across_the_place_where_the_last_search_ended_is_found() {
    let pool = pool(4);
    let one = pool.alloc(2 * PAGE_SIZE).unwrap();
    drop(one);
    let _last = pool.alloc(PAGE_SIZE).unwrap();
    // Pages 0, 1 and 3 are free; the search goes on at 3.
    let two = pool.alloc(2 * PAGE_SIZE).unwrap();
    assert_eq!(two.addr(), BASE);
    drop(two);
    assert!(pool.alloc(3 * PAGE_SIZE).is_err());
}

#[test]
fn pages_are_given_back_once() {
    let mut pages = Pages::new(4);
    let first = pages.take(2).unwrap();
    assert!(!pages.give(first, 3));
    assert!(pages.give(first, 2));
    assert!(!pages.give(first, 2));
    assert!(!pages.give(usize::MAX, 2));
    assert_eq!(pages.free, 4);
}

#[test]
fn addresses_that_cannot_be_are_refused() {
    for (base, len) in [
        (0, 4096),
        (0x1001, 4096),
        (0x1000, 0),
        (u64::MAX - 0xfff, 8192),
        (0x1000, usize::MAX),
    ] {
        assert!(
            DmaPool::new("test", BusAddr(base), len).is_err(),
            "{len} at {base:#x}"
        );
    }
}
