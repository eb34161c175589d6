// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::atomic::AtomicU64;

use super::super::medium::Kind;
use super::*;

const PAGE: u64 = 4096;

/// A file in memory, the same as a medium, and mapped; and memory for requests.
struct Rig {
    file: File,
    medium: Medium,
    mapped: Mapped,
    memory: Vec<AtomicU64>,
}

impl Rig {
    fn new(size: u64) -> Self {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        file.set_len(size).unwrap();
        let medium = Medium::new(fd, Kind::Regular, None);
        let mapped = Mapped::new(&medium, size, false).expect("mapped");
        let memory = (0..16 * PAGE / 8).map(|_| AtomicU64::new(0)).collect();
        Self {
            file,
            medium,
            mapped,
            memory,
        }
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
        let ram = RamSlice::from_atomics(&self.memory);
        ram.fill(0xee);
        let (one, two) = ram.get(0, len).unwrap().split_at(len / 3);
        let to = [one, two];
        let to = Pieces::new(&to);
        let request = Request::Read { offset, to };
        self.mapped.run(&self.medium, request, false)?;
        let mut bytes = vec![0; len];
        ram.read(0, &mut bytes);
        Ok(bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let ram = RamSlice::from_atomics(&self.memory);
        ram.write(0, bytes);
        let (one, two) = ram.get(0, bytes.len()).unwrap().split_at(bytes.len() / 3);
        let from = [one, two];
        let from = Pieces::new(&from);
        let request = Request::Write { offset, from };
        self.mapped.run(&self.medium, request, false)
    }

    /// Pages of the file that take memory.
    fn pages(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512 / PAGE
    }

    fn is_there(&self, page: u64) -> bool {
        let len = usize::try_from(PAGE).unwrap();
        self.mapped.is_there(page * PAGE, len)
    }
}

#[test]
fn the_bits_of_a_range_are_those_of_its_pages() {
    let all = |offset, len| words(offset, len, PAGE).collect::<Vec<_>>();
    assert_eq!(all(0, 1), [(0, 1)]);
    assert_eq!(all(PAGE - 1, 2), [(0, 3)]);
    assert_eq!(all(63 * PAGE, PAGE), [(0, 1 << 63)]);
    assert_eq!(all(63 * PAGE, PAGE + 1), [(0, 1 << 63), (1, 1)]);
    assert_eq!(all(64 * PAGE, 64 * PAGE), [(1, u64::MAX)]);
    assert_eq!(
        all(62 * PAGE, 68 * PAGE),
        [(0, 3 << 62), (1, u64::MAX), (2, 3)]
    );
}

#[test]
fn holes_that_are_read_take_no_memory() {
    let mut rig = Rig::new(200 * PAGE);
    for _ in 0..2 {
        assert_eq!(rig.read(3 * PAGE, 5 * 4096).unwrap(), vec![0; 5 * 4096]);
    }
    assert_eq!(rig.pages(), 0);
    assert!(!rig.is_there(3));
    rig.file.write_all_at(&[7; 4096], 4 * PAGE).unwrap();
    assert_eq!(rig.read(4 * PAGE, 4096).unwrap(), vec![7; 4096]);
    assert!(rig.is_there(4), "the second time it is a copy");
    assert_eq!(rig.read(4 * PAGE, 4096).unwrap(), vec![7; 4096]);
    assert!(!rig.is_there(5));
    assert_eq!(rig.pages(), 1);
}

#[test]
fn what_was_written_is_there_for_all_and_written_by_copies_then() {
    let mut rig = Rig::new(200 * PAGE);
    let data: Vec<u8> = (0..9000).map(|at| (at % 251) as u8).collect();
    // Three pages and a part of a fourth.
    for (turn, offset) in [64 * PAGE - 700, 64 * PAGE - 512].into_iter().enumerate() {
        rig.write(offset, &data).unwrap();
        assert!(rig.is_there(63) && rig.is_there(64) && rig.is_there(65));
        let mut found = vec![0; data.len()];
        rig.file.read_exact_at(&mut found, offset).unwrap();
        assert!(found == data, "turn {turn}");
        assert!(rig.read(offset, data.len()).unwrap() == data);
    }
    // What others write is seen, too.
    rig.file.write_all_at(&[9; 100], 64 * PAGE).unwrap();
    assert_eq!(rig.read(64 * PAGE, 100).unwrap(), [9; 100]);
}

#[test]
fn pages_that_are_given_up_are_not_touched_any_more() {
    let mut rig = Rig::new(200 * PAGE);
    rig.write(0, &[1; 16 * 4096]).unwrap();
    assert_eq!(rig.pages(), 16);
    let (offset, len) = (2 * PAGE, 3 * PAGE);
    let request = Request::Discard { offset, len };
    rig.mapped.run(&rig.medium, request, false).unwrap();
    let (offset, len, unmap) = (8 * PAGE, PAGE, true);
    let request = Request::WriteZeroes { offset, len, unmap };
    rig.mapped.run(&rig.medium, request, false).unwrap();
    assert_eq!(rig.pages(), 12);
    for (page, there) in [(1, true), (2, false), (4, false), (5, true), (8, false)] {
        assert_eq!(rig.is_there(page), there, "page {page}");
    }
    let found = rig.read(0, 16 * 4096).unwrap();
    for (page, bytes) in found.chunks(4096).enumerate() {
        let byte = u8::from(![2, 3, 4, 8].contains(&page));
        assert!(bytes.iter().all(|other| *other == byte), "page {page}");
    }
    assert_eq!(rig.pages(), 12);
}

#[test]
fn a_file_that_is_cut_off_makes_errors_and_no_signals() {
    let mut rig = Rig::new(200 * PAGE);
    rig.write(100 * PAGE, &[1; 8192]).unwrap();
    rig.write(2 * PAGE, &[2; 4096]).unwrap();
    rig.file.set_len(50 * PAGE).unwrap();
    rig.read(100 * PAGE, 4096).expect_err("cut off");
    assert!(rig.mapped.mapping.is_none(), "lost");
    // What is still there is read and written all the same.
    assert_eq!(rig.read(2 * PAGE, 4096).unwrap(), [2; 4096]);
    rig.write(3 * PAGE, &[3; 4096]).unwrap();
    rig.mapped.renew(&rig.medium, 50 * PAGE);
    assert!(rig.mapped.mapping.is_some());
    assert_eq!(rig.read(3 * PAGE, 4096).unwrap(), [3; 4096]);
    assert!(rig.is_there(3));
    // A write behind the end makes the file longer, as long as nobody has noticed that it is shorter.
    rig.mapped.renew(&rig.medium, 50 * PAGE);
    rig.file.set_len(20 * PAGE).unwrap();
    rig.mapped.note(30 * PAGE, 4096);
    rig.write(30 * PAGE, &[4; 4096]).unwrap();
    let mut found = [0; 4096];
    rig.file.read_exact_at(&mut found, 30 * PAGE).unwrap();
    assert_eq!(found, [4; 4096]);
}

#[test]
fn a_file_that_grows_is_mapped_anew_and_its_last_part_of_a_page_is_not() {
    let mut rig = Rig::new(2 * PAGE);
    rig.file.set_len(100 * PAGE + 512).unwrap();
    rig.mapped.renew(&rig.medium, 100 * PAGE + 512);
    for offset in [99 * PAGE, 100 * PAGE] {
        rig.write(offset, &[5; 512]).unwrap();
        rig.write(offset, &[6; 512]).unwrap();
        assert_eq!(rig.read(offset, 512).unwrap(), [6; 512]);
    }
    let mapped = rig.mapped.mapping.as_ref().unwrap().len() as u64;
    assert_eq!(mapped, 100 * PAGE);
    assert_eq!(rig.file.metadata().unwrap().len(), 100 * PAGE + 512);
}

#[test]
fn a_file_that_must_not_be_written_is_read() {
    let rig = Rig::new(10 * PAGE);
    rig.file.write_all_at(&[1; 4096], 0).unwrap();
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&rig.file)
    );
    let file = File::open(path).unwrap();
    let medium = Medium::new(file.into(), Kind::Regular, None);
    let mapped = Mapped::new(&medium, 10 * PAGE, true).expect("mapped");
    let mut rig = Rig {
        medium,
        mapped,
        ..rig
    };
    for _ in 0..2 {
        assert_eq!(rig.read(0, 4096).unwrap(), [1; 4096]);
    }
    assert!(rig.is_there(0));
}

#[test]
fn a_file_of_huge_pages_is_written() {
    use rustix::fs::MemfdFlags;
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::memfd_create("disk", flags) else {
        println!("skipped: no huge pages");
        return;
    };
    let file = File::from(fd.try_clone().unwrap());
    file.set_len(2 * HUGE).unwrap();
    if file.write_at(&[1], 0).is_ok() {
        println!("skipped: this kernel writes such files like all others");
        return;
    }
    let medium = Medium::new(fd, Kind::Regular, None);
    let Some(mapped) = Mapped::new(&medium, 2 * HUGE, false) else {
        println!("skipped: no huge page is free");
        return;
    };
    let mut rig = Rig {
        file,
        medium,
        mapped,
        ..Rig::new(PAGE)
    };
    assert_eq!(rig.read(HUGE + 512, 512).unwrap(), [0; 512]);
    match rig.write(HUGE - 512, &[7; 1024]) {
        Ok(()) => assert_eq!(rig.read(HUGE - 512, 1024).unwrap(), [7; 1024]),
        // Nobody has huge pages to spare: an error, and no signal.
        Err(error) => assert!(matches!(error, Failure::Io(_)), "{error}"),
    }
}

#[test]
fn others_see_by_its_time_that_the_file_was_written() {
    let mut rig = Rig::new(4 * PAGE);
    rig.write(0, &[1; 4096]).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let set = |rig: &Rig| rig.file.set_modified(long_ago).unwrap();
    let time = |rig: &Rig| rig.file.metadata().unwrap().modified().unwrap();
    // Reading changes nothing.
    set(&rig);
    rig.read(0, 4096).unwrap();
    rig.mapped.renew(&rig.medium, 4 * PAGE);
    assert_eq!(time(&rig), long_ago);
    rig.write(0, &[2; 4096]).unwrap();
    rig.mapped.renew(&rig.medium, 4 * PAGE);
    assert!(time(&rig) > long_ago);
    // Nor does looking again; what was written last is seen at the end.
    set(&rig);
    rig.mapped.renew(&rig.medium, 4 * PAGE);
    assert_eq!(time(&rig), long_ago);
    rig.write(512, &[3; 512]).unwrap();
    assert_eq!(time(&rig), long_ago, "it was a copy");
    let Rig { file, mapped, .. } = rig;
    drop(mapped);
    assert!(file.metadata().unwrap().modified().unwrap() > long_ago);
}

#[test]
fn of_a_vast_file_a_part_is_mapped_and_none_where_addresses_are_few() {
    let size = 40 * MOST;
    let mut rig = Rig::new(size);
    let mapped = rig.mapped.mapping.as_ref().unwrap().len() as u64;
    assert_eq!(mapped, MOST);
    for offset in [0, MOST - 512, size - 1024] {
        for byte in [5, 6] {
            rig.write(offset, &[byte; 1024]).unwrap();
            assert_eq!(rig.read(offset, 1024).unwrap(), [byte; 1024]);
        }
    }
    assert!(rig.is_there(MOST / PAGE - 1));
    // Nor is it mapped again and again.
    let before = rig.mapped.mapping.as_ref().unwrap().ram().as_ptr();
    rig.mapped.renew(&rig.medium, size);
    assert_eq!(rig.mapped.mapping.as_ref().unwrap().ram().as_ptr(), before);
    assert!(rig.is_there(0));
    rig.mapped.has_few_addresses = true;
    rig.mapped.renew(&rig.medium, size);
    assert!(rig.mapped.mapping.is_none());
    assert_eq!(rig.read(0, 512).unwrap(), [6; 512]);
}
