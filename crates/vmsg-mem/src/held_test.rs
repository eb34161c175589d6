// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::{Access, BusAddr, Mapping, TableEntry};

const PAGE: usize = 4096;

fn table(mappings: &[&Arc<Mapping>]) -> Arc<WindowTable> {
    let mut base = 0;
    let mut entries = Vec::new();
    for mapping in mappings {
        entries.push(TableEntry {
            base: BusAddr(base),
            mapping: Arc::clone(mapping),
            offset: 0,
            len: mapping.len(),
            access: Access::ReadWrite,
        });
        base += mapping.len() as u64;
    }
    Arc::new(WindowTable::new(entries).unwrap())
}

fn memory(pages: usize) -> Arc<Mapping> {
    let len = (pages * PAGE) as u64;
    Arc::new(Mapping::memfd("test", len, true).unwrap().0)
}

fn lengths(held: &Held) -> Vec<usize> {
    held.pieces().iter().map(|piece| piece.len()).collect()
}

#[test]
fn memory_stays_mapped_as_long_as_it_is_held() {
    let memory = memory(2);
    let table = table(&[&memory]);
    let piece = memory.ram().get(10, 20).unwrap();
    let held = Held::new(Pieces::new(&[piece]), &table).unwrap();
    let weak = Arc::downgrade(&memory);
    drop((memory, table));
    assert!(weak.upgrade().is_some());
    std::thread::spawn(move || {
        held.pieces().write(b"still there");
        let mut back = [0; 11];
        held.pieces().read(&mut back);
        assert_eq!(&back, b"still there");
    })
    .join()
    .unwrap();
    assert!(weak.upgrade().is_none());
}

#[test]
fn memory_of_others_is_refused() {
    let (ours, other) = (memory(1), memory(1));
    let table = table(&[&ours]);
    let inside = ours.ram().get(0, 8).unwrap();
    let outside = other.ram().get(0, 8).unwrap();
    assert!(Held::new(Pieces::new(&[inside]), &table).is_ok());
    for pieces in [[outside, inside], [inside, outside]] {
        let error = Held::new(Pieces::new(&pieces), &table).unwrap_err();
        assert!(matches!(error, Error::Foreign { len: 8 }), "{error}");
        assert!(!error.is_peer_fault());
    }
    let words = [const { AtomicU64::new(0) }; 4];
    let stack = RamSlice::from_atomics(&words);
    assert!(Held::new(Pieces::new(&[stack]), &table).is_err());
    assert!(Held::new(Pieces::new(&[stack]), &Arc::new(WindowTable::empty())).is_err());
    // No bytes are nowhere.
    let nothing = Held::new(Pieces::EMPTY, &Arc::new(WindowTable::empty())).unwrap();
    assert!(nothing.is_empty());
}

#[test]
fn parts_of_one_mapping_are_found_however_they_overlap() {
    let whole = memory(4);
    let part = |offset, len| Arc::new(whole.part(offset, len).unwrap());
    let (a, b, c) = (part(0, 3 * PAGE), part(PAGE, PAGE), part(2 * PAGE, PAGE));
    let table = table(&[&b, &c, &a]);
    for at in [0, PAGE + 5, 2 * PAGE, 3 * PAGE - 8] {
        let piece = whole.ram().get(at, 8).unwrap();
        assert!(Held::new(Pieces::new(&[piece]), &table).is_ok(), "{at}");
    }
    let behind = whole.ram().get(3 * PAGE - 4, 8).unwrap();
    assert!(Held::new(Pieces::new(&[behind]), &table).is_err());
}

#[test]
fn pieces_that_follow_each_other_become_one() {
    let memory = memory(4);
    let table = table(&[&memory]);
    let piece = |offset, len| memory.ram().get(offset, len).unwrap();
    let pieces = [
        piece(0, PAGE),
        piece(PAGE, PAGE),
        piece(0, 16),
        piece(16, 16),
        piece(40, 8),
    ];
    let held = Held::new(Pieces::new(&pieces), &table).unwrap();
    assert_eq!(lengths(&held), [2 * PAGE, 32, 8]);
    assert_eq!(held.len(), 2 * PAGE + 40);

    let scattered: Vec<_> = (0..100).map(|i| piece(i * 32, 16)).collect();
    let mut held = Held::new(Pieces::new(&scattered), &table).unwrap();
    assert_eq!(lengths(&held), [16; 100]);
    held.advance(16 * 98 + 8);
    assert_eq!(lengths(&held), [8, 16]);
    held.truncate(10);
    assert_eq!(lengths(&held), [8, 2]);
    let twin = held.clone();
    held.advance(usize::MAX);
    assert!(held.is_empty() && lengths(&held).is_empty());
    assert_eq!(twin.len(), 10);
}

#[test]
fn buffers_are_aligned_and_their_own() {
    for align in [1, 8, 512, 4096] {
        for len in [0, 1, 511, 5000] {
            let held = Held::buffer(len, align);
            assert_eq!(held.pieces().len(), len);
            assert!(held.table().is_none());
            for piece in held.pieces().iter() {
                assert_eq!(piece.as_ptr().addr() % align, 0);
            }
            let mut bytes = vec![1; len];
            held.pieces().read(&mut bytes);
            assert!(bytes.iter().all(|byte| *byte == 0));
            let bytes: Vec<u8> = (0..len).map(|i| i.to_le_bytes()[0]).collect();
            let moved = held;
            moved.pieces().write(&bytes);
            let mut back = vec![0; len];
            moved.pieces().read(&mut back);
            assert_eq!(back, bytes);
        }
    }
}

#[test]
fn what_is_settled_does_not_change_any_more_and_the_rest_may() {
    let memory = memory(2);
    let table = table(&[&memory]);
    let ram = memory.ram();
    let pieces = [
        ram.get(1, 3).unwrap(),
        ram.get(100, 600).unwrap(),
        ram.get(5000, 7).unwrap(),
    ];
    let mut held = Held::new(Pieces::new(&pieces), &table).unwrap();
    held.pieces().iter().for_each(|piece| piece.fill(1));
    held.settle(512, 512);
    assert_eq!(lengths(&held), [512, 91, 7]);
    assert_eq!(held.len(), 610);
    let first = held.pieces().iter().next().unwrap().as_ptr();
    assert_eq!(first.addr() % 512, 0);
    ram.fill(2);
    let mut bytes = [0; 610];
    held.pieces().read(&mut bytes);
    assert_eq!(bytes[..512], [1; 512]);
    assert_eq!(bytes[512..], [2; 98]);
    // Once more, and with more than there is.
    let mut short = Held::new(Pieces::new(&pieces[2..]), &table).unwrap();
    short.settle(512, 1);
    short.settle(512, 1);
    ram.fill(3);
    let mut bytes = [0; 7];
    short.pieces().read(&mut bytes);
    assert_eq!(bytes, [2; 7]);
    // The rest is still held.
    let weak = Arc::downgrade(&memory);
    drop((memory, table, short));
    assert!(weak.upgrade().is_some());
    drop(held);
    assert!(weak.upgrade().is_none());
}
