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

/// Reads the byte at each address; `None` where there is no window.
fn look(table: &WindowTable, addr: u64) -> Option<u8> {
    let slice = table.space().get(BusAddr(addr), 1, Access::Read)?;
    let mut byte = [0];
    slice.read(0, &mut byte);
    Some(byte[0])
}

#[test]
fn what_follows_each_other_in_addresses_and_memory_is_one_window() {
    let memory = mapping(8 * 4096);
    let table = WindowTable::new(vec![
        entry(0x3000, &memory, 8192, 4096),
        entry(0x1000, &memory, 0, 4096),
        entry(0x2000, &memory, 4096, 4096),
        entry(0x4000, &memory, 0x7000, 4096),
    ])
    .unwrap();
    assert_eq!(table.space().windows().len(), 2);
    assert!(
        table
            .space()
            .slice(BusAddr(0x1ff0), 0x1100, Access::Read)
            .is_ok()
    );
    assert!(matches!(
        table.space().slice(BusAddr(0x3ff0), 0x20, Access::Read),
        Err(Error::Scattered { .. })
    ));
    assert_eq!(table.mappings().len(), 1);
    let hole = table.changed(&[(BusAddr(0x2000), 4096)], vec![]).unwrap();
    assert_eq!(hole.space().windows().len(), 3);
    assert!(
        hole.space()
            .slice(BusAddr(0x1ff0), 0x20, Access::Read)
            .is_err()
    );
    let whole = hole
        .changed(&[], vec![entry(0x2000, &memory, 4096, 4096)])
        .unwrap();
    assert_eq!(whole.space().windows().len(), 2);
    let mut less = entry(0x2000, &memory, 4096, 4096);
    less.access = Access::Read;
    let less = hole.changed(&[], vec![less]).unwrap();
    assert_eq!(
        less.space().windows().len(),
        4,
        "it allows less than its neighbours"
    );
}

#[test]
fn bad_changes_are_refused() {
    let memory = mapping(4 * 4096);
    let table = WindowTable::new(vec![
        entry(0x1000, &memory, 0, 4096),
        entry(0x4000, &memory, 8192, 4096),
    ])
    .unwrap();
    for (addr, len) in [
        (0, 4096),
        (0x2000, 1),
        (0x1000, 4097),
        (0x1000, 0),
        (0x1fff, 2),
        (0x5000, 1),
        (u64::MAX, 1),
        (0x4000, usize::MAX),
    ] {
        let refused = table.changed(&[(BusAddr(addr), len)], vec![]);
        assert!(matches!(refused, Err(Error::Unmapped { .. })), "{addr:#x}");
    }
    for (base, offset, len) in [
        (0xfff, 0, 2),
        (0x1fff, 0, 1),
        (0x1800, 0, 16),
        (0, 0, 0x4000),
        (0x2000, 0, 0x2001),
        (0x2000, 0x4000, 1),
        (0x2000, 0, 0),
        (u64::MAX, 0, 2),
    ] {
        let refused = table.changed(&[], vec![entry(base, &memory, offset, len)]);
        assert!(matches!(refused, Err(Error::BadWindow { .. })), "{base:#x}");
    }
}

#[test]
fn memory_is_let_go_with_its_last_window() {
    let (one, two, three) = (mapping(8192), mapping(4096), mapping(4096));
    let table = WindowTable::new(vec![
        entry(0x1000, &one, 0, 4096),
        entry(0x5000, &one, 4096, 4096),
        entry(0x8000, &two, 0, 4096),
        entry(0xa000, &three, 0, 4096),
    ])
    .unwrap();
    assert_eq!(table.mappings().len(), 3);
    let less = table.changed(&[(BusAddr(0x1000), 4096)], vec![]).unwrap();
    assert_eq!(less.mappings().len(), 3);
    let all = [(BusAddr(0x5000), 4096), (BusAddr(0x8000), 4096)];
    let fewer = less.changed(&all, vec![]).unwrap();
    assert_eq!(fewer.mappings().len(), 1);
    drop((table, less));
    let less = fewer;
    assert_eq!(Arc::strong_count(&one), 1);
    assert_eq!(Arc::strong_count(&two), 1);
    assert_eq!(Arc::strong_count(&three), 2);
    less.space()
        .slice(BusAddr(0xa000), 1, Access::ReadWrite)
        .unwrap()
        .write(0, b"3");
    assert_eq!(look(&less, 0xa000), Some(b'3'));
    let replaced = less
        .changed(
            &[(BusAddr(0xa000), 4096)],
            vec![entry(0xb000, &three, 0, 4096)],
        )
        .unwrap();
    assert_eq!(look(&replaced, 0xb000), Some(b'3'));
    assert_eq!(replaced.mappings().len(), 1);
}

#[test]
fn any_changes_lead_to_the_table_made_at_once() {
    use proptest::prelude::*;
    let files = [mapping(16 * 4096), mapping(16 * 4096)];
    for (file, memory) in files.iter().enumerate() {
        for page in 0..16 {
            let mark = u8::try_from(file * 16 + page + 1).unwrap();
            memory.ram().write(page * 4096, &[mark]);
        }
    }
    // Of each page of addresses: which page of which file, if any; and who may.
    let pages = proptest::collection::vec((0u64..24, 0usize..2, 0usize..16, any::<bool>()), 1..80);
    proptest!(|(steps in pages)| {
        let mut model = std::collections::BTreeMap::new();
        let mut table = WindowTable::empty();
        for (at, file, page, write) in steps {
            let base = at << 12;
            if model.remove(&at).is_some() {
                table = table.changed(&[(BusAddr(base), 4096)], vec![]).unwrap();
            } else {
                let mut new = entry(base, &files[file], page * 4096, 4096);
                new.access = if write { Access::ReadWrite } else { Access::Read };
                table = table.changed(&[], vec![new.clone()]).unwrap();
                model.insert(at, (new, file * 16 + page + 1));
            }
            for at in 0..24 {
                let mark = model.get(&at).map(|(_, mark)| u8::try_from(*mark).unwrap());
                prop_assert_eq!(look(&table, at << 12), mark);
                prop_assert_eq!(look(&table, (at << 12) + 4095), mark.map(|_| 0));
            }
            let at_once = WindowTable::new(model.values().map(|(e, _)| e.clone()).collect()).unwrap();
            let shape = |table: &WindowTable| {
                let windows = table.space().windows().iter();
                windows.map(|w| (w.base(), w.ram().len(), w.access(), w.ram().as_ptr())).collect::<Vec<_>>()
            };
            prop_assert_eq!(shape(&table), shape(&at_once));
            prop_assert_eq!(table.mappings().len(), at_once.mappings().len());
        }
    });
}

#[test]
fn places_say_where_each_window_is() {
    let (one, other) = (mapping(3 * 4096), mapping(4096));
    let entries = vec![
        entry(0x9000, &one, 8192, 4096),
        entry(0x1000, &one, 0, 4096),
        entry(0x2000, &one, 4096, 4096),
        entry(0x3000, &other, 0, 4096),
    ];
    let table = WindowTable::new(entries).unwrap();
    let places: Vec<_> = table
        .places()
        .map(|place| {
            let first = Arc::ptr_eq(place.mapping, &one);
            (place.base.0, place.len, first, place.offset)
        })
        .collect();
    let expected = [
        (0x1000, 8192, true, 0),
        (0x3000, 4096, false, 0),
        (0x9000, 4096, true, 8192),
    ];
    assert_eq!(places, expected);
}

#[test]
fn a_table_has_all_of_another_if_nothing_is_elsewhere_or_gone() {
    let (one, other) = (mapping(4 * 4096), mapping(4 * 4096));
    let read_only = |mut entry: TableEntry| {
        entry.access = Access::Read;
        entry
    };
    let table = |entries| WindowTable::new(entries).unwrap();
    let old = table(vec![entry(0x2000, &one, 4096, 4096)]);
    let has = |entries| table(entries).has_all_of(&old);
    assert!(has(vec![entry(0x2000, &one, 4096, 4096)]));
    assert!(has(vec![entry(0x1000, &one, 0, 4 * 4096)]));
    assert!(has(vec![
        entry(0x1000, &one, 0, 4096),
        entry(0x2000, &one, 4096, 4096),
        entry(0x9000, &other, 0, 4096),
    ]));
    assert!(!has(vec![]));
    assert!(!has(vec![entry(0x9000, &one, 4096, 4096)]), "elsewhere");
    assert!(!has(vec![entry(0x2000, &one, 8192, 4096)]), "other bytes");
    assert!(
        !has(vec![entry(0x2000, &other, 4096, 4096)]),
        "other memory"
    );
    assert!(!has(vec![entry(0x2000, &one, 4096, 4095)]), "shorter");
    assert!(!has(vec![entry(0x2001, &one, 4097, 4095)]), "begins later");
    assert!(!has(vec![read_only(entry(0x2000, &one, 4096, 4096))]));
    let old = table(vec![read_only(entry(0x2000, &one, 4096, 4096))]);
    assert!(table(vec![entry(0x2000, &one, 4096, 4096)]).has_all_of(&old));
    assert!(table(vec![]).has_all_of(&table(vec![])));
}
