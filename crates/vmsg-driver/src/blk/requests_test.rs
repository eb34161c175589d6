// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;

use vmsg_queue::{Layout, QueueFeatures};

use super::super::request::Failure;
use super::*;

const BASE: BusAddr = BusAddr(0x10_0000);
const SIZE: u16 = 8;
const CELLS: usize = 0x4000;

type Ring<'m> = DriverQueue<'m, Vec<DriverSlot>>;

struct Memory(Vec<AtomicU64>);

impl Memory {
    fn new() -> Self {
        Self((0..0x1000).map(|_| AtomicU64::new(!0)).collect())
    }
    fn ram(&self) -> RamSlice<'_> {
        let ram = RamSlice::from_atomics(&self.0);
        let skip = ram.as_ptr().align_offset(Layout::ALIGN);
        ram.split_at(skip).1
    }
    fn set_up(&self, indirect: u16) -> (Ring<'_>, Requests<'_, Vec<Pending>>) {
        let layout = Layout::new(SIZE, indirect).unwrap();
        let features = QueueFeatures {
            event_idx: false,
            indirect: indirect > 0,
        };
        let slots = vec![DriverSlot::default(); usize::from(SIZE)];
        let ring = DriverQueue::new(layout, features, self.ram(), BASE, slots).unwrap();
        let cells = self.ram().split_at(CELLS).1;
        let base = BusAddr(BASE.0 + CELLS as u64);
        let pending = vec![Pending::default(); usize::from(SIZE)];
        (ring, Requests::new(SIZE, (cells, base), pending).unwrap())
    }
    fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let at = usize::try_from(addr - BASE.0).unwrap();
        self.ram().read_array(at).unwrap()
    }
    fn write(&self, addr: u64, bytes: &[u8]) {
        let at = usize::try_from(addr - BASE.0).unwrap();
        self.ram().write(at, bytes);
    }
    /// The descriptors of the chain at `head`: address, length, flags; through an indirect table if there is one.
    fn chain(&self, head: u16) -> Vec<(u64, u32, u16)> {
        let (mut table, mut index, mut chain) = (BASE.0, head, Vec::new());
        loop {
            let d: [u8; 16] = self.read(table + 16 * u64::from(index));
            let addr = u64::from_le_bytes(d[..8].try_into().unwrap());
            let len = u32::from_le_bytes(d[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes([d[12], d[13]]);
            if flags & 4 != 0 {
                (table, index) = (addr, 0);
                continue;
            }
            chain.push((addr, len, flags & 2));
            if flags & 1 == 0 {
                return chain;
            }
            index = u16::from_le_bytes([d[14], d[15]]);
        }
    }
    /// Uses the chain at `head` as a device would, good or bad.
    fn use_chain(&self, ring: &Ring<'_>, index: u16, id: u32, written: u32) {
        let device = ring.config().device.0;
        let entry = device + 4 + 8 * u64::from(index % SIZE);
        self.write(entry, &id.to_le_bytes());
        self.write(entry + 4, &written.to_le_bytes());
        self.write(device + 2, &(index + 1).to_le_bytes());
    }
}

#[test]
fn a_read_has_a_header_its_buffers_and_a_status() {
    for indirect in [0, 16] {
        let memory = Memory::new();
        let (mut ring, mut requests) = memory.set_up(indirect);
        let to = [(BusAddr(0x5000), 512), (BusAddr(0x9000), 3584)];
        let request = Request::Read { sector: 9, to: &to };
        requests.add(&mut ring, 77, request).unwrap();
        assert!(ring.publish().unwrap());
        assert_eq!(requests.in_flight(), 1);
        let chain = memory.chain(0);
        assert_eq!(chain.len(), 4);
        assert_eq!((chain[0].1, chain[0].2), (16, 0));
        assert_eq!(
            memory.read::<16>(chain[0].0),
            [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(chain[1..3], [(0x5000, 512, 2), (0x9000, 3584, 2)]);
        assert_eq!((chain[3].1, chain[3].2), (1, 2));
        memory.write(chain[3].0, &[0]);
        assert_eq!(requests.pop(&mut ring).unwrap(), None);
        memory.use_chain(&ring, 0, 0, 4097);
        let done = requests.pop(&mut ring).unwrap().unwrap();
        assert_eq!((done.tag, done.result), (77, Ok(())));
        assert!(done.is_whole());
        assert_eq!(requests.in_flight(), 0);
    }
}

#[test]
fn each_kind_of_request_is_what_the_specification_says() {
    let memory = Memory::new();
    let (mut ring, mut requests) = memory.set_up(16);
    let from = [(BusAddr(0x5000), 512)];
    for (tag, request) in (0..).zip([
        Request::Write {
            sector: 1,
            from: &from,
        },
        Request::Flush,
        Request::Discard {
            sector: 3,
            sectors: 5,
        },
        Request::WriteZeroes {
            sector: 3,
            sectors: 5,
            unmap: true,
        },
        Request::GetId,
        Request::Other {
            kind: 99,
            sector: 2,
            readable: &from,
            writable: &from,
        },
    ]) {
        requests.add(&mut ring, tag, request).unwrap();
    }
    let kind = |head| u32::from_le_bytes(memory.read(memory.chain(head)[0].0));
    let heads = [0, 1, 2, 3, 4, 5];
    assert_eq!(heads.map(kind), [1, 4, 11, 13, 8, 99]);
    let lengths = |head| -> Vec<_> {
        let chain = memory.chain(head);
        chain.iter().map(|&(_, len, flags)| (len, flags)).collect()
    };
    assert_eq!(lengths(0), [(16, 0), (512, 0), (1, 2)]);
    assert_eq!(lengths(1), [(16, 0), (1, 2)]);
    assert_eq!(lengths(2), [(16, 0), (16, 0), (1, 2)]);
    assert_eq!(lengths(4), [(16, 0), (20, 2), (1, 2)]);
    assert_eq!(lengths(5), [(16, 0), (512, 0), (512, 2), (1, 2)]);
    let segment = |head| memory.read::<16>(memory.chain(head)[1].0);
    assert_eq!(segment(2), [3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(segment(3)[12..], [1, 0, 0, 0]);
}

#[test]
fn a_status_is_told_by_its_name_and_none_is_none() {
    let memory = Memory::new();
    let (mut ring, mut requests) = memory.set_up(0);
    let cases = [
        (Some(0), Ok(())),
        (Some(1), Err(Failure::IoErr)),
        (Some(2), Err(Failure::Unsupp)),
        (Some(3), Err(Failure::BadStatus(3))),
        (None, Err(Failure::BadStatus(0xff))),
    ];
    for (index, (status, expected)) in (0..).zip(cases) {
        requests.add(&mut ring, 5, Request::Flush).unwrap();
        let head = u16::try_from(ring_head(&memory, &ring, index)).unwrap();
        ring.publish().unwrap();
        if let Some(status) = status {
            memory.write(memory.chain(head)[1].0, &[status]);
        }
        memory.use_chain(&ring, index, head.into(), 1);
        let done = requests.pop(&mut ring).unwrap().unwrap();
        assert_eq!(done.result, expected);
    }
}

/// The head in entry `index` of the available ring.
fn ring_head(memory: &Memory, ring: &Ring<'_>, index: u16) -> u32 {
    let at = ring.config().driver.0 + 4 + 2 * u64::from(index % SIZE);
    u16::from_le_bytes(memory.read(at)).into()
}

#[test]
fn a_device_that_uses_what_was_not_sent_breaks_the_queue() {
    for (id, written) in [(1, 1), (8, 1), (u32::MAX, 1), (0, 2), (0, u32::MAX)] {
        let memory = Memory::new();
        let (mut ring, mut requests) = memory.set_up(0);
        requests.add(&mut ring, 5, Request::Flush).unwrap();
        ring.publish().unwrap();
        memory.use_chain(&ring, 0, id, written);
        let error = requests.pop(&mut ring).unwrap_err();
        assert!(error.is_peer_fault(), "{error}");
        let again = requests.add(&mut ring, 6, Request::Flush);
        assert!(matches!(again, Err(QueueError::Broken)));
    }
}

#[test]
fn a_full_queue_takes_no_more_until_something_comes_back() {
    let memory = Memory::new();
    let (mut ring, mut requests) = memory.set_up(0);
    for tag in 0..4 {
        requests.add(&mut ring, tag, Request::Flush).unwrap();
    }
    let full = requests.add(&mut ring, 4, Request::Flush);
    assert!(matches!(full, Err(QueueError::Full)));
    ring.publish().unwrap();
    let head = ring_head(&memory, &ring, 2);
    memory.use_chain(&ring, 0, head, 1);
    assert_eq!(requests.pop(&mut ring).unwrap().unwrap().tag, 2);
    requests.add(&mut ring, 4, Request::Flush).unwrap();
}

#[test]
fn more_buffers_than_there_may_be_are_refused() {
    let memory = Memory::new();
    let (mut ring, mut requests) = memory.set_up(0);
    for count in [7, MAX_SEGMENTS, MAX_SEGMENTS + 1] {
        let to = vec![(BusAddr(0x5000), 512); count];
        let request = Request::Read { sector: 0, to: &to };
        let refused = requests.add(&mut ring, 0, request);
        assert!(matches!(refused, Err(QueueError::BadChain { .. })));
    }
    assert_eq!((requests.in_flight(), ring.free_descriptors()), (0, SIZE));
}

#[test]
fn memory_that_is_too_short_is_refused() {
    let memory = Memory::new();
    let short = memory.ram().split_at(CELL * usize::from(SIZE) - 1).0;
    let pending = || vec![Pending::default(); usize::from(SIZE)];
    assert!(Requests::new(SIZE, (short, BASE), pending()).is_err());
    let ram = memory.ram();
    assert!(Requests::new(SIZE, (ram, BusAddr(!0 - 63)), pending()).is_err());
    assert!(Requests::new(SIZE, (ram, BASE), vec![Pending::default(); 7]).is_err());
}
