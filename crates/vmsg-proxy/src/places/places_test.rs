// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use vmsg_bus::Physical;
use vmsg_mem::Mapping;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const PRESENT: u64 = 1 << 63;
const ID: FileId = FileId {
    device: 3,
    inode: 4,
};

fn file(len: u64) -> OwnedFd {
    Mapping::memfd("guest", len, true).unwrap().1
}

fn place(offset_in_common: u64, len: u64) -> Place {
    Place {
        offset_in_common,
        len,
    }
}

fn write(path: PathBuf, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A machine with blocks of 128 MiB: those of node 0 and those of node 1.
fn machine(blocks: [&[u64]; 2]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let system = root.path().join("sys/devices/system");
    write(system.join("memory/block_size_bytes"), "8000000\n");
    for (node, blocks) in blocks.iter().enumerate() {
        let folder = system.join(format!("node/node{node}"));
        write(folder.join("meminfo"), "");
        write(folder.join("memory_failure/total"), "0\n");
        for block in *blocks {
            let index = folder.join(format!("memory{block}/phys_index"));
            write(index, &format!("{block:08x}\n"));
        }
    }
    root
}

fn huge(_: BorrowedFd<'_>) -> Option<u64> {
    Some(HUGE)
}

/// A file of huge pages at these physical addresses.
fn at(root: &Path, physical: Physical, len: Option<u64>, pages: &[u64]) -> Pagemap {
    let pages = pages.to_vec();
    let lookup = move |_, number: u64| {
        let page = pages.get(usize::try_from(number).unwrap());
        page.map(|page| PRESENT | (page / 4096))
            .ok_or(io::ErrorKind::UnexpectedEof.into())
    };
    Pagemap::below(root, physical, len).with_lookup(lookup, huge)
}

fn find(places: &dyn Places, offset: u64, len: u64) -> Result<Vec<Place>, PlaceError> {
    let found = places.places(file(8 * HUGE).as_fd(), ID, offset, len)?;
    Ok(found.places)
}

#[test]
fn a_file_that_is_the_common_memory_is_one_place() {
    let same = SameFile {
        id: ID,
        offset: MIB,
        len: 4 * MIB,
        name: "bar".into(),
    };
    assert_eq!(find(&same, MIB, MIB), Ok(vec![place(0, MIB)]));
    assert_eq!(find(&same, 2 * MIB, 3 * MIB), Ok(vec![place(MIB, 3 * MIB)]));
    for (offset, len) in [(0, MIB), (2 * MIB, 3 * MIB + 1), (MIB, u64::MAX), (MIB, 0)] {
        let refused = find(&same, offset, len);
        assert!(
            matches!(refused, Err(PlaceError::Outside { .. })),
            "{offset:#x}+{len:#x}"
        );
    }
    let other = SameFile {
        id: FileId {
            device: 3,
            inode: 5,
        },
        ..same
    };
    assert!(matches!(
        find(&other, MIB, MIB),
        Err(PlaceError::OtherFile { .. })
    ));
}

#[test]
fn pages_of_a_node_are_places_and_neighbours_are_one() {
    let root = machine([&[0, 1], &[2, 3]]);
    let base = 2 * 128 * MIB;
    let pages = [base + HUGE, base + 2 * HUGE, base + 9 * HUGE, base];
    let map = at(root.path(), Physical::Node(1), None, &pages);
    let all = vec![place(HUGE, 2 * HUGE), place(9 * HUGE, HUGE), place(0, HUGE)];
    assert_eq!(find(&map, 0, 4 * HUGE), Ok(all));
}

#[test]
fn a_part_begins_and_ends_within_pages() {
    let root = machine([&[0, 1], &[2, 3]]);
    let base = 2 * 128 * MIB;
    let map = at(
        root.path(),
        Physical::Node(1),
        None,
        &[base + 4 * HUGE, base],
    );
    // From the middle of the second page of the file on.
    let part = find(&map, HUGE + MIB, HUGE);
    let expected = vec![place(4 * HUGE + MIB, MIB), place(0, MIB)];
    assert_eq!(part, Ok(expected));
}

#[test]
fn what_was_looked_up_stays_mapped_and_is_not_looked_up_again() {
    let root = machine([&[], &[2]]);
    let base = 2 * 128 * MIB;
    let times = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = times.clone();
    let lookup = move |_, number: u64| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(PRESENT | ((base + number * HUGE) / 4096))
    };
    let map = Pagemap::below(root.path(), Physical::Node(1), None).with_lookup(lookup, huge);
    let memory = file(8 * HUGE);
    let looked_up = || times.load(std::sync::atomic::Ordering::Relaxed);
    let whole = map.places(memory.as_fd(), ID, 0, 8 * HUGE).unwrap();
    assert_eq!(
        (whole.places.as_slice(), looked_up()),
        (&[place(0, 8 * HUGE)][..], 8)
    );
    let part = map.places(memory.as_fd(), ID, HUGE + 1, HUGE).unwrap();
    assert_eq!(
        (part.places.as_slice(), looked_up()),
        (&[place(HUGE + 1, HUGE)][..], 8)
    );
    // Whoever has let go of it has it looked up again: it may be another one's by now.
    drop((whole, part));
    map.places(memory.as_fd(), ID, 0, HUGE).unwrap();
    assert_eq!(looked_up(), 9);
}

#[test]
fn a_page_that_is_elsewhere_is_named_with_what_to_do() {
    let root = machine([&[0, 1], &[2, 3]]);
    let base = 2 * 128 * MIB;
    let map = at(root.path(), Physical::Node(1), None, &[base, base - HUGE]);
    let text = find(&map, 0, 2 * HUGE).unwrap_err().to_string();
    for part in [
        "0x200000",
        "0xfe00000",
        "NUMA node 1",
        "host-nodes=1,policy=bind,prealloc=on",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // The last page of the node ends with it.
    let last = base + 256 * MIB - HUGE;
    let map = at(root.path(), Physical::Node(1), None, &[last, last + HUGE]);
    assert_eq!(find(&map, 0, HUGE), Ok(vec![place(256 * MIB - HUGE, HUGE)]));
    assert!(matches!(
        find(&map, 0, 2 * HUGE),
        Err(PlaceError::Elsewhere { .. })
    ));
}

#[test]
fn ordinary_pages_are_refused_and_so_is_who_may_not_know() {
    let root = machine([&[0], &[2]]);
    let map = Pagemap::below(root.path(), Physical::Node(1), None);
    assert!(matches!(
        find(&map, 0, HUGE),
        Err(PlaceError::Movable { .. })
    ));
    // What everybody sees without CAP_SYS_ADMIN.
    let map = at(root.path(), Physical::Node(1), None, &[0]);
    assert_eq!(find(&map, 0, HUGE), Err(PlaceError::NotPermitted));
    assert!(!PlaceError::NotPermitted.is_of_file());
}

#[test]
fn nonsense_of_a_pagemap_is_an_error() {
    let root = machine([&[0], &[2]]);
    let base = 2 * 128 * MIB;
    let answer = |entry: u64| {
        let lookup = move |_, _| Ok(entry);
        Pagemap::below(root.path(), Physical::Node(1), None).with_lookup(lookup, huge)
    };
    // Not there, swapped out, not aligned, the highest frame.
    for entry in [
        0,
        1 << 62,
        PRESENT | ((base / 4096) + 1),
        u64::MAX,
        PRESENT | 1,
    ] {
        let refused = find(&answer(entry), 0, HUGE);
        assert!(refused.is_err(), "{entry:#x}: {refused:?}");
    }
    // Two pages of a file are never one.
    let same = answer(PRESENT | (base / 4096));
    assert!(find(&same, 0, HUGE).is_ok());
    assert!(matches!(find(&same, 0, 2 * HUGE), Err(PlaceError::File(_))));
    // It ends too soon.
    let short = at(root.path(), Physical::Node(1), None, &[base]);
    assert!(matches!(
        find(&short, 0, 2 * HUGE),
        Err(PlaceError::NoWindow(_))
    ));
    for (offset, len) in [(0, 0), (1, u64::MAX), (0, 9 * HUGE), (0, u64::MAX)] {
        assert!(matches!(
            find(&short, offset, len),
            Err(PlaceError::File(_))
        ));
    }
}

#[test]
fn a_node_that_is_not_there_or_not_clear_is_named() {
    let root = machine([&[0, 1], &[1, 2]]);
    for (node, word) in [
        (7, "no NUMA node 7"),
        (1, "memory1 belongs to more than one"),
    ] {
        let map = at(root.path(), Physical::Node(node), None, &[0]);
        let text = find(&map, 0, HUGE).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }
    let empty = machine([&[0], &[]]);
    let map = at(empty.path(), Physical::Node(1), None, &[0]);
    assert!(matches!(find(&map, 0, HUGE), Err(PlaceError::NoWindow(_))));
    let broken = machine([&[0], &[1]]);
    let index = "sys/devices/system/node/node1/memory1/phys_index";
    for text in ["x", "", "ffffffffffffffff", "-1"] {
        write(broken.path().join(index), text);
        let map = at(broken.path(), Physical::Node(1), None, &[0]);
        assert!(
            matches!(find(&map, 0, HUGE), Err(PlaceError::NoWindow(_))),
            "{text:?}"
        );
    }
}

#[test]
fn a_node_on_both_sides_of_the_hole_goes_on_behind_it() {
    // Two blocks end at 3 GiB, one begins at 4 GiB.
    let root = machine([&[0], &[22, 23, 32]]);
    let window = PhysicalWindow::new(root.path(), Physical::Node(1), None).unwrap();
    assert_eq!(window.offset_of(22 * 128 * MIB, HUGE), Some(0));
    assert_eq!(window.offset_of(4096 * MIB, HUGE), Some(256 * MIB));
    assert_eq!(window.offset_of(24 * 128 * MIB, HUGE), None);
    assert_eq!(window.offset_of(24 * 128 * MIB - MIB, HUGE), None);
}

#[test]
fn a_window_is_what_was_said() {
    let root = tempfile::tempdir().unwrap();
    let window =
        |base, size| PhysicalWindow::new(root.path(), Physical::Window { base, size }, None);
    let some = window(0x1_0000_0000, 16 * MIB).unwrap();
    assert_eq!(some.offset_of(0x1_0020_0000, HUGE), Some(HUGE));
    assert_eq!(some.offset_of(0xffe0_0000, HUGE), None);
    assert_eq!(some.offset_of(0x1_0100_0000 - HUGE, HUGE + 1), None);
    assert_eq!(some.offset_of(0x1_0000_0000, u64::MAX), None);
    assert!(window(0, 0).is_err() && window(u64::MAX, 2).is_err());
}

fn whole(iomem: &str, len: Option<u64>) -> Result<PhysicalWindow, PlaceError> {
    let root = tempfile::tempdir().unwrap();
    write(root.path().join("proc/iomem"), iomem);
    PhysicalWindow::new(root.path(), Physical::Whole, len)
}

const Q35: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
00100000-7ffdffff : System RAM
  01000000-01e00d86 : Kernel code
7ffe0000-7fffffff : Reserved
b0000000-bfffffff : PCI MMCONFIG 0000 [bus 00-ff]
fee00000-fee00fff : Local APIC
100000000-17fffffff : System RAM
";

#[test]
fn the_whole_memory_of_a_q35_machine_goes_on_behind_its_hole() {
    for len in [None, Some(4096 * MIB)] {
        let window = whole(Q35, len).unwrap();
        assert_eq!(window.offset_of(16 * MIB, HUGE), Some(16 * MIB));
        assert_eq!(window.offset_of(4096 * MIB, HUGE), Some(2048 * MIB));
        assert_eq!(window.offset_of(2048 * MIB, HUGE), None);
        assert_eq!(window.offset_of(6144 * MIB, HUGE), None);
    }
    // More than is there above, or less than is there below.
    for len in [1, 2048 * MIB, 4096 * MIB - 0x3_0000, 6145 * MIB] {
        let refused = whole(Q35, Some(len));
        let contiguous = len >= 6144 * MIB;
        assert_eq!(refused.is_ok(), contiguous, "{len:#x}: {refused:?}");
    }
}

#[test]
fn the_whole_memory_of_a_virt_machine_has_no_hole() {
    let virt = "09000000-09000fff : pl011@9000000\n40000000-13fffffff : System RAM\n  40210000-41b1ffff : Kernel code\n";
    let window = whole(virt, None).unwrap();
    assert_eq!(window.offset_of(0x4000_0000, HUGE), Some(0));
    assert_eq!(window.offset_of(0x1_0000_0000, HUGE), Some(0xc000_0000));
    assert_eq!(window.offset_of(0x1_4000_0000, HUGE), None);
}

#[test]
fn an_iomem_that_says_nothing_is_one_that_was_not_to_be_read() {
    let zero = "00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n";
    assert_eq!(whole(zero, None), Err(PlaceError::NotPermitted));
    for nonsense in ["", "x-y : System RAM\n", "5-3 : System RAM\n", "System RAM"] {
        assert!(whole(nonsense, None).is_err(), "{nonsense:?}");
    }
    assert!(whole("0-ffffffffffffffff : System RAM\n", None).is_err());
}

#[test]
fn the_kernel_of_this_machine_is_asked_in_its_own_words() {
    // Privileged or not, the real pagemap has an entry for a page that was touched.
    let root = Path::new("/");
    let anywhere = Physical::Window {
        base: 0,
        size: 1 << 52,
    };
    let small = |_: BorrowedFd<'_>| Some(rustix::param::page_size() as u64);
    let map = Pagemap::below(root, anywhere, None).with_page_size(small);
    match find(&map, 0, 4096) {
        Ok(places) => assert_eq!(places.len(), 1),
        Err(error) => assert_eq!(error, PlaceError::NotPermitted),
    }
}
