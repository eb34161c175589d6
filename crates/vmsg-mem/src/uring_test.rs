// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;

use super::*;
use crate::{Access, BusAddr, Mapping, Pieces, RamSlice, TableEntry, WindowTable};

/// Makes a ring, or says why not: it is often forbidden.
fn ring(depth: u32) -> Option<Ring> {
    match Ring::new(depth) {
        Ok(ring) => Some(ring),
        Err(error @ (RingError::Denied { .. } | RingError::Missing)) => {
            eprintln!("left out: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

struct Memory {
    mapping: Arc<Mapping>,
    table: Arc<WindowTable>,
}

impl Memory {
    fn new(len: usize) -> Self {
        let mapping = Arc::new(Mapping::memfd("test", len as u64, true).unwrap().0);
        let entry = TableEntry {
            base: BusAddr(0),
            mapping: Arc::clone(&mapping),
            offset: 0,
            len,
            access: Access::ReadWrite,
        };
        let table = Arc::new(WindowTable::new(vec![entry]).unwrap());
        Self { mapping, table }
    }

    fn hold(&self, parts: &[(usize, usize)]) -> Held {
        let pieces: Vec<RamSlice<'_>> = parts
            .iter()
            .map(|(offset, len)| self.mapping.ram().get(*offset, *len).unwrap())
            .collect();
        Held::new(Pieces::new(&pieces), &self.table).unwrap()
    }
}

fn file() -> (Arc<OwnedFd>, File) {
    let file = tempfile::tempfile().unwrap();
    (Arc::new(file.try_clone().unwrap().into()), file)
}

fn wait(ring: &mut Ring) -> Finished {
    ring.submit().unwrap();
    loop {
        if let Some(finished) = ring.pop() {
            return finished;
        }
        let fd = ring.event_fd();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
    }
}

#[test]
fn what_is_written_from_pieces_is_read_into_others() {
    let Some(mut ring) = ring(4) else { return };
    let memory = Memory::new(1 << 16);
    let (fd, file) = file();
    let from = memory.hold(&[(0, 5), (100, 7), (4096, 1)]);
    from.pieces().write(b"hello, world!");
    let offset = 3;
    let sync = true;
    ring.push(7, &fd, Operation::Write { offset, from, sync })
        .unwrap();
    assert_eq!(ring.in_flight(), 1);
    let done = wait(&mut ring);
    assert_eq!((done.tag, done.result.unwrap()), (7, 13));
    assert_eq!(done.memory.unwrap().len(), 13);
    assert_eq!(ring.in_flight(), 0);

    let mut bytes = [0; 13];
    file.read_exact_at(&mut bytes, 3).unwrap();
    assert_eq!(&bytes, b"hello, world!");

    for parts in [&[(9000, 20)][..], &[(9000, 10), (20000, 10)]] {
        let to = memory.hold(parts);
        let offset = 10;
        ring.push(8, &fd, Operation::Read { offset, to }).unwrap();
        let done = wait(&mut ring);
        assert_eq!(done.result.unwrap(), 6, "the file has no more");
        let mut bytes = [0; 6];
        done.memory.unwrap().pieces().read(&mut bytes);
        assert_eq!(&bytes, b"world!");
    }
    assert!(ring.pop().is_none());
}

#[test]
fn space_is_given_back_and_files_are_synced() {
    let Some(mut ring) = ring(4) else { return };
    let (fd, file) = file();
    file.write_all_at(&[1; 16384], 0).unwrap();
    let (mode, offset, len) = (
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        4096,
        8192,
    );
    ring.push(1, &fd, Operation::Allocate { mode, offset, len })
        .unwrap();
    wait(&mut ring).result.unwrap();
    let mut bytes = [2; 16384];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(
        bytes[..4096]
            .iter()
            .chain(&bytes[12288..])
            .all(|byte| *byte == 1)
    );
    assert!(bytes[4096..12288].iter().all(|byte| *byte == 0));
    ring.push(2, &fd, Operation::SyncData).unwrap();
    wait(&mut ring).result.unwrap();
}

#[test]
fn errors_are_those_of_the_system() {
    let Some(mut ring) = ring(4) else { return };
    let memory = Memory::new(4096);
    let full = Arc::new(
        File::options()
            .write(true)
            .open("/dev/full")
            .unwrap()
            .into(),
    );
    let from = memory.hold(&[(0, 16)]);
    let (offset, sync) = (0, false);
    ring.push(1, &full, Operation::Write { offset, from, sync })
        .unwrap();
    let error = wait(&mut ring).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));

    // Memory that is not there any more.
    let (mapping, lent) = Mapping::memfd("gone", 8192, false).unwrap();
    let mapping = Arc::new(mapping);
    let entry = TableEntry {
        base: BusAddr(0),
        mapping: Arc::clone(&mapping),
        offset: 0,
        len: 8192,
        access: Access::ReadWrite,
    };
    let table = Arc::new(WindowTable::new(vec![entry]).unwrap());
    rustix::fs::ftruncate(&lent, 0).unwrap();
    let to = Held::new(Pieces::new(&[mapping.ram()]), &table).unwrap();
    let (fd, file) = file();
    file.write_all_at(&[1; 8192], 0).unwrap();
    let offset = 0;
    ring.push(2, &fd, Operation::Read { offset, to }).unwrap();
    let error = wait(&mut ring).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn more_than_the_depth_is_refused_and_all_the_rest_is_done() {
    let Some(mut ring) = ring(9) else { return };
    let memory = Memory::new(1 << 16);
    let (fd, file) = file();
    for i in 0..9u8 {
        let from = memory.hold(&[(usize::from(i) * 512, 512)]);
        from.pieces().write(&[i + 1; 512]);
        let (offset, sync) = (u64::from(i) * 512, false);
        ring.push(u64::from(i), &fd, Operation::Write { offset, from, sync })
            .unwrap();
    }
    assert!(matches!(
        ring.push(9, &fd, Operation::SyncData),
        Err(Operation::SyncData)
    ));
    let mut tags: Vec<u64> = (0..9)
        .map(|_| {
            let done = wait(&mut ring);
            assert_eq!(done.result.unwrap(), 512);
            done.tag
        })
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..9).collect::<Vec<_>>());
    ring.push(9, &fd, Operation::SyncData).unwrap();
    assert_eq!(wait(&mut ring).tag, 9);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 8 * 512 + 511).unwrap();
    assert_eq!(byte, [9]);
}

/// Both ends of a pipe: reads wait as long as nobody writes.
fn pipe() -> (Arc<OwnedFd>, OwnedFd) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    (Arc::new(read), write)
}

#[test]
fn what_waits_can_be_canceled() {
    let Some(mut ring) = ring(4) else { return };
    let memory = Memory::new(4096);
    let (read, _write) = pipe();
    for tag in 0..3 {
        let (offset, to) = (0, memory.hold(&[(0, 16)]));
        ring.push(tag, &read, Operation::Read { offset, to })
            .unwrap();
    }
    ring.submit().unwrap();
    assert!(ring.pop().is_none());
    ring.cancel_all();
    for _ in 0..3 {
        let error = wait(&mut ring).result.unwrap_err();
        let errno = error.raw_os_error();
        assert!(
            matches!(errno, Some(libc::ECANCELED | libc::EINTR)),
            "{error}"
        );
    }
    assert!(ring.pop().is_none());
}

#[test]
fn dropped_with_operations_under_way_it_lets_go_of_memory_and_file_only_when_the_kernel_has() {
    let Some(mut ring) = ring(8) else { return };
    let memory = Memory::new(1 << 20);
    let weak = Arc::downgrade(&memory.mapping);
    let (read, write) = pipe();
    let (fd, file) = file();
    for tag in 0..3 {
        let (offset, to) = (0, memory.hold(&[(0, 16)]));
        ring.push(tag, &read, Operation::Read { offset, to })
            .unwrap();
    }
    ring.submit().unwrap();
    // One that is not even submitted.
    let (offset, from, sync) = (0, memory.hold(&[(0, 1 << 20)]), true);
    ring.push(3, &fd, Operation::Write { offset, from, sync })
        .unwrap();
    drop((read, memory));
    assert!(weak.upgrade().is_some());
    drop(ring);
    assert!(weak.upgrade().is_none());
    assert_eq!(Arc::strong_count(&fd), 1);
    // Nobody reads there any more.
    let mut pipe = File::from(write);
    let error = std::io::Write::write_all(&mut pipe, b"x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    drop(file);
}

#[test]
fn the_thread_that_submits_may_end() {
    let Some(mut ring) = ring(4) else { return };
    let memory = Memory::new(4096);
    let (read, write) = pipe();
    let (offset, to) = (0, memory.hold(&[(0, 5)]));
    let mut ring = thread::spawn(move || {
        ring.push(1, &read, Operation::Read { offset, to }).unwrap();
        ring.submit().unwrap();
        ring
    })
    .join()
    .unwrap();
    rustix::io::write(&write, b"hello").unwrap();
    let done = wait(&mut ring);
    // The kernel gives up what a thread has begun when it ends.
    match done.result {
        Ok(count) => assert_eq!(count, 5),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ECANCELED)),
    }
}

#[test]
fn another_file_under_the_same_number_is_not_touched() {
    let Some(mut ring) = ring(4) else { return };
    let memory = Memory::new(4096);
    let (fd, file) = file();
    let number = fd.as_raw_fd();
    let from = memory.hold(&[(0, 4096)]);
    from.pieces().write(&[5; 4096]);
    let (offset, sync) = (0, false);
    ring.push(1, &fd, Operation::Write { offset, from, sync })
        .unwrap();
    // The ring has the file open still.
    drop(fd);
    let other = tempfile::tempfile().unwrap().into_raw_fd();
    assert_ne!(other, number);
    assert_eq!(wait(&mut ring).result.unwrap(), 4096);
    assert_eq!(file.metadata().unwrap().len(), 4096);
    // SAFETY: just made, and given away once.
    drop(unsafe { OwnedFd::from_raw_fd(other) });
}

/// The page cache has all of it: whoever submits would copy it.
#[test]
fn what_is_long_does_not_hold_up_who_submits_nor_what_is_short() {
    let Some(mut ring) = ring(4) else { return };
    let (fd, plain) = file();
    let len = 64 << 20;
    plain.set_len(len as u64).unwrap();
    let memory = Memory::new(1 << 20);
    let whole = vec![(0, 1 << 20); 64];
    for (tag, parts) in [(1, &whole[..]), (2, &[(0, 4096)])] {
        let to = memory.hold(parts);
        let read = Operation::Read { offset: 0, to };
        assert!(ring.push(tag, &fd, read).is_ok());
    }
    assert_eq!(wait(&mut ring).tag, 2);
    let long = wait(&mut ring);
    assert_eq!((long.tag, long.result.unwrap()), (1, len));
}
