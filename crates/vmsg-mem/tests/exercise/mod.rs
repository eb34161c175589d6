// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The AMP layout, its queues and their life, against words of any value at any moment. The story is told by bytes: for tests and for
//! `fuzz/`.

use std::sync::atomic::AtomicU64;

use vmsg_mem::amp::{Event, Head, Layout, Life, Queue, Side, Start};
use vmsg_mem::spsc::PushError;
use vmsg_mem::{DeviceRegion, QueueMemory};

/// The memory that a layout may use, behind and before which nobody has any business.
const BYTES: usize = 4096;
const GUARD: u64 = 0x5aa5_f00f_1234_8765;
const GUARDS: usize = 64;

struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte().unwrap_or(0), self.byte().unwrap_or(0)])
    }

    fn word(&mut self) -> u32 {
        match self.byte().unwrap_or(0) {
            0 => 0,
            small @ 1..64 => u32::from(small),
            status @ 64..80 => 0x514f | u32::from(status & 15) << 16,
            80..160 => u32::from(self.half() & 0x3f) << 16 | u32::from(self.half() & 0x3f),
            _ => u32::from(self.half()) << 16 | u32::from(self.half()),
        }
    }
}

/// Whoever writes any word.
fn hostile(memory: &DeviceRegion<'_>, bytes: &mut Bytes<'_>, places: &[usize]) {
    let number = usize::from(bytes.half());
    let at = match number & 3 {
        0 => number / 4 * 4 % BYTES,
        _ => places[number / 4 % places.len()],
    };
    memory.store_release(at, bytes.word());
}

/// Tells the story.
pub(crate) fn amp(bytes: &[u8]) {
    let words: Vec<AtomicU64> = (0..BYTES / 8 + 2 * GUARDS)
        .map(|_| AtomicU64::new(GUARD))
        .collect();
    let all = DeviceRegion::from_atomics(&words);
    let memory = all.get(GUARDS * 8, BYTES).expect("inside");
    for at in (0..BYTES).step_by(8) {
        assert!(memory.write_u64(at, 0));
    }
    let mut bytes = Bytes(bytes);
    let made = Layout::packed(8, 64).expect("a layout");
    made.store(&memory);
    // Some of its words are others.
    for _ in 0..bytes.byte().unwrap_or(0) % 8 {
        let at = usize::from(bytes.byte().unwrap_or(0) % 64);
        memory.write(at, &[bytes.byte().unwrap_or(0)]);
    }
    if let Ok(Some(layout)) = Layout::load(&memory) {
        assert!(layout.len() <= BYTES);
        for side in [Side::Device, Side::Driver] {
            let queue = usize::from(layout.elements()) * usize::from(layout.element_size());
            assert!(layout.head(side) + 8 <= BYTES && layout.queue(side) + queue <= BYTES);
            if let Some(area) = layout.notification_area(side) {
                assert!(area + usize::from(layout.notifications()) * 16 <= BYTES);
            }
        }
        let again = Layout::parse(&layout.to_bytes(), BYTES);
        assert_eq!(again, Ok(Some(layout)));
        for side in [Side::Device, Side::Driver] {
            queue(&memory, &layout, side, &mut bytes);
            life(side, layout.elements(), &mut bytes);
        }
    }
    let guards = (0..GUARDS * 8).chain(GUARDS * 8 + BYTES..all.len());
    assert!(guards.step_by(8).all(|at| all.read_u64(at) == Some(GUARD)));
}

fn queue(memory: &DeviceRegion<'_>, layout: &Layout, side: Side, bytes: &mut Bytes<'_>) {
    let start = Start {
        tail: bytes.half() % 16,
        head: bytes.half() % 16,
    };
    let in_range = start.tail.max(start.head) < layout.elements();
    let queue = Queue::new(*memory, layout, side, start);
    assert_eq!(queue.is_ok(), in_range);
    let Ok(mut queue) = queue else { return };
    let other = match side {
        Side::Device => Side::Driver,
        Side::Driver => Side::Device,
    };
    let places = [
        layout.head(other) + 4,
        layout.head(side) + 4,
        0,
        layout.queue(other),
    ];
    let mut corrupt = false;
    let mut message = [0; 256];
    for _ in 0..200 {
        let Some(step) = bytes.byte() else { return };
        match step & 7 {
            0 | 1 => hostile(memory, bytes, &places),
            2 | 3 => {
                let len = usize::from(bytes.byte().unwrap_or(0));
                match queue.try_push(&message[..len]) {
                    Ok(()) => assert!(len <= queue.element_size()),
                    Err(PushError::TooLong) => assert!(len > queue.element_size()),
                    Err(PushError::Corrupt(_)) => corrupt = true,
                    Err(PushError::Full) => {}
                }
                assert!(queue.unpublished() < queue.capacity());
            }
            4 => {
                let had = queue.unpublished() > 0;
                assert_eq!(queue.publish(), had);
                assert_eq!(queue.unpublished(), 0);
            }
            5 => {
                let room = usize::from(bytes.byte().unwrap_or(0));
                let says = usize::from(bytes.half());
                match queue.try_pop_sized(&mut message[..room], |_| says) {
                    Ok(Some(len)) => {
                        assert!(len <= room.min(queue.element_size()).min(says.max(room.min(7))));
                    }
                    Ok(None) => assert!(!corrupt, "it has forgotten"),
                    Err(error) => {
                        assert_eq!(error.capacity, queue.capacity());
                        corrupt = true;
                    }
                }
            }
            6 => queue.release(),
            _ => {
                let (full, empty) = (queue.is_full(), queue.is_empty());
                assert!(!(corrupt && (full || empty)), "its owner would sleep");
            }
        }
    }
}

fn life(side: Side, elements: u16, bytes: &mut Bytes<'_>) {
    let head = |bytes: &mut Bytes<'_>| Head {
        state: bytes.word(),
        indices: bytes.word(),
    };
    let mut now = 0;
    let (own, theirs) = (head(bytes), head(bytes));
    let (mut life, _) = Life::begin(side, elements, now, own, theirs);
    let mut up = false;
    for _ in 0..50 {
        let Some(step) = bytes.byte() else { return };
        now += u64::from(step) * 10;
        let (stores, event) = life.step(now, head(bytes), step & 1 != 0);
        for store in stores {
            assert!(matches!(store.word().0, 0 | 4));
        }
        match event {
            Some(Event::Up(start)) => {
                assert!(!up && start.tail < elements && start.head < elements);
                up = true;
            }
            Some(Event::Down(_)) => {
                assert!(up);
                up = false;
                let (own, theirs) = (head(bytes), head(bytes));
                assert!(life.again(now, own, theirs).count() <= 4);
            }
            None => {}
        }
        assert_eq!(life.is_up(), up);
    }
}
