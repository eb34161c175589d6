// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests that take long, of a disk whose thread does what is short itself.

mod held;

use held::{Memory, pattern, read, wait};
use vmsg_block::{Disk, Engine, FileConfig, FileDisk, Request, Submitted};
use vmsg_mem::Pieces;

const SIZE: u64 = 64 << 20;

#[test]
fn who_submits_does_what_is_short_and_is_not_held_up_by_what_is_long() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(SIZE).expect("a size");
    let config = FileConfig {
        engine: Engine::Inline,
        ..FileConfig::new(file.path())
    };
    let mut disk = FileDisk::open(&config).expect("a disk");
    let memory = Memory::new(8 << 20);
    let bytes = pattern(1, 8 << 20);
    memory.fill(0, &bytes);
    let len = 8 << 20;
    let pieces = memory.pieces(0, len);
    for (tag, request) in [
        Request::Write {
            offset: 4096,
            from: Pieces::new(&pieces),
        },
        Request::WriteZeroes {
            offset: 32 << 20,
            len: 32 << 20,
            unmap: false,
        },
        Request::Discard {
            offset: 32 << 20,
            len: 32 << 20,
        },
    ]
    .into_iter()
    .enumerate()
    {
        let tag = u32::try_from(tag).expect("few");
        let submitted = disk.submit(tag, request, &memory.table);
        assert!(matches!(submitted, Submitted::Pending), "{request:?}");
        // Short ones do not wait for it.
        let flushed = disk.submit(9, Request::Flush, &memory.table);
        assert!(matches!(flushed, Submitted::Done(Ok(()))));
        assert_eq!(disk.in_flight(), 1);
        disk.commit();
        let done = wait(&mut disk, 1);
        assert_eq!(done[0].tag, tag);
        assert!(done[0].result.is_ok(), "{done:?}");
        assert_eq!((disk.in_flight(), disk.touching_memory()), (0, 0));
    }
    let back = read(&mut disk, &memory, 4096, 1 << 20).expect("read");
    assert_eq!(back, bytes[..1 << 20]);
}

/// The driver's file shrinks while its pieces are copied in threads: they are not aligned for what goes past the page cache.
#[test]
fn memory_that_goes_under_a_thread_ends_no_process() {
    let file = tempfile::NamedTempFile::new_in(".").expect("a file");
    file.as_file().set_len(SIZE).expect("a size");
    let config = FileConfig {
        engine: Engine::Threads,
        direct: true,
        ..FileConfig::new(file.path())
    };
    let Ok(mut disk) = FileDisk::open(&config) else {
        println!("left out: no I/O past the page cache here");
        return;
    };
    vmsg_mem::fault::install().expect("a handler");
    let (mapping, fd) = vmsg_mem::Mapping::memfd("gone", 8 << 20, false).expect("memory");
    let mapping = std::sync::Arc::new(mapping);
    let entry = vmsg_mem::TableEntry {
        base: vmsg_mem::BusAddr(0),
        mapping: std::sync::Arc::clone(&mapping),
        offset: 0,
        len: 8 << 20,
        access: vmsg_mem::Access::ReadWrite,
    };
    let table = std::sync::Arc::new(vmsg_mem::WindowTable::new(vec![entry]).expect("a window"));
    for tag in 0..16 {
        let at = 1 + (tag as usize % 2) * (2 << 20);
        let pieces = [mapping.ram().get(at, 2 << 20).expect("inside")];
        let offset = u64::from(tag) << 21;
        let request = if tag % 2 == 0 {
            let from = Pieces::new(&pieces);
            Request::Write { offset, from }
        } else {
            let to = Pieces::new(&pieces);
            Request::Read { offset, to }
        };
        let submitted = disk.submit(tag, request, &table);
        assert!(matches!(submitted, Submitted::Pending), "{submitted:?}");
        if tag == 1 {
            rustix::fs::ftruncate(&fd, 0).expect("shrunk");
        }
    }
    disk.commit();
    // With an error or without: what was there is of no interest.
    assert_eq!(wait(&mut disk, 16).len(), 16);
    assert!(mapping.is_lost());
}
