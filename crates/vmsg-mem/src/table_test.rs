// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn mapping(len: u64) -> Arc<Mapping> {
    Arc::new(Mapping::memfd("test", len, true).unwrap().0)
}

fn entry(base: u64, mapping: &Arc<Mapping>, offset: usize, len: usize) -> TableEntry {
    TableEntry {
        base: BusAddr(base),
        mapping: mapping.clone(),
        offset,
        len,
        access: Access::ReadWrite,
    }
}

#[test]
fn windows_lead_to_their_part_of_the_mapping() {
    let memory = mapping(3 * 4096);
    let table = WindowTable::new(vec![
        entry(0x9000, &memory, 8192, 4096),
        entry(0x1000, &memory, 0, 4096),
    ])
    .unwrap();
    let space = table.space();
    assert_eq!(space.windows()[0].base(), BusAddr(0x1000));
    let slice = space.slice(BusAddr(0x9010), 4, Access::ReadWrite).unwrap();
    slice.write(0, b"here");
    let mut there = [0; 4];
    memory.ram().read(8192 + 16, &mut there);
    assert_eq!(&there, b"here");
    assert!(space.slice(BusAddr(0x2000), 1, Access::Read).is_err());
    assert!(!table.is_lost());
}

#[test]
fn bad_windows_are_refused() {
    let memory = mapping(8192);
    let bad = |entries: Vec<TableEntry>| {
        let error = WindowTable::new(entries).unwrap_err();
        assert!(error.is_peer_fault(), "{error}");
    };
    bad(vec![entry(0, &memory, 0, 8193)]);
    bad(vec![entry(0, &memory, 8192, 1)]);
    bad(vec![entry(0, &memory, usize::MAX, 2)]);
    bad(vec![entry(0, &memory, 0, 0)]);
    bad(vec![entry(u64::MAX - 100, &memory, 0, 4096)]);
    bad(vec![
        entry(0x1000, &memory, 0, 4096),
        entry(0x1fff, &memory, 0, 16),
    ]);
    bad(vec![
        entry(0x1000, &memory, 0, 16),
        entry(0x1000, &memory, 0, 16),
    ]);
}

#[test]
fn a_window_allows_no_more_than_its_mapping() {
    let (_, fd) = Mapping::memfd("test", 4096, true).unwrap();
    let fd = std::os::fd::AsFd::as_fd(&fd);
    let memory = Arc::new(Mapping::of_fd(fd, 0, 4096, Access::Read).unwrap());
    let mut window = entry(0, &memory, 0, 4096);
    assert!(matches!(
        WindowTable::new(vec![window.clone()]),
        Err(Error::ReadOnly { .. })
    ));
    window.access = Access::Read;
    assert!(WindowTable::new(vec![window]).is_ok());
}

#[test]
fn memory_is_let_go_with_the_last_table() {
    let memory = mapping(4096);
    let table = Arc::new(WindowTable::new(vec![entry(0, &memory, 0, 4096)]).unwrap());
    let user = table.clone();
    drop(table);
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(user);
    assert_eq!(Arc::strong_count(&memory), 1);
    assert!(WindowTable::empty().space().windows().is_empty());
}
