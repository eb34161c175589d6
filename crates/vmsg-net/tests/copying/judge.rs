// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What may have become of a frame, and what may not.

use vmsg_net::switch::{Delivered, TagChange};
use vmsg_net::{Offloads, VnetHeader};

use super::built::{Built, be16, low_byte};

/// Everything that is said to have arrived has, and nothing else.
pub(super) fn account(told: Delivered, frames: &[(VnetHeader, Vec<u8>)], ample: bool) {
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
pub(super) fn hints(header: &VnetHeader, len: usize, to: &Offloads, ample: bool) {
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
pub(super) fn retag(built: &Built, tag: TagChange) -> Built {
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
pub(super) fn told_right(told: Delivered, expected: &Built, header: &VnetHeader, to: &Offloads) {
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
pub(super) fn whole(
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
