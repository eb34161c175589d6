// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that breaks connections and forgets what it was not told to keep, and a model of what must be there.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use vmsg_block::{Disk, NbdDisk, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, pattern, read, run, wait, write};
use super::server::{self, FLUSH, FUA, Forgetful, Habits, TRIM, ZEROES};

const SECTORS: usize = 64;
const SIZE: usize = SECTORS * 512;
const PATIENT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u64),
    Zeroes(usize, usize, bool),
    Flush,
    /// Waits for all that is under way.
    Wait,
    Cancel,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS).prop_flat_map(|at| (Just(at), 1..=(SECTORS - at).min(16)));
    prop_oneof![
        4 => range().prop_map(|(at, len)| Step::Read(at, len)),
        6 => (range(), any::<u64>()).prop_map(|((at, len), seed)| Step::Write(at, len, seed)),
        2 => (range(), any::<bool>()).prop_map(|((at, len), hole)| Step::Zeroes(at, len, hole)),
        2 => Just(Step::Flush),
        2 => Just(Step::Wait),
        1 => Just(Step::Cancel),
    ]
}

/// What a range may hold: one of the versions of each sector.
type Versions = Vec<Vec<[u8; 512]>>;

/// A request that is under way, and what it does to the model.
enum Pending {
    Read {
        at: usize,
        len: usize,
        slot: usize,
        may: Versions,
    },
    Write {
        at: usize,
        now: Vec<[u8; 512]>,
    },
    Flush,
}

struct Model {
    /// What each sector may read as.
    may: Versions,
    /// How many of these were there before the writes that are under way.
    old: Vec<usize>,
}

impl Model {
    fn sectors(bytes: &[u8]) -> Vec<[u8; 512]> {
        bytes
            .chunks(512)
            .map(|sector| sector.try_into().unwrap())
            .collect()
    }

    /// A write has begun: both is possible, and what reads see that are under way.
    fn begin(&mut self, at: usize, now: &[[u8; 512]], pending: &mut HashMap<u32, Pending>) {
        for (sector, now) in now.iter().enumerate() {
            self.may[at + sector].push(*now);
            for other in pending.values_mut() {
                if let Pending::Read {
                    at: from, len, may, ..
                } = other
                    && (*from..*from + *len).contains(&(at + sector))
                {
                    may[at + sector - *from].push(*now);
                }
            }
        }
    }

    /// A write is done, and none that overlaps it is under way.
    fn settle(&mut self, at: usize, now: &[[u8; 512]], pending: &HashMap<u32, Pending>) {
        for sector in 0..now.len() {
            let place = at + sector;
            let busy = pending.values().any(|other| match other {
                Pending::Write { at, now } => (*at..*at + now.len()).contains(&place),
                _ => false,
            });
            // Of writes that were under way at the same time any may have come last.
            if !busy {
                self.may[place].drain(..self.old[place]);
                self.old[place] = self.may[place].len();
            }
        }
    }
}

fn end(
    disk: &mut NbdDisk,
    memory: &Memory,
    pending: &mut HashMap<u32, Pending>,
    model: &mut Model,
    canceled: bool,
) {
    for done in wait(disk, pending.len()) {
        let Some(was) = pending.remove(&done.tag) else {
            panic!("tag {} twice", done.tag);
        };
        if canceled {
            // What became of it is open, but not which of the two.
            continue;
        }
        done.result.unwrap();
        match was {
            Pending::Read { at, len, slot, may } => {
                let got = Model::sectors(&memory.bytes(slot, len * 512));
                for (sector, got) in got.iter().enumerate() {
                    assert!(may[sector].contains(got), "sector {}", at + sector);
                }
            }
            Pending::Write { at, now } => model.settle(at, &now, pending),
            Pending::Flush => {}
        }
    }
    assert!(pending.is_empty());
    assert_eq!(disk.in_flight(), 0);
}

fn story(steps: &[Step], habits: Habits, write_back: bool) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let server = Forgetful::new(&socket, SIZE, habits);
    let memory = Memory::new(4 << 20);
    let mut disk = NbdDisk::open(&server::config(&socket, PATIENT)).unwrap();
    disk.set_write_back(write_back);
    let mut model = Model {
        may: vec![vec![[0; 512]]; SECTORS],
        old: vec![1; SECTORS],
    };
    let mut pending = HashMap::new();
    for (tag, step) in steps.iter().enumerate() {
        let (slot, tag) = ((tag * 16 * 512) % (3 << 20), u32::try_from(tag).unwrap());
        match *step {
            Step::Read(at, len) => {
                let pieces = memory.pieces(slot, len * 512);
                let to = Pieces::new(&pieces);
                let request = Request::Read {
                    offset: at as u64 * 512,
                    to,
                };
                assert!(matches!(
                    disk.submit(tag, request, &memory.table),
                    Submitted::Pending
                ));
                let may = model.may[at..at + len].to_vec();
                pending.insert(tag, Pending::Read { at, len, slot, may });
            }
            Step::Write(at, len, seed) => {
                let bytes = pattern(seed, len * 512);
                memory.fill(slot, &bytes);
                let pieces = memory.pieces(slot, len * 512);
                let from = Pieces::new(&pieces);
                let request = Request::Write {
                    offset: at as u64 * 512,
                    from,
                };
                assert!(matches!(
                    disk.submit(tag, request, &memory.table),
                    Submitted::Pending
                ));
                let now = Model::sectors(&bytes);
                model.begin(at, &now, &mut pending);
                pending.insert(tag, Pending::Write { at, now });
            }
            Step::Zeroes(at, len, unmap) => {
                let request = Request::WriteZeroes {
                    offset: at as u64 * 512,
                    len: len as u64 * 512,
                    unmap,
                };
                assert!(matches!(
                    disk.submit(tag, request, &memory.table),
                    Submitted::Pending
                ));
                let now = vec![[0; 512]; len];
                model.begin(at, &now, &mut pending);
                pending.insert(tag, Pending::Write { at, now });
            }
            Step::Flush => {
                assert!(matches!(
                    disk.submit(tag, Request::Flush, &memory.table),
                    Submitted::Pending
                ));
                pending.insert(tag, Pending::Flush);
            }
            Step::Wait => {
                disk.commit();
                end(&mut disk, &memory, &mut pending, &mut model, false);
            }
            Step::Cancel => {
                disk.commit();
                disk.cancel();
                assert_eq!(disk.touching_memory(), 0);
                end(&mut disk, &memory, &mut pending, &mut model, true);
                // What was canceled does not come over what is written now.
                let bytes = pattern(u64::from(tag), SIZE);
                write(&mut disk, &memory, 0, &bytes).unwrap();
                model.may = Model::sectors(&bytes)
                    .into_iter()
                    .map(|sector| vec![sector])
                    .collect();
                model.old = vec![1; SECTORS];
            }
        }
        if tag % 3 == 0 {
            disk.commit();
        }
    }
    disk.commit();
    end(&mut disk, &memory, &mut pending, &mut model, false);
    let seen = Model::sectors(&read(&mut disk, &memory, 0, SIZE).unwrap());
    for (sector, seen) in seen.iter().enumerate() {
        assert!(model.may[sector].contains(seen), "sector {sector}");
    }
    if write_back {
        run(&mut disk, Request::Flush, &memory).unwrap();
    }
    assert_eq!(
        Model::sectors(&server.durable()),
        seen,
        "what was flushed is there"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_lost_or_done_out_of_order(
        steps in prop::collection::vec(step(), 1..60),
        breaks in prop::collection::vec(0u32..12, 0..6),
        structured: bool,
        write_back: bool,
        fua: bool,
        seed: u64,
        // Longer requests go in parts, some of which may have been answered when the connection breaks.
        maximum in prop::sample::select(vec![1024, 32 << 20]),
    ) {
        let fua = if fua { FUA } else { 0 };
        let flags = FLUSH | TRIM | ZEROES | fua;
        story(&steps, Habits { flags, structured, breaks, seed, maximum }, write_back);
    }
}

#[test]
fn writes_that_a_server_forgets_are_written_again_before_a_flush_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let habits = Habits {
        flags: FLUSH,
        structured: true,
        breaks: vec![3],
        seed: 1,
        maximum: 32 << 20,
    };
    let server = Forgetful::new(&socket, SIZE, habits);
    let memory = Memory::new(1 << 20);
    let mut disk = NbdDisk::open(&server::config(&socket, PATIENT)).unwrap();
    for at in 0..3 {
        write(&mut disk, &memory, at * 512, &pattern(at, 1024)).unwrap();
    }
    // The connection breaks at this.
    run(&mut disk, Request::Flush, &memory).unwrap();
    let mut wanted = pattern(0, 512);
    wanted.extend(&pattern(1, 512));
    wanted.extend(pattern(2, 1024));
    assert_eq!(server.durable()[..2048], wanted);
    let counters: HashMap<_, _> = disk.counters().into_iter().collect();
    assert_eq!(counters["nbd_connections"], 2);
    assert_eq!(counters["nbd_rewritten"], 3);
    assert_eq!(counters["nbd_resent"], 1);
}

/// Half of a write is answered when the server ends and forgets it.
#[test]
fn the_part_of_a_write_that_a_server_forgets_is_written_again_too() {
    for breaks in 1..8 {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let habits = Habits {
            flags: FLUSH,
            structured: true,
            breaks: vec![breaks],
            seed: u64::from(breaks),
            maximum: 1024,
        };
        let server = Forgetful::new(&socket, SIZE, habits);
        let memory = Memory::new(1 << 20);
        let mut disk = NbdDisk::open(&server::config(&socket, PATIENT)).unwrap();
        let bytes = pattern(7, 8192);
        write(&mut disk, &memory, 0, &bytes).unwrap();
        run(&mut disk, Request::Flush, &memory).unwrap();
        assert!(server.durable()[..8192] == bytes, "broken at {breaks}");
    }
}
