// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of any bytes, made from any bytes, into receivers of any kind; what arrives is judged by code that shares nothing with
//! what cuts frames and sums them.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "not everybody needs all of it"
)]

mod built;
mod judge;

use std::sync::atomic::{AtomicU64, Ordering};

use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{TagChange, deliver};
use vmsg_net::{Offloads, RxSink, Target, TxFrame, VnetHeader};

use self::built::be16;
use self::judge::{account, hints, retag, told_right, whole};

pub use self::built::{ADDRESSES, Built, build, sum};

/// Takes decisions from bytes; zeros when they are used up.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// Less than `end`.
    fn below(&mut self, end: usize) -> usize {
        (usize::from(self.byte()) << 16 | usize::from(self.short())) % end
    }

    /// True for one in `n`.
    fn one_in(&mut self, n: u8) -> bool {
        self.byte() % n == n - 1
    }
}

/// Buffers of a receiver, and a sender who writes to its frame whenever it is looked at, if it does.
struct Receiver<'a> {
    room: &'a [RamSlice<'a>],
    buffers: usize,
    offered: Option<usize>,
    head: Vec<u8>,
    hostile: Option<(&'a [AtomicU64], u64)>,
    frames: Vec<(VnetHeader, Vec<u8>)>,
}

impl RxSink for Receiver<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        let Target::Head(head) = to else {
            panic!("the switch knows the frame");
        };
        self.head = head.to_vec();
        self.offered = (self.buffers > 0).then_some(len);
        if let Some((words, pattern)) = self.hostile {
            for word in words {
                word.store(pattern, Ordering::Relaxed);
            }
        }
        (self.buffers > 0).then(|| Pieces::new(self.room).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let offered = self.offered.take().expect("an offer");
        assert!(len <= offered, "{len} bytes, {offered} asked for");
        self.buffers -= 1;
        let mut bytes = vec![0; len];
        let room = Pieces::new(self.room).read(&mut bytes);
        bytes.truncate(room);
        let same = self.head.len().min(bytes.len());
        // Checksums and lengths need not be there yet.
        assert_eq!(self.head[..12.min(same)], bytes[..12.min(same)]);
        self.frames.push((*header, bytes));
    }
}

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

/// `memory` in pieces of lengths that `choices` has.
fn pieces<'m>(memory: &'m [AtomicU64], choices: &mut Choices<'_>) -> Vec<RamSlice<'m>> {
    let mut rest = RamSlice::from_atomics(memory);
    let mut all = Vec::new();
    for _ in 0..choices.below(6) {
        let at = match choices.byte() % 3 {
            0 => choices.below(16),
            1 => choices.below(200),
            _ => choices.below(9000),
        };
        let (piece, behind) = rest.split_at(at);
        all.push(piece);
        rest = behind;
    }
    all.push(rest);
    all
}

fn offloads(choices: &mut Choices<'_>) -> Offloads {
    let bits = choices.byte();
    Offloads {
        guest_csum: bits & 1 != 0,
        guest_tso4: bits & 2 != 0,
        guest_tso6: bits & 4 != 0,
        guest_ecn: bits & 8 != 0,
        guest_uso4: bits & 16 != 0,
        guest_uso6: bits & 32 != 0,
        mtu: match choices.byte() % 4 {
            0 => 1500,
            1 => 9000,
            2 => u16::MAX,
            _ => choices.short(),
        },
        ..Offloads::NONE
    }
}

/// One frame, from what `bytes` say.
pub fn one(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let kind = choices.byte();
    let to = offloads(&mut choices);
    let tag = match choices.byte() % 4 {
        0 => TagChange::Keep,
        1 => TagChange::Strip,
        2 => TagChange::Push(choices.short()),
        _ => TagChange::Replace(choices.short()),
    };
    let buffers = match choices.byte() % 4 {
        0 => choices.below(4),
        1 => choices.below(50),
        _ => 100_000,
    };
    let large = kind & 3 != 0;
    let longest = if large { 66_000 } else { 3000 };
    let payload = choices.below(longest);
    let mut built = build(&mut choices, payload);
    let payload = built.bytes.len() - built.payload;
    let mut header = VnetHeader::default();
    let partial = large || choices.one_in(2);
    built.finish(partial);
    if partial {
        header.flags = VnetHeader::NEEDS_CSUM;
        header.csum_start = u16::try_from(built.transport).expect("short");
        header.csum_offset = u16::try_from(built.checksum_offset()).expect("short");
    } else if choices.one_in(2) {
        header.flags = VnetHeader::DATA_VALID;
    }
    if large {
        header.gso_type = match (built.udp, built.v6) {
            (true, _) => VnetHeader::GSO_UDP_L4,
            (false, true) => VnetHeader::GSO_TCPV6,
            (false, false) => VnetHeader::GSO_TCPV4,
        };
        if !built.udp && choices.one_in(3) {
            header.gso_type |= VnetHeader::GSO_ECN;
        }
        header.hdr_len = choices.short();
        let least = if built.udp {
            payload.div_ceil(128).max(1)
        } else {
            8
        };
        let size = least + choices.below(3000);
        header.gso_size = u16::try_from(size).expect("short");
    }
    // Now and then nothing of it is left to be true.
    let mut sound = true;
    if kind & 0x30 == 0x30 {
        sound = false;
        for _ in 0..1 + choices.below(4) {
            match choices.byte() % 8 {
                0 => header.flags = choices.byte(),
                1 => header.gso_type = choices.byte(),
                2 => header.gso_size = choices.short(),
                3 => header.csum_start = choices.short(),
                4 => header.csum_offset = choices.short(),
                5 => built.bytes.truncate(choices.below(200)),
                _ => {
                    let end = built.bytes.len().min(160);
                    if end > 0 {
                        let at = choices.below(end);
                        built.bytes[at] = choices.byte();
                    }
                }
            }
        }
    }
    let hostile = kind & 0x40 != 0;
    let source = memory(built.bytes.len() + 8);
    let from = pieces(&source, &mut choices);
    let frame = TxFrame {
        header,
        payload: Pieces::new(&from).take(built.bytes.len()),
    };
    frame.payload.write(&built.bytes);
    let target = memory(built.bytes.len() + 8);
    let room = pieces(&target, &mut choices);
    // Sometimes the buffers can never hold it.
    let room = &room[..if choices.one_in(8) { 1 } else { room.len() }];
    let pattern = u64::from(choices.short()).wrapping_mul(0x0001_0001_0001_0003);
    let mut sink = Receiver {
        room,
        buffers,
        offered: None,
        head: Vec::new(),
        hostile: hostile.then_some((&source, pattern)),
        frames: Vec::new(),
    };
    let mut head = [0; Target::HEAD];
    let len = frame.payload.read(&mut head);
    let told = deliver(&frame, &head[..len], tag, &to, &mut sink);
    let ample = Pieces::new(room).len() >= built.bytes.len() + 4;
    let frames = sink.frames;
    account(told, &frames, ample);
    for (header, bytes) in &frames {
        hints(header, bytes.len(), &to, ample);
    }
    let tagged = matches!(
        be16(&[&built.bytes[..], &[0; 14]].concat(), 12),
        0x8100 | 0x88a8
    );
    if !sound || matches!(tag, TagChange::Strip | TagChange::Replace(_)) && !tagged {
        return;
    }
    let expected = retag(&built, tag);
    told_right(told, &expected, &header, &to);
    if !ample {
        return;
    }
    if hostile {
        // What was decided by is there, and the sum is of what was copied.
        for (header, bytes) in &frames {
            assert_eq!(bytes[..12], expected.bytes[..12]);
            if partial {
                Built::read(bytes).check(header);
            }
        }
    } else {
        whole(&expected, &header, &frames, told, partial);
    }
}
