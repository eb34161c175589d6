// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's driver that puts anything into its rings: the device stops by name, and works again after a reset.

use crate::device::Echo;
use crate::guest::{GUEST, Numbers, PATIENCE, Queue, Ram, broken, features, of_queue, shadow};
use std::time::Instant;
use vmsg_mem::{BusAddr, RamSlice};
use vmsg_proxy::memory::MemoryError;
use vmsg_proxy::shadow::{Broken, Event};

const SIZE: u16 = 64;
const RAM: u64 = 0x40_0000;
const BUFFERS: u64 = GUEST + 0x10_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The rings of a queue, for writing whatever one likes.
struct Rings<'m> {
    ram: RamSlice<'m>,
    driver: usize,
    avail: u16,
}

impl Rings<'_> {
    fn describe(&self, at: usize, addr: u64, len: u32, flags: u16, next: u16) {
        self.ram.write(at, &addr.to_le_bytes());
        self.ram.write(at + 8, &len.to_le_bytes());
        self.ram.write(at + 12, &flags.to_le_bytes());
        self.ram.write(at + 14, &next.to_le_bytes());
    }

    fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail % SIZE);
        self.ram
            .write(self.driver + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.ram.write(self.driver + 2, &self.avail.to_le_bytes());
    }
}

type Deed = fn(&mut Rings<'_>);
type Suffers = fn(&Broken) -> bool;

/// What a driver does, and what its device is then said to suffer from.
fn deeds() -> Vec<(&'static str, Deed, Suffers)> {
    fn driver(why: &Broken) -> bool {
        matches!(why, Broken::Driver { queue: 0, .. })
    }
    fn memory(why: &Broken) -> bool {
        let Broken::Memory { queue: 0, error } = why else {
            return false;
        };
        matches!(error, MemoryError::Unmapped { .. })
    }
    fn large(why: &Broken) -> bool {
        matches!(why, Broken::TooLarge { queue: 0, .. })
    }
    vec![
        (
            "a circle",
            |r| {
                r.describe(0, BUFFERS, 16, NEXT, 0);
                r.offer(0);
            },
            driver,
        ),
        (
            "a circle in an indirect table of 65,536 entries",
            |r| {
                r.describe(0x8_0000, BUFFERS, 1, NEXT, 0);
                r.describe(0, GUEST + 0x8_0000, 16 << 16, INDIRECT, 0);
                r.offer(0);
            },
            driver,
        ),
        (
            "thousands of descriptors",
            |r| {
                for n in 0..4000 {
                    r.describe(0x8_0000 + 16 * n, BUFFERS, 1, NEXT, 1 + n as u16);
                }
                r.describe(0x8_0000 + 16 * 4000, BUFFERS, 1, 0, 0);
                r.describe(0, GUEST + 0x8_0000, 16 * 4001, INDIRECT, 0);
                r.offer(0);
            },
            driver,
        ),
        ("a head that is none", |r| r.offer(SIZE), driver),
        (
            "an index that is none",
            |r| {
                r.ram.write(r.driver + 2, &0x8000u16.to_le_bytes());
            },
            driver,
        ),
        (
            "4 GiB to be read",
            |r| {
                r.describe(0, GUEST, u32::MAX, 0, 0);
                r.offer(0);
            },
            large,
        ),
        (
            "4 GiB to be written, piece by piece over each other",
            |r| {
                for n in 0..32 {
                    let next = n as u16 + 1;
                    r.describe(
                        16 * n,
                        GUEST,
                        128 << 20,
                        if n < 31 { WRITE | NEXT } else { WRITE },
                        next,
                    );
                }
                r.offer(0);
            },
            large,
        ),
        (
            "memory that is none",
            |r| {
                r.describe(0, GUEST + RAM, 16, 0, 0);
                r.offer(0);
            },
            memory,
        ),
        (
            "memory around the end of all addresses",
            |r| {
                r.describe(0, u64::MAX - 7, 16, 0, 0);
                r.offer(0);
            },
            memory,
        ),
        (
            "an indirect table that is no memory",
            |r| {
                r.describe(0, GUEST + RAM - 16, 32, INDIRECT, 0);
                r.describe(RAM as usize - 16, BUFFERS, 16, NEXT, 1);
                r.offer(0);
            },
            memory,
        ),
        (
            "room to write that is no memory",
            |r| {
                r.describe(0, BUFFERS, 8, NEXT, 1);
                r.describe(16, GUEST + RAM - 4, 8, WRITE, 0);
                r.offer(0);
            },
            memory,
        ),
    ]
}

#[test]
fn each_misdeed_stops_the_device_by_name_until_it_is_reset() {
    for far in [false, true] {
        let ram = Ram::new(RAM, far);
        let set = features(true, true);
        let shadow = shadow(&ram, set, &[SIZE, SIZE], 1 << 20);
        for (name, deed, suffers) in deeds() {
            shadow.set_features(set);
            let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
            let echo = Echo::start(&shadow.window(), &queue.started, &set);
            shadow.run();
            let at = BusAddr(BUFFERS);
            queue.driver.add(&[(at, 8)], &[(at, 8)]).unwrap();
            queue.publish(&shadow);
            assert_eq!(queue.next().written, 8, "{name}");
            let mut rings = Rings {
                ram: ram.ram(),
                driver: (queue.driver.config().driver.0 - GUEST) as usize,
                avail: 1,
            };
            deed(&mut rings);
            let begin = Instant::now();
            shadow.kick(queue.index);
            let why = broken(&shadow);
            assert!(suffers(&why), "{name}: {why:?}");
            assert!(begin.elapsed() < PATIENCE, "{name}");
            drop(echo);
            shadow.reset();
        }
    }
}

#[test]
fn rings_full_of_nonsense_harm_nobody() {
    let ram = Ram::new(RAM, false);
    let set = features(false, true);
    let shadow = shadow(&ram, set, &[SIZE], 1 << 20);
    let mut numbers = Numbers(99);
    let mut stopped = 0;
    let (begin, mut rounds) = (Instant::now(), 0);
    // More where the thread of the queues seldom comes to look at rings before they are stopped.
    while rounds < 200 || (stopped <= 50 && begin.elapsed() < PATIENCE) {
        rounds += 1;
        shadow.set_features(set);
        let queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
        let echo = Echo::start(&shadow.window(), &queue.started, &set);
        shadow.run();
        let mut rings = Rings {
            ram: ram.ram(),
            driver: (queue.driver.config().driver.0 - GUEST) as usize,
            avail: 0,
        };
        for _ in 0..300 {
            let next = numbers.below(70) as u16;
            let addr = match numbers.below(60) {
                0 => numbers.next(),
                1 => GUEST + RAM - numbers.next() % 64,
                _ => BUFFERS + numbers.next() % 0x10_0000,
            };
            let len = match numbers.below(80) {
                0 => numbers.next() as u32,
                1 => 0,
                _ => 16 * (1 + numbers.below(200)) as u32,
            };
            let flags = [0, 0, 0, 2, 2, 2, 1, 3, 4][numbers.below(9)];
            rings.describe(16 * numbers.below(64), addr, len, flags, next);
            rings.offer(numbers.below(64) as u16);
            shadow.kick(queue.index);
        }
        // Whatever it was, it is over at some time.
        drop(echo);
        shadow.stop_queue(queue.index);
        stopped += u32::from(matches!(shadow.poll_event(), Some(Event::NeedsReset(_))));
        shadow.reset();
    }
    assert!(stopped > 50, "{stopped} of {rounds} rings were found out");
}
