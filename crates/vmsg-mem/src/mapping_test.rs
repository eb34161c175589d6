// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;

fn bytes<const N: usize>(ram: RamSlice<'_>, offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    assert_eq!(ram.read(offset, &mut bytes), N);
    bytes
}

#[test]
fn two_mappings_of_one_file_show_the_same_bytes() {
    let (one, fd) = Mapping::memfd("test", 8192, true).unwrap();
    let two = Mapping::of_fd(fd.as_fd(), 0, 8192, Access::Read).unwrap();
    assert_eq!(one.ram().write(5000, b"hello"), 5);
    assert_eq!(&bytes::<5>(two.ram(), 5000), b"hello");
    assert_eq!(two.access(), Access::Read);
    assert!(!one.is_lost());
}

#[test]
fn offset_and_length_need_no_alignment() {
    let (_, fd) = Mapping::memfd("test", 3 * 4096, false).unwrap();
    let file = File::from(fd);
    file.write_all_at(b"edges", 4090).unwrap();
    file.write_all_at(b"!", 4090 + 4999).unwrap();
    let mapping = Mapping::of_fd(file.as_fd(), 4090, 5000, Access::ReadWrite).unwrap();
    assert_eq!(mapping.len(), 5000);
    assert_eq!(mapping.ram().len(), 5000);
    assert_eq!(&bytes::<5>(mapping.ram(), 0), b"edges");
    assert_eq!(&bytes::<1>(mapping.ram(), 4999), b"!");
}

#[test]
fn a_short_file_is_refused() {
    let (_, fd) = Mapping::memfd("test", 4096, false).unwrap();
    for (offset, len) in [(0, 4097), (1, 4096), (8192, 1), (u64::from(u32::MAX), 1)] {
        let error = Mapping::of_fd(fd.as_fd(), offset, len, Access::Read).unwrap_err();
        assert!(
            matches!(error, Error::FileTooShort { have: 4096, need } if need == offset + len),
            "{error}"
        );
        assert!(error.is_peer_fault());
    }
    assert!(Mapping::of_fd(fd.as_fd(), u64::MAX, 2, Access::Read).is_err());
    assert!(Mapping::of_fd(fd.as_fd(), 0, 0, Access::Read).is_err());
}

#[test]
fn a_file_open_for_reading_cannot_be_mapped_for_writing() {
    let file = tempfile();
    file.set_len(4096).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let reader = File::open(path).unwrap();
    assert!(Mapping::of_fd(reader.as_fd(), 0, 4096, Access::ReadWrite).is_err());
    assert!(Mapping::of_fd(reader.as_fd(), 0, 4096, Access::Read).is_ok());
}

#[test]
fn seals_tell_whether_a_file_can_shrink() {
    let (_, sealed) = Mapping::memfd("test", 4096, true).unwrap();
    let (_, open) = Mapping::memfd("test", 4096, false).unwrap();
    assert!(check_seals(sealed.as_fd()).unwrap());
    assert!(!check_seals(open.as_fd()).unwrap());
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(!check_seals(pipe.as_fd()).unwrap());
    assert!(File::from(sealed).set_len(0).is_err());
}

#[test]
fn a_part_keeps_the_whole_mapped() {
    let (mapping, fd) = Mapping::memfd("test", 8192, true).unwrap();
    let mapping = Arc::new(mapping);
    assert!(MappedSlice::new(mapping.clone(), 8000, 193).is_none());
    let part = MappedSlice::new(mapping.clone(), 4096, 4096).unwrap();
    drop(mapping);
    part.store_release(8, 0x0403_0201);
    QueueMemory::write(&part, 12, b"more");
    let mut there = [0; 8];
    File::from(fd).read_exact_at(&mut there, 4096 + 8).unwrap();
    assert_eq!(&there, b"\x01\x02\x03\x04more");
    assert_eq!(part.mapping().len(), 8192);
}

/// A file that has no name.
fn tempfile() -> File {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    File::from(fd)
}

#[test]
fn a_part_that_is_a_mapping_keeps_the_whole_mapped() {
    let (mapping, _fd) = Mapping::memfd("part", 0x3000, true).unwrap();
    let mapping = Arc::new(mapping);
    assert!(mapping.part(0x2000, 0x1001).is_none());
    assert!(mapping.part(usize::MAX, 1).is_none());
    assert!(mapping.part(0, 0).is_none());
    let part = mapping.part(0x1004, 8).unwrap();
    mapping.ram().write(0x1004, b"a string");
    drop(mapping);
    let mut bytes = [0; 8];
    part.ram().read(0, &mut bytes);
    assert_eq!((part.len(), &bytes), (8, b"a string"));
    assert!(!part.is_lost());
}

#[test]
fn a_mapping_gives_its_file_to_others_if_it_was_kept() {
    let (mapping, fd) = Mapping::memfd("test", 8192, true).unwrap();
    assert!(mapping.file().is_none());
    let fd = Arc::new(fd);
    let mapping = Mapping::of_fd(fd.as_fd(), 100, 8000, Access::ReadWrite).unwrap();
    let mapping = Arc::new(mapping.with_file(Arc::clone(&fd), 100));
    let part = mapping.part(4096, 10).unwrap();
    mapping.ram().write(4096, b"here");
    for (of, begin) in [(&*mapping, 100), (&part, 4196)] {
        let (file, offset) = of.file().unwrap();
        assert!(Arc::ptr_eq(file, &fd));
        assert_eq!(offset, begin);
    }
    let (file, offset) = part.file().unwrap();
    let other = Mapping::of_fd(file.as_fd(), offset, 4, Access::Read).unwrap();
    assert_eq!(&bytes(other.ram(), 0), b"here");
}

#[test]
fn pages_that_a_file_has_are_resident_and_its_holes_are_not() {
    let page = rustix::param::page_size();
    let (mapping, fd) = Mapping::memfd("test", 600 * page as u64, true).unwrap();
    rustix::io::pwrite(&fd, &[1], 3 * page as u64).unwrap();
    rustix::io::pwrite(&fd, &vec![1; 300 * page], 300 * page as u64).unwrap();
    assert!(mapping.is_resident(3 * page + 5, page - 5).unwrap());
    assert!(!mapping.is_resident(3 * page + 5, page).unwrap());
    assert!(mapping.is_resident(300 * page, 300 * page).unwrap());
    assert!(!mapping.is_resident(299 * page, 301 * page).unwrap());
    assert!(mapping.is_resident(7, 0).is_ok());
    assert!(mapping.is_resident(600 * page, 1).is_err());
    assert!(mapping.is_resident(usize::MAX, 2).is_err());
}
