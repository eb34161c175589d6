// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network devices of one worker that put frames into each other, by a back end that knows them all.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_msg::FeatureSet;
use vmsg_net::{Backend, Guest, Offloads, TxFrame};

use super::*;
use crate::device::{Device, Operation};
use crate::net::{Mac, Net, Settings, bits};
use crate::stand::{BASE, BUFFERS, Driver, NoFds, start};
use crate::worker::{Command, Core};

#[path = "others_panic_test.rs"]
mod panics;

const BUFFER: usize = 2048;
const SIZE: u16 = 16;

/// What happens in a `fill`, beside the frames.
type Hook = Box<dyn FnMut(u32, &mut dyn RxSink) + Send>;

#[derive(Default)]
struct Hub {
    keys: BTreeMap<u32, u64>,
    /// Which keys get what each sender sends; all others without an entry.
    to: Option<Vec<u64>>,
    pair: Option<u16>,
    /// For each key that was asked, the frames it took, or why it took none.
    outcomes: Vec<(u64, Result<usize, Closed>)>,
    hook: Option<Hook>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Hub>>);

impl Shared {
    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn key(&self, guest: u32) -> u64 {
        self.hub().keys[&guest]
    }

    fn outcomes(&self) -> Vec<(u64, Result<usize, Closed>)> {
        std::mem::take(&mut self.hub().outcomes)
    }
}

/// One port: what it gets from its device goes to all others.
struct Port(u32, Shared);

impl Backend for Port {
    fn queue_pairs(&self) -> u16 {
        4
    }
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }
    fn set_guest(&mut self, _: &Guest) {}
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn transmit(&mut self, _: Instant, _: u16, _: &[TxFrame<'_>]) -> usize {
        unreachable!("devices call the other one")
    }
    fn set_key(&mut self, key: u64) {
        self.1.hub().keys.insert(self.0, key);
    }
    fn transmit_to(
        &mut self,
        _: Instant,
        _: u16,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> usize {
        if frames.is_empty() {
            return 0;
        }
        let mut hub = self.1.hub();
        let all = hub.keys.iter().filter(|(guest, _)| **guest != self.0);
        let keys: Vec<u64> = match &hub.to {
            Some(keys) => keys.clone(),
            None => all.map(|(_, key)| *key).collect(),
        };
        let mut hook = hub.hook.take();
        for key in keys {
            let mut taken = 0;
            let result = others.fill(key, &mut |sink| {
                for frame in frames {
                    let mut head = [0; Target::HEAD];
                    let len = frame.payload.read(&mut head);
                    let target = match hub.pair {
                        Some(pair) => Target::Pair(pair),
                        None => Target::Head(&head[..len]),
                    };
                    let bytes = frame.payload.len();
                    if let Some(room) = sink.offer(target, bytes) {
                        frame.payload.copy_to(room);
                        sink.commit(&frame.header, bytes);
                        taken += 1;
                    }
                }
                if let Some(hook) = &mut hook {
                    hook(self.0, sink);
                }
            });
            hub.outcomes.push((key, result.map(|()| taken)));
        }
        hub.hook = hook;
        frames.len()
    }
    fn receive(&mut self, _: Instant, _: &mut dyn RxSink) -> usize {
        0
    }
    fn has_frames(&self) -> bool {
        false
    }
    fn shutdown(&mut self) {}
}

struct Party {
    core: Core,
    hub: Shared,
    guests: BTreeMap<u32, Driver>,
    tickets: u64,
    /// What devices have noticed, by slot.
    notices: Vec<(Slot, Notice)>,
}

impl Party {
    fn new(guests: u32) -> Self {
        let mut party = Self {
            core: Core::new(),
            hub: Shared::default(),
            guests: BTreeMap::new(),
            tickets: 0,
            notices: Vec::new(),
        };
        for guest in 0..guests {
            party.add_net(guest, 1);
            party.bring_up(guest, &[], &[0, 1]);
            party.give(guest, 0, usize::from(SIZE));
        }
        party.notices.clear();
        party
    }

    fn add_net(&mut self, guest: u32, pairs: u16) {
        let [.., high, low] = guest.to_be_bytes();
        let settings = Settings {
            queue_pairs: pairs,
            ..Settings::new(Mac([0x52, 0x54, 0, 0, high, low]))
        };
        let net = Net::new(&settings, Box::new(Port(guest, self.hub.clone())));
        self.add(guest, Box::new(net));
    }

    fn add(&mut self, guest: u32, device: Box<dyn Device>) {
        let driver = Driver::new(device.queue_sizes().len(), SIZE, false);
        let table = Arc::clone(&driver.table);
        self.guests.insert(guest, driver);
        self.core
            .command(Slot(guest), 0, Command::Add(device), &mut NoFds);
        self.tell(guest, Command::SetMemory(table)).expect("memory");
    }

    fn tell(&mut self, guest: u32, command: Command) -> Result<(), String> {
        self.tickets += 1;
        let ticket = self.tickets;
        self.core.command(Slot(guest), ticket, command, &mut NoFds);
        let mut answer = None;
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done { result, .. } => answer = Some(result),
                Reply::Notice(slot, notice) => self.notices.push((slot, notice)),
            }
        }
        answer.expect("every command is answered")
    }

    fn bring_up(&mut self, guest: u32, features: &[u32], queues: &[usize]) {
        let features = FeatureSet::from_bits(features);
        for queue in queues {
            let config = self.driver(guest).set_up(*queue);
            self.tell(guest, Command::StartQueue(start(*queue, config)))
                .expect("a queue");
        }
        self.tell(guest, Command::DriverOk(features))
            .expect("running");
        self.run();
    }

    fn run(&mut self) {
        for _ in 0..100_000 {
            if !self.core.step(Instant::now()) {
                break;
            }
        }
        assert!(!self.core.has_work(), "a device is busy for ever");
        for reply in self.core.take_replies() {
            match reply {
                Reply::Notice(slot, notice) => self.notices.push((slot, notice)),
                Reply::Done { .. } => panic!("nobody has asked"),
            }
        }
    }

    fn driver(&mut self, guest: u32) -> &mut Driver {
        self.guests.get_mut(&guest).expect("there")
    }

    fn give(&mut self, guest: u32, queue: usize, count: usize) {
        for _ in 0..count {
            self.driver(guest).add(queue, &[], BUFFER);
        }
        self.core.kick(Slot(guest), queue);
        self.run();
    }

    /// Sends frames in one batch.
    fn send(&mut self, guest: u32, frames: &[Vec<u8>]) {
        for frame in frames {
            let mut bytes = vec![0; 12];
            bytes.extend(frame);
            self.driver(guest).add(1, &bytes, 0);
        }
        self.core.kick(Slot(guest), 1);
        self.run();
    }

    /// The frames in what a device has used of a queue.
    fn used(&mut self, guest: u32, queue: usize) -> Vec<Vec<u8>> {
        let driver = self.driver(guest);
        let used = std::iter::from_fn(|| driver.pop(queue));
        used.map(|mut bytes| bytes.split_off(12.min(bytes.len())))
            .collect()
    }

    fn is_broken(&self, guest: u32) -> bool {
        let mut notices = self.notices.iter();
        notices.any(|(slot, notice)| slot.0 == guest && matches!(notice, Notice::Broken { .. }))
    }

    /// That guest 0 reaches guest 2, before and now.
    fn assert_others_go_on_after(&mut self, sent: usize) {
        assert_eq!(self.used(0, 1).len(), sent);
        assert_eq!(self.used(2, 0).len(), sent);
        self.hub.hub().hook = None;
        self.send(0, &[frame(90)]);
        assert_eq!(self.used(2, 0), [frame(90)]);
        assert_eq!(self.used(0, 1).len(), 1);
        assert!(!self.is_broken(0) && !self.is_broken(2));
    }
}

fn frame(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([2, 0, 0, 0, 0, seed, 8, 0]);
    bytes.extend((0..50 + seed).map(|byte| byte ^ seed));
    bytes
}

#[test]
fn a_batch_goes_from_one_device_to_the_other_and_is_announced_once() {
    let mut party = Party::new(2);
    let frames: Vec<Vec<u8>> = (0..10).map(frame).collect();
    party.send(0, &frames);
    assert_eq!(party.used(1, 0), frames);
    assert_eq!(
        party.used(0, 1).len(),
        10,
        "the sender has its buffers back"
    );
    let of = |guest, queue| (Slot(guest), Notice::Used { queue });
    assert_eq!(party.notices, [of(1, 0), of(0, 1)]);
}

#[test]
fn a_broadcast_reaches_255_others() {
    let mut party = Party::new(256);
    let frames = [frame(1), frame(2)];
    party.send(77, &frames);
    for guest in (0..256).filter(|guest| *guest != 77) {
        assert_eq!(party.used(guest, 0), frames, "{guest}");
    }
    assert_eq!(party.used(77, 1).len(), 2);
    assert_eq!(party.used(77, 0).len(), 0);
    assert_eq!(party.hub.outcomes().len(), 255);
}

#[test]
fn a_receiver_without_buffers_loses_its_own_frames_and_holds_nobody_up() {
    let mut party = Party::new(3);
    for round in 0..4 {
        let frames: Vec<Vec<u8>> = (0..10).map(frame).collect();
        party.send(0, &frames);
        assert_eq!(party.used(0, 1).len(), 10, "{round}");
        assert_eq!(party.used(2, 0), frames, "{round}");
        party.give(2, 0, 10);
    }
    let to_1 = party.hub.key(1);
    let taken: Vec<_> = party.hub.outcomes();
    let taken: Vec<_> = taken.iter().filter(|(key, _)| *key == to_1).collect();
    assert_eq!(
        taken,
        [
            &(to_1, Ok(10)),
            &(to_1, Ok(6)),
            &(to_1, Ok(0)),
            &(to_1, Ok(0))
        ]
    );
    assert_eq!(party.used(1, 0).len(), 16);
    party.give(1, 0, 1);
    party.send(0, &[frame(7)]);
    assert_eq!(party.used(1, 0), [frame(7)], "it takes part again");
}

#[test]
fn who_takes_nothing_says_why() {
    let mut party = Party::new(5);
    let keys: Vec<u64> = (0..5).map(|guest| party.hub.key(guest)).collect();
    party.tell(1, Command::Reset).expect("reset");
    party
        .tell(2, Command::Operate(Operation::SetLink(false)))
        .expect("unplugged");
    party.tell(3, Command::Remove).expect("removed");
    // Addresses of no window in every descriptor.
    let rings = party.guests[&4].mapping.ram();
    rings.write(0, &[0; 256]);
    party.send(0, &[frame(1)]);
    assert!(party.is_broken(4), "{:?}", party.notices);
    assert_eq!(
        party.hub.outcomes(),
        [
            (keys[1], Err(Closed::NoDriver)),
            (keys[2], Err(Closed::LinkDown)),
            (keys[3], Err(Closed::Gone)),
            (keys[4], Err(Closed::Broken)),
        ]
    );
    // Another device where one was.
    party.add_net(3, 1);
    party.bring_up(3, &[], &[0, 1]);
    party.give(3, 0, 1);
    assert_ne!(party.hub.key(3), keys[3]);
    party.hub.hub().to = Some(vec![keys[0], keys[3], keys[4], u64::MAX, 0]);
    party.send(0, &[frame(2)]);
    assert_eq!(
        party.hub.outcomes(),
        [
            (keys[0], Err(Closed::Gone)),
            (keys[3], Err(Closed::Gone)),
            (keys[4], Err(Closed::Broken)),
            (u64::MAX, Err(Closed::Gone)),
            (0, Err(Closed::Gone)),
        ]
    );
    assert_eq!(
        party.used(3, 0).len(),
        0,
        "not what was meant for the other"
    );
    assert_eq!(party.used(0, 1).len(), 2);
}

#[test]
fn what_a_receiver_does_to_its_rings_hurts_nobody_else() {
    // Offsets in the part of queue 0: descriptors at 0, the available ring behind its 16 descriptors.
    let avail = usize::from(SIZE) * 16;
    let lies: [(&str, usize, Vec<u8>); 6] = [
        ("no window has this address", 0, [0xff; 8].repeat(32)),
        ("so many cannot be available", avail + 2, vec![0xff, 0x7f]),
        ("no descriptor has this index", avail + 4, vec![0xff; 32]),
        ("buffers are for the device to read", 12, vec![0; 2]),
        ("a chain without an end", 0, {
            let mut descriptor = (BASE + 8192).to_le_bytes().to_vec();
            descriptor.extend([16, 0, 0, 0, 3, 0, 0, 0]);
            descriptor.repeat(16)
        }),
        ("a table in a table", 0, {
            let mut descriptor = BASE.to_le_bytes().to_vec();
            descriptor.extend([32, 0, 0, 0, 4, 0, 0, 0]);
            descriptor.repeat(16)
        }),
    ];
    for (what, at, bytes) in lies {
        let mut party = Party::new(3);
        party.guests[&1].mapping.ram().write(at, &bytes);
        let frames: Vec<Vec<u8>> = (0..4).map(frame).collect();
        party.send(0, &frames);
        assert_eq!(party.used(0, 1).len(), 4, "{what}");
        assert_eq!(party.used(2, 0), frames, "{what}");
        assert!(!party.is_broken(0) && !party.is_broken(2), "{what}");
        let (_, outcome) = party.hub.outcomes()[0];
        if outcome == Err(Closed::Broken) {
            assert!(party.is_broken(1), "{what}");
            party.tell(1, Command::Reset).expect("reset");
            party.bring_up(1, &[], &[0, 1]);
            party.give(1, 0, 4);
            party.send(0, &frames);
            assert_eq!(party.used(1, 0), frames, "{what}");
        } else {
            // The device has taken the frames, and dropped them.
            assert_eq!(outcome, Ok(4), "{what}");
            assert_eq!(party.used(1, 0).len(), 0, "{what}");
        }
    }
}

#[test]
fn memory_that_a_receiver_takes_away_or_loses_breaks_it_alone() {
    vmsg_mem::fault::install().expect("a handler");
    let mut party = Party::new(3);
    party
        .tell(1, Command::SetMemory(Arc::default()))
        .expect("memory");
    party.send(0, &[frame(1)]);
    assert!(party.is_broken(1));
    party.assert_others_go_on_after(1);
    let mut party = Party::new(3);
    rustix::fs::ftruncate(&party.guests[&1].file, BUFFERS as u64).expect("truncated");
    party.send(0, &[frame(1)]);
    assert!(party.is_broken(1), "{:?}", party.notices);
    party.assert_others_go_on_after(1);
}

#[test]
fn memory_is_not_replaced_while_it_is_filled() {
    let mut party = Party::new(3);
    let seat = party.core.seats().at(Slot(1));
    let key = party.hub.key(1);
    let refused = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&refused);
    let of_hook = Arc::clone(&seat);
    party.hub.hub().to = Some(vec![key]);
    party.hub.hub().hook = Some(Box::new(move |_, _| {
        let refused = of_hook.try_set(Arc::default()).is_err();
        *seen.lock().expect("sound") += u32::from(refused);
    }));
    party.send(0, &[frame(1)]);
    assert_eq!(*refused.lock().expect("sound"), 1);
    assert!(seat.try_set(Arc::default()).is_ok(), "afterwards it is");
    party.send(0, &[frame(1)]);
    assert!(party.is_broken(1));
    let table = Arc::clone(&party.guests[&1].table);
    party.tell(1, Command::Reset).expect("reset");
    party.tell(1, Command::SetMemory(table)).expect("memory");
    party.bring_up(1, &[], &[0, 1]);
    party.give(1, 0, 1);
    party.send(0, &[frame(5)]);
    assert_eq!(party.used(1, 0), [frame(5)]);
}

#[test]
fn a_receiver_with_several_pairs_gets_frames_where_they_belong() {
    let mut party = Party::new(1);
    party.add_net(1, 2);
    party.bring_up(1, &[bits::MQ], &[0, 1, 2, 3]);
    party.give(1, 0, 16);
    party.give(1, 2, 16);
    party.notices.clear();
    party.hub.hub().pair = Some(1);
    party.send(0, &[frame(1), frame(2)]);
    assert_eq!(party.used(1, 2), [frame(1), frame(2)]);
    party.hub.hub().pair = Some(0);
    party.send(0, &[frame(3)]);
    assert_eq!(party.used(1, 0), [frame(3)]);
    let of = |guest, queue| (Slot(guest), Notice::Used { queue });
    assert_eq!(party.notices, [of(1, 2), of(0, 1), of(1, 0), of(0, 1)]);
}
