// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages that are none, that come too often, or that nobody may send.

use virtio_msg::DevNum;

use crate::host::{HONEST, Host, NET, RNG};
use crate::peer::{
    CLAIM, EVENT_AVAIL, GET_INFO, HELD, MARKER, OK, PING, Peer, RESET_VQUEUE, SET_CONFIG,
    SET_FEATURES, SET_STATUS, SET_VQUEUE, WINDOW_REMOVE, message, words,
};

/// xorshift: any sequence will do, as long as it is the same each time.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1 << 40)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }
}

#[test]
fn garbage_and_truncated_messages_are_dropped() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let mut random = Random::new(1);
    for round in 0..4000 {
        let len = usize::try_from(random.below(320)).expect("small");
        let mut bytes = random.bytes(len);
        if round % 2 == 0 && len >= 8 {
            // A header that is nearly right.
            bytes[0] &= 3;
            bytes[2..4].copy_from_slice(&[1, 0]);
            let size = u16::try_from(len).expect("small") + u16::from(round % 4 == 0);
            bytes[6..8].copy_from_slice(&size.to_le_bytes());
        }
        // Markers are for another test.
        if bytes.first().is_some_and(|byte| byte & 2 != 0) && bytes.get(1) == Some(&MARKER[1]) {
            continue;
        }
        assert!(peer.push(&bytes), "the connection stays");
        while peer.pop().is_some() {}
    }
    peer.ping();
    drop(peer);
    host.finish();
}

#[test]
fn every_message_with_every_length_and_random_contents_is_survived() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let mut random = Random::new(2);
    for id in 0..=255u8 {
        for kind in 0..4 {
            if kind & 2 != 0 && id == MARKER[1] {
                continue;
            }
            for len in [0, 1, 4, 7, 8, 12, 16, 31, 32, 40, 41, 200, 312] {
                let mut payload = random.bytes(len);
                // Small numbers reach further.
                for byte in &mut payload {
                    *byte &= if random.below(3) == 0 { 0xff } else { 1 };
                }
                let dev = [0, 1, 2, 3, 0xffff][usize::from(random.byte() % 5)];
                let token = u16::from(random.byte());
                assert!(peer.push(&message(kind, id, dev, token, &payload)));
                while peer.pop().is_some() {}
            }
        }
    }
    peer.ping();
    drop(peer);
    host.finish();
}

#[test]
fn requests_without_end_from_a_driver_that_takes_no_answer_stop_being_read() {
    let mut host = Host::start();
    let mut peers: Vec<Peer> = (0..8).map(|_| Peer::connect(&host.path())).collect();
    let requests = [
        message(0, GET_INFO, RNG.0, 1, &[]),
        message(2, PING, 0, 1, &words(&[1])),
        message(0, SET_STATUS, RNG.0, 1, &words(&[0])),
        message(2, CLAIM, 0, 1, &words(&[RNG.0.into()])),
        message(2, WINDOW_REMOVE, 0, 1, &words(&[1, 0])),
        message(2, 0x83, 0, 1, &[]),
    ];
    // Until none of them gets anything through, though the host has had time.
    let mut stuck = 0;
    let mut sent = 0u32;
    while stuck < 3 {
        let mut any = false;
        for peer in &mut peers {
            for request in &requests {
                while peer.try_push(request) {
                    any = true;
                    sent += 1;
                    assert!(sent < 1_000_000, "the host takes whatever comes");
                }
            }
        }
        stuck = if any { 0 } else { stuck + 1 };
        host.ping();
    }
    host.assert_idle();
    // Those who listen again are served again.
    for peer in &mut peers {
        peer.listen();
        peer.ping();
    }
    drop(peers);
    host.finish();
}

#[test]
fn a_flood_of_kicks_by_message_does_not_pile_up() {
    let mut host = Host::start();
    let before = host.resident();
    let mut peer = Peer::connect(&host.path());
    let memory = crate::rings::Memory::lend(&mut peer, 1 << 20);
    peer.negotiate(RNG, 0);
    let base = memory.base;
    let ring = memory.ring(&mut peer, RNG, 0, 64);
    assert_eq!(peer.set_status(RNG, 15), 15);
    // Requests as long as possible, so that the worker is busy.
    for head in 0..32 {
        ring.descriptor(head, base, 1 << 20, 2, 0);
        ring.offer(head);
    }
    for _ in 0..60_000 {
        peer.kick(RNG, 0);
        while peer.pop().is_some() {}
    }
    // Kicks for queues that are not there, or of others.
    for _ in 0..5_000 {
        for (dev, queue) in [
            (RNG, 1),
            (RNG, u32::MAX),
            (HONEST, 0),
            (NET, 2),
            (DevNum(99), 0),
        ] {
            peer.kick(dev, queue);
        }
        while peer.pop().is_some() {}
    }
    peer.barrier();
    assert!(host.resident() < before + (8 << 10), "{before} KiB before");
    host.ping();
    drop(peer);
    host.finish();
}

#[test]
fn what_others_hold_cannot_be_changed() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    assert_eq!(peer.claim(HONEST), HELD);
    let before = peer.status(HONEST);
    assert_eq!(before, 15);
    for status in [0, 1, 128, u32::MAX] {
        assert_eq!(peer.set_status(HONEST, status), before);
    }
    peer.ask(SET_FEATURES, HONEST, &words(&[0, 1, 0]));
    peer.ask(SET_CONFIG, HONEST, &words(&[0, 0, 0]));
    peer.ask(RESET_VQUEUE, HONEST, &words(&[0]));
    peer.ask(SET_VQUEUE, HONEST, &words(&[0; 10]));
    assert_ne!(peer.release(HONEST), OK);
    assert_ne!(peer.notify(HONEST, 0, 0, &[]), OK);
    assert_eq!(peer.status(HONEST), before);
    // Nobody holds this one: a kick alone does not take it.
    peer.push(&message(0, EVENT_AVAIL, RNG.0, 0, &words(&[0, 0])));
    let mut other = Peer::connect(&host.path());
    peer.ping();
    assert_eq!(other.claim(RNG), OK);
    drop((peer, other));
    host.finish();
}
