// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk of which nobody has said that it is a raw one never looks like an image.

use std::sync::atomic::{AtomicBool, Ordering};

use vmsg_block::{Disk, Failure, FileConfig, QCOW2_MAGIC, Request};
use vmsg_mem::Pieces;

use super::ground::{ENGINES, directory, open, sparse};
use super::held::{Memory, pattern, read, run, write};

const MIB: u64 = 1 << 20;

#[test]
fn a_write_that_would_make_a_guessed_disk_an_image_is_refused_and_no_other() {
    for engine in ENGINES {
        for (direct, guessed) in [(false, true), (true, true), (false, false)] {
            let dir = directory();
            let config = FileConfig {
                engine,
                direct,
                guessed,
                ..FileConfig::new(sparse(dir.path(), 4 * MIB))
            };
            let Some(mut disk) = open(&config) else {
                continue;
            };
            let memory = Memory::new(4 << 20);
            let old = pattern(1, 8192);
            write(&mut disk, &memory, 0, &old).expect("written");
            for len in [512, 4096, 200_000 / 512 * 512, 3 << 20] {
                let mut image = pattern(2, len);
                image[..4].copy_from_slice(&QCOW2_MAGIC);
                let result = write(&mut disk, &memory, 0, &image);
                if guessed {
                    assert!(matches!(result, Err(Failure::Image)), "{result:?}");
                    let back = read(&mut disk, &memory, 0, 8192).expect("read");
                    assert!(back == old, "nothing of it was written");
                } else {
                    result.expect("written");
                }
                // Nearly.
                image[3] ^= 1;
                write(&mut disk, &memory, 0, &image).expect("written");
                assert!(read(&mut disk, &memory, 0, len).expect("read") == image);
                write(&mut disk, &memory, 0, &old).expect("written");
                // Somewhere else.
                image[3] ^= 1;
                write(&mut disk, &memory, 512, &image[..len.min(1 << 20)]).expect("written");
                write(&mut disk, &memory, 0, &old).expect("written");
            }
            assert_eq!((disk.in_flight(), disk.touching_memory()), (0, 0));
        }
    }
}

/// What was looked at is what is written, whatever the guest does meanwhile.
#[test]
fn a_guest_that_changes_its_memory_under_the_write_gets_no_image_either() {
    for engine in ENGINES {
        let dir = directory();
        let config = FileConfig {
            engine,
            guessed: true,
            ..FileConfig::new(sparse(dir.path(), MIB))
        };
        let Some(mut disk) = open(&config) else {
            continue;
        };
        let memory = Memory::new(8192);
        let over = AtomicBool::new(false);
        let (mut good, mut bad) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    memory.fill(0, &QCOW2_MAGIC);
                    memory.fill(0, b"good");
                }
            });
            while (good < 200 || bad < 200) && good + bad < 200_000 {
                let pieces = [memory.piece(0, 512)];
                let from = Pieces::new(&pieces);
                match run(&mut disk, Request::Write { offset: 0, from }, &memory) {
                    Ok(()) => good += 1,
                    Err(Failure::Image) => bad += 1,
                    Err(failure) => panic!("{failure}"),
                }
                let mut first = [0; 4];
                let file = std::fs::File::open(&config.path).expect("there");
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).expect("read");
                assert_ne!(first, QCOW2_MAGIC, "{engine:?}");
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(good > 0 && bad > 0, "{good} and {bad}");
    }
}
