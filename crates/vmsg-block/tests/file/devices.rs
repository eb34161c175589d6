// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block devices.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Engine, FileConfig, FileDisk, LockError, OpenError, Request};

use super::ground::{Loop, directory, open, sparse};
use super::held::{Memory, pattern, read, run, write};

const MIB: u64 = 1 << 20;

fn config(device: &Loop, engine: Engine, direct: bool) -> FileConfig {
    FileConfig {
        engine,
        direct,
        patience: Duration::ZERO,
        ..FileConfig::new(&device.0)
    }
}

#[test]
fn a_block_device_says_itself_what_its_blocks_are() {
    for sector in [512, 4096] {
        let dir = directory();
        let Some(device) = Loop::new(&sparse(dir.path(), MIB), sector) else {
            return;
        };
        let disk = open(&config(&device, Engine::Auto, false)).expect("a disk");
        let facts = disk.facts();
        assert_eq!((facts.size, facts.block_size), (MIB, sector));
        assert!(facts.physical_block_size >= sector);
        assert!(facts.discard && facts.write_zeroes && !facts.read_only);
        assert_ne!(disk.engine(), Engine::Auto);
    }
}

#[test]
fn discards_and_zeroes_reach_a_block_device_whatever_their_place() {
    for (sector, direct) in [(512, false), (512, true), (4096, false), (4096, true)] {
        for engine in [Engine::Uring, Engine::Threads, Engine::Inline] {
            let dir = directory();
            let below = sparse(dir.path(), 4 * MIB);
            let Some(device) = Loop::new(&below, sector) else {
                return;
            };
            let Some(mut disk) = open(&config(&device, engine, direct)) else {
                continue;
            };
            let memory = Memory::new(4 << 20);
            let what = format!("{engine:?}, {sector}, {direct}");
            let bytes = pattern(1, 4 << 20);
            write(&mut disk, &memory, 0, &bytes).expect("written");
            run(&mut disk, Request::Flush, &memory).expect("flushed");
            let blocks = || std::fs::metadata(&below).expect("there").blocks();
            let full = blocks();
            for (offset, len, unmap) in [
                (0, 8192, false),
                (4096 + 8192, 4096, true),
                // No blocks of either device.
                (20481, 1, false),
                (20999, 9001, true),
                (40000, 100, false),
                (MIB + 512, MIB, true),
            ] {
                let request = Request::WriteZeroes { offset, len, unmap };
                run(&mut disk, request, &memory).expect("zeroes");
                let [at, len] = [offset, len].map(|bytes| usize::try_from(bytes).unwrap());
                let around = read(&mut disk, &memory, offset.saturating_sub(64), len + 128);
                let around = around.expect("read");
                let before = at.min(64);
                assert_eq!(around[before..][..len], vec![0; len], "{what}, {offset}");
                if offset > 0 {
                    assert_eq!(around[..before], bytes[at - before..at], "{what}, {offset}");
                }
                assert_eq!(
                    around[before + len..],
                    bytes[at + len..][..around.len() - before - len],
                    "{what}, {offset}"
                );
            }
            // Of no whole blocks: advice that is not taken, and what is beside it stays as it was.
            let (offset, len) = (3 * MIB + 100, 200);
            run(&mut disk, Request::Discard { offset, len }, &memory).expect("taken note of");
            let at = 3 << 20;
            let back = read(&mut disk, &memory, 3 * MIB, 512).expect("read");
            assert_eq!(back[..100], bytes[at..at + 100], "{what}");
            assert_eq!(back[300..], bytes[at + 300..at + 512], "{what}");
            let (offset, len) = (2 * MIB + 4096, MIB / 2);
            run(&mut disk, Request::Discard { offset, len }, &memory).expect("given back");
            run(&mut disk, Request::Flush, &memory).expect("flushed");
            assert!(blocks() + 1000 < full, "{what}: {full} to {}", blocks());
        }
    }
}

#[test]
fn a_block_device_that_grows_is_a_larger_disk() {
    let dir = directory();
    let below = sparse(dir.path(), MIB);
    let Some(device) = Loop::new(&below, 512) else {
        return;
    };
    let mut disk = open(&config(&device, Engine::Auto, true)).expect("a disk");
    let memory = Memory::new(4096);
    let file = std::fs::File::options().write(true).open(&below);
    let file = file.expect("there");
    for size in [3 * MIB, 2 * MIB] {
        file.set_len(size).expect("resized");
        device.resize();
        assert_eq!(
            disk.facts().size,
            if size > 2 * MIB { MIB } else { 3 * MIB }
        );
        disk.look_soon(Instant::now());
        assert!(disk.poll(Instant::now()), "it is another");
        assert_eq!(disk.facts().size, size);
        write(&mut disk, &memory, size - 512, &[7; 512]).expect("the last block");
        assert!(write(&mut disk, &memory, size, &[7; 512]).is_err());
    }
}

#[test]
fn a_block_device_is_opened_for_writing_by_one_and_not_while_it_is_mounted() {
    let dir = directory();
    let Some(device) = Loop::new(&sparse(dir.path(), MIB), 512) else {
        return;
    };
    let first = open(&config(&device, Engine::Threads, false)).expect("a disk");
    let second = FileDisk::open(&config(&device, Engine::Threads, false));
    assert!(matches!(second, Err(OpenError::InUse { .. })), "{second:?}");
    drop(first);
    // As a file system does. A program that another test starts has all that this process has open, for a moment.
    let end = Instant::now() + Duration::from_secs(60);
    let claimed = loop {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL;
        match rustix::fs::open(&device.0, flags, rustix::fs::Mode::empty()) {
            Ok(claimed) => break claimed,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    let third = FileDisk::open(&config(&device, Engine::Threads, false));
    assert!(
        matches!(
            third,
            Err(OpenError::InUse {
                source: LockError::Claimed,
                ..
            })
        ),
        "{third:?}"
    );
    drop(claimed);
    let patient = FileConfig {
        patience: Duration::from_secs(60),
        ..config(&device, Engine::Threads, false)
    };
    assert!(FileDisk::open(&patient).is_ok());
}
