// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames and buffers in all the sizes that nobody uses.

use crate::host::{Host, NET, PATIENCE, arp_request};
use crate::messages::Random;
use crate::peer::{EVENT_CONFIG, NEEDS_RESET, OK, Peer};
use crate::rings::{Memory, NEXT, Ring, WRITE};

const RX: u32 = 0;
const TX: u32 = 1;
const CONTROL: u32 = 2;
const SIZE: u16 = 128;

/// Feature bits.
const MERGEABLE: u32 = 1 << 15;
const CTRL_VQ: u32 = 1 << 17;
const CTRL_MAC: u32 = 1 << 23;

/// Where buffers begin in the lent memory: the frames to be sent, and the others.
const FRAMES: u64 = 1 << 20;
const BUFFERS: u64 = 2 << 20;

/// Bytes of the header before a frame.
const HEADER: usize = 12;

/// The attacked network device, running.
struct Card<'m> {
    memory: &'m Memory,
    rx: Ring<'m>,
    tx: Ring<'m>,
    control: Ring<'m>,
}

impl<'m> Card<'m> {
    fn start(peer: &mut Peer, memory: &'m Memory, features: u32) -> Self {
        memory.restart();
        peer.negotiate(NET, features);
        let mut ring = |queue| memory.ring(peer, NET, queue, SIZE);
        let (rx, tx, control) = (ring(RX), ring(TX), ring(CONTROL));
        assert_eq!(peer.set_status(NET, 15), 15);
        Self {
            memory,
            rx,
            tx,
            control,
        }
    }

    /// Offers the whole receive queue, each chain `pieces` buffers of `len` bytes.
    fn offer_buffers(&self, pieces: u16, len: u32, flags: u16) {
        for index in 0..SIZE {
            let addr = self.memory.base + BUFFERS + u64::from(index) * 2048;
            let last = (index + 1) % pieces == 0;
            let next = if last { 0 } else { NEXT };
            self.rx
                .descriptor(index, addr, len, flags | next, index + 1);
        }
        for index in 0..SIZE / pieces {
            self.rx.offer(index * pieces);
        }
    }

    /// Sends a frame, header included, in pieces of `piece` bytes.
    fn send(&self, frame: &[u8], piece: usize) {
        let addr = self.memory.base + FRAMES;
        self.tx.write(FRAMES, frame);
        let count = frame.len().div_ceil(piece).max(1);
        for index in 0..count {
            let begin = index * piece;
            let len = piece.min(frame.len() - begin);
            let next = if index + 1 < count { NEXT } else { 0 };
            let number = u16::try_from(index).expect("fits the queue");
            let len = u32::try_from(len).expect("short");
            self.tx
                .descriptor(number, addr + begin as u64, len, next, number + 1);
        }
        self.tx.offer(0);
    }
}

/// A frame that is answered.
fn question() -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend(arp_request());
    frame
}

/// Sends `frame` as it should be, one by one.
fn send_all(peer: &mut Peer, card: &Card<'_>, frame: &[u8], count: usize) {
    for _ in 0..count {
        card.send(frame, 4096);
        peer.kick(NET, TX);
        peer.barrier();
    }
}

#[test]
fn frames_of_any_length_in_pieces_of_a_byte_are_sent_or_dropped() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    let card = Card::start(&mut peer, &memory, 0);
    card.offer_buffers(1, 2048, WRITE);
    let question = question();
    let mut sent = 0;
    for len in (1..=question.len()).chain([100, 128]) {
        let mut frame = question.clone();
        frame.resize(len, 0);
        for piece in [1, 5, 11, 12, 13, 2048] {
            card.send(&frame, piece);
            peer.kick(NET, TX);
            peer.barrier();
            sent += 1;
            assert_eq!(
                card.tx.used_index(),
                sent,
                "{len} bytes in pieces of {piece}"
            );
        }
    }
    // The whole ones were answered, each time.
    assert!(
        card.rx.used_index() >= 6,
        "{} answers",
        card.rx.used_index()
    );
    // To be written only: nothing to send.
    card.tx.descriptor(0, memory.base, 4096, WRITE, 0);
    card.tx.offer(0);
    peer.kick(NET, TX);
    peer.barrier();
    assert_eq!(card.tx.used_index(), sent + 1);
    assert_eq!(peer.status(NET), 15);
    drop(peer);
    host.finish();
}

#[test]
fn random_frames_and_headers_are_survived() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    // All offloads that there may be.
    let card = Card::start(&mut peer, &memory, 1 | 1 << 11 | MERGEABLE);
    let mut random = Random::new(4);
    for round in 0..2000 {
        let len = usize::try_from(20 + random.below(1500)).expect("short");
        let mut frame = random.bytes(len);
        if round % 2 == 0 {
            // An IP packet, nearly, from the guest.
            frame.resize(frame.len().max(60), 0);
            frame[24..26].copy_from_slice(&[8, 0]);
            frame[26] = 0x45;
            frame[35] = [1, 6, 17][round % 3];
            frame[38..42].copy_from_slice(&[10, 0, 2, 15]);
            frame[42..46].copy_from_slice(&[10, 0, 2, 2]);
        }
        card.send(&frame, 2048);
        peer.kick(NET, TX);
        if round % 16 == 15 {
            peer.barrier();
        }
        while peer.pop().is_some() {}
    }
    peer.barrier();
    assert_eq!(peer.status(NET) & NEEDS_RESET, 0);
    drop(peer);
    host.finish();
}

#[test]
fn buffers_that_hold_nothing_or_a_byte_keep_nobody_awake() {
    let mut host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    let question = question();
    for features in [0, MERGEABLE] {
        for (pieces, len, flags) in [(1, 64, 0), (1, 1, WRITE), (4, 3, WRITE), (1, 13, WRITE)] {
            let card = Card::start(&mut peer, &memory, features);
            card.offer_buffers(pieces, len, flags);
            peer.kick(NET, RX);
            send_all(&mut peer, &card, &question, 20);
            assert_eq!(card.tx.used_index(), 20, "answers hold up what is sent");
            peer.kick(NET, RX);
            peer.barrier();
            if features == MERGEABLE && flags == WRITE {
                // 60 bytes fit into so many.
                assert_ne!(card.rx.used_index(), 0, "{pieces} pieces of {len} bytes");
            }
            assert_eq!(peer.status(NET), 15);
        }
        host.assert_idle();
    }
    // None at all, and much to say.
    let before = host.resident();
    let card = Card::start(&mut peer, &memory, 0);
    for round in 0..20_000 {
        card.send(&question, 4096);
        peer.kick(NET, TX);
        while peer.pop().is_some() {}
        if round % 100 == 99 {
            peer.barrier();
        }
    }
    assert_eq!(card.tx.used_index(), 20_000);
    host.assert_idle();
    assert!(host.resident() < before + (8 << 10), "{before} KiB before");
    // What was kept comes as soon as there is room, though the driver says so only once.
    card.offer_buffers(1, 2048, WRITE);
    peer.kick(NET, RX);
    peer.barrier();
    assert_ne!(card.rx.used_index(), 0);
    drop(peer);
    host.finish();
}

#[test]
fn too_few_buffers_are_waited_for_without_asking_again_and_again() {
    let mut host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    // EVENT_IDX: the driver kicks only past the index that it is told.
    let card = Card::start(&mut peer, &memory, MERGEABLE | 1 << 29);
    for index in 0..3 {
        card.rx
            .descriptor(index, memory.base + BUFFERS, 16, WRITE, 0);
        card.rx.offer(index);
    }
    send_all(&mut peer, &card, &question(), 1);
    host.assert_idle();
    assert_eq!(card.rx.used_index(), 0, "48 bytes hold no answer");
    for index in 3..16 {
        card.rx
            .descriptor(index, memory.base + BUFFERS, 16, WRITE, 0);
        card.rx.offer(index);
    }
    // The fourth is what the device waits for.
    assert_eq!(card.rx.avail_event(), 3);
    peer.kick(NET, RX);
    peer.barrier();
    assert_ne!(card.rx.used_index(), 0);
    drop(peer);
    host.finish();
}

#[test]
fn a_broken_device_with_frames_on_their_way_sleeps() {
    let mut host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    for queue in [RX, TX, CONTROL] {
        let card = Card::start(&mut peer, &memory, CTRL_VQ);
        send_all(&mut peer, &card, &question(), 5);
        let ring = [&card.rx, &card.tx, &card.control][queue as usize];
        ring.set_avail(0x7000);
        peer.kick(NET, queue);
        peer.wait_for_needs_reset(NET);
        for queue in [RX, TX, CONTROL] {
            peer.kick(NET, queue);
        }
        peer.barrier();
        host.assert_idle();
    }
    drop(peer);
    host.finish();
}

#[test]
fn commands_that_are_none_are_answered_with_an_error() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    let card = Card::start(&mut peer, &memory, CTRL_VQ | CTRL_MAC);
    let base = memory.base;
    let mut random = Random::new(5);
    for round in 0..600u16 {
        let len = u32::try_from(random.below(40)).expect("short");
        let mut command = random.bytes(40);
        command[0] &= 3;
        command[1] &= 3;
        card.control.write(FRAMES, &command);
        // In any form: no command, no place for the answer, both.
        match round % 4 {
            0 => card.control.descriptor(0, base + FRAMES, len + 1, 0, 0),
            1 => card
                .control
                .descriptor(0, base + BUFFERS, len + 1, WRITE, 0),
            _ => {
                card.control.descriptor(0, base + FRAMES, len + 1, NEXT, 1);
                card.control.descriptor(1, base + BUFFERS, 1, WRITE, 0);
            }
        }
        card.control.offer(0);
        peer.kick(NET, CONTROL);
        peer.barrier();
        assert_eq!(card.control.used_index(), round + 1);
        while peer.pop().is_some() {}
    }
    assert_eq!(peer.status(NET), 15);
    drop(peer);
    host.finish();
}

#[test]
fn addresses_that_change_without_end_do_not_pile_up_as_events() {
    let mut host = Host::start();
    let before = host.resident();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    let card = Card::start(&mut peer, &memory, CTRL_VQ | CTRL_MAC);
    let base = memory.base;
    let mac = |last| [0x52, 0x54, 0, 1, 2, last];
    for number in 0..2u8 {
        let command = [[1, 1].as_slice(), &mac(number)].concat();
        card.control
            .write(FRAMES + 64 * u64::from(number), &command);
        let head = u16::from(number) * 2;
        let addr = base + FRAMES + 64 * u64::from(number);
        card.control.descriptor(head, addr, 8, NEXT, head + 1);
        card.control
            .descriptor(head + 1, base + BUFFERS, 1, WRITE, 0);
    }
    // Kicked over an eventfd and never listening: nothing but events goes back.
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
    let fd = std::os::fd::AsFd::as_fd(&kick);
    assert_eq!(peer.notify(NET, CONTROL, 1, &[fd]), OK);
    let rounds = 20_000;
    for round in 0..rounds {
        card.control.offer(if round % 2 == 0 { 0 } else { 2 });
        rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("a kick");
        let done = round + 1;
        let deadline = std::time::Instant::now() + PATIENCE;
        while card.control.used_index() != done {
            assert!(std::time::Instant::now() < deadline, "not served");
            std::thread::yield_now();
        }
    }
    host.ping();
    assert!(host.resident() < before + (8 << 10), "{before} KiB before");
    // The last one to come tells the last address. There is room for it, and then it has come.
    peer.barrier();
    peer.barrier();
    peer.ping();
    let mut last = None;
    while let Some(event) = peer.events.pop_front().or_else(|| peer.pop()) {
        if event[1] == EVENT_CONFIG {
            last = Some(event);
        }
    }
    let last = last.expect("an event");
    assert_eq!(last[24..30], mac(1), "{last:?}");
    drop(peer);
    host.finish();
}

#[test]
fn answers_written_over_the_rings_end_somehow() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    for features in [0, MERGEABLE] {
        let card = Card::start(&mut peer, &memory, features);
        for index in 0..SIZE {
            let areas = [&card.tx, &card.rx][usize::from(index) % 2].areas();
            let addr = areas[usize::from(index / 2) % 3];
            card.rx.descriptor(index, addr, 80, WRITE, 0);
            card.rx.offer(index);
        }
        for _ in 0..50 {
            card.send(&question(), 4096);
            peer.kick(NET, TX);
            peer.kick(NET, RX);
            peer.barrier();
            while peer.pop().is_some() {}
        }
    }
    drop(peer);
    host.finish();
}
