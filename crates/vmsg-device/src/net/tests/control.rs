// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queue: filters, offloads, addresses, and commands that are none.

use proptest::prelude::*;

use super::bench::{Bench, Incoming, MAC};
use crate::net::bits;
use crate::net::packets::{ipv4, tagged, to};

const CONTROL: usize = 2;
const OK: u8 = 0;
const ERR: u8 = 1;

const ALL: [u32; 9] = [
    bits::CTRL_VQ,
    bits::CTRL_RX,
    bits::CTRL_RX_EXTRA,
    bits::CTRL_VLAN,
    bits::CTRL_MAC_ADDR,
    bits::GUEST_CSUM,
    bits::GUEST_TSO4,
    bits::CTRL_GUEST_OFFLOADS,
    bits::GUEST_ANNOUNCE,
];

const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

fn running() -> Bench {
    let mut bench = Bench::running(1, &ALL, &[0, 1, CONTROL]);
    bench.give(0, 60, 2048);
    bench
}

fn packet() -> Vec<u8> {
    let end = ("10.0.0.1".parse().expect("an address"), 7);
    ipv4(17, end, end)
}

/// How many of `frames` come in, once chosen by the back end and once by their heads.
fn admitted(bench: &mut Bench, frames: &[Vec<u8>]) -> usize {
    let mut counts = Vec::new();
    for chosen in [false, true] {
        for frame in frames {
            bench.wire.push(if chosen {
                Incoming::on(0, frame)
            } else {
                Incoming::new(frame)
            });
        }
        bench.poll();
        let came = bench.frames(0);
        assert!(came.iter().all(|frame| frames.contains(frame)));
        bench.give(0, came.len(), 2048);
        counts.push(came.len());
    }
    assert_eq!(counts[0], counts[1]);
    counts[0]
}

#[test]
fn frames_for_others_stay_out_once_the_driver_has_said_what_it_wants() {
    let mut bench = running();
    let all = [
        to(MAC, &packet()),
        to(OTHER, &packet()),
        to(GROUP, &packet()),
    ];
    assert_eq!(admitted(&mut bench, &all), 3, "nothing was said");
    assert_eq!(bench.control(CONTROL, 0, 0, &[0]), OK);
    assert_eq!(admitted(&mut bench, &all), 1);
    assert_eq!(bench.counter("rx_filtered"), 4);
    // A table with one address of each kind.
    let mut table = vec![1, 0, 0, 0];
    table.extend(OTHER);
    table.extend([1, 0, 0, 0]);
    table.extend(GROUP);
    assert_eq!(bench.control(CONTROL, 1, 0, &table), OK);
    assert_eq!(admitted(&mut bench, &all), 3);
    assert_eq!(bench.control(CONTROL, 1, 0, &[0; 8]), OK);
    assert_eq!(admitted(&mut bench, &all), 1);
    for (mode, expected) in [(0, 3), (1, 2), (2, 2), (4, 0)] {
        assert_eq!(bench.control(CONTROL, 0, mode, &[1]), OK);
        assert_eq!(admitted(&mut bench, &all), expected, "mode {mode}");
        assert_eq!(bench.control(CONTROL, 0, mode, &[0]), OK);
    }
    // What was refused used no buffers: all that were given are still there or came back full.
    assert_eq!(bench.outstanding(0), 60);
}

#[test]
fn another_address_is_told_and_filtered_by_until_the_reset() {
    let mut bench = running();
    assert_eq!(bench.control(CONTROL, 0, 0, &[0]), OK);
    assert_eq!(bench.control(CONTROL, 1, 1, &OTHER), OK);
    assert_eq!(bench.config_notice(0), Some(OTHER.to_vec()));
    let frames = [to(MAC, &packet()), to(OTHER, &packet())];
    assert_eq!(admitted(&mut bench, &frames), 1);
    assert_eq!(bench.control(CONTROL, 1, 1, &GROUP), ERR);
    assert_eq!(bench.control(CONTROL, 1, 1, &OTHER[..5]), ERR);
    bench.tell(crate::worker::Command::Reset).expect("reset");
    assert_eq!(bench.config_notice(0).expect("all of it")[..6], MAC);
    bench.bring_up(&ALL, &[0, 1, CONTROL]);
    bench.give(0, 8, 2048);
    assert_eq!(admitted(&mut bench, &frames), 2, "the filter is gone");
}

#[test]
fn tagged_frames_come_in_if_their_vlan_was_added() {
    let mut bench = running();
    assert_eq!(bench.control(CONTROL, 0, 0, &[0]), OK);
    let own = to(MAC, &packet());
    let frames = [own.clone(), tagged(&own, 5), tagged(&own, 4095)];
    assert_eq!(admitted(&mut bench, &frames), 1);
    assert_eq!(bench.control(CONTROL, 2, 0, &[5, 0]), OK);
    assert_eq!(admitted(&mut bench, &frames), 2);
    assert_eq!(bench.control(CONTROL, 2, 0, &[0xff, 0x0f]), OK);
    assert_eq!(admitted(&mut bench, &frames), 3);
    assert_eq!(
        bench.control(CONTROL, 2, 0, &[0x00, 0x10]),
        ERR,
        "no such VLAN"
    );
    assert_eq!(bench.control(CONTROL, 2, 1, &[5, 0]), OK);
    assert_eq!(admitted(&mut bench, &frames), 2);
}

#[test]
fn offloads_can_be_switched_as_far_as_they_were_negotiated() {
    let mut bench = running();
    let offloads = |bench: &Bench| bench.wire.state().guest.offloads;
    assert!(offloads(&bench).guest_csum && offloads(&bench).guest_tso4);
    assert!(!offloads(&bench).guest_tso6 && !offloads(&bench).csum);
    let set = |bench: &mut Bench, bits: u64| bench.control(CONTROL, 5, 0, &bits.to_le_bytes());
    assert_eq!(set(&mut bench, 1 << bits::GUEST_CSUM), OK);
    assert!(offloads(&bench).guest_csum && !offloads(&bench).guest_tso4);
    assert_eq!(
        set(&mut bench, 1 << bits::GUEST_TSO6),
        ERR,
        "not negotiated"
    );
    assert!(offloads(&bench).guest_csum);
    assert_eq!(set(&mut bench, 1 << bits::GUEST_TSO4), OK);
    assert!(
        !offloads(&bench).guest_tso4,
        "without checksums there is none"
    );
    assert_eq!(set(&mut bench, 1 << 7 | 1 << 1), OK);
    assert!(offloads(&bench).guest_tso4);
    assert_eq!(bench.control(CONTROL, 5, 0, &[0; 7]), ERR);
}

#[test]
fn commands_of_features_that_were_not_negotiated_are_refused() {
    let mut bench = Bench::running(4, &[bits::CTRL_VQ], &[0, 1, CONTROL]);
    let data = [0; 64];
    for class in 0..8 {
        for code in 0..8 {
            assert_eq!(
                bench.control(CONTROL, class, code, &data),
                ERR,
                "{class} {code}"
            );
        }
    }
    assert_eq!(bench.counter("control_commands"), 64);
    assert_eq!(bench.counter("control_refused"), 64);
}

#[test]
fn tables_shorter_than_they_say_change_nothing() {
    let mut bench = running();
    assert_eq!(bench.control(CONTROL, 0, 0, &[0]), OK);
    let mut table = vec![1, 0, 0, 0];
    table.extend(OTHER);
    table.extend([0; 4]);
    assert_eq!(bench.control(CONTROL, 1, 0, &table), OK);
    let frames = [to(OTHER, &packet())];
    for len in 0..table.len() {
        assert_eq!(bench.control(CONTROL, 1, 0, &table[..len]), ERR, "{len}");
    }
    for count in [3_u32, 0x1000_0000, u32::MAX, u32::MAX / 6 + 1] {
        let mut table = count.to_le_bytes().to_vec();
        table.extend([0; 16]);
        assert_eq!(bench.control(CONTROL, 1, 0, &table), ERR, "{count}");
    }
    assert_eq!(
        admitted(&mut bench, &frames),
        1,
        "the good table still holds"
    );
    // More than are remembered: all of that kind come in.
    let mut table = 1025_u32.to_le_bytes().to_vec();
    table.extend(vec![2; 1025 * 6]);
    table.extend([0; 4]);
    assert_eq!(bench.control(CONTROL, 1, 0, &table), OK);
    let frames = [to(OTHER, &packet()), to(GROUP, &packet())];
    assert_eq!(admitted(&mut bench, &frames), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_is_commanded_the_device_goes_on(
        commands in prop::collection::vec(
            (0..7_u8, 0..7_u8, prop::collection::vec(any::<u8>(), 0..80)), 1..12),
    ) {
        let mut features = ALL.to_vec();
        features.extend([bits::MQ, bits::RSS, bits::HASH_REPORT]);
        let mut bench = Bench::running(4, &features, &[0, 1, 2, 3, 8]);
        bench.give(0, 20, 256);
        for (class, code, data) in commands {
            let ack = bench.control(8, class, code, &data);
            prop_assert!(ack <= ERR);
            bench.wire.push(Incoming::new(&packet()));
            bench.poll();
            bench.send(3, &packet());
            bench.received(0);
        }
        prop_assert!(!bench.is_broken());
        prop_assert!(bench.wire.state().guest.pairs >= 1);
        prop_assert!(bench.wire.state().guest.pairs <= 4);
    }
}
