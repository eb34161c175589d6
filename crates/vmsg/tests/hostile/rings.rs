// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings with nonsense in them, and in places where no ring should be.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use virtio_msg::DevNum;
use vmsg_mem::Mapping;

use crate::host::{Host, NET, RNG};
use crate::messages::Random;
use crate::peer::{NEEDS_RESET, OK, Peer, QUEUE_RESUME, words};

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// RING_INDIRECT_DESC.
const INDIRECT_DESC: u32 = 1 << 28;

/// Memory that a peer has lent, as window 1.
pub(crate) struct Memory {
    pub(crate) mapping: Mapping,
    pub(crate) fd: OwnedFd,
    pub(crate) base: u64,
    used: Cell<u64>,
}

impl Memory {
    pub(crate) fn lend(peer: &mut Peer, len: u64) -> Self {
        let (mapping, fd) = Mapping::memfd("evil", len, false).expect("memory");
        let base = 0x8000_0000;
        assert_eq!(peer.window(1, 1, (base, len, 0), fd.as_fd()), OK);
        // The first page is for buffers.
        Self {
            mapping,
            fd,
            base,
            used: Cell::new(4096),
        }
    }

    /// Room for a ring of `size` entries, not yet set up.
    pub(crate) fn place(&self, size: u16) -> Ring<'_> {
        let at = self.used.get();
        let size = u64::from(size);
        let desc = at;
        let avail = desc + 16 * size;
        let used = (avail + 6 + 2 * size).next_multiple_of(64);
        let end = (used + 6 + 8 * size).next_multiple_of(4096);
        self.used.set(end);
        assert!(end <= self.mapping.len() as u64);
        Ring {
            mapping: &self.mapping,
            base: self.base,
            desc,
            avail,
            used,
            size: u16::try_from(size).expect("a queue's size"),
        }
    }

    /// A queue, set up.
    pub(crate) fn ring(&self, peer: &mut Peer, dev: DevNum, queue: u32, size: u16) -> Ring<'_> {
        let ring = self.place(size);
        peer.set_queue(dev, queue, size.into(), ring.areas());
        ring
    }
}

/// A split ring by its bytes.
pub(crate) struct Ring<'m> {
    pub(crate) mapping: &'m Mapping,
    base: u64,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    size: u16,
}

impl Ring<'_> {
    pub(crate) fn areas(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used].map(|offset| self.base + offset)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let offset = usize::try_from(offset).expect("inside");
        assert_eq!(
            self.mapping
                .ram()
                .get(offset, bytes.len())
                .expect("inside")
                .write(0, bytes),
            bytes.len()
        );
    }

    /// A descriptor at any place.
    pub(crate) fn descriptor_at(&self, offset: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(offset, &bytes);
    }

    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.desc + 16 * u64::from(index), addr, len, flags, next);
    }

    fn word(&self, offset: u64) -> u16 {
        let offset = usize::try_from(offset).expect("inside");
        let word = self.mapping.ram().atomic_u16(offset).expect("aligned");
        word.load(Ordering::Acquire)
    }

    pub(crate) fn set_avail(&self, index: u16) {
        let offset = usize::try_from(self.avail + 2).expect("inside");
        let word = self.mapping.ram().atomic_u16(offset).expect("aligned");
        word.store(index, Ordering::SeqCst);
    }

    /// Makes a chain available.
    pub(crate) fn offer(&self, head: u16) {
        let index = self.word(self.avail + 2);
        let slot = self.avail + 4 + 2 * u64::from(index % self.size);
        self.write(slot, &head.to_le_bytes());
        self.set_avail(index.wrapping_add(1));
    }

    /// The index past which the device wants to be kicked, with EVENT_IDX.
    pub(crate) fn avail_event(&self) -> u16 {
        self.word(self.used + 4 + 8 * u64::from(self.size))
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.word(self.used + 2)
    }
}

/// Brings the attacked entropy device up with one queue of 64.
fn bring_up<'m>(peer: &mut Peer, memory: &'m Memory, features: u32) -> Ring<'m> {
    peer.negotiate(RNG, features);
    let ring = memory.ring(peer, RNG, 0, 64);
    assert_eq!(peer.set_status(RNG, 15), 15);
    ring
}

#[test]
fn impossible_chains_break_the_device_until_it_is_reset() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    let base = memory.base;
    type Spoil = fn(&Ring<'_>, u64);
    let cases: [(&str, u32, Spoil); 16] = [
        ("a head outside", 0, |ring, _| ring.offer(64)),
        ("an index far ahead", 0, |ring, _| ring.set_avail(0x8000)),
        ("an index behind", 0, |ring, _| ring.set_avail(u16::MAX)),
        ("a circle", 0, |ring, base| {
            ring.descriptor(0, base, 8, WRITE | NEXT, 0);
            ring.offer(0);
        }),
        ("a next outside", 0, |ring, base| {
            ring.descriptor(0, base, 8, WRITE | NEXT, 64);
            ring.offer(0);
        }),
        ("no bytes", 0, |ring, base| {
            ring.descriptor(0, base, 0, WRITE, 0);
            ring.offer(0);
        }),
        ("memory that is not lent", 0, |ring, base| {
            ring.descriptor(0, base - 4096, 8, WRITE, 0);
            ring.offer(0);
        }),
        ("memory that wraps around", 0, |ring, _| {
            ring.descriptor(0, u64::MAX - 3, 8, WRITE, 0);
            ring.offer(0);
        }),
        ("more than there is", 0, |ring, base| {
            ring.descriptor(0, base, u32::MAX, WRITE, 0);
            ring.offer(0);
        }),
        (
            "an indirect table that was not negotiated",
            0,
            |ring, base| {
                ring.descriptor(0, base, 16, INDIRECT, 0);
                ring.offer(0);
            },
        ),
        (
            "an indirect table in itself",
            INDIRECT_DESC,
            |ring, base| {
                ring.descriptor_at(0, base, 16, INDIRECT, 0);
                ring.descriptor(0, base, 16, INDIRECT, 0);
                ring.offer(0);
            },
        ),
        (
            "an indirect table of the table itself",
            INDIRECT_DESC,
            |ring, base| {
                ring.descriptor(0, base + ring.desc, 1024, INDIRECT, 0);
                ring.offer(0);
            },
        ),
        (
            "an indirect table and a next",
            INDIRECT_DESC,
            |ring, base| {
                ring.descriptor(0, base, 16, INDIRECT | NEXT, 1);
                ring.offer(0);
            },
        ),
        ("an odd indirect table", INDIRECT_DESC, |ring, base| {
            ring.descriptor(0, base, 17, INDIRECT, 0);
            ring.offer(0);
        }),
        ("an indirect circle", INDIRECT_DESC, |ring, base| {
            for index in 0..8 {
                ring.descriptor_at(16 * index, base + 2048, 8, WRITE | NEXT, 0);
            }
            ring.descriptor(0, base, 128, INDIRECT, 0);
            ring.offer(0);
        }),
        ("65,536 buffers of a byte", INDIRECT_DESC, |ring, base| {
            let table = 2 << 20;
            for index in 0..65_536u64 {
                let next = u16::try_from((index + 1) % 65_536).expect("reduced");
                ring.descriptor_at(table + 16 * index, base, 1, WRITE | NEXT, next);
            }
            ring.descriptor(0, base + table, 1 << 20, INDIRECT, 0);
            ring.offer(0);
        }),
    ];
    for (what, features, spoil) in cases {
        let ram = memory.mapping.ram();
        ram.get(0, 2 << 20).expect("inside").fill(0);
        memory.restart();
        let ring = bring_up(&mut peer, &memory, features);
        spoil(&ring, base);
        peer.kick(RNG, 0);
        peer.wait_for_needs_reset(RNG);
        assert_eq!(ring.used_index(), 0, "{what}");
        // Nothing helps but a reset.
        assert_ne!(peer.set_status(RNG, 15) & NEEDS_RESET, 0, "{what}");
        peer.kick(RNG, 0);
        peer.barrier();
    }
    drop(peer);
    host.finish();
}

#[test]
fn a_device_that_is_broken_a_thousand_times_fills_no_log() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    for _ in 0..400 {
        memory.restart();
        let ring = bring_up(&mut peer, &memory, 0);
        ring.set_avail(0x8000);
        peer.kick(RNG, 0);
        peer.wait_for_needs_reset(RNG);
        ring.set_avail(0);
        // A queue in no memory, too, and a claim.
        peer.negotiate(RNG, 0);
        peer.set_queue(RNG, 0, 64, [0x1000, 0x2000, 0x3000]);
        peer.release(RNG);
    }
    drop(peer);
    host.finish();
}

#[test]
fn queues_that_cannot_be_are_not_set_up() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let base = memory.base;
    let good = memory.place(64).areas();
    // Before the features, and by somebody who holds nothing.
    peer.set_queue(RNG, 0, 64, good);
    peer.release(RNG);
    peer.negotiate(RNG, 0);
    for (queue, size, areas) in [
        (0, 0, good),
        (0, 63, good),
        (0, 2048, good),
        (0, 0x1_0040, good),
        (0, u32::MAX, good),
        (1, 64, good),
        (u32::MAX, 64, good),
        (0, 64, [base + 1, good[1], good[2]]),
        (0, 64, [good[0], good[1] + 1, good[2]]),
        (0, 64, [good[0], good[1], good[2] + 2]),
        (0, 64, [!15, good[1], good[2]]),
        (0, 64, [good[0], 0, good[2]]),
        (0, 64, [good[0], good[1], base + (1 << 20) - 64]),
        (0, 64, [base - 16, good[1], good[2]]),
    ] {
        peer.set_queue(RNG, queue, size, areas);
    }
    for (avail, used) in [(65, 0), (0, 1), (0x8000, 0), (5, 6)] {
        let mut payload = words(&[RNG.0.into(), 0]);
        payload.extend(words(&[avail | used << 16]));
        assert_eq!(peer.bus(QUEUE_RESUME, &payload, &[]), OK);
        peer.set_queue(RNG, 0, 64, good);
    }
    // None of them is there.
    assert_eq!(peer.set_status(RNG, 15), 15);
    peer.kick(RNG, 0);
    let info = peer.ask(0x09, RNG, &words(&[0]));
    assert_eq!(info[8..12], [0; 4], "the queue has a size");
    assert_eq!(peer.status(RNG), 15);
    drop(peer);
    host.finish();
}

#[test]
fn a_queue_that_resumes_in_the_middle_of_nowhere_hurts_nobody() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    for (mode, avail, used) in [
        (0, 64, 0),
        (0, u16::MAX, u16::MAX),
        (0, 10, 65_500),
        (1, 0, 0),
        (1, 9, 77),
    ] {
        memory.restart();
        peer.negotiate(RNG, 0);
        let payload = words(&[
            u32::from(RNG.0) | mode << 16,
            0,
            u32::from(avail) | u32::from(used) << 16,
        ]);
        assert_eq!(peer.bus(QUEUE_RESUME, &payload, &[]), OK);
        let ring = memory.place(64);
        ring.write(ring.used, &[0, 0, 0xff, 0x7f]);
        peer.set_queue(RNG, 0, 64, ring.areas());
        peer.set_status(RNG, 15);
        ring.set_avail(avail.wrapping_add(1));
        peer.kick(RNG, 0);
        peer.barrier();
    }
    drop(peer);
    host.finish();
}

#[test]
fn rings_that_lie_in_each_other_and_in_their_own_buffers_end_somehow() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    // Two queues of one device, and one of another, in the same memory.
    let areas = memory.place(64).areas();
    peer.negotiate(NET, 0);
    for queue in 0..3 {
        peer.set_queue(NET, queue, 64, areas);
    }
    peer.set_status(NET, 15);
    peer.negotiate(RNG, 0);
    peer.set_queue(RNG, 0, 64, areas);
    peer.set_status(RNG, 15);
    let ring = Ring {
        mapping: &memory.mapping,
        base: memory.base,
        desc: areas[0] - memory.base,
        avail: areas[1] - memory.base,
        used: areas[2] - memory.base,
        size: 64,
    };
    for index in 0..64 {
        // Everything that is written goes over the rings.
        let area = areas[usize::from(index) % 3];
        ring.descriptor(index, area, 4096, WRITE, 0);
        ring.offer(index);
    }
    for queue in 0..3 {
        peer.kick(NET, queue);
    }
    peer.kick(RNG, 0);
    peer.barrier();
    peer.barrier();
    // All three areas of a queue at one place.
    peer.negotiate(RNG, 0);
    peer.set_queue(RNG, 0, 64, [areas[0]; 3]);
    peer.set_status(RNG, 15);
    ring.descriptor(0, areas[0], 4096, WRITE, 0);
    peer.kick(RNG, 0);
    peer.barrier();
    drop(peer);
    host.finish();
}

#[test]
fn random_bytes_in_running_rings_are_survived() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let mut random = Random::new(3);
    for round in 0..60 {
        memory.restart();
        let ring = bring_up(
            &mut peer,
            &memory,
            if round % 2 == 0 { INDIRECT_DESC } else { 0 },
        );
        for step in 0..20 {
            for _ in 0..16 {
                let index = u16::from(random.byte() % 64);
                let good = random.below(4) > 0;
                let addr = if good {
                    0x8000_0000 + random.below(1 << 20)
                } else {
                    random.next()
                };
                let len = u32::try_from(random.below(1 << 16)).expect("small");
                let flags = u16::from(random.byte() & 7);
                ring.descriptor(index, addr, len, flags, u16::from(random.byte() % 70));
            }
            ring.offer(u16::from(random.byte() % 65));
            if step % 7 == 0 {
                let offset = ring.desc + random.below(ring.used - ring.desc);
                ring.write(offset, &[random.byte()]);
            }
            peer.kick(RNG, 0);
        }
        peer.barrier();
        while peer.pop().is_some() {}
    }
    drop(peer);
    host.finish();
}

impl Memory {
    /// Forgets the rings.
    pub(crate) fn restart(&self) {
        let ram = self.mapping.ram();
        ram.get(4096, 64 << 10).expect("inside").fill(0);
        self.used.set(4096);
    }
}
