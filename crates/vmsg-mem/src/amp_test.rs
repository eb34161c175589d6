// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::RamSlice;
use core::sync::atomic::AtomicU64;
use proptest::prelude::*;

type Words = Vec<AtomicU64>;

fn words(bytes: usize) -> Words {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

type RamSliceOf = RamSlice<'static>;

/// Tests leak their memory rather than thread lifetimes through.
fn leaked(bytes: usize) -> &'static [AtomicU64] {
    Box::leak(words(bytes).into_boxed_slice())
}

fn ends(memory: &'static [AtomicU64], layout: &Layout) -> (Queue<RamSliceOf>, Queue<RamSliceOf>) {
    let end = |side| {
        let memory = RamSlice::from_atomics(memory);
        Queue::new(memory, layout, side, Start::default()).unwrap()
    };
    (end(Side::Driver), end(Side::Device))
}

fn pop(queue: &mut Queue<RamSliceOf>) -> Option<u8> {
    let mut message = [0; 64];
    let popped = queue.try_pop_sized(&mut message, |_| 64).unwrap();
    queue.release();
    popped.map(|_| message[0])
}

/// What Linux accepts: 60 elements of 64 bytes.
const SAMPLE: &str = "4f4c40000100000000003c004000000000000000000000004000000000000000c00000000000000000000000000000008000000000000000c00f000000000000";

fn sample() -> [u8; 64] {
    let mut bytes = [0; 64];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&SAMPLE[at * 2..at * 2 + 2], 16).unwrap();
    }
    bytes
}

#[test]
fn the_packed_layout_is_the_one_that_linux_accepts() {
    let layout = Layout::packed(60, 64).unwrap();
    assert_eq!(layout.to_bytes(), sample());
    assert_eq!(layout.len(), 0x1ec0);
    assert_eq!(Layout::parse(&sample(), 0x1ec0), Ok(Some(layout)));
    assert_eq!(Layout::fitting(8192, 64, 60), Some(layout));
}

#[test]
fn what_a_layout_must_not_say_is_refused_by_name() {
    let with = |at: usize, value: u16| {
        let mut bytes = sample();
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        Layout::parse(&bytes, 0x2000)
    };
    assert_eq!(with(0, 0), Ok(None));
    assert_eq!(with(2, 60), Err(LayoutError::Length(60)));
    assert_eq!(with(4, 2), Err(LayoutError::Version(2)));
    assert_eq!(with(6, 4), Err(LayoutError::Features(4)));
    assert_eq!(with(14, 1), Err(LayoutError::Reserved(1)));
    assert!(matches!(
        with(8, 65),
        Err(LayoutError::Notifications { words: 65, .. })
    ));
    assert!(matches!(
        with(8, 1 | 3 << 8),
        Err(LayoutError::Notifications { per_device: 3, .. })
    ));
    assert!(matches!(
        with(10, 1),
        Err(LayoutError::Elements { elements: 1, .. })
    ));
    assert!(matches!(
        with(12, 0),
        Err(LayoutError::Elements { size: 0, .. })
    ));
    assert!(matches!(
        with(24, 0x42),
        Err(LayoutError::Place {
            part: "queue head of the device",
            ..
        })
    ));
    assert!(matches!(with(24, 0), Err(LayoutError::Place { .. })));
    assert!(matches!(
        with(56, 0x1101),
        Err(LayoutError::Place {
            part: "queue of the driver",
            ..
        })
    ));
    assert_eq!(
        with(24, 0x80),
        Err(LayoutError::Overlap(
            "queue head of the device",
            "queue head of the driver"
        ))
    );
    assert!(matches!(with(32, 0xf00), Err(LayoutError::Overlap(..))));
    assert!(matches!(
        with(24, 0x20),
        Err(LayoutError::Overlap("description", _))
    ));
    let mut bytes = sample();
    bytes[56..].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        Layout::parse(&bytes, usize::MAX),
        Err(LayoutError::Place { .. })
    ));
}

#[test]
fn the_offset_of_notifications_that_are_not_there_means_nothing() {
    let mut bytes = sample();
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    bytes[40..48].copy_from_slice(&0x1_0001u64.to_le_bytes());
    let layout = Layout::parse(&bytes, 8192).unwrap().unwrap();
    assert_eq!(layout.len(), 192 + 2 * 60 * 64);
    assert_eq!(layout.notification_area(Side::Device), None);
}

#[test]
fn the_magic_number_of_a_layout_is_stored_last() {
    let memory = RamSlice::from_atomics(leaked(8192));
    assert_eq!(Layout::load(&memory), Ok(None));
    let layout = Layout::packed_with(8, 64, 2, 4).unwrap();
    layout.store(&memory);
    assert_eq!(Layout::load(&memory), Ok(Some(layout)));
    Layout::withdraw(&memory);
    assert_eq!(Layout::load(&memory), Ok(None));
}

#[test]
fn messages_go_both_ways_around_the_end() {
    let layout = Layout::packed(4, 64).unwrap();
    let (mut driver, mut device) = ends(leaked(layout.len()), &layout);
    for n in 1..20u8 {
        driver.try_push(&[n; 64]).unwrap();
        assert!(device.is_empty(), "not published");
        assert!(driver.publish());
        assert!(!driver.publish());
        device.try_push(&[!n; 12]).unwrap();
        assert!(device.publish());
        assert_eq!(pop(&mut device), Some(n));
        assert_eq!(pop(&mut driver), Some(!n));
        assert_eq!((pop(&mut device), pop(&mut driver)), (None, None));
    }
}

#[test]
fn one_element_stays_free() {
    let layout = Layout::packed(4, 64).unwrap();
    let (mut driver, mut device) = ends(leaked(layout.len()), &layout);
    for n in 0..3 {
        driver.try_push(&[n, 1]).unwrap();
    }
    assert_eq!(driver.try_push(&[3, 1]), Err(PushError::Full));
    assert!(!driver.is_full(), "nothing is published");
    assert!(driver.publish() && driver.is_full());
    assert_eq!(driver.try_push(&[0; 65]), Err(PushError::TooLong));
    assert!(!device.is_empty());
    assert_eq!(pop(&mut device), Some(0));
    assert!(!driver.is_full());
    driver.try_push(&[3, 1]).unwrap();
}

#[test]
fn a_queue_goes_on_where_it_is_said() {
    let layout = Layout::packed(4, 64).unwrap();
    let memory = leaked(layout.len());
    let at = |side, tail, head| {
        Queue::new(
            RamSlice::from_atomics(memory),
            &layout,
            side,
            Start { tail, head },
        )
    };
    let mut driver = at(Side::Driver, 3, 1).unwrap();
    let mut device = at(Side::Device, 1, 3).unwrap();
    driver.try_push(&[7, 1]).unwrap();
    assert!(driver.publish());
    assert_eq!(pop(&mut device), Some(7));
    assert!(matches!(
        at(Side::Device, 4, 0),
        Err(Error::CorruptQueue {
            index: 4,
            capacity: 4
        })
    ));
    let small = RamSlice::from_atomics(&memory[1..]);
    assert!(matches!(
        Queue::new(small, &layout, Side::Driver, Start::default()),
        Err(Error::BadQueue { .. })
    ));
}

#[test]
fn an_impossible_index_ends_the_queue_for_good() {
    let layout = Layout::packed(4, 64).unwrap();
    for indices in [
        index_word(4, 0),
        index_word(0, 4),
        index_word(0xffff, 0),
        index_word(0, 1),
    ] {
        let memory = leaked(layout.len());
        let (_, mut device) = ends(memory, &layout);
        let ram = RamSlice::from_atomics(memory);
        ram.store_release(layout.head(Side::Driver) + 4, indices);
        assert!(device.try_pop_sized(&mut [0; 64], |_| 64).is_err());
        ram.store_release(layout.head(Side::Driver) + 4, 0);
        assert!(device.try_pop_sized(&mut [0; 64], |_| 64).is_err());
        assert!(!device.is_empty() && !device.is_full());
    }
}

/// A driver of Linux's that is there again zeroes its elements and begins at the first one, which the device need not have noticed.
#[test]
fn an_element_that_was_zeroed_is_no_message_and_ends_the_queue() {
    let layout = Layout::packed(8, 64).unwrap();
    let memory = leaked(layout.len());
    let (mut driver, mut device) = ends(memory, &layout);
    for n in 1..4 {
        driver.try_push(&[n]).unwrap();
        let _ = driver.publish();
        assert_eq!(pop(&mut device), Some(n));
    }
    let ram = RamSlice::from_atomics(memory);
    ram.write(layout.queue(Side::Driver) + 64, &[0; 7 * 64]);
    ram.store_release(layout.head(Side::Driver) + 4, index_word(1, 0));
    let mut message = [0; 64];
    for _ in 0..2 {
        let popped = device.try_pop_sized(&mut message, |_| 64);
        assert_eq!(popped.unwrap_err().index, 3);
    }
    device.release();
    assert_eq!(Head::load(&ram, layout.head(Side::Device)).head(), 3);
}

#[test]
fn a_peer_that_goes_back_is_noticed() {
    let layout = Layout::packed(8, 64).unwrap();
    let memory = leaked(layout.len());
    let (mut driver, mut device) = ends(memory, &layout);
    for n in 0..3 {
        driver.try_push(&[n, 1]).unwrap();
    }
    let _ = driver.publish();
    let mut message = [0; 64];
    for _ in 0..3 {
        let popped = device.try_pop_sized(&mut message, |_| 64);
        assert_eq!(popped, Ok(Some(64)));
    }
    // Nothing is given back yet: the driver cannot have filled the queue once around.
    let ram = RamSlice::from_atomics(memory);
    ram.store_release(layout.head(Side::Driver) + 4, index_word(2, 0));
    assert!(device.try_pop_sized(&mut message, |_| 64).is_err());
}

#[test]
fn notifications_are_pending_until_they_are_taken() {
    let layout = Layout::packed_with(4, 64, 2, 4).unwrap();
    let memory = leaked(layout.len());
    let end = |side| Notifications::new(RamSlice::from_atomics(memory), &layout, side).unwrap();
    let (mut driver, mut device) = (end(Side::Driver), end(Side::Device));
    assert_eq!(driver.bits(), 128);
    assert!(driver.raise(3) && driver.raise(40) && driver.raise(127));
    assert!(!driver.raise(3), "pending already");
    assert!(!driver.raise(128) && !driver.raise(usize::MAX));
    assert_eq!(device.take(0), 1 << 3 | 1 << 40);
    assert_eq!(
        (device.take(0), device.take(1), device.take(2)),
        (0, 1 << 63, 0)
    );
    assert!(driver.raise(3));
    assert_eq!(device.take(0), 1 << 3);
    assert!(device.raise(0));
    assert_eq!(driver.take(0), 1);
    driver.clear();
    let none = Layout::packed(4, 64).unwrap();
    assert!(Notifications::new(RamSlice::from_atomics(memory), &none, Side::Driver).is_none());
}

#[test]
fn a_masked_notification_is_pending_and_rings_nobody() {
    let mut bytes = Layout::packed_with(4, 64, 1, 1).unwrap().to_bytes();
    bytes[6] = 1;
    // The mask makes each area 24 bytes long.
    let area = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + 24;
    bytes[40..48].copy_from_slice(&area.to_le_bytes());
    let layout = Layout::parse(&bytes, 4096).unwrap().unwrap();
    let memory = leaked(4096);
    let end = |side| Notifications::new(RamSlice::from_atomics(memory), &layout, side).unwrap();
    let (mut driver, mut device) = (end(Side::Driver), end(Side::Device));
    let mask = layout.notification_area(Side::Device).unwrap() + 16;
    RamSlice::from_atomics(memory).store_release(mask, 1 << 5);
    assert!(!driver.raise(5));
    assert!(driver.raise(6));
    assert_eq!(device.take(0), 1 << 5 | 1 << 6);
}

proptest! {
    #[test]
    fn no_words_of_a_peer_lead_outside(
        elements in 2u16..9,
        size in prop::sample::select(vec![8u16, 44, 64, 72, 264]),
        hostile in prop::collection::vec((any::<u32>(), any::<bool>(), 0u8..4), 1..64),
    ) {
        let layout = Layout::packed(elements, size).unwrap();
        let memory = leaked(layout.len());
        let (_, mut device) = ends(memory, &layout);
        let ram = RamSlice::from_atomics(memory);
        let mut popped = 0u32;
        for (word, tame, what) in hostile {
            let word = if tame {
                let [low, high] = halves(word);
                index_word(low % elements, high % elements)
            } else {
                word
            };
            ram.store_release(layout.head(Side::Driver) + 4, word);
            match what {
                0 => { let _ = device.try_push(&[1; 8]); }
                1 => { let _ = device.publish(); }
                2 => {
                    let mut buf = [0; 300];
                    if let Ok(Some(len)) = device.try_pop_sized(&mut buf, |_| usize::MAX) {
                        prop_assert!(len <= usize::from(size));
                        popped += 1;
                    }
                }
                _ => device.release(),
            }
            let [tail, head] = halves(ram.load_acquire(layout.head(Side::Device) + 4));
            prop_assert!(tail < elements && head < elements);
        }
        prop_assert!(popped <= 64);
    }

    #[test]
    fn no_bytes_are_a_layout_that_leads_outside(mut bytes in prop::collection::vec(any::<u8>(), 64), memory in 64usize..20_000) {
        // As good as it may be, so that the offsets are looked at.
        bytes[..10].copy_from_slice(&sample()[..10]);
        bytes[11] = 0;
        bytes[13..16].fill(0);
        for offset in [16, 24, 32, 40, 48, 56] {
            bytes[offset + 2..offset + 8].fill(0);
        }
        if let Ok(Some(layout)) = Layout::parse(bytes[..].try_into().unwrap(), memory) {
            prop_assert!(layout.len() <= memory);
            for side in [Side::Device, Side::Driver] {
                prop_assert!(layout.head(side) + 8 <= memory && layout.head(side) >= 64);
                let bytes = usize::from(layout.elements()) * usize::from(layout.element_size());
                prop_assert!(layout.queue(side) + bytes <= memory);
            }
        }
    }
}

mod life {
    use super::*;

    fn head(status: Status, tail: u16, head: u16) -> Head {
        Head {
            state: state_word(status),
            indices: index_word(tail, head),
        }
    }

    struct Player {
        life: Life,
        own: Head,
    }

    impl Player {
        fn new(side: Side, own: Head, theirs: Head) -> Self {
            let (life, store) = Life::begin(side, 60, 0, own, theirs);
            let mut player = Self { life, own };
            player.put(store);
            player
        }

        fn put(&mut self, store: Store) {
            match store.word() {
                (0, word) => self.own.state = word,
                (_, word) => self.own.indices = word,
            }
        }

        fn step(&mut self, theirs: Head) -> Option<Event> {
            self.step_at(0, theirs, false)
        }

        fn step_at(&mut self, now: u64, theirs: Head, rung: bool) -> Option<Event> {
            let (stores, event) = self.life.step(now, theirs, rung);
            for store in stores {
                self.put(store);
            }
            event
        }

        fn again(&mut self, theirs: Head) {
            for store in self.life.again(0, self.own, theirs) {
                self.put(store);
            }
        }
    }

    const UP: Option<Event> = Some(Event::Up(Start { tail: 0, head: 0 }));

    #[test]
    fn both_come_up_whoever_is_first() {
        for device_first in [true, false] {
            let nothing = Head::default();
            let (mut a, mut b) = (None, None);
            let make = |side, theirs| Some(Player::new(side, nothing, theirs));
            let theirs = |of: &Option<Player>| of.as_ref().map_or(nothing, |player| player.own);
            match device_first {
                true => a = make(Side::Device, nothing),
                false => b = make(Side::Driver, nothing),
            }
            for _ in 0..3 {
                if let Some(a) = &mut a {
                    a.step(theirs(&b));
                }
                if let Some(b) = &mut b {
                    b.step(theirs(&a));
                }
                let (for_a, for_b) = (theirs(&b), theirs(&a));
                a = a.or_else(|| make(Side::Device, for_a));
                b = b.or_else(|| make(Side::Driver, for_b));
            }
            let (a, b) = (a.unwrap(), b.unwrap());
            assert!(a.life.is_up() && b.life.is_up());
            assert_eq!(
                (a.own, b.own),
                (head(Status::Run, 0, 0), head(Status::Run, 0, 0))
            );
        }
    }

    #[test]
    fn a_linux_driver_that_goes_from_init_to_run_at_once_is_met() {
        let mut device = Player::new(Side::Device, Head::default(), Head::default());
        assert_eq!(device.step(Head::default()), None);
        assert_eq!(device.step(head(Status::Ready, 0, 0)), UP);
        assert_eq!(device.own, head(Status::Run, 0, 0));
        assert_eq!(device.step(head(Status::Ready, 0, 0)), None);
        assert_eq!(device.step(head(Status::Run, 1, 0)), None);
        assert_eq!(
            device.step(head(Status::Ready, 0, 0)),
            Some(Event::Down(End::Restarted))
        );
    }

    #[test]
    fn every_way_to_part_has_its_name() {
        for (last, end) in [
            (head(Status::Init, 0, 0), End::Restarted),
            (head(Status::Shutdown, 3, 3), End::Shutdown),
            (head(Status::PeerDead, 3, 3), End::TookUsForDead),
            (head(Status::Unknown, 3, 3), End::Broken),
            (Head::default(), End::Broken),
        ] {
            let mut device = Player::new(Side::Device, Head::default(), Head::default());
            assert_eq!(device.step(head(Status::Ready, 0, 0)), UP);
            assert_eq!(device.step(last), Some(Event::Down(end)));
            assert_eq!(device.step(last), None, "told once");
            device.again(last);
            assert!(device.own.status() <= Some(Status::Ready));
            // And the next one comes.
            assert_eq!(device.step(head(Status::Init, 0, 0)), None);
            assert_eq!(device.step(head(Status::Run, 0, 0)), UP);
        }
    }

    #[test]
    fn after_a_shutdown_the_next_driver_need_not_wait() {
        let mut device = Player::new(Side::Device, Head::default(), Head::default());
        device.step(head(Status::Ready, 0, 0));
        device.own.indices = index_word(17, 20);
        device.step(head(Status::Shutdown, 20, 17));
        device.again(head(Status::Shutdown, 20, 17));
        assert_eq!(device.own, head(Status::Ready, 0, 0));
        assert_eq!(device.step(head(Status::Shutdown, 20, 17)), None);
        assert_eq!(device.step(head(Status::Run, 1, 0)), UP);
    }

    #[test]
    fn a_driver_that_was_left_in_memory_is_not_taken_for_one() {
        let stale = head(Status::Run, 20, 17);
        let mut device = Player::new(Side::Device, head(Status::Run, 17, 20), stale);
        for now in 0..10 {
            assert_eq!(device.step_at(now * 1000, stale, false), None);
        }
        assert_eq!(device.own, head(Status::Init, 17, 20), "nothing is lost");
    }

    #[test]
    fn a_driver_that_runs_on_is_met_where_it_is() {
        let found = head(Status::Run, 20, 15);
        let own = head(Status::Run, 17, 20);
        let start = Some(Event::Up(Start { tail: 15, head: 20 }));
        // It says something.
        let mut device = Player::new(Side::Device, own, found);
        assert_eq!(device.step(head(Status::Run, 21, 15)), start);
        assert_eq!(device.own, head(Status::Run, 15, 20));
        // It has rung.
        let mut device = Player::new(Side::Device, own, found);
        assert_eq!(device.step_at(0, found, true), start);
        // It has said something meanwhile.
        let mut device = Player::new(Side::Device, own, head(Status::Run, 22, 15));
        assert_eq!(device.step(head(Status::Run, 22, 15)), start);
        // Indices that are none are not gone on with, nor are those that this end never had.
        let mut device = Player::new(Side::Device, own, found);
        assert_eq!(device.step_at(0, head(Status::Run, 60, 15), true), None);
        let mut device = Player::new(Side::Device, Head::default(), found);
        assert_eq!(device.step_at(0, head(Status::Run, 21, 15), true), None);
    }

    #[test]
    fn a_driver_gives_a_running_device_time_to_notice() {
        let running = head(Status::Run, 9, 9);
        let mut driver = Player::new(Side::Driver, Head::default(), running);
        assert_eq!(driver.own.status(), Some(Status::Init));
        assert_eq!(driver.step_at(1999, running, false), None);
        assert_eq!(driver.step_at(1999, head(Status::Ready, 0, 0), false), UP);
        let mut driver = Player::new(Side::Driver, Head::default(), running);
        assert_eq!(driver.step_at(2000, running, false), UP);
        let mut driver = Player::new(Side::Driver, Head::default(), Head::default());
        assert_eq!(
            driver.step_at(9000, head(Status::Shutdown, 0, 0), false),
            None
        );
    }

    proptest! {
        #[test]
        fn whatever_the_other_side_says_life_goes_on(heads in prop::collection::vec((any::<u32>(), any::<u32>(), 0u16..7, any::<bool>()), 1..80), device in any::<bool>()) {
            let side = if device { Side::Device } else { Side::Driver };
            let mut player = Player::new(side, Head::default(), Head::default());
            let mut up = false;
            for (now, (state, indices, status, rung)) in heads.into_iter().enumerate() {
                let state = if status < 6 { word(QUEUE_MAGIC, status) } else { state };
                let theirs = Head { state, indices };
                match player.step_at(now as u64 * 300, theirs, rung) {
                    Some(Event::Up(start)) => {
                        prop_assert!(!up && start.tail < 60 && start.head < 60);
                        up = true;
                    }
                    Some(Event::Down(_)) => {
                        prop_assert!(up);
                        up = false;
                        player.again(theirs);
                    }
                    None => {}
                }
                prop_assert_eq!(up, player.life.is_up());
                prop_assert_eq!(up, player.own.status() == Some(Status::Run));
            }
        }
    }
}
