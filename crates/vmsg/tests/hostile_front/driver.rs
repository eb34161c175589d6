// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's driver whose rings hold anything, and change while they are looked at.

use crate::stage::{ISOLATED, LENT, NET, Stage};
use crate::vmm::{GUEST, Numbers, RAM, Ram, Vmm, descriptor, rings};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const SIZE: u16 = 64;

struct Trick {
    name: &'static str,
    descriptors: Vec<[u8; 16]>,
    available: Vec<u16>,
    index: u16,
}

fn tricks() -> Vec<Trick> {
    let at = GUEST + 0x1_0000;
    let next = 1;
    let (write, indirect) = (2, 4);
    let trick = |name, descriptors, index| Trick {
        name,
        descriptors,
        available: vec![0; 64],
        index,
    };
    let ring = |n: u16| descriptor(at, 4, next, (n + 1) % SIZE);
    let mut tricks = vec![
        trick("a loop of one", vec![descriptor(at, 4, next, 0)], 1),
        trick("a loop of all", (0..SIZE).map(ring).collect(), 1),
        trick("4 GiB", vec![descriptor(at, u32::MAX, write, 0)], 1),
        trick("4 GiB to read", vec![descriptor(at, u32::MAX, 0, 0)], 1),
        trick("no bytes", vec![descriptor(at, 0, write, 0)], 1),
        trick("wraps", vec![descriptor(u64::MAX - 4, 64, write, 0)], 1),
        trick("nowhere", vec![descriptor(1 << 60, 64, write, 0)], 1),
        trick(
            "an index that jumps",
            vec![descriptor(at, 4, write, 0)],
            4000,
        ),
        trick(
            "an index of the end",
            vec![descriptor(at, 4, write, 0)],
            u16::MAX,
        ),
        trick("next of none", vec![descriptor(at, 4, next | write, 64)], 1),
        trick(
            "read behind write",
            vec![descriptor(at, 4, next | write, 1), descriptor(at, 4, 0, 0)],
            1,
        ),
        trick(
            "a table of itself",
            vec![descriptor(GUEST, 16 * 64, indirect, 0)],
            1,
        ),
        trick(
            "a table in a table",
            vec![descriptor(GUEST + 0x8000, 16 * 4, indirect, 0)],
            1,
        ),
        trick(
            "a table of no whole entries",
            vec![descriptor(GUEST + 0x8000, 17, indirect, 0)],
            1,
        ),
        trick(
            "a table of 4 GiB",
            vec![descriptor(GUEST, 0xffff_fff0, indirect, 0)],
            1,
        ),
        trick(
            "a table of nothing",
            vec![descriptor(GUEST, 0, indirect, 0)],
            1,
        ),
        trick(
            "the rings as buffers",
            vec![descriptor(GUEST, 0x4000, write, 0)],
            1,
        ),
        trick(
            "the whole memory, again and again",
            (0..SIZE)
                .map(|n| {
                    descriptor(
                        GUEST,
                        RAM as u32,
                        write | if n + 1 < SIZE { next } else { 0 },
                        n + 1,
                    )
                })
                .collect(),
            1,
        ),
        trick(
            "all of it 64 times",
            vec![descriptor(GUEST + 0x4000, (RAM - 0x4000) as u32, write, 0)],
            64,
        ),
    ];
    tricks.push(Trick {
        name: "heads of none",
        descriptors: vec![descriptor(at, 4, write, 0)],
        available: vec![64; 64],
        index: 3,
    });
    tricks
}

#[test]
fn each_trick_in_a_ring_costs_only_its_own_device() {
    let stage = Stage::start();
    let mut longest = Duration::ZERO;
    for front in [LENT, ISOLATED, NET] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        for features in [0, INDIRECT | EVENT_IDX] {
            for trick in tricks() {
                ram.mapping.ram().get(0, 0x2_0000).unwrap().fill(0);
                for (n, bytes) in trick.descriptors.iter().enumerate() {
                    ram.write(16 * n, bytes);
                    ram.write(0x8000 + 16 * n, &descriptor(GUEST + 0x8000, 16, 4, 0));
                }
                for (n, head) in trick.available.iter().enumerate() {
                    ram.write(0x1004 + 2 * n, &head.to_le_bytes());
                }
                ram.write(0x1002, &trick.index.to_le_bytes());
                vmm.start(features, SIZE, GUEST);
                vmm.kick(0);
                for _ in 0..5 {
                    vmm.kick(0);
                    let status = vmm.status();
                    assert_eq!(status & 0xf, 0xf, "{}", trick.name);
                }
                vmm.set_status(0);
                vmm.negotiate(features);
            }
        }
        longest = longest.max(vmm.longest);
    }
    eprintln!("longest {longest:?}");
    stage.finish();
}

#[test]
fn rings_that_change_while_they_are_looked_at_cost_only_their_own_device() {
    let stage = Stage::start();
    let mut longest = Duration::ZERO;
    for (seed, front) in [(11, LENT), (12, ISOLATED), (13, NET), (14, ISOLATED)] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM / 2, 0, Some(&ram.file)).unwrap();
        // What is not lent stays as it is.
        let kept = (RAM / 2) as usize;
        ram.mapping.ram().get(kept, kept).unwrap().fill(0x5a);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (ram, stop) = (&ram, &stop);
            scope.spawn(move || {
                let mut numbers = Numbers(seed);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..200 {
                        let slot = numbers.below(SIZE.into()) as usize;
                        let near = GUEST + numbers.below(RAM / 2);
                        let wild = numbers.next();
                        let addr = numbers.pick(&[near, near, near, near, wild]);
                        let len = numbers.pick(&[16, 64, 1500, 0x1_0000, u32::MAX, 0]);
                        let flags = numbers.pick(&[0, 1, 2, 2, 3, 3, 4, 7]);
                        let next = numbers.below(u64::from(SIZE) + 1) as u16;
                        ram.write(16 * slot, &descriptor(addr, len, flags, next));
                        let head = numbers.below(u64::from(SIZE)) as u16;
                        ram.write(0x1004 + 2 * slot, &head.to_le_bytes());
                    }
                    let old = u16::from_le_bytes(ram.read(0x1002, 2).try_into().unwrap());
                    let step = numbers.pick(&[1, 1, 1, 2, 5, 5, 100]);
                    ram.write(0x1002, &old.wrapping_add(step).to_le_bytes());
                    std::thread::yield_now();
                }
            });
            let end = Instant::now() + Duration::from_millis(700);
            while Instant::now() < end {
                ram.write(0x1002, &0u16.to_le_bytes());
                vmm.start(INDIRECT | EVENT_IDX, SIZE, GUEST);
                for _ in 0..20 {
                    vmm.kick(0);
                    vmm.status();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        vmm.set_status(0);
        while vmm.status() != 0 {}
        longest = longest.max(vmm.longest);
        assert!(
            ram.read(kept, kept).iter().all(|byte| *byte == 0x5a),
            "{front}"
        );
    }
    eprintln!("longest {longest:?}");
    stage.finish();
}

#[test]
fn queues_anywhere_in_the_address_space_are_refused_or_need_a_reset() {
    let stage = Stage::start();
    let mut numbers = Numbers(5);
    for front in [LENT, ISOLATED, NET] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        // Without a file, and a hole between them.
        vmm.map(GUEST + RAM + 0x1000, 0x1_0000, 0, None).unwrap();
        let places = [
            0,
            1,
            GUEST,
            GUEST + 4,
            GUEST + RAM - 16,
            GUEST + RAM,
            GUEST + RAM + 0x1000,
            u64::MAX - 15,
            u64::MAX - 0xfff,
            1 << 63,
        ];
        for _ in 0..60 {
            vmm.negotiate(0);
            let at = [(); 3].map(|()| numbers.pick(&places));
            let size = numbers.pick(&[0, 1, 3, 64, 256, 1024, 32768, u16::MAX]);
            for index in [0, 1, 5, u16::MAX] {
                vmm.queue(index, size, at);
            }
            vmm.set_status(0xf);
            vmm.kick(0);
            vmm.kick(900);
            vmm.status();
            // Stopped, started elsewhere, and stopped.
            vmm.write(crate::vmm::BAR, 0x3a, &1u16.to_le_bytes());
            vmm.queue(0, 16, rings(GUEST));
            vmm.kick(0);
            vmm.status();
        }
        eprintln!("{front}: longest {:?}", vmm.longest);
    }
    stage.finish();
}
