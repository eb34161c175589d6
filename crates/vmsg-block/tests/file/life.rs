// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that are resized, given up and dropped.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmsg_block::{Disk, Engine, FileConfig, FileDisk, Request, Submitted};
use vmsg_mem::Pieces;

use super::ground::{ENGINES, directory, open, sparse};
use super::held::{Memory, pattern, read, run, wait, write};

const MIB: u64 = 1 << 20;
const WHILE: Duration = Duration::from_secs(60);

fn config(directory: &Path, size: u64, direct: bool, engine: Engine) -> FileConfig {
    FileConfig {
        engine,
        direct,
        patience: Duration::ZERO,
        ..FileConfig::new(sparse(directory, size))
    }
}

fn is_readable(disk: &FileDisk) -> bool {
    let fd = disk.event_fd().expect("an event");
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec::default())).expect("polled") > 0
}

/// As a worker would otherwise never sleep.
#[test]
fn an_event_is_there_only_as_long_as_something_is_to_be_told() {
    for engine in ENGINES {
        for direct in [false, true] {
            let dir = directory();
            let Some(mut disk) = open(&config(dir.path(), 8 * MIB, direct, engine)) else {
                continue;
            };
            let memory = Memory::new(4 << 20);
            for round in 0..8u64 {
                // Of no blocks: past the page cache threads do it, also beside io_uring.
                let bytes = pattern(round, 3 << 20);
                write(&mut disk, &memory, round + 1, &bytes).expect("written");
                run(&mut disk, Request::Flush, &memory).expect("flushed");
                let mut done = Vec::new();
                disk.completed(&mut done);
                assert!(done.is_empty());
                let end = Instant::now() + WHILE;
                while is_readable(&disk) {
                    // The event may be on its way still.
                    assert!(Instant::now() < end, "{engine:?} {direct}: for nothing");
                    disk.completed(&mut done);
                }
                disk.cancel();
                disk.completed(&mut done);
                assert!(done.is_empty());
                assert!(
                    !is_readable(&disk),
                    "{engine:?} {direct}: nothing was canceled"
                );
            }
        }
    }
}

#[test]
fn a_disk_that_is_resized_under_load_fails_what_is_gone_and_nothing_else() {
    for (engine, direct) in [
        (Engine::Uring, false),
        (Engine::Uring, true),
        (Engine::Threads, true),
        (Engine::Inline, false),
    ] {
        let dir = directory();
        let config = config(dir.path(), 2 * MIB, direct, engine);
        let Some(mut disk) = open(&config) else {
            continue;
        };
        let memory = Memory::new(16 * 8192);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let resizer = scope.spawn(|| {
                let file = std::fs::File::options().write(true).open(&config.path);
                let file = file.expect("there");
                let mut sizes = [2 * MIB, 4 * MIB, MIB, 3 * MIB + 100].iter().cycle();
                while !over.load(Ordering::Relaxed) {
                    let size = *sizes.next().expect("endless");
                    file.set_len(size).expect("resized");
                    std::thread::yield_now();
                }
                file.set_len(4 * MIB).expect("resized");
            });
            let mut sizes = std::collections::BTreeSet::new();
            let end = Instant::now() + WHILE;
            let mut round = 0;
            // On a busy machine the other thread may not have had its turn by then.
            while round < 400 || (sizes.len() < 2 && Instant::now() < end) {
                round += 1;
                disk.look_soon(Instant::now());
                disk.poll(Instant::now());
                let size = disk.facts().size;
                sizes.insert(size);
                assert!(size % 512 == 0 && size <= 4 * MIB);
                let pieces: Vec<_> = (0..16).map(|tag| memory.pieces(tag * 8192, 4608)).collect();
                let mut pending = 0;
                for (tag, pieces) in pieces.iter().enumerate() {
                    let offset = (round * 7919u64 + tag as u64 * 104_729) * 512 % (size - 4608);
                    let offset = offset / 512 * 512;
                    let pieces = Pieces::new(pieces);
                    let request = match tag % 4 {
                        0 => Request::Read { offset, to: pieces },
                        1 => Request::WriteZeroes {
                            offset,
                            len: 4608,
                            unmap: true,
                        },
                        _ => Request::Write {
                            offset,
                            from: pieces,
                        },
                    };
                    let is_read = matches!(request, Request::Read { .. });
                    let tag = u32::try_from(tag).unwrap();
                    match disk.submit(tag, request, &memory.table) {
                        Submitted::Pending => pending += 1,
                        Submitted::Done(result) => assert!(is_read || result.is_ok()),
                        Submitted::Full => panic!("full"),
                    }
                }
                disk.commit();
                for done in wait(&mut disk, pending) {
                    // Who reads what is gone hears of it; who writes there makes the file longer again.
                    assert!(done.tag % 4 == 0 || done.result.is_ok(), "{done:?}");
                }
            }
            over.store(true, Ordering::Relaxed);
            resizer.join().expect("no panic");
            assert!(sizes.len() > 1, "{sizes:?}");
        });
        disk.look_soon(Instant::now());
        disk.poll(Instant::now());
        assert_eq!(disk.facts().size, 4 * MIB);
        let bytes = pattern(9, 8192);
        write(&mut disk, &memory, 4 * MIB - 8192, &bytes).expect("the new end");
        assert!(read(&mut disk, &memory, 4 * MIB - 8192, 8192).expect("read") == bytes);
    }
}

#[test]
fn a_disk_dropped_when_all_is_done_has_let_go_of_everything() {
    for engine in ENGINES {
        for direct in [false, true] {
            let dir = directory();
            let mut config = config(dir.path(), 8 * MIB, direct, engine);
            // A program that another test starts has all that this process has open, for a moment.
            config.patience = WHILE;
            for _ in 0..20 {
                let Some(mut disk) = open(&config) else {
                    break;
                };
                let memory = Memory::new(4 << 20);
                // Threads have something to do, too.
                write(&mut disk, &memory, 1, &vec![1; 3 << 20]).expect("written");
                drop(disk);
                let fds = std::fs::read_dir("/proc/self/fd").expect("there");
                let fds = fds.flatten().map(|fd| std::fs::read_link(fd.path()));
                let open = fds.flatten().filter(|path| *path == config.path);
                assert_eq!(open.count(), 0, "{engine:?} {direct}");
                assert_eq!(Arc::strong_count(&memory.table), 1);
            }
        }
    }
}
