// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of any bytes, made from any bytes, into receivers of any kind; what arrives is judged by code that shares nothing with
//! what cuts frames and sums them.
#![allow(dead_code, unreachable_pub, reason = "not everybody needs all of it")]

use std::sync::atomic::{AtomicU64, Ordering};

use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{Delivered, TagChange, deliver};
use vmsg_net::{Offloads, RxSink, Target, TxFrame, VnetHeader};

const TCP: u8 = 6;
const UDP: u8 = 17;

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

/// The sum of 16-bit words, as RFC 1071 has it, one by one.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for word in part.chunks(2) {
            let low = word.get(1).copied().unwrap_or(0);
            sum += u64::from(word[0]) * 256 + u64::from(low);
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).expect("folded")
}

fn low_byte(n: usize) -> u8 {
    u8::try_from(n & 0xff).expect("eight bits")
}

fn be16(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) * 256 + usize::from(bytes[at + 1])
}

/// A frame of TCP or UDP, and where its parts are.
#[derive(Clone, Debug)]
pub struct Built {
    pub bytes: Vec<u8>,
    pub network: usize,
    pub transport: usize,
    pub payload: usize,
    pub v6: bool,
    pub udp: bool,
}

impl Built {
    /// What the partial checksum holds, or all of it must add up to.
    fn pseudo(&self) -> u16 {
        let len = u32::try_from(self.bytes.len() - self.transport).expect("short");
        let protocol = [0, if self.udp { UDP } else { TCP }];
        let addresses = if self.v6 {
            self.network + 8..self.network + 40
        } else {
            self.network + 12..self.network + 20
        };
        sum(&[&self.bytes[addresses], &protocol, &len.to_be_bytes()])
    }

    pub const fn checksum_offset(&self) -> usize {
        if self.udp { 6 } else { 16 }
    }

    fn put(&mut self, at: usize, value: usize) {
        let value = u16::try_from(value).expect("short");
        self.bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// Writes the checksum of TCP or UDP: only the sum of the pseudo-header, or all.
    pub fn finish(&mut self, partial: bool) {
        let at = self.transport + self.checksum_offset();
        let pseudo = self.pseudo();
        self.put(at, pseudo.into());
        if !partial {
            let whole = !sum(&[&self.bytes[self.transport..]]);
            self.put(at, if whole == 0 { 0xffff } else { whole }.into());
        }
    }

    /// Reads a frame as its receiver would; panics where that would drop it.
    pub fn read(bytes: &[u8]) -> Self {
        let mut network = 14;
        while matches!(be16(bytes, network - 2), 0x8100 | 0x88a8) {
            network += 4;
        }
        let v6 = be16(bytes, network - 2) == 0x86dd;
        let (mut protocol, mut transport, len);
        if v6 {
            protocol = bytes[network + 6];
            transport = network + 40;
            len = 40 + be16(bytes, network + 4);
            while protocol != TCP && protocol != UDP {
                assert!(matches!(protocol, 0 | 43 | 60), "protocol {protocol}");
                protocol = bytes[transport];
                transport += 8 + 8 * usize::from(bytes[transport + 1]);
            }
        } else {
            assert_eq!(be16(bytes, network - 2), 0x800, "type");
            let header = usize::from(bytes[network] & 15) * 4;
            protocol = bytes[network + 9];
            transport = network + header;
            len = be16(bytes, network + 2);
            assert_eq!(sum(&[&bytes[network..transport]]), 0xffff, "checksum of IP");
        }
        assert_eq!(len, bytes.len() - network, "length of IP");
        let udp = protocol == UDP;
        let payload = if udp {
            assert_eq!(be16(bytes, transport + 4), bytes.len() - transport);
            transport + 8
        } else {
            transport + usize::from(bytes[transport + 12] >> 4) * 4
        };
        Self {
            bytes: bytes.to_vec(),
            network,
            transport,
            payload,
            v6,
            udp,
        }
    }

    /// What a receiver checks who is told `header`.
    fn check(&self, header: &VnetHeader) {
        let at = self.transport + self.checksum_offset();
        if header.needs_csum() {
            assert_eq!(usize::from(header.csum_start), self.transport);
            assert_eq!(usize::from(header.csum_offset), self.checksum_offset());
            let zero = |sum: u16| sum % 0xffff;
            let partial = u16::try_from(be16(&self.bytes, at)).expect("16 bits");
            assert_eq!(zero(partial), zero(self.pseudo()), "partial checksum");
        } else {
            let all = sum(&[&self.bytes[self.transport..], &self.pseudo().to_be_bytes()]);
            assert_eq!(all, 0xffff, "checksum");
            assert!(!self.udp || be16(&self.bytes, at) != 0, "no checksum");
        }
        if header.gso_type != VnetHeader::GSO_NONE {
            assert_eq!(usize::from(header.hdr_len), self.payload);
        }
    }
}

/// To whom frames are, and from whom.
pub const ADDRESSES: [u8; 12] = [0x52, 0x54, 0, 1, 2, 3, 0x52, 0x54, 0, 1, 2, 4];

/// A frame that makes sense, with `payload` bytes that repeat after no power of two.
pub fn build(choices: &mut Choices<'_>, payload: usize) -> Built {
    let mut bytes = ADDRESSES.to_vec();
    let shape = choices.byte();
    for _ in 0..(shape & 3).min(2) {
        let tpid = if shape & 4 == 0 { 0x81 } else { 0x88 };
        let low = if tpid == 0x81 { 0 } else { 0xa8 };
        bytes.extend([tpid, low, choices.byte(), choices.byte()]);
    }
    let v6 = shape & 8 != 0;
    let udp = shape & 16 != 0;
    let protocol = if udp { UDP } else { TCP };
    let options = choices.below(11) * 4;
    bytes.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let network = bytes.len();
    if v6 {
        let mut extensions = Vec::new();
        let mut first = protocol;
        for kind in (0..choices.below(3)).map(|i| [60, 43, 0][i]) {
            let words = u8::try_from(choices.below(3)).expect("small");
            let mut extension = vec![0; 8 + 8 * usize::from(words)];
            extension[0] = first;
            extension[1] = words;
            first = kind;
            extension.extend(extensions);
            extensions = extension;
        }
        bytes.extend([
            0x60 | choices.byte() & 15,
            choices.byte(),
            0,
            0,
            0,
            0,
            first,
            64,
        ]);
        bytes.extend((0..32).map(|_| choices.byte()));
        bytes.extend(extensions);
    } else {
        let words = u8::try_from(5 + choices.below(11)).expect("small");
        bytes.extend([
            0x40 | words,
            choices.byte(),
            0,
            0,
            choices.byte(),
            choices.byte(),
        ]);
        bytes.extend([0x40 & choices.byte(), 0, 64, protocol, 0, 0]);
        bytes.extend((0..8).map(|_| choices.byte()));
        bytes.resize(network + usize::from(words) * 4, 1);
    }
    let transport = bytes.len();
    bytes.extend([choices.byte(), 80, 0, choices.byte()]);
    if udp {
        bytes.extend([0; 4]);
    } else {
        bytes.extend((0..8).map(|_| choices.byte()));
        let words = u8::try_from(5 + options / 4).expect("small");
        bytes.extend([words << 4, choices.byte(), 1, 2, 0, 0, 0, 0]);
        bytes.resize(transport + usize::from(words) * 4, 1);
    }
    let header = bytes.len();
    let payload = payload.min(65535 - (header - network));
    let seed = usize::from(choices.byte());
    bytes.extend((0..payload).map(|i| low_byte(i * 7 + i / 251 + seed)));
    let mut built = Built {
        bytes,
        network,
        transport,
        payload: header,
        v6,
        udp,
    };
    let len = built.bytes.len();
    if udp {
        built.put(transport + 4, len - transport);
    }
    if v6 {
        built.put(network + 4, len - network - 40);
    } else {
        built.put(network + 2, len - network);
        let sum = !sum(&[&built.bytes[network..transport]]);
        built.put(network + 10, sum.into());
    }
    built
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

/// Everything that is said to have arrived has, and nothing else.
fn account(told: Delivered, frames: &[(VnetHeader, Vec<u8>)], ample: bool) {
    let (count, bytes) = match told {
        Delivered::Frame(bytes) => (1, bytes),
        Delivered::Frames { count, bytes } => {
            assert!(count > 1);
            (count, bytes)
        }
        Delivered::NoBuffers { count, bytes, lost } => {
            assert!(lost > 0);
            (count, bytes)
        }
        Delivered::TooLarge | Delivered::Malformed => (0, 0),
    };
    assert_eq!(count, frames.len());
    if ample {
        let all: usize = frames.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(bytes, all);
    }
}

/// What is said about a frame holds, and the receiver has asked for it.
fn hints(header: &VnetHeader, len: usize, to: &Offloads, ample: bool) {
    assert!(to.guest_csum || header.flags == 0);
    assert_eq!(header.flags & !3, 0);
    if header.needs_csum() && ample {
        assert!(usize::from(header.csum_start) >= 14);
        assert!(usize::from(header.csum_start) + usize::from(header.csum_offset) + 2 <= len);
    }
    let ecn = header.gso_type & VnetHeader::GSO_ECN != 0;
    let taken = match header.gso_type & !VnetHeader::GSO_ECN {
        VnetHeader::GSO_NONE => !ecn,
        VnetHeader::GSO_TCPV4 => to.guest_tso4,
        VnetHeader::GSO_TCPV6 => to.guest_tso6,
        VnetHeader::GSO_UDP_L4 => to.guest_uso4 || to.guest_uso6,
        _ => false,
    };
    assert!(taken && (!ecn || to.guest_ecn), "{header:?}");
    if header.gso_type != VnetHeader::GSO_NONE && ample {
        assert!(header.needs_csum() && header.gso_size > 0);
        assert!(usize::from(header.hdr_len) < len);
    }
}

/// The frame with its tag changed, made the simple way.
fn retag(built: &Built, tag: TagChange) -> Built {
    let mut changed = built.clone();
    let moved: isize = match tag {
        TagChange::Keep => 0,
        TagChange::Strip => {
            changed.bytes.drain(12..16);
            -4
        }
        TagChange::Push(tci) => {
            let [high, low] = tci.to_be_bytes();
            changed.bytes.splice(12..12, [0x81, 0, high, low]);
            4
        }
        TagChange::Replace(tci) => {
            changed.bytes[14..16].copy_from_slice(&tci.to_be_bytes());
            0
        }
    };
    for at in [
        &mut changed.network,
        &mut changed.transport,
        &mut changed.payload,
    ] {
        *at = at.checked_add_signed(moved).expect("inside");
    }
    changed
}

/// The frame's fate is the one that the receiver's offloads and the MTU say.
fn told_right(told: Delivered, expected: &Built, header: &VnetHeader, to: &Offloads) {
    let payload = expected.bytes.len() - expected.payload;
    let size = usize::from(header.gso_size);
    let large = header.gso_type != VnetHeader::GSO_NONE;
    let longest = if large { payload.min(size) } else { payload };
    if expected.payload - expected.network + longest > usize::from(to.mtu) {
        assert_eq!(told, Delivered::TooLarge);
        return;
    }
    let taken = to.guest_csum
        && (to.guest_ecn || header.gso_type & VnetHeader::GSO_ECN == 0)
        && match (expected.udp, expected.v6) {
            (false, false) => to.guest_tso4,
            (false, true) => to.guest_tso6,
            (true, false) => to.guest_uso4,
            (true, true) => to.guest_uso6,
        };
    let pieces = if large && !taken {
        payload.div_ceil(size).max(1)
    } else {
        1
    };
    let all = match told {
        Delivered::Frame(_) => 1,
        Delivered::Frames { count, .. } => count,
        Delivered::NoBuffers { count, lost, .. } => count + lost,
        Delivered::TooLarge | Delivered::Malformed => 0,
    };
    assert_eq!(all, pieces, "{told:?}");
}

/// What arrived is the frame, put together again.
fn whole(
    sent: &Built,
    header: &VnetHeader,
    frames: &[(VnetHeader, Vec<u8>)],
    told: Delivered,
    partial: bool,
) {
    let mut payload = Vec::new();
    let complete = matches!(told, Delivered::Frame(_) | Delivered::Frames { .. });
    let size = usize::from(header.gso_size);
    for (index, (header, bytes)) in frames.iter().enumerate() {
        let got = Built::read(bytes);
        got.check(header);
        if !partial {
            assert!(*bytes == sent.bytes, "the frame");
        }
        assert_eq!(got.payload, sent.payload);
        let mut like = sent.bytes[..sent.payload].to_vec();
        let last = complete && index + 1 == frames.len();
        let own = |like: &mut Vec<u8>, at: usize, n: usize| {
            like[at..at + n].copy_from_slice(&bytes[at..at + n]);
        };
        // Lengths and checksums have been judged.
        if sent.v6 {
            own(&mut like, sent.network + 4, 2);
        } else {
            own(&mut like, sent.network + 2, 2);
            own(&mut like, sent.network + 10, 2);
            let ident = be16(&sent.bytes, sent.network + 4) + index;
            like[sent.network + 4] = low_byte(ident >> 8);
            like[sent.network + 5] = low_byte(ident);
        }
        own(&mut like, sent.transport + sent.checksum_offset(), 2);
        if sent.udp {
            own(&mut like, sent.transport + 4, 2);
        } else {
            let at = sent.transport + 4;
            let mut word = [0; 4];
            word.copy_from_slice(&sent.bytes[at..at + 4]);
            let offset = u32::try_from(index * size).expect("small");
            let sequence = u32::from_be_bytes(word).wrapping_add(offset);
            like[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
            if index > 0 {
                like[sent.transport + 13] &= 0x7f;
            }
            if !last {
                like[sent.transport + 13] &= !9;
            }
        }
        assert_eq!(bytes[..got.payload], like, "headers of piece {index}");
        payload.extend_from_slice(&bytes[got.payload..]);
    }
    if complete {
        assert!(payload == sent.bytes[sent.payload..], "payload");
    } else {
        assert!(sent.bytes[sent.payload..].starts_with(&payload));
    }
}
