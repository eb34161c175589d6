// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any requests, many at the same time and over each other, and a model of what may be read.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vmsg_block::{Disk, Engine, FileConfig, Request, Submitted};
use vmsg_mem::Pieces;

use super::ground::{ENGINES, Loop, Mounted, directory, open, sparse};
use super::held::{Memory, pattern, read, wait};

const SIZE: usize = 192 << 10;
/// Bytes of a request at most, but for a few of the whole disk.
const LONG: usize = 24 << 10;
/// Memory that each request has to itself: it begins somewhere in there, and its pieces do not follow each other.
const ROOM: usize = SIZE + (32 << 10);
/// Requests at the same time.
const MANY: usize = 20;
/// What is in memory where nothing was read to.
const NOTHING: u8 = 0xee;

#[derive(Clone, Debug)]
enum Op {
    Read,
    Write(u64),
    Zeroes(bool),
    Discard,
    Flush,
}

#[derive(Clone, Debug)]
struct Wish {
    op: Op,
    at: usize,
    len: usize,
    /// Where in its memory it begins.
    skip: usize,
    /// Lengths of its pieces but for the last one.
    cuts: Vec<usize>,
}

#[derive(Clone, Debug)]
struct Round {
    wishes: Vec<Wish>,
    write_back: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    let op = prop_oneof![
        3 => Just(Op::Read),
        6 => any::<u64>().prop_map(Op::Write),
        2 => any::<bool>().prop_map(Op::Zeroes),
        1 => Just(Op::Discard),
        1 => Just(Op::Flush),
    ];
    let unit = prop::sample::select(vec![1usize, 512, 512, 4096, 4096]);
    let len = prop_oneof![20 => 1..LONG, 1 => Just(SIZE)];
    let skip = prop_oneof![Just(0usize), Just(512), 0..4096usize];
    let cut = prop_oneof![Just(512usize), Just(4096), 1..6000usize];
    let cuts = prop::collection::vec(cut, 0..5);
    (op, unit, 0..SIZE, len, skip, cuts).prop_map(|(op, unit, at, len, skip, cuts)| {
        let at = at / unit * unit;
        let len = len.next_multiple_of(unit).min(SIZE - at);
        Wish {
            op,
            at,
            len,
            skip,
            cuts,
        }
    })
}

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let wishes = prop::collection::vec(wish(), 1..MANY);
    let round = (wishes, prop::bool::weighted(0.8));
    let round = round.prop_map(|(wishes, write_back)| Round { wishes, write_back });
    prop::collection::vec(round, 1..6)
}

impl Wish {
    /// Where in memory its pieces are, if its memory begins at `base`: with holes between them.
    fn places(&self, base: usize) -> Vec<(usize, usize)> {
        let (mut at, mut rest) = (base + self.skip, self.len);
        let mut places = Vec::new();
        for cut in &self.cuts {
            if *cut >= rest {
                break;
            }
            places.push((at, *cut));
            at += (cut + 1).next_multiple_of(512);
            rest -= cut;
        }
        places.push((at, rest));
        places
    }

    fn fill(&self, memory: &Memory, base: usize, bytes: &[u8]) {
        let mut bytes = bytes;
        for (at, len) in self.places(base) {
            let (now, rest) = bytes.split_at(len);
            memory.fill(at, now);
            bytes = rest;
        }
    }

    /// What was read, if nothing was put anywhere else.
    fn take(&self, memory: &Memory, base: usize) -> Vec<u8> {
        let mut all = memory.bytes(base, ROOM);
        let mut bytes = Vec::new();
        for (at, len) in self.places(base) {
            let place = &mut all[at - base..at - base + len];
            bytes.extend_from_slice(place);
            place.fill(NOTHING);
        }
        assert!(
            all.iter().all(|byte| *byte == NOTHING),
            "beside the pieces of {self:?}"
        );
        bytes
    }
}

/// What each byte of the disk may be while, and after, the requests of a round are done.
struct Permitted {
    before: Vec<u8>,
    /// By requests: where, and what; nothing: whatever it likes.
    changes: Vec<(usize, usize, Option<Vec<u8>>)>,
}

impl Permitted {
    /// Looks at what was read at `at`. While requests are under way what was there before is right, too.
    fn check(&self, at: usize, got: &[u8], under_way: bool) {
        let end = at + got.len();
        // Marked where it is right.
        let mut right = vec![false; got.len()];
        let mut changed = vec![false; got.len()];
        for (from, to, bytes) in &self.changes {
            for place in (*from).max(at)..(*to).min(end) {
                changed[place - at] = true;
                let may = |bytes: &Vec<u8>| bytes[place - from] == got[place - at];
                right[place - at] |= bytes.as_ref().is_none_or(may);
            }
        }
        for (index, byte) in got.iter().enumerate() {
            let old = self.before[at + index] == *byte && (under_way || !changed[index]);
            assert!(
                right[index] || old,
                "byte {}: {byte:#x}, before {:#x}, changed {}",
                at + index,
                self.before[at + index],
                changed[index]
            );
        }
    }
}

fn story(config: &FileConfig, rounds: &[Round]) -> bool {
    let Some(mut disk) = open(config) else {
        return false;
    };
    assert_eq!(disk.facts().size, SIZE as u64);
    let memory = Memory::new(MANY * ROOM);
    let mut model = read(&mut disk, &memory, 0, SIZE).unwrap();
    for round in rounds {
        disk.set_write_back(round.write_back);
        memory.fill(0, &vec![NOTHING; round.wishes.len() * ROOM]);
        let mut permitted = Permitted {
            before: model,
            changes: Vec::new(),
        };
        let mut pending = 0;
        for (tag, wish) in round.wishes.iter().enumerate() {
            let (offset, len) = (wish.at as u64, wish.len as u64);
            let base = tag * ROOM;
            let places = wish.places(base);
            let pieces: Vec<_> = places
                .iter()
                .map(|(at, len)| memory.piece(*at, *len))
                .collect();
            let mut changes = |bytes| permitted.changes.push((wish.at, wish.at + wish.len, bytes));
            let request = match wish.op {
                Op::Read => Request::Read {
                    offset,
                    to: Pieces::new(&pieces),
                },
                Op::Write(seed) => {
                    let bytes = pattern(seed, wish.len);
                    wish.fill(&memory, base, &bytes);
                    changes(Some(bytes));
                    Request::Write {
                        offset,
                        from: Pieces::new(&pieces),
                    }
                }
                Op::Zeroes(unmap) => {
                    changes(Some(vec![0; wish.len]));
                    Request::WriteZeroes { offset, len, unmap }
                }
                Op::Discard if disk.facts().discard => {
                    changes(None);
                    Request::Discard { offset, len }
                }
                Op::Discard | Op::Flush => Request::Flush,
            };
            let tag = u32::try_from(tag).unwrap();
            match disk.submit(tag, request, &memory.table) {
                Submitted::Done(result) => result.unwrap(),
                Submitted::Pending => pending += 1,
                Submitted::Full => panic!("full"),
            }
        }
        disk.commit();
        for done in wait(&mut disk, pending) {
            done.result.unwrap();
        }
        assert_eq!((disk.in_flight(), disk.touching_memory()), (0, 0));
        for (tag, wish) in round.wishes.iter().enumerate() {
            if matches!(wish.op, Op::Read) {
                permitted.check(wish.at, &wish.take(&memory, tag * ROOM), true);
            }
        }
        let now = read(&mut disk, &memory, 0, SIZE).unwrap();
        permitted.check(0, &now, false);
        model = now;
    }
    drop(disk);
    let bytes = std::fs::read(&config.path).unwrap();
    assert!(bytes[..SIZE] == model, "it is in the file");
    true
}

/// `cases` stories on a new disk each, that `make` makes and keeps.
fn stories<T>(
    cases: u32,
    make: impl Fn() -> Option<(PathBuf, T)>,
    change: impl Fn(&mut FileConfig),
) {
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&rounds(), |rounds| {
        if let Some((path, _kept)) = make() {
            let mut config = FileConfig::new(path);
            change(&mut config);
            story(&config, &rounds);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

fn in_a_file(direct: bool) {
    for engine in ENGINES {
        for block_size in [512, 4096] {
            let make = || {
                let dir = directory();
                Some((sparse(dir.path(), SIZE as u64), dir))
            };
            stories(8, make, |config| {
                config.engine = engine;
                config.direct = direct;
                config.block_size = Some(block_size);
            });
        }
    }
}

#[test]
fn a_file_holds_what_was_written() {
    in_a_file(false);
}

#[test]
fn a_file_past_the_page_cache_holds_what_was_written() {
    in_a_file(true);
}

#[test]
fn a_file_in_memory_holds_what_was_written() {
    let make = || {
        let dir = tempfile::tempdir_in("/dev/shm").ok()?;
        Some((sparse(dir.path(), SIZE as u64), dir))
    };
    for engine in ENGINES {
        for direct in [false, true] {
            stories(8, make, |config| {
                config.engine = engine;
                config.direct = direct;
            });
        }
    }
}

#[test]
fn a_file_whose_system_cannot_make_zeroes_or_holes_holds_what_was_written() {
    let Some(ext2) = Mounted::ext2(8 << 20) else {
        return;
    };
    for engine in ENGINES {
        for direct in [false, true] {
            let make = || Some((sparse(ext2.path(), SIZE as u64), ()));
            stories(8, make, |config| {
                config.engine = engine;
                config.direct = direct;
            });
        }
    }
}

/// A block device over a file, while it is there.
fn device(dir: &Path, sector: u32) -> Option<(PathBuf, Loop)> {
    let device = Loop::new(&sparse(dir, SIZE as u64), sector)?;
    Some((device.0.clone(), device))
}

/// Blocks of 4096 bytes that are written by requests of single bytes: past the page cache each such block is read, changed and
/// written.
#[test]
fn a_block_device_holds_what_was_written() {
    for sector in [512, 4096] {
        for direct in [false, true] {
            for engine in [Engine::Uring, Engine::Threads] {
                let dir = directory();
                // One device for all stories: it takes a moment to make one.
                let Some((path, _device)) = device(dir.path(), sector) else {
                    return;
                };
                stories(
                    8,
                    || Some((path.clone(), ())),
                    |config| {
                        config.engine = engine;
                        config.direct = direct;
                    },
                );
            }
        }
    }
}
