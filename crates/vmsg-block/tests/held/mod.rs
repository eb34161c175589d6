// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's memory, and a disk's user who waits.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmsg_block::{Completion, Disk, Failure, Request, Submitted};
use vmsg_mem::{Access, BusAddr, Mapping, Pieces, RamSlice, TableEntry, WindowTable};

/// Stops the test with a message if something is missing, unless VMSG_REQUIRE_TOOLS=1: then it fails. True if it is there.
pub(crate) fn has_tool(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    if !found {
        let required = std::env::var_os("VMSG_REQUIRE_TOOLS").is_some_and(|value| value == "1");
        assert!(!required, "missing: {name}");
        println!("skipped: missing: {name}");
    }
    found
}

/// Memory that requests lie in.
pub(crate) struct Memory {
    mapping: Arc<Mapping>,
    pub(crate) table: Arc<WindowTable>,
}

impl Memory {
    pub(crate) fn new(len: usize) -> Self {
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

    /// `len` bytes from `at` on, in pieces that do not follow each other in memory if there is room for that.
    pub(crate) fn pieces(&self, at: usize, len: usize) -> [RamSlice<'_>; 2] {
        let half = (len / 2).next_multiple_of(16).min(len);
        let ram = self.mapping.ram();
        [
            ram.get(at, half).unwrap(),
            ram.get(at + half, len - half).unwrap(),
        ]
    }

    pub(crate) fn piece(&self, at: usize, len: usize) -> RamSlice<'_> {
        self.mapping.ram().get(at, len).unwrap()
    }

    pub(crate) fn fill(&self, at: usize, bytes: &[u8]) {
        assert_eq!(
            self.mapping
                .ram()
                .get(at, bytes.len())
                .unwrap()
                .write(0, bytes),
            bytes.len()
        );
    }

    pub(crate) fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(
            self.mapping.ram().get(at, len).unwrap().read(0, &mut bytes),
            len
        );
        bytes
    }
}

/// One request and its end.
pub(crate) fn run(
    disk: &mut dyn Disk,
    request: Request<'_>,
    memory: &Memory,
) -> Result<(), Failure> {
    match disk.submit(7, request, &memory.table) {
        Submitted::Done(result) => result,
        Submitted::Full => panic!("full"),
        Submitted::Pending => {
            disk.commit();
            let mut done = wait(disk, 1);
            assert_eq!(done.len(), 1);
            assert_eq!(done[0].tag, 7);
            done.remove(0).result
        }
    }
}

/// Waits for `count` completions as a worker does: for the descriptor, or the time that the disk names.
pub(crate) fn wait(disk: &mut dyn Disk, count: usize) -> Vec<Completion> {
    let end = Instant::now() + Duration::from_secs(120);
    let mut done = Vec::new();
    while done.len() < count {
        assert!(Instant::now() < end, "{} of {count} are done", done.len());
        turn(disk, end);
        disk.completed(&mut done);
    }
    done
}

/// Waits once and lets the disk do its work.
pub(crate) fn turn(disk: &mut dyn Disk, end: Instant) {
    let now = Instant::now();
    let until = disk.next_timeout().map_or(end, |next| next.min(end));
    let left = Timespec::try_from(until.saturating_duration_since(now)).unwrap();
    if let Some(fd) = disk.event_fd() {
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&left)).unwrap();
    }
    disk.poll(Instant::now());
}

pub(crate) fn write(
    disk: &mut dyn Disk,
    memory: &Memory,
    offset: u64,
    bytes: &[u8],
) -> Result<(), Failure> {
    memory.fill(0, bytes);
    let pieces = memory.pieces(0, bytes.len());
    let from = Pieces::new(&pieces);
    run(disk, Request::Write { offset, from }, memory)
}

pub(crate) fn read(
    disk: &mut dyn Disk,
    memory: &Memory,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, Failure> {
    memory.fill(0, &vec![0xee; len]);
    let pieces = memory.pieces(0, len);
    let to = Pieces::new(&pieces);
    run(disk, Request::Read { offset, to }, memory)?;
    Ok(memory.bytes(0, len))
}

/// Bytes that differ from place to place and from `seed` to `seed`.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
