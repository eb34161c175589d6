// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::sync::Mutex;

/// Memory of the client, as messages reach it; its first byte is at address 0.
struct Client(Mutex<Vec<u8>>);

impl Messages for Arc<Client> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let at = usize::try_from(address).unwrap();
        into.copy_from_slice(&self.0.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        let at = usize::try_from(address).unwrap();
        self.0.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn cancel(&self) {}
}

struct World {
    memory: DmaMemory,
    client: Arc<Client>,
}

fn world() -> World {
    let client = Arc::new(Client(Mutex::new(vec![0; 0x20_0000])));
    World {
        memory: DmaMemory::new(Box::new(client.clone()), Some(rustix::process::getpid())),
        client,
    }
}

fn range(address: u64, size: u64, offset: u64, fd: Option<&OwnedFd>) -> Range {
    Range {
        address,
        size,
        offset,
        readable: true,
        writable: true,
        fd: fd.map(|fd| fd.try_clone().unwrap()),
    }
}

fn ram(len: u64) -> (Mapping, OwnedFd) {
    Mapping::memfd("guest", len, false).unwrap()
}

#[test]
fn an_access_goes_through_mapped_ranges_and_messages_as_they_lie() {
    let World { memory, client } = world();
    let (ram, fd) = ram(0x4000);
    memory
        .map(range(0x1000, 0x1000, 0x2000, Some(&fd)))
        .unwrap();
    assert!(
        memory
            .map(range(0x2000, 0x1000, 0, None))
            .unwrap()
            .is_none()
    );
    memory.map(range(0x3000, 0x1000, 0, Some(&fd))).unwrap();
    let data: Vec<u8> = (0..0x2800).map(|i| (i % 251) as u8).collect();
    memory.write(BusAddr(0x1400), &data).unwrap();
    let mut back = vec![0; 0x1000];
    ram.ram().read(0x2000, &mut back);
    assert_eq!(back[0x400..], data[..0xc00]);
    assert_eq!(
        client.0.lock().unwrap()[0x2000..0x3000],
        data[0xc00..0x1c00]
    );
    ram.ram().read(0, &mut back);
    assert_eq!(back[..0xc00], data[0x1c00..]);
    let mut all = vec![0; data.len()];
    memory.read(BusAddr(0x1400), &mut all).unwrap();
    assert_eq!(all, data);
    let (copy, _) = self::ram(0x2800);
    memory.read_into(BusAddr(0x1400), copy.ram()).unwrap();
    copy.ram().read(0, &mut all);
    assert_eq!(all, data);
    copy.ram().fill(7);
    memory.write_from(BusAddr(0x1400), copy.ram()).unwrap();
    memory.read(BusAddr(0x1400), &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
    assert_eq!(
        memory.read(BusAddr(0x3800), &mut all),
        Err(MemoryError::Unmapped {
            addr: BusAddr(0x3800),
            len: all.len()
        })
    );
    assert!(memory.read(BusAddr(u64::MAX), &mut all).is_err());
}

#[test]
fn messages_move_more_than_one_chunk() {
    let World { memory, client } = world();
    memory.map(range(0, 0x20_0000, 0, None)).unwrap();
    let len = 2 * CHUNK + 5;
    let (copy, _) = ram(len as u64);
    copy.ram().fill(3);
    memory.write_from(BusAddr(11), copy.ram()).unwrap();
    let sum: usize = client.0.lock().unwrap().iter().map(|b| *b as usize).sum();
    assert_eq!(sum, 3 * len);
    copy.ram().fill(0);
    memory.read_into(BusAddr(11), copy.ram()).unwrap();
    let mut back = vec![0; len];
    copy.ram().read(0, &mut back);
    assert!(back.iter().all(|byte| *byte == 3));
}

#[test]
fn words_are_read_and_written_in_one_piece_or_not_at_all() {
    let World { memory, .. } = world();
    let (ram, fd) = ram(0x1000);
    memory.map(range(0x1000, 0x1000, 0, Some(&fd))).unwrap();
    memory.map(range(0x2000, 0x1000, 0, None)).unwrap();
    memory.map(range(0x3000, 1, 0, None)).unwrap();
    for at in [0x1ffe, 0x2000] {
        memory.store_u16(BusAddr(at), 0xabcd).unwrap();
        assert_eq!(memory.load_u16(BusAddr(at)), Ok(0xabcd));
    }
    let mut bytes = [0; 2];
    ram.ram().read(0xffe, &mut bytes);
    assert_eq!(bytes, [0xcd, 0xab]);
    for at in [0x1001, 0x2001] {
        let addr = BusAddr(at);
        assert_eq!(memory.load_u16(addr), Err(MemoryError::Misaligned { addr }));
    }
    assert!(memory.load_u16(BusAddr(0x3000)).is_err());
}

#[test]
fn what_may_only_be_read_is_lent_so_and_not_written() {
    let World { memory, .. } = world();
    let (_, fd) = ram(0x3000);
    let rom = Range {
        writable: false,
        ..range(0, 0x1000, 0, Some(&fd))
    };
    let window = memory.map(rom).unwrap().unwrap();
    assert!(!window.writable);
    let blind = Range {
        readable: false,
        ..range(0x1000, 0x1000, 0x1000, Some(&fd))
    };
    assert!(memory.map(blind).unwrap().is_none());
    let window = memory
        .map(range(0x2000, 0x1000, 0x2000, Some(&fd)))
        .unwrap();
    assert_eq!(window.unwrap().file_offset, 0x2000);
    assert_eq!(memory.windows().len(), 2);
    let denied = |addr, len| MemoryError::Denied {
        addr: BusAddr(addr),
        len,
    };
    assert_eq!(memory.write(BusAddr(8), &[0]), Err(denied(8, 1)));
    assert_eq!(memory.store_u16(BusAddr(8), 0), Err(denied(8, 2)));
    assert_eq!(memory.load_u16(BusAddr(0x1000)), Err(denied(0x1000, 2)));
    assert!(memory.write(BusAddr(0x1000), &[0]).is_ok());
}

#[test]
fn bad_ranges_are_refused_and_leave_all_as_it_was() {
    let World { memory, .. } = world();
    let (_, fd) = ram(0x2000);
    memory.map(range(0x1000, 0x1000, 0, Some(&fd))).unwrap();
    for (address, size) in [(0x1fff, 1), (0, 0x1001), (0x1000, 0x1000), (0, 0x4000)] {
        let error = memory.map(range(address, size, 0, None)).unwrap_err();
        assert!(matches!(error, MapError::Overlap(0x1000)), "{error}");
    }
    for (address, size) in [(0, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let error = memory.map(range(address, size, 0, None)).unwrap_err();
        assert!(matches!(error, MapError::BadRange), "{error}");
    }
    for offset in [0x1001, u64::MAX] {
        let error = memory.map(range(0x8000, 0x1000, offset, Some(&fd)));
        assert!(error.is_err(), "{offset:#x}");
    }
    let (pipe, _other) = std::io::pipe().unwrap();
    let pipe = OwnedFd::from(pipe);
    assert!(memory.map(range(0x8000, 1, 0, Some(&pipe))).is_err());
    assert_eq!(memory.windows().len(), 1);
    assert_eq!(memory.clear(), 0x1000);
}

#[test]
fn ranges_are_closed_whole() {
    let World { memory, .. } = world();
    for at in 0..4 {
        memory.map(range(at * 0x1000, 0x1000, 0, None)).unwrap();
    }
    for (address, size, cut) in [(0x800, 0x1000, 0), (0x1000, 0x1800, 0x2000), (1, 1, 0)] {
        let error = memory.unmap(address, size).unwrap_err();
        assert!(
            matches!(error, UnmapError::Cuts(at) if at == cut),
            "{error}"
        );
    }
    assert_eq!(memory.unmap(0x1000, 0x2000).unwrap(), 0x2000);
    assert_eq!(memory.unmap(0x1000, 0x2000).unwrap(), 0, "nothing there");
    assert!(memory.read(BusAddr(0x1000), &mut [0]).is_err());
    assert!(memory.read(BusAddr(0x3000), &mut [0]).is_ok());
    assert_eq!(memory.unmap(0, u64::MAX).unwrap(), 0x2000);
    assert_eq!(memory.clear(), 0);
}

#[test]
fn there_is_an_end_to_ranges() {
    let World { memory, .. } = world();
    for at in 0..MAX_RANGES as u64 {
        memory.map(range(at * 2, 1, 0, None)).unwrap();
    }
    let error = memory.map(range(u64::MAX - 1, 1, 0, None)).unwrap_err();
    assert!(matches!(error, MapError::TooMany));
    memory.unmap(0, 1).unwrap();
    assert!(memory.map(range(u64::MAX - 1, 1, 0, None)).is_ok());
}

#[test]
fn a_file_is_mapped_once_however_many_ranges_it_has_and_again_when_it_has_grown() {
    let World { memory, .. } = world();
    let (_, fd) = ram(0x2000);
    memory.map(range(0, 0x1000, 0, Some(&fd))).unwrap();
    memory
        .map(range(0x1000, 0x1000, 0x1000, Some(&fd)))
        .unwrap();
    let same = |memory: &DmaMemory| {
        let state = memory.state();
        let backing = |at: u64| state.ranges[&at].backing.clone().unwrap();
        Arc::ptr_eq(&backing(0), &backing(0x1000))
    };
    assert!(same(&memory));
    rustix::fs::ftruncate(&fd, 0x4000).unwrap();
    memory
        .map(range(0x8000, 0x1000, 0x3000, Some(&fd)))
        .unwrap();
    memory.write(BusAddr(0x8000), &[1]).unwrap();
    memory.write(BusAddr(0), &[1]).unwrap();
}

#[test]
fn a_file_that_was_cut_off_is_an_error_and_no_signal() {
    vmsg_mem::fault::install().unwrap();
    let World { memory, .. } = world();
    let (_, fd) = ram(0x2000);
    memory.map(range(0, 0x2000, 0, Some(&fd))).unwrap();
    memory.read(BusAddr(0x1000), &mut [0]).unwrap();
    rustix::fs::ftruncate(&fd, 0).unwrap();
    assert!(memory.read(BusAddr(0x1000), &mut [0]).is_err());
}

#[test]
fn memory_without_a_file_can_only_be_reached_by_messages() {
    let World { memory, client } = world();
    let (_, fd) = ram(0x1000);
    memory.map(range(0x1000, 0x1000, 0, Some(&fd))).unwrap();
    memory.map(range(0x2000, 0x1000, 0, None)).unwrap();
    assert!(!memory.is_unshared(0x1fff));
    assert!(memory.is_unshared(0x2000));
    assert!(!memory.is_unshared(0x3000), "there is nothing");
    // As if the client had mapped it for itself.
    let state = memory.state();
    let backing = state.ranges[&0x1000].backing.clone().unwrap();
    drop(state);
    assert_eq!(backing.private.get(), Some(&false));
    assert_eq!(memory.windows().len(), 1);
    assert_eq!(memory.largest(), 0x1000);
    drop(client);
}

#[test]
fn a_file_that_the_client_has_mapped_for_itself_is_neither_lent_nor_used() {
    let World { memory, client } = world();
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let program = OwnedFd::from(program);
    memory
        .map(range(0x1000, 0x1000, 0, Some(&program)))
        .unwrap();
    assert_eq!(memory.windows().len(), 1);
    assert!(memory.is_unshared(0x1000), "it is this program");
    assert!(memory.windows().is_empty());
    client.0.lock().unwrap()[0x1000] = 9;
    let mut byte = [0];
    memory.read(BusAddr(0x1000), &mut byte).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn one_client_has_no_more_files_than_others_can_spare() {
    let World { memory, .. } = world();
    let of = |n: usize| n as u64 * 0x10_0000;
    for n in 0..MAX_FILES {
        let (_, fd) = ram(0x1000);
        memory.map(range(of(n), 0x1000, 0, Some(&fd))).unwrap();
    }
    let (_, fd) = ram(0x1000);
    let refused = memory.map(range(of(MAX_FILES), 0x1000, 0, Some(&fd)));
    assert!(matches!(refused, Err(MapError::TooManyFiles)));
    // Those there are can be used on.
    memory.unmap(0, 0x1000).unwrap();
    memory.map(range(0, 0x1000, 0, Some(&fd))).unwrap();
    memory.clear();
    for n in 0..MAX_FILES {
        let (_, fd) = ram(0x1000);
        memory.map(range(of(n), 0x1000, 0, Some(&fd))).unwrap();
    }
}

#[test]
fn one_client_has_no_more_addresses_of_this_process_than_others_can_spare() {
    let World { memory, .. } = world();
    let sparse = |len| {
        let file = rustix::fs::memfd_create("sparse", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file
    };
    let (large, other, small) = (sparse(MAX_MAPPED - 0x1000), sparse(0x2000), sparse(0x1000));
    for (at, fd) in [(0, &large), (0x1000, &other), (0x2000, &small)] {
        memory.map(range(at, 0x1000, 0, Some(fd))).unwrap();
    }
    memory.write(BusAddr(0), &[1; 8]).unwrap();
    let refused = memory.write(BusAddr(0x1000), &[1; 8]);
    assert!(matches!(refused, Err(MemoryError::Unmapped { .. })));
    memory.write(BusAddr(0x2000), &[1; 8]).unwrap();
}
