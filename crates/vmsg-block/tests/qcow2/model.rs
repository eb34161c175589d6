// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any requests, several at the same time, and a model of what must be read.

use proptest::prelude::*;
use vmsg_block::{Disk, Qcow2Config, Qcow2Disk, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, pattern, wait};
use super::tools;

const SECTORS: usize = 8192;
/// What one request has at most; each has its place in memory.
const MOST: usize = 300;

#[derive(Clone, Debug)]
enum Op {
    Read,
    Write(u64),
    Zeroes(bool),
    Discard,
}

/// Requests that do not overlap, then one after the other again.
fn round() -> impl Strategy<Value = Vec<(usize, usize, Op)>> {
    let op = prop_oneof![
        3 => Just(Op::Read),
        6 => any::<u64>().prop_map(Op::Write),
        2 => any::<bool>().prop_map(Op::Zeroes),
        1 => Just(Op::Discard),
    ];
    let request = (0..SECTORS, 1..MOST, op);
    prop::collection::vec(request, 1..12).prop_map(|requests| {
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut round = Vec::new();
        for (at, len, op) in requests {
            let end = (at + len).min(SECTORS);
            if taken.iter().all(|&(from, to)| end <= from || to <= at) {
                taken.push((at, end));
                round.push((at, end - at, op));
            }
        }
        round
    })
}

fn story(options: &str, rounds: &[Vec<(usize, usize, Op)>]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    tools::create(&path, options, &(SECTORS * 512).to_string());
    let mut model = vec![0; SECTORS * 512];
    let memory = Memory::new(12 * MOST * 512);
    for rounds in rounds.chunks(4) {
        let mut disk = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap();
        assert_eq!(disk.facts().size, (SECTORS * 512) as u64);
        for (number, round) in rounds.iter().enumerate() {
            disk.set_write_back(number % 3 != 2);
            let mut pending = 0;
            for (slot, (at, len, op)) in round.iter().enumerate() {
                let (offset, range) = (*at as u64 * 512, at * 512..(at + len) * 512);
                let place = slot * MOST * 512;
                let pieces = memory.pieces(place, len * 512);
                let request = match op {
                    Op::Read => Request::Read {
                        offset,
                        to: Pieces::new(&pieces),
                    },
                    Op::Write(seed) => {
                        let bytes = pattern(*seed, len * 512);
                        memory.fill(place, &bytes);
                        model[range].copy_from_slice(&bytes);
                        Request::Write {
                            offset,
                            from: Pieces::new(&pieces),
                        }
                    }
                    Op::Zeroes(unmap) => {
                        model[range].fill(0);
                        Request::WriteZeroes {
                            offset,
                            len: *len as u64 * 512,
                            unmap: *unmap,
                        }
                    }
                    Op::Discard => Request::Discard {
                        offset,
                        len: *len as u64 * 512,
                    },
                };
                let tag = u32::try_from(slot).unwrap();
                assert!(matches!(
                    disk.submit(tag, request, &memory.table),
                    Submitted::Pending
                ));
                pending += 1;
            }
            disk.commit();
            for done in wait(&mut disk, pending) {
                done.result.unwrap();
                let slot = usize::try_from(done.tag).unwrap();
                let (at, len, op) = &round[slot];
                if matches!(op, Op::Read) {
                    let got = memory.bytes(slot * MOST * 512, len * 512);
                    assert!(
                        got == model[at * 512..(at + len) * 512],
                        "{len} sectors at {at}"
                    );
                }
            }
            for (at, len, op) in round {
                if matches!(op, Op::Discard) {
                    // Anything may be there now; so say what.
                    let range = at * 512..(at + len) * 512;
                    memory.fill(0, &model[range.clone()]);
                    let got =
                        super::held::read(&mut disk, &memory, *at as u64 * 512, len * 512).unwrap();
                    model[range].copy_from_slice(&got);
                }
            }
        }
        drop(disk);
        tools::check(&path);
    }
    assert!(tools::contents(&path) == model, "QEMU sees the same");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn an_image_holds_what_was_written(
        rounds in prop::collection::vec(round(), 1..12),
        options in prop::sample::select(vec![
            "", "cluster_size=512", "compat=0.10", "cluster_size=4k,refcount_bits=1", "cluster_size=2M,refcount_bits=64",
        ]),
    ) {
        if tools::there() {
            story(options, &rounds);
        }
    }
}
