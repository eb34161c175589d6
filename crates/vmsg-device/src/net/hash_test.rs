// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::net::{Ipv4Addr, Ipv6Addr};

use super::super::packets::{Extension, ipv4, ipv6};
use super::*;

/// The key of the examples in Microsoft's documentation of RSS ("Verifying the RSS Hash Calculation").
pub(in super::super) const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

const TCP: u8 = 6;
const UDP: u8 = 17;

fn hashed(types: u32, frame: &[u8]) -> Option<(u32, u16)> {
    let flow = Flow::of(frame)?;
    let hash = Hasher::new(types, &KEY)?.hash(&flow)?;
    Some((hash.value, hash.report))
}

#[test]
fn the_hashes_of_the_published_examples_come_out_ipv4() {
    // Source, destination, hash of the addresses, hash with ports.
    for (src, sport, dst, dport, ip, tcp) in [
        (
            [66, 9, 149, 187],
            2794,
            [161, 142, 100, 80],
            1766,
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            [199, 92, 111, 2],
            14230,
            [65, 69, 140, 83],
            4739,
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            [24, 19, 198, 95],
            12898,
            [12, 22, 207, 184],
            38024,
            0xd2d0_a5de,
            0x5c2b_394a,
        ),
        (
            [38, 27, 205, 30],
            48228,
            [209, 142, 163, 6],
            2217,
            0x8298_9176,
            0xafc7_327f,
        ),
        (
            [153, 39, 163, 191],
            44251,
            [202, 188, 127, 2],
            1303,
            0x5d18_09c5,
            0x10e8_28a2,
        ),
    ] {
        let (src, dst) = (Ipv4Addr::from(src), Ipv4Addr::from(dst));
        let frame = ipv4(TCP, (src, sport), (dst, dport));
        assert_eq!(hashed(types::IPV4, &frame), Some((ip, 1)));
        assert_eq!(hashed(types::TCPV4 | types::IPV4, &frame), Some((tcp, 2)));
        assert_eq!(hashed(types::TCPV4 | types::UDPV4, &frame), Some((tcp, 2)));
        let frame = ipv4(UDP, (src, sport), (dst, dport));
        assert_eq!(hashed(types::UDPV4 | types::IPV4, &frame), Some((tcp, 3)));
        assert_eq!(hashed(types::TCPV4 | types::IPV4, &frame), Some((ip, 1)));
        assert_eq!(hashed(types::TCPV4, &frame), None);
    }
}

#[test]
fn the_hashes_of_the_published_examples_come_out_ipv6() {
    for (src, sport, dst, dport, ip, tcp) in [
        (
            "3ffe:2501:200:1fff::7",
            2794,
            "3ffe:2501:200:3::1",
            1766,
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            "3ffe:501:8::260:97ff:fe40:efab",
            14230,
            "ff02::1",
            4739,
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
        (
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            44251,
            "fe80::200:f8ff:fe21:67cf",
            38024,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ] {
        let src: Ipv6Addr = src.parse().expect("an address");
        let dst: Ipv6Addr = dst.parse().expect("an address");
        let frame = ipv6(TCP, (src, sport), (dst, dport), &[]);
        assert_eq!(hashed(types::IPV6, &frame), Some((ip, 4)));
        assert_eq!(hashed(types::TCPV6 | types::IPV6, &frame), Some((tcp, 5)));
        let udp = ipv6(UDP, (src, sport), (dst, dport), &[]);
        assert_eq!(hashed(SUPPORTED, &udp), Some((tcp, 6)));
        // The addresses of mobile hosts stand for the others; the same numbers come out.
        let elsewhere: Ipv6Addr = "2001:db8::1".parse().expect("an address");
        let extensions = [Extension::Home(src), Extension::Routed(dst)];
        let frame = ipv6(TCP, (elsewhere, sport), (elsewhere, dport), &extensions);
        assert_eq!(hashed(types::TCP_EX, &frame), Some((tcp, 8)));
        assert_eq!(hashed(types::IP_EX | types::TCPV6, &frame), Some((ip, 7)));
        let frame = ipv6(UDP, (elsewhere, sport), (elsewhere, dport), &extensions);
        assert_eq!(hashed(SUPPORTED, &frame), Some((tcp, 9)));
        // Without the types for extensions they are skipped.
        let frame = ipv6(TCP, (src, sport), (dst, dport), &[Extension::HopByHop]);
        assert_eq!(hashed(types::TCPV6, &frame), Some((tcp, 5)));
    }
}

#[test]
fn what_is_not_wanted_or_no_ip_has_no_hash() {
    assert!(Hasher::new(0, &KEY).is_none());
    let src = (Ipv4Addr::new(10, 0, 0, 1), 1);
    let frame = ipv4(TCP, src, src);
    assert_eq!(
        hashed(types::IPV6 | types::UDPV6 | types::TCPV6, &frame),
        None
    );
    let mut arp = frame.clone();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(hashed(SUPPORTED, &arp), None);
    // A fragment: its ports, if it has any, are not looked at.
    let mut fragment = frame.clone();
    fragment[20] |= 0x20;
    assert_eq!(
        hashed(SUPPORTED, &fragment),
        hashed(types::IPV4, &frame),
        "by addresses alone"
    );
}

/// The hash as it is defined, bit by bit.
fn slowly(key: &[u8], input: &[u8]) -> u32 {
    let mut window: Vec<bool> = key
        .iter()
        .flat_map(|byte| (0..8).map(move |bit| byte >> (7 - bit) & 1 != 0))
        .collect();
    window.resize(40 * 8 + 32, false);
    let mut hash = 0;
    for (at, byte) in input.iter().enumerate() {
        for bit in 0..8 {
            if byte >> (7 - bit) & 1 != 0 {
                let begin = at * 8 + bit;
                hash ^= window[begin..begin + 32]
                    .iter()
                    .fold(0, |word, bit| word << 1 | u32::from(*bit));
            }
        }
    }
    hash
}

proptest::proptest! {
    #[test]
    fn the_table_gives_what_the_definition_gives(
        key in proptest::collection::vec(proptest::num::u8::ANY, 0..=KEY_LEN),
        input in proptest::collection::vec(proptest::num::u8::ANY, 0..=INPUT),
    ) {
        proptest::prop_assert_eq!(Toeplitz::new(&key).hash(&input), slowly(&key, &input));
    }
}
