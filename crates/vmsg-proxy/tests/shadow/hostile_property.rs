// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever is written into memory in common, in whatever order: what the guest did not lend stays as it is, what it hears of its requests is about
//! its requests, and after a reset everything works.

use crate::device::Echo;
use crate::guest::{GUEST, Queue, Ram, facts, features, of_queue, read};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use vmsg_mem::{BusAddr, Doorbell, Mapping, RamSlice};
use vmsg_proxy::shadow::{Common, Event, Options, Segment, Shadow};
use vmsg_queue::Token;

const SIZE: u16 = 16;
const RAM: u64 = 0x10_0000;
const BUFFERS: usize = 0x1_0000;
/// For each request: bytes to be read, and room from the middle on.
const SLOT: usize = 0x2000;
const COMMON: u64 = 0x4_0000;
const PART: std::ops::Range<u64> = 0x1_0000..0x3_0000;
const CANARY: u8 = 0x5c;

/// What somebody does to the memory, or the guest's driver meanwhile.
#[derive(Clone, Debug)]
enum Act {
    Ask {
        readable: u16,
        writable: u16,
    },
    /// Bytes anywhere in the segment.
    Write {
        at: u32,
        bytes: Vec<u8>,
    },
    /// A used element.
    Used {
        slot: u16,
        id: u32,
        len: u32,
    },
    /// The used index goes on by so many.
    Advance(i16),
    /// The same as an honest device would do it.
    Honest {
        len: u16,
    },
    /// Rings.
    Call,
    /// The guest takes what came back.
    Look,
    /// All of a ring.
    Fill {
        byte: u8,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let small = prop_oneof![Just(0u32), 0u32..20, any::<u32>()];
    let len = prop_oneof![0u32..0x1001, any::<u32>()];
    prop_oneof![
        4 => (0u16..0x1000, 0u16..0x1000).prop_map(|(readable, writable)| Act::Ask { readable, writable }),
        2 => (0u32..0x2_0000, prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Act::Write { at, bytes }),
        2 => (0u32..0x400, prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Act::Write { at, bytes }),
        3 => (0..SIZE, small, len).prop_map(|(slot, id, len)| Act::Used { slot, id, len }),
        3 => (-2i16..4).prop_map(Act::Advance),
        4 => (0u16..0x1000).prop_map(|len| Act::Honest { len }),
        4 => Just(Act::Call),
        4 => Just(Act::Look),
        1 => any::<u8>().prop_map(|byte| Act::Fill { byte }),
    ]
}

fn half(ram: RamSlice<'_>, at: usize) -> u16 {
    let mut bytes = [0; 2];
    ram.read(at, &mut bytes);
    u16::from_le_bytes(bytes)
}

/// The guest's side.
struct Driver<'m> {
    ram: &'m Ram,
    queue: Queue<'m>,
    /// Where each request is, and how much room it has.
    asked: HashMap<Token, (usize, u32)>,
    /// How much of each slot may have been written.
    lent: Vec<usize>,
}

impl Driver<'_> {
    fn ask(&mut self, shadow: &Shadow, readable: u16, writable: u16) {
        let taken: Vec<usize> = self.asked.values().map(|(slot, _)| *slot).collect();
        let slot = (0..self.lent.len()).find(|slot| !taken.contains(slot));
        let slot = slot.expect("more than requests");
        let at = BUFFERS + slot * SLOT;
        let from = BusAddr(GUEST + at as u64);
        let to = BusAddr(from.0 + SLOT as u64 / 2);
        let part = |addr, len: u16| (len > 0).then_some((addr, u32::from(len)));
        let (read, write) = (part(from, readable), part(to, writable));
        let added = self.queue.driver.add(read.as_slice(), write.as_slice());
        if let Ok(token) = added {
            self.asked.insert(token, (slot, writable.into()));
            self.lent[slot] = self.lent[slot].max(writable.into());
        }
        self.queue.publish(shadow);
    }

    fn look(&mut self) {
        // An error is one of the proxy's.
        while let Some(used) = self.queue.driver.pop_used().unwrap() {
            let (_, room) = self.asked.remove(&used.token).expect("asked for");
            assert!(used.written <= room);
        }
    }

    /// Everything that was never lent.
    fn check(&self) {
        let bytes = read(self.ram.ram(), BUFFERS, RAM as usize - BUFFERS);
        for (slot, bytes) in bytes.chunks(SLOT).enumerate() {
            let lent = self.lent.get(slot).copied().unwrap_or(0);
            let (read, room) = bytes.split_at(SLOT / 2);
            assert!(read.iter().all(|b| *b == CANARY), "slot {slot}");
            assert!(room[lent..].iter().all(|b| *b == CANARY), "slot {slot}");
        }
    }
}

fn play(acts: &[Act], event_idx: bool, indirect: bool) {
    let ram = Ram::new(RAM, false);
    ram.ram().fill(CANARY);
    let (common, file) = Mapping::memfd("common", COMMON, true).unwrap();
    let common = Arc::new(common);
    common.ram().fill(CANARY);
    let given = Common::new(common.clone(), Arc::new(file), 0, 0x7000).unwrap();
    let part = Arc::new(given).divide(PART, &[None]).unwrap().remove(0);
    let set = features(event_idx, indirect);
    let options = Options {
        segment: Segment::Given(part),
        ..Options::default()
    };
    let shadow = Shadow::new(ram.clone(), &facts(set, &[SIZE]), options).unwrap();
    shadow.set_features(set);
    let queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let window = shadow.window();
    let segment = common.ram().get(PART.start as usize, window.len as usize);
    let segment = segment.unwrap();
    let at = |address: u64| (address - window.base) as usize;
    let avail = at(queue.started.setup.driver);
    let used = at(queue.started.setup.device);
    let call = Doorbell::from_fd(queue.started.call.try_clone().unwrap()).unwrap();
    shadow.run();
    let mut driver = Driver {
        ram: &ram,
        queue,
        asked: HashMap::new(),
        lent: vec![0; 2 * usize::from(SIZE)],
    };
    let mut honest = 0u16;
    for act in acts {
        match act {
            Act::Ask { readable, writable } => driver.ask(&shadow, *readable, *writable),
            Act::Write { at, bytes } => {
                segment.write(*at as usize, bytes);
            }
            Act::Used { slot, id, len } => {
                let at = used + 4 + 8 * usize::from(*slot);
                segment.write(at, &id.to_le_bytes());
                segment.write(at + 4, &len.to_le_bytes());
            }
            Act::Advance(by) => {
                let index = half(segment, used + 2).wrapping_add_signed(*by);
                segment.write(used + 2, &index.to_le_bytes());
            }
            Act::Honest { len } => {
                let head = half(segment, avail + 4 + 2 * usize::from(honest % SIZE));
                let at = used + 4 + 8 * usize::from(half(segment, used + 2) % SIZE);
                segment.write(at, &u32::from(head).to_le_bytes());
                segment.write(at + 4, &u32::from(*len).to_le_bytes());
                let index = half(segment, used + 2).wrapping_add(1);
                segment.write(used + 2, &index.to_le_bytes());
                honest = honest.wrapping_add(1);
                call.ring().unwrap();
            }
            Act::Call => call.ring().unwrap(),
            Act::Look => driver.look(),
            Act::Fill { byte } => segment.get(0, 0x1000).unwrap().fill(*byte),
        }
    }
    call.ring().unwrap();
    driver.look();
    shadow.stop_queue(driver.queue.index);
    driver.look();
    driver.check();
    while let Some(event) = shadow.poll_event() {
        let needs_reset = matches!(event, Event::NeedsReset(_));
        assert!(needs_reset, "{event:?}");
    }
    shadow.reset();
    // What belongs to others was never touched, and what is the segment's is empty but for what was written where nothing ever was.
    let all = read(common.ram(), 0, COMMON as usize);
    let (start, end) = (PART.start as usize, PART.end as usize);
    assert!(all[..start].iter().chain(&all[end..]).all(|b| *b == CANARY));
    sane(&shadow, &ram);
    drop(shadow);
    let part = read(common.ram(), start, end - start);
    assert!(part.iter().all(|b| *b == 0), "given back empty");
}

/// A driver and a device that start anew.
fn sane(shadow: &Shadow, ram: &Arc<Ram>) {
    let set = features(true, true);
    let device = shadow.set_features(set);
    let mut queue = Queue::start(shadow, ram, 0, SIZE, 0, of_queue(&set));
    let _echo = Echo::start(&shadow.window(), &queue.started, &device);
    shadow.run();
    let from = BusAddr(GUEST + BUFFERS as u64);
    let to = BusAddr(from.0 + 0x1000);
    for n in 1..40u8 {
        ram.ram().get(BUFFERS, 0x800).unwrap().fill(n);
        queue.driver.add(&[(from, 0x800)], &[(to, 0x900)]).unwrap();
        queue.publish(shadow);
        assert_eq!(queue.next().written, 0x800);
        let answer = read(ram.ram(), BUFFERS + 0x1000, 0x800);
        assert!(answer.iter().all(|b| *b == n ^ 0x5a));
    }
    assert_eq!(shadow.poll_event(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_time: 10_000, ..ProptestConfig::with_cases(300) })]
    #[test]
    fn anything_in_memory_in_common_is_harmless(
        acts in prop::collection::vec(act(), 1..80),
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
    ) {
        play(&acts, event_idx, indirect);
    }
}

#[test]
fn a_segment_that_the_device_side_truncates_breaks_the_device_and_nothing_else() {
    vmsg_mem::fault::install().unwrap();
    let ram = Ram::new(RAM, false);
    let (common, file) = Mapping::memfd("common", COMMON, false).unwrap();
    let file = Arc::new(file);
    let given = Common::new(Arc::new(common), file.clone(), 0, 0).unwrap();
    let part = Arc::new(given).divide(PART, &[None]).unwrap().remove(0);
    let set = features(true, true);
    let options = Options {
        segment: Segment::Given(part),
        ..Options::default()
    };
    let shadow = Shadow::new(ram.clone(), &facts(set, &[SIZE]), options).unwrap();
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    shadow.run();
    rustix::fs::ftruncate(&file, 0).unwrap();
    let at = BusAddr(GUEST + BUFFERS as u64);
    for _ in 0..2 {
        queue.driver.add(&[(at, 64)], &[(at, 64)]).unwrap();
        queue.publish(&shadow);
        std::thread::sleep(Duration::from_millis(10));
    }
    let why = crate::guest::broken(&shadow);
    assert_eq!(why, vmsg_proxy::shadow::Broken::Lost);
    assert!(shadow.is_lost());
    shadow.reset();
}
