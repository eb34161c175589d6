// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::sync::atomic::AtomicU64;

use vmsg_mem::RamSlice;

use super::super::copy::TagChange;
use super::*;

/// Buffers for frames of any size, `left` of them.
struct Sink<'a> {
    room: [RamSlice<'a>; 1],
    left: usize,
    frames: Vec<(VnetHeader, Vec<u8>)>,
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        (self.left > 0).then(|| Pieces::new(&self.room).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        self.left -= 1;
        let mut bytes = vec![0; len];
        Pieces::new(&self.room).read(&mut bytes);
        self.frames.push((*header, bytes));
    }
}

/// What becomes of `frame`, and what arrives.
fn cut(
    header: VnetHeader,
    frame: &[u8],
    to: &Offloads,
    buffers: usize,
) -> (Delivered, Vec<(VnetHeader, Vec<u8>)>) {
    let source: Vec<AtomicU64> = (0..9000).map(|_| AtomicU64::new(0)).collect();
    let source = [RamSlice::from_atomics(&source)];
    let payload = Pieces::new(&source).take(frame.len());
    payload.write(frame);
    let room: Vec<AtomicU64> = (0..9000).map(|_| AtomicU64::new(0)).collect();
    let mut sink = Sink {
        room: [RamSlice::from_atomics(&room)],
        left: buffers,
        frames: Vec::new(),
    };
    let frame = TxFrame { header, payload };
    let mut head = [0; Target::HEAD];
    let len = payload.read(&mut head);
    let told = super::super::copy::deliver(&frame, &head[..len], TagChange::Keep, to, &mut sink);
    (told, sink.frames)
}

fn short(n: usize) -> [u8; 2] {
    u16::try_from(n).expect("short").to_be_bytes()
}

/// TCP over IPv6 behind an extension header with `extension` bytes.
fn tcp6(next: u8, extension: &[u8], payload: usize) -> (VnetHeader, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd];
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(short(extension.len() + 20 + payload));
    frame.extend([next, 64]);
    frame.extend([0xfd; 15]);
    frame.push(1);
    frame.extend([0xfd; 15]);
    frame.push(2);
    frame.extend(extension);
    let start = frame.len();
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
    frame.extend([0xab, 0xcd, 0, 0]);
    frame.extend((0..=250).cycle().take(payload));
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: VnetHeader::GSO_TCPV6,
        hdr_len: 0,
        gso_size: 1000,
        csum_start: narrow(start),
        csum_offset: 16,
    };
    (header, frame)
}

const ALL: Offloads = Offloads::ALL;
const MTU: usize = 1500;

fn plain() -> Offloads {
    Offloads {
        mtu: narrow(MTU),
        ..Offloads::NONE
    }
}

#[test]
fn a_packet_that_is_still_to_be_routed_keeps_the_sum_of_the_address_only_its_sender_knows() {
    let routing = [
        TCP, 2, 2, 1, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9,
    ];
    let (header, mut frame) = tcp6(ROUTING, &routing, 2500);
    let start = usize::from(header.csum_start);
    let last = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9);
    let mut octets = [0xfd; 16];
    octets[15] = 1;
    let first = Ipv6Addr::from_octets(octets);
    let sum = |len| Sum::pseudo(first.into(), last.into(), TCP, len);
    frame[start + 16..start + 18].copy_from_slice(&sum(2520).folded().to_be_bytes());
    let (told, pieces) = cut(header, &frame, &plain(), 9);
    let bytes = 3 * (start + 20) + 2500;
    assert_eq!(told, Delivered::Frames { count: 3, bytes });
    for (_, piece) in &pieces {
        let mut whole = sum(piece.len() - start);
        whole.add(&piece[start..]);
        assert!(whole.is_valid());
    }
    // Handed on whole, it has the sum that it came with.
    let (_, whole) = cut(header, &frame, &ALL, 1);
    assert_eq!(whole[0].1, frame);
    // Nobody can tell without a partial checksum.
    let none = VnetHeader { flags: 0, ..header };
    assert_eq!(cut(none, &frame, &plain(), 9).0, Delivered::Malformed);
}

#[test]
fn extension_headers_beyond_the_first_bytes_are_gone_through_up_to_a_limit() {
    for (words, fits) in [(0, true), (10, true), (21, true), (22, false), (255, false)] {
        let mut options = vec![0; 8 + 8 * usize::from(words)];
        options[..2].copy_from_slice(&[TCP, words]);
        let (header, frame) = tcp6(HOP_BY_HOP, &options, 2001);
        let (told, pieces) = cut(header, &frame, &plain(), 9);
        if !fits {
            assert_eq!(told, Delivered::Malformed, "{words}");
            continue;
        }
        let bytes = 3 * (frame.len() - 2001) + 2001;
        assert_eq!(told, Delivered::Frames { count: 3, bytes }, "{words}");
        assert_eq!(pieces[1].1[54..54 + options.len()], options);
    }
}

#[test]
fn segments_that_find_no_buffer_are_counted() {
    let (header, frame) = tcp6(TCP, &[], 9999);
    let (told, pieces) = cut(header, &frame, &plain(), 4);
    assert_eq!(
        told,
        Delivered::NoBuffers {
            count: 4,
            bytes: 4 * 1074,
            lost: 6
        }
    );
    assert_eq!(pieces.len(), 4);
}

#[test]
fn pieces_that_exceed_the_mtu_are_too_large_cut_or_not() {
    let (mut header, frame) = tcp6(TCP, &[], 9999);
    header.gso_size = 1440;
    assert!(matches!(
        cut(header, &frame, &plain(), 9).0,
        Delivered::Frames { .. }
    ));
    header.gso_size = 1441;
    assert_eq!(cut(header, &frame, &plain(), 9).0, Delivered::TooLarge);
    let tso = Offloads {
        mtu: narrow(MTU),
        ..ALL
    };
    assert_eq!(cut(header, &frame, &tso, 9).0, Delivered::TooLarge);
}

#[test]
fn what_contradicts_itself_is_refused() {
    type Spoil = fn(&mut VnetHeader, &mut Vec<u8>);
    let spoilt: &[(&str, Spoil)] = &[
        ("no size", |header, _| header.gso_size = 0),
        ("tiny pieces", |header, _| header.gso_size = 7),
        ("another protocol", |header, _| {
            header.gso_type = VnetHeader::GSO_UDP_L4
        }),
        ("another version", |header, _| {
            header.gso_type = VnetHeader::GSO_TCPV4
        }),
        ("UDP fragmentation", |header, _| {
            header.gso_type = VnetHeader::GSO_UDP
        }),
        ("an unknown type", |header, _| header.gso_type = 2),
        ("nothing but ECN", |header, _| {
            header.gso_type = VnetHeader::GSO_ECN
        }),
        ("start", |header, _| header.csum_start += 2),
        ("start beyond", |header, _| header.csum_start = u16::MAX),
        ("offset", |header, _| header.csum_offset = 6),
        ("IP version", |_, frame| frame[14] = 0x40),
        ("IP length", |_, frame| frame[19] ^= 1),
        ("a fragment", |_, frame| frame[20] = 44),
        ("protocol", |_, frame| frame[20] = 59),
        ("TCP header too short", |_, frame| frame[66] = 0x40),
        ("type", |_, frame| frame[12] = 0x88),
        ("a byte too few", |_, frame| {
            frame.pop();
        }),
        ("no transport header", |_, frame| {
            frame.truncate(60);
            frame[18..20].copy_from_slice(&[0, 6]);
        }),
    ];
    for (what, spoil) in spoilt {
        let (mut header, mut frame) = tcp6(TCP, &[], 3000);
        spoil(&mut header, &mut frame);
        for to in [plain(), ALL] {
            let (told, pieces) = cut(header, &frame, &to, 99);
            assert_eq!(told, Delivered::Malformed, "{what}");
            assert!(pieces.is_empty());
        }
    }
}

#[test]
fn a_wrong_length_of_the_headers_is_put_right() {
    for hdr_len in [0, 1, 14, 73, 200, u16::MAX] {
        let (mut header, frame) = tcp6(TCP, &[], 3000);
        header.hdr_len = hdr_len;
        let (_, whole) = cut(header, &frame, &ALL, 1);
        assert_eq!(whole[0].0.hdr_len, 74);
    }
}

#[test]
fn a_segment_that_fits_into_one_piece_is_not_called_large() {
    let (header, frame) = tcp6(TCP, &[], 1000);
    let (told, pieces) = cut(header, &frame, &ALL, 1);
    assert_eq!(told, Delivered::Frame(frame.len()));
    assert_eq!(pieces[0].0.gso_type, VnetHeader::GSO_NONE);
    assert_eq!(pieces[0].0.flags, VnetHeader::NEEDS_CSUM);
}

#[test]
fn congestion_marks_need_a_receiver_who_knows_them() {
    let (mut header, mut frame) = tcp6(TCP, &[], 2500);
    header.gso_type |= VnetHeader::GSO_ECN;
    frame[67] |= CWR | FIN;
    let (told, whole) = cut(header, &frame, &ALL, 1);
    assert_eq!(told, Delivered::Frame(frame.len()));
    assert_eq!(whole[0].0.gso_type, header.gso_type);
    let without = Offloads {
        guest_ecn: false,
        ..ALL
    };
    let (_, pieces) = cut(header, &frame, &without, 3);
    let flags: Vec<u8> = pieces.iter().map(|(_, piece)| piece[67]).collect();
    assert_eq!(flags, [0x90, 0x10, 0x19]);
}
