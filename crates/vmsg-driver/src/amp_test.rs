// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::cell::Cell;
use std::sync::atomic::AtomicU64;

use vmsg_mem::amp::Status;
use vmsg_mem::{DeviceRegion, QueueMemory};

use super::*;

const ELEMENTS: u16 = 4;
const RUN: u32 = (Status::Run.bits() as u32) << 16 | vmsg_mem::amp::QUEUE_MAGIC as u32;

fn words() -> Vec<AtomicU64> {
    (0..0x400).map(|_| AtomicU64::new(!0)).collect()
}

/// A device side that has begun, and says RUN when it is asked the second time.
struct Other<'m> {
    memory: DeviceRegion<'m>,
    layout: Layout,
    life: Life,
    queue: Option<Queue<DeviceRegion<'m>>>,
}

impl<'m> Other<'m> {
    fn new(memory: DeviceRegion<'m>) -> Self {
        let layout = Layout::packed(ELEMENTS, 64).unwrap();
        for side in [Side::Device, Side::Driver] {
            memory.store_relaxed(layout.head(side), 0);
        }
        layout.store(&memory);
        let own = Head::default();
        let (life, word) = Life::begin(Side::Device, ELEMENTS, 0, own, own);
        let (at, word) = word.word();
        memory.store_release(layout.head(Side::Device) + at, word);
        Self {
            memory,
            layout,
            life,
            queue: None,
        }
    }
    fn step(&mut self) -> Option<Event> {
        let theirs = Head::load(&self.memory, self.layout.head(Side::Driver));
        let (stores, event) = self.life.step(0, theirs, false);
        for word in stores {
            let (at, word) = word.word();
            self.memory
                .store_release(self.layout.head(Side::Device) + at, word);
        }
        if let Some(Event::Up(start)) = event {
            let queue = Queue::new(self.memory, &self.layout, Side::Device, start).unwrap();
            self.queue = Some(queue);
        }
        event
    }
}

fn connected<'m, R: FnMut()>(
    memory: DeviceRegion<'m>,
    ring: R,
) -> (Other<'m>, Amp<DeviceRegion<'m>, R>) {
    let mut other = Other::new(memory);
    let mut time = 0;
    let clock = || {
        other.step();
        time += 1_000_000;
        Instant(time)
    };
    let bus = Amp::connect(memory, ring, clock, Duration::from_secs(1)).unwrap();
    other.step();
    (other, bus)
}

#[test]
fn messages_go_both_ways_and_each_flush_rings_once() {
    let words = words();
    let rings = Cell::new(0);
    let ring = || rings.set(rings.get() + 1);
    let (mut other, mut bus) = connected(DeviceRegion::from_atomics(&words), ring);
    let queue = other.queue.as_mut().expect("up");
    let mut buffer = [0; 64];
    assert_eq!(bus.try_recv(&mut buffer).unwrap(), None);

    let before = rings.get();
    bus.try_send(&[1; 48]).unwrap();
    bus.try_send(&[2; 64]).unwrap();
    bus.flush().unwrap();
    bus.flush().unwrap();
    assert_eq!(rings.get(), before + 1);
    assert_eq!(queue.try_pop_sized(&mut buffer, |_| 64).unwrap(), Some(64));
    assert_eq!(buffer[..48], [1; 48]);
    assert_eq!(buffer[48..], [0; 16], "padded");
    assert_eq!(queue.try_pop_sized(&mut buffer, |_| 64).unwrap(), Some(64));
    assert_eq!(buffer, [2; 64]);
    queue.release();

    queue.try_push(&[3; 64]).unwrap();
    let _ = queue.publish();
    assert_eq!(bus.try_recv(&mut buffer).unwrap(), Some(64));
    assert_eq!(buffer, [3; 64]);
}

#[test]
fn what_does_not_fit_is_told_and_there_is_room_when_the_other_side_has_read() {
    let words = words();
    let (mut other, mut bus) = connected(DeviceRegion::from_atomics(&words), || ());
    assert_eq!(bus.try_send(&[1; 65]), Err(ChannelError::TooLong));
    assert_eq!(bus.try_recv(&mut [0; 63]), Err(ChannelError::TooLong));
    for _ in 1..ELEMENTS {
        bus.try_send(&[1; 64]).unwrap();
    }
    assert_eq!(bus.try_send(&[1; 64]), Err(ChannelError::Full));
    bus.flush().unwrap();
    let queue = other.queue.as_mut().expect("up");
    queue.try_pop_sized(&mut [0; 64], |_| 64).unwrap();
    queue.release();
    bus.try_send(&[1; 64]).unwrap();
}

#[test]
fn a_device_side_that_ends_or_begins_anew_closes_the_bus() {
    for word in [
        Life::shutdown(),
        Store::State(0),
        Store::State(RUN & 0xffff),
    ] {
        let words = words();
        let memory = DeviceRegion::from_atomics(&words);
        let (other, mut bus) = connected(memory, || ());
        assert_eq!(bus.try_recv(&mut [0; 64]), Ok(None));
        let (at, word) = word.word();
        memory.store_release(other.layout.head(Side::Device) + at, word);
        assert_eq!(bus.try_recv(&mut [0; 64]), Err(ChannelError::Closed));
        assert_eq!(bus.try_recv(&mut [0; 64]), Err(ChannelError::Closed));
    }
}

#[test]
fn indices_that_cannot_be_close_the_bus() {
    let words = words();
    let memory = DeviceRegion::from_atomics(&words);
    let (other, mut bus) = connected(memory, || ());
    memory.store_release(other.layout.head(Side::Device) + 4, 0xffff_ffff);
    let corrupt = bus.try_recv(&mut [0; 64]);
    assert!(matches!(corrupt, Err(ChannelError::Corrupt(_))));
}

#[test]
fn the_other_side_is_told_when_the_bus_is_dropped() {
    let words = words();
    let (mut other, bus) = connected(DeviceRegion::from_atomics(&words), || ());
    drop(bus);
    let event = other.step();
    assert_eq!(event, Some(Event::Down(vmsg_mem::amp::End::Shutdown)));
}

#[test]
fn nobody_and_nonsense_are_errors() {
    let words = words();
    let memory = DeviceRegion::from_atomics(&words);
    memory.store_release(0, 0);
    let mut time = 0;
    let mut clock = || {
        time += 1_000_000;
        Instant(time)
    };
    let timeout = Duration::from_millis(10);
    let nobody = Amp::connect(memory, || (), &mut clock, timeout);
    assert!(matches!(nobody, Err(Error::Timeout { .. })));
    // The magic number, and a length that it does not have.
    memory.store_release(0, 0xffff_4c4f);
    let nonsense = Amp::connect(memory, || (), &mut clock, timeout);
    let corrupt = matches!(nonsense, Err(Error::Channel(ChannelError::Corrupt(_))));
    assert!(corrupt);
}
