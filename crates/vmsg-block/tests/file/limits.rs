// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where there is no room: on the medium, and among the requests under way.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use vmsg_block::{Disk, Engine, Failure, FileConfig, Request, Submitted};
use vmsg_mem::Pieces;

use super::ground::{ENGINES, Mounted, directory, open, sparse};
use super::held::{Memory, pattern, read, run, wait, write};

const MIB: u64 = 1 << 20;

fn kind(result: &Result<(), Failure>) -> Option<ErrorKind> {
    match result {
        Err(Failure::Io(error)) => Some(error.kind()),
        _ => None,
    }
}

/// Writes a disk that is larger than its file system from the beginning on, many requests at a time.
fn fill_up(config: &FileConfig) {
    let Some(mut disk) = open(config) else {
        return;
    };
    let size = disk.facts().size;
    let memory = Memory::new(1 << 20);
    let len = 64 << 10;
    let block = pattern(3, len);
    memory.fill(0, &block);
    let pieces = memory.pieces(0, len);
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    let mut place = 0;
    while place < size {
        let mut pending = Vec::new();
        for tag in 0..16 {
            let offset = place + u64::from(tag) * len as u64;
            let from = Pieces::new(&pieces);
            match disk.submit(tag, Request::Write { offset, from }, &memory.table) {
                Submitted::Done(result) => pending.push((offset, result)),
                Submitted::Pending => {}
                Submitted::Full => panic!("full"),
            }
        }
        disk.commit();
        let left = 16 - pending.len();
        for done in wait(&mut disk, left) {
            pending.push((place + u64::from(done.tag) * len as u64, done.result));
        }
        for (offset, result) in pending {
            if result.is_ok() {
                good.push(offset);
            } else {
                assert_eq!(kind(&result), Some(ErrorKind::StorageFull), "{result:?}");
                bad.push(offset);
            }
        }
        place += 16 * len as u64;
    }
    assert!(!good.is_empty() && !bad.is_empty(), "{good:?} {bad:?}");
    run(&mut disk, Request::Flush, &memory).expect("nothing that was told as written is lost");
    let zeroes = Request::WriteZeroes {
        offset: bad[0],
        len: 8 * MIB,
        unmap: false,
    };
    let result = run(&mut disk, zeroes, &memory);
    assert_eq!(kind(&result), Some(ErrorKind::StorageFull), "{result:?}");
    // Space that is given back is there for others.
    if disk.facts().discard {
        for offset in good.drain(..good.len() / 2) {
            let len = len as u64;
            run(&mut disk, Request::Discard { offset, len }, &memory).expect("given back");
        }
        run(&mut disk, Request::Flush, &memory).expect("flushed");
        write(&mut disk, &memory, bad[0], &block).expect("there is room again");
        good.push(bad[0]);
    }
    for offset in good {
        assert!(read(&mut disk, &memory, offset, len).expect("read") == block);
    }
}

fn on(directory: &Path, size: u64, direct: bool, engine: Engine) -> FileConfig {
    FileConfig {
        engine,
        direct,
        ..FileConfig::new(sparse(directory, size))
    }
}

#[test]
fn a_full_file_system_fails_what_it_has_no_room_for_and_nothing_else() {
    for engine in ENGINES {
        if let Some(memory) = Mounted::tmpfs(4 * MIB) {
            fill_up(&on(memory.path(), 16 * MIB, false, engine));
        }
        for direct in [false, true] {
            let Some(ext4) = Mounted::ext4(16 * MIB) else {
                return;
            };
            fill_up(&on(ext4.path(), 32 * MIB, direct, engine));
        }
    }
}

#[test]
fn as_many_requests_are_taken_as_there_is_room_for_and_the_rest_later() {
    for engine in [Engine::Uring, Engine::Threads] {
        for direct in [false, true] {
            let dir = directory();
            let Some(mut disk) = open(&on(dir.path(), 4 * MIB, direct, engine)) else {
                continue;
            };
            let count = 1000;
            let memory = Memory::new(count * 512);
            for index in 0..count {
                memory.fill(index * 512, &[u8::try_from(index % 251).unwrap(); 512]);
            }
            let (mut next, mut done, mut full) = (0, 0, 0);
            let mut seen = vec![false; count];
            while done < count {
                while next < count {
                    let pieces = [memory.piece(next * 512, 512)];
                    // Odd places: past the page cache they wait for each other.
                    let offset = next as u64 * 1000;
                    let from = Pieces::new(&pieces);
                    let tag = u32::try_from(next).unwrap();
                    match disk.submit(tag, Request::Write { offset, from }, &memory.table) {
                        Submitted::Pending => next += 1,
                        Submitted::Full => {
                            full += 1;
                            break;
                        }
                        Submitted::Done(result) => panic!("{result:?}"),
                    }
                }
                assert!(disk.in_flight() <= 256);
                disk.commit();
                for completion in wait(&mut disk, 1) {
                    completion.result.expect("written");
                    let tag = usize::try_from(completion.tag).unwrap();
                    assert!(!std::mem::replace(&mut seen[tag], true), "told twice");
                    done += 1;
                }
            }
            assert!(full > 0);
            assert_eq!(disk.in_flight(), 0);
            let bytes = std::fs::read(dir.path().join("disk")).expect("there");
            for index in 0..count {
                let byte = u8::try_from(index % 251).unwrap();
                assert!(bytes[index * 1000..][..512].iter().all(|b| *b == byte));
            }
        }
    }
}

/// One request of more pieces and of more bytes than one system call moves.
#[test]
fn a_request_of_many_pieces_is_done_in_several_steps() {
    for engine in ENGINES {
        for direct in [false, true] {
            let dir = directory();
            let Some(mut disk) = open(&on(dir.path(), 4 * MIB, direct, engine)) else {
                continue;
            };
            let memory = Memory::new(8 << 20);
            // 1500 pieces of 512 bytes with holes between them.
            let bytes = pattern(5, 1500 * 512);
            let mut pieces = Vec::new();
            for (index, part) in bytes.chunks(512).enumerate() {
                memory.fill(index * 1024, part);
                pieces.push(memory.piece(index * 1024, 512));
            }
            let from = Pieces::new(&pieces);
            let request = Request::Write { offset: 512, from };
            run(&mut disk, request, &memory).expect("written");
            for piece in &pieces {
                piece.fill(0);
            }
            let to = Pieces::new(&pieces);
            run(&mut disk, Request::Read { offset: 512, to }, &memory).expect("read");
            let mut back = Vec::new();
            for index in 0..1500 {
                back.extend_from_slice(&memory.bytes(index * 1024, 512));
            }
            assert!(back == bytes, "{engine:?} {direct}");
            let file = std::fs::read(dir.path().join("disk")).expect("there");
            assert!(file[512..][..bytes.len()] == bytes);
        }
    }
}

#[test]
fn what_is_outside_the_disk_is_refused_and_the_file_keeps_its_size() {
    for engine in ENGINES {
        let dir = directory();
        let config = on(dir.path(), MIB, false, engine);
        let Some(mut disk) = open(&config) else {
            continue;
        };
        let memory = Memory::new(8192);
        for offset in [MIB - 512, MIB, u64::MAX - 511, i64::MAX.unsigned_abs()] {
            let result = write(&mut disk, &memory, offset, &[1; 1024]);
            assert_eq!(kind(&result), Some(ErrorKind::InvalidInput));
            let (len, unmap) = (1024, false);
            for request in [
                Request::Discard { offset, len },
                Request::WriteZeroes { offset, len, unmap },
            ] {
                let result = run(&mut disk, request, &memory);
                assert_eq!(kind(&result), Some(ErrorKind::InvalidInput));
            }
            assert!(read(&mut disk, &memory, offset, 1024).is_err());
        }
        assert_eq!(std::fs::metadata(&config.path).expect("there").size(), MIB);
    }
}
