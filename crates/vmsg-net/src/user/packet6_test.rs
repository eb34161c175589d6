// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packets of any shape.

use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmsg_mem::RamSlice;

use super::super::packet::ETHERNET;
use super::*;

fn parse_bytes<T>(bytes: &[u8], look: impl FnOnce(Result<IpIn<'_>, Unfit>) -> T) -> T {
    let words: Vec<AtomicU64> = (0..bytes.len().div_ceil(8).max(1))
        .map(|_| AtomicU64::new(0))
        .collect();
    let memory = [RamSlice::from_atomics(&words)];
    let all = Pieces::new(&memory);
    all.write(bytes);
    look(parse(all.take(bytes.len())))
}

#[test]
fn what_is_written_is_read_again() {
    let (src, dst) = ("fd00::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
    for fragment in [
        None,
        Some(Fragment {
            ident: 0x1234_5678,
            offset: 1440,
            more: true,
        }),
        Some(Fragment {
            ident: 9,
            offset: 65_520,
            more: false,
        }),
    ] {
        let out = IpOut {
            hop_limit: 7,
            fragment,
            ..IpOut::new(src, dst, 17)
        };
        let mut bytes = vec![0; out.len() + 8];
        out.emit(&mut bytes, 8);
        parse_bytes(&bytes, |packet| {
            let packet = packet.unwrap();
            assert_eq!((packet.src, packet.dst), (src, dst));
            assert_eq!((packet.protocol, packet.hop_limit), (17, 7));
            assert_eq!(packet.fragment, fragment);
            assert_eq!(packet.payload.len(), 8);
        });
    }
    assert_eq!(ETHERNET + IPV6, super::super::packet::MAX_HEADERS);
}

#[test]
fn a_fragment_behind_the_end_of_a_packet_is_malformed() {
    let out = IpOut {
        fragment: Some(Fragment {
            ident: 9,
            offset: 65_528,
            more: false,
        }),
        ..IpOut::new("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), 17)
    };
    let mut bytes = vec![0; out.len() + 8];
    out.emit(&mut bytes, 8);
    parse_bytes(&bytes, |packet| {
        assert_eq!(packet.err(), Some(Unfit::Malformed));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn chains_of_any_headers_end(
        first in prop::sample::select(vec![0u8, 43, 44, 60, 17, 59, 51]),
        mut bytes in prop::collection::vec(
            prop_oneof![
                4 => prop::sample::select(vec![0u8, 1, 2, 17, 43, 44, 60]),
                1 => any::<u8>(),
            ],
            0..700,
        ),
    ) {
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
        packet.extend_from_slice(&[first, 64]);
        packet.extend_from_slice(&[0xfd; 32]);
        let len = bytes.len();
        packet.append(&mut bytes);
        parse_bytes(&packet, |packet| {
            if let Ok(packet) = packet {
                assert!(packet.payload.len() <= len);
                let known = matches!(packet.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION);
                assert!(!known || packet.fragment.is_some(), "{packet:?}");
                let offset = packet.fragment.map_or(0, |part| part.offset);
                assert!(offset + packet.payload.len() <= MAX_PACKET);
            }
        });
    }
}
