// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::super::packets::{Extension, ipv4, ipv6, tagged};
use super::*;

const ONE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 2, 15), 4000);
const TWO: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 7), 80);

fn hash(frame: &[u8]) -> u64 {
    Flow::of(frame).expect("an IP packet").symmetric_hash()
}

#[test]
fn both_directions_of_a_flow_have_one_hash_and_others_have_others() {
    let there = ipv4(TCP, ONE, TWO);
    let back = ipv4(TCP, TWO, ONE);
    assert_eq!(hash(&there), hash(&back));
    assert_ne!(hash(&there), hash(&ipv4(UDP, ONE, TWO)));
    // The ports exchanged without the addresses are another flow.
    assert_ne!(
        hash(&there),
        hash(&ipv4(TCP, (ONE.0, TWO.1), (TWO.0, ONE.1)))
    );
    let (a, b) = ((Ipv6Addr::LOCALHOST, 1), (Ipv6Addr::UNSPECIFIED, 2));
    assert_eq!(hash(&ipv6(TCP, a, b, &[])), hash(&ipv6(TCP, b, a, &[])));
}

#[test]
fn tags_and_extensions_are_skipped() {
    let frame = ipv4(TCP, ONE, TWO);
    let twice = tagged(&tagged(&frame, 5), 6);
    assert_eq!(Flow::of(&twice), Flow::of(&frame));
    assert_eq!(Flow::of(&tagged(&twice, 7)), None, "nobody has three tags");
    let (a, b) = ((Ipv6Addr::LOCALHOST, 1), (Ipv6Addr::LOCALHOST, 2));
    let frame = ipv6(UDP, a, b, &[Extension::HopByHop, Extension::HopByHop]);
    let flow = Flow::of(&frame).expect("IP");
    assert!(flow.extended);
    assert_eq!(flow.transport, Transport::Udp([0, 1, 0, 2]));
    let flow = Flow::of(&ipv6(UDP, a, b, &[Extension::Fragment])).expect("IP");
    assert_eq!(flow.transport, Transport::Other);
}

proptest! {
    #[test]
    fn whatever_a_frame_holds_is_read_without_harm(
        mut frame in prop::collection::vec(any::<u8>(), 0..160),
        kind in prop::sample::select(vec![0x0800_u16, 0x86dd, 0x8100, 0x0806]),
        first in prop::sample::select(vec![0x45_u8, 0x4f, 0x60, 0x00]),
        next in prop::sample::select(vec![0_u8, 6, 17, 43, 44, 51, 60, 135]),
    ) {
        if frame.len() > 20 {
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame[14] = first;
            frame[20] = next;
        }
        for len in 0..frame.len() {
            if let Some(flow) = Flow::of(&frame[..len]) {
                flow.symmetric_hash();
            }
        }
    }
}
