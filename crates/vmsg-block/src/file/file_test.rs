// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread;

use vmsg_mem::{Held, Pieces};

use super::medium::{Alignment, Kind};
use super::*;

fn medium(file: File, direct: Option<Alignment>) -> Medium {
    Medium::new(OwnedFd::from(file), Kind::Regular, direct)
}

fn empty(direct: Option<(u32, u32)>) -> Medium {
    let direct = direct.map(|(offset, memory)| Alignment { offset, memory });
    medium(tempfile::tempfile().unwrap(), direct)
}

#[test]
fn past_the_page_cache_places_lengths_and_memory_are_aligned() {
    let cached = empty(None);
    assert!(cached.is_aligned(1, 1) && cached.goes_on(1, 7) && !cached.goes_on(0, 7));
    let direct = empty(Some((4096, 512)));
    assert!(direct.is_aligned(8192, 4096));
    assert!(!direct.is_aligned(512, 4096) && !direct.is_aligned(4096, 512));
    // A part that ends in a block cannot be gone on with.
    assert!(direct.goes_on(4096, 8192) && direct.goes_on(100, 100));
    assert!(!direct.goes_on(512, 8192) && !direct.goes_on(0, 8192));
    let memory = Held::buffer(16384, 4096);
    let part = |skip: usize, len: usize| memory.pieces().skip(skip).take(len);
    for (skip, len, taken) in [
        (0, 4096, true),
        (512, 8192, true),
        (100, 4096, false),
        (0, 512, false),
    ] {
        assert_eq!(direct.takes(part(skip, len)), taken, "{len} at {skip}");
        assert!(cached.takes(part(skip, len)));
    }
    // No more pieces than a system call takes.
    let piece = memory.pieces().iter().next().unwrap();
    let piece = piece.get(0, 4096).unwrap();
    let many = vec![piece; 1025];
    assert!(direct.takes(Pieces::new(&many[1..])) && !direct.takes(Pieces::new(&many)));
}

#[test]
fn a_rest_that_is_no_block_is_no_part_of_the_disk() {
    for (direct, block, size, usable) in [
        (None, 512, 1000, 512),
        (None, 4096, 8191, 4096),
        (Some((4096, 512)), 512, 8191, 4096),
        (None, 512, 511, 0),
        (None, 512, u64::MAX, i64::MAX.unsigned_abs() & !511),
    ] {
        assert_eq!(open::usable(&empty(direct), block, size), usable);
    }
}

#[test]
fn after_a_failed_flush_each_later_one_fails() {
    let medium = empty(None);
    medium.sync().unwrap();
    let error = io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error());
    assert!(medium.synced(Err(error)).is_err());
    // The system says that all is well, and it is not.
    assert!(medium.sync().is_err());
    assert!(medium.synced(Ok(())).is_err());
    let Err(Failure::Io(error)) = medium.is_intact() else {
        panic!("it is lost");
    };
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
}

/// Files to which the system says no are in memory here: a sealed one.
#[test]
fn what_the_system_refuses_is_an_error_and_no_more_is_done() {
    use rustix::fs::{MemfdFlags, SealFlags};
    let fd = rustix::fs::memfd_create("sealed", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 8192).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).unwrap();
    let medium = medium(fd.into(), None);
    let buffer = Held::buffer(4096, 1);
    assert!(medium.write(0, buffer.pieces()).is_err());
    assert!(medium.zero(0, 4096, true).is_err());
    assert!(medium.discard(0, 4096).is_err());
    assert!(medium.read(4096, buffer.pieces()).is_ok());
    // Behind the end there is nothing to be read, and the error says why.
    let Err(Failure::Io(error)) = medium.read(8192 - 100, buffer.pieces()) else {
        panic!("there is less");
    };
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn threads_that_have_nothing_to_do_end_with_the_disk() {
    let medium = Arc::new(empty(None));
    medium.write(0, Held::buffer(4096, 1).pieces()).unwrap();
    let pool = Pool::new(Arc::clone(&medium), 4).unwrap();
    for tag in 0..64 {
        pool.push(tag, Work::Flush);
    }
    let mut done = Vec::new();
    while done.len() < 64 {
        pool.completed(&mut done);
        thread::yield_now();
    }
    pool.cancel();
    pool.completed(&mut done);
    assert_eq!(done.len(), 64, "nothing was there to be canceled");
    drop(pool);
    assert_eq!(
        Arc::strong_count(&medium),
        1,
        "nobody has the file any more"
    );
}

#[test]
fn all_disks_look_at_their_sizes_at_the_same_time() {
    let now = Instant::now();
    let first = next_look(now);
    assert!(first > now);
    assert_eq!(next_look(first), first + LOOK);
    // Not once for each that was missed.
    assert!(next_look(now + 100 * LOOK) > now + 100 * LOOK);
    assert!(next_look(now + 100 * LOOK) <= now + 101 * LOOK);
}

#[test]
fn a_file_in_memory_is_mapped_if_the_guest_writes_it() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: no file system in memory");
        return;
    };
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for (engine, read_only, maps) in [
        (Engine::Auto, false, true),
        (Engine::Inline, false, true),
        (Engine::Threads, false, false),
        // Holes would be filled by reading them where the kernel does not say that they are holes.
        (Engine::Auto, true, false),
    ] {
        let config = FileConfig {
            engine,
            read_only,
            ..FileConfig::new(&path)
        };
        let disk = FileDisk::open(&config).unwrap();
        let case = format!("{engine:?}, read-only: {read_only}");
        assert_eq!(disk.mapped.is_some(), disk.in_memory && maps, "{case}");
        // Many pages are not taken down in a thread that others wait for.
        let at_once = disk.in_memory && !maps;
        assert_eq!(disk.ends_at_once(), at_once, "{case}");
    }
}
