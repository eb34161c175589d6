// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn file(len: u64) -> (Mapping, OwnedFd) {
    Mapping::memfd("guest", len, false).unwrap()
}

fn region(guest: u64, size: u64, user: u64, offset: u64) -> RawRegion {
    RawRegion {
        guest,
        size,
        user,
        offset,
    }
}

#[test]
fn addresses_are_translated_by_region_and_ring_words_read_behind_the_offset_in_the_file() {
    let (ram, fd) = file(0x10000);
    ram.ram().write(0x5000 + 0x802, &[0x34, 0x12]);
    let table = vec![region(0x4000_0000, 0x8000, 0x7f00_0000, 0x5000)];
    let memory = GuestMemory::of_table(table, vec![fd]).unwrap();
    assert_eq!(memory.to_guest(0x7f00_0800, 4), Some(0x4000_0800));
    assert_eq!(memory.to_guest(0x7f00_7ffc, 4), Some(0x4000_7ffc));
    assert_eq!(memory.to_guest(0x7f00_7ffd, 4), None);
    assert_eq!(memory.to_guest(0x7eff_ffff, 4), None);
    assert_eq!(memory.to_guest(u64::MAX, u64::MAX), None);
    assert_eq!(memory.read_u16(0x4000_0802), Some(0x1234));
    assert_eq!(memory.read_u16(0x4000_7fff), None);
    let windows = memory.windows();
    assert_eq!(
        (windows[0].base, windows[0].len, windows[0].file_offset),
        (0x4000_0000, 0x8000, 0x5000)
    );
}

#[test]
fn tables_without_files_with_short_files_or_overlapping_regions_are_refused() {
    let one = || region(0, 0x1000, 0x1000, 0);
    assert!(matches!(
        GuestMemory::of_table(vec![one()], vec![]),
        Err(MemoryError::NotShared { regions: 1, fds: 0 })
    ));
    assert!(matches!(
        GuestMemory::of_table(vec![], vec![]),
        Err(MemoryError::NotShared { .. })
    ));
    let short = GuestMemory::of_table(vec![region(0, 0x2000, 0, 0x1000)], vec![file(0x2000).1]);
    assert!(matches!(
        short,
        Err(MemoryError::File(FileError::TooShort {
            have: 0x2000,
            need: 0x3000
        }))
    ));
    let twice = GuestMemory::of_table(
        vec![one(), region(0xfff, 0x1000, 0, 0)],
        vec![file(0x1000).1, file(0x1000).1],
    );
    assert!(matches!(twice, Err(MemoryError::Overlap)));
}

#[test]
fn regions_come_and_go() {
    let memory =
        GuestMemory::of_table(vec![region(0, 0x1000, 0x1000, 0)], vec![file(0x1000).1]).unwrap();
    let more = region(0x1000, 0x1000, 0x9000, 0);
    let (_, fd) = file(0x1000);
    let again = fd.try_clone().unwrap();
    let both = memory.with(more, fd).unwrap().unwrap();
    assert!(both.with(more, again).unwrap().is_none(), "there already");
    assert_eq!(both.windows().len(), 2);
    assert!(memory.windows()[0].is_same(&both.windows()[0]));
    assert!(both.with(more, file(0x1000).1).is_err());
    let left = both.without(&more).unwrap();
    assert_eq!(left.windows().len(), 1);
    assert!(matches!(
        left.without(&more),
        Err(MemoryError::NoSuchRegion)
    ));
}
