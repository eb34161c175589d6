// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Several queue pairs: which of them a frame comes back on.

use super::bench::{Bench, Incoming};
use crate::net::bits;
use crate::net::packets::ipv4;
use crate::worker::Command;

const PAIRS: u16 = 4;
const CONTROL: usize = 8;
const ALL: [usize; 9] = [0, 1, 2, 3, 4, 5, 6, 7, CONTROL];
const OK: u8 = 0;
const ERR: u8 = 1;

/// The packets of a flow: from the guest, and back.
fn flow(number: u8) -> (Vec<u8>, Vec<u8>) {
    let guest = ([10, 0, 2, 15].into(), 1000 + u16::from(number));
    let peer = ([192, 0, 2, number].into(), 80);
    (ipv4(6, guest, peer), ipv4(6, peer, guest))
}

fn running(features: &[u32]) -> Bench {
    let mut all = vec![bits::CTRL_VQ];
    all.extend(features);
    let mut bench = Bench::running(PAIRS, &all, &ALL);
    for pair in 0..4 {
        bench.give(2 * pair, 30, 2048);
    }
    bench
}

fn set_pairs(bench: &mut Bench, pairs: u16) -> u8 {
    bench.control(CONTROL, 4, 0, &pairs.to_le_bytes())
}

/// The pair on which `frame` comes.
fn comes_on(bench: &mut Bench, frame: &[u8]) -> Option<usize> {
    bench.wire.push(Incoming::new(frame));
    bench.poll();
    let mut found = None;
    for pair in 0..4 {
        for came in bench.frames(2 * pair) {
            assert_eq!((came.as_slice(), found), (frame, None));
            found = Some(pair);
            bench.give(2 * pair, 1, 2048);
        }
    }
    found
}

/// `struct virtio_net_rss_config`.
fn rss(types: u32, table: &[u16], unclassified: u16, transmit: u16, key: &[u8]) -> Vec<u8> {
    let mask = u16::try_from(table.len()).expect("short").wrapping_sub(1);
    let mut bytes = types.to_le_bytes().to_vec();
    bytes.extend(mask.to_le_bytes());
    bytes.extend(unclassified.to_le_bytes());
    for entry in table {
        bytes.extend(entry.to_le_bytes());
    }
    bytes.extend(transmit.to_le_bytes());
    bytes.push(u8::try_from(key.len()).expect("short"));
    bytes.extend(key);
    bytes
}

const KEY: [u8; 40] = crate::net::hash::tests::KEY;

#[test]
fn a_flow_comes_back_on_the_pair_on_which_it_was_sent() {
    let mut bench = running(&[bits::MQ]);
    assert_eq!(set_pairs(&mut bench, 4), OK);
    assert_eq!(bench.wire.state().guest.pairs, 4);
    for round in 0..3 {
        for number in 0..16 {
            let pair = usize::from(number + round) % 4;
            let (there, back) = flow(number);
            bench.send(2 * pair + 1, &there);
            assert_eq!(comes_on(&mut bench, &back), Some(pair));
            assert_eq!(bench.reclaim(2 * pair + 1), 1);
        }
    }
    let sent: Vec<u16> = bench.wire.state().sent.iter().map(|sent| sent.0).collect();
    assert_eq!(sent[..5], [0, 1, 2, 3, 0], "the back end hears the pair");
    // Frames without a flow have a place, too.
    assert_eq!(comes_on(&mut bench, &[0xff; 60]), Some(0));
}

#[test]
fn only_the_first_pair_is_used_until_more_are_enabled() {
    let mut bench = running(&[bits::MQ]);
    for number in 0..16 {
        let (there, back) = flow(number);
        bench.send(7, &there);
        assert_eq!(comes_on(&mut bench, &back), Some(0));
    }
    assert_eq!(
        bench.reclaim(7),
        16,
        "what is sent too early is no reason to fail"
    );
    for wrong in [0, 5, 0x8000, u16::MAX] {
        assert_eq!(set_pairs(&mut bench, wrong), ERR);
    }
    assert_eq!(set_pairs(&mut bench, 3), OK);
    let used: std::collections::BTreeSet<_> = (0..50)
        .map(|number| comes_on(&mut bench, &flow(number).1))
        .collect();
    assert_eq!(used, [Some(0), Some(1), Some(2)].into());
    assert_eq!(set_pairs(&mut bench, 1), OK);
    assert_eq!(comes_on(&mut bench, &flow(200).1), Some(0));
}

#[test]
fn a_full_pair_does_not_hold_up_others() {
    let mut bench = Bench::running(PAIRS, &[bits::CTRL_VQ, bits::MQ], &ALL);
    assert_eq!(set_pairs(&mut bench, 2), OK);
    bench.give(2, 4, 2048);
    for number in 0..4_u8 {
        bench.wire.push(Incoming::on(0, &[number; 60]));
        bench.wire.push(Incoming::on(1, &[number; 60]));
    }
    bench.poll();
    assert_eq!(bench.frames(2).len(), 4);
    assert_eq!(bench.wire.state().incoming.len(), 4);
    // A kick of the pair that was empty brings the rest, in order.
    bench.give(0, 8, 2048);
    let came: Vec<u8> = bench.frames(0).iter().map(|frame| frame[0]).collect();
    assert_eq!(came, [0, 1, 2, 3]);
}

#[test]
fn without_a_control_queue_the_pairs_that_are_set_up_are_enabled() {
    let mut bench = Bench::running(PAIRS, &[bits::MQ], &[0, 1, 2, 3]);
    assert_eq!(bench.wire.state().guest.pairs, 2);
    bench.give(0, 20, 2048);
    bench.give(2, 20, 2048);
    let (there, back) = flow(9);
    for pair in [1, 0, 1] {
        bench.send(2 * pair + 1, &there);
        assert_eq!(bench.reclaim(2 * pair + 1), 1);
        bench.wire.push(Incoming::new(&back));
        bench.poll();
        assert_eq!(bench.frames(2 * pair).len(), 1);
    }
    for queue in 4..8 {
        bench.set_up(queue, None).expect("a queue");
    }
    assert_eq!(bench.wire.state().guest.pairs, 4);
    bench.tell(Command::ResetQueue(5)).expect("reset");
    assert_eq!(bench.wire.state().guest.pairs, 2);
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut bench = Bench::running(PAIRS, &[bits::CTRL_VQ, bits::CTRL_RX], &[0, 1, 2]);
    assert_eq!(bench.control(2, 0, 0, &[0]), OK);
    assert_eq!(set_pairs_at(&mut bench, 2, 2), ERR);
    // A queue that does not exist with these features is left alone.
    bench.set_up(CONTROL, None).expect("a queue");
    bench.send_raw(CONTROL, &[0, 0, 1]);
    assert_eq!(bench.reclaim(CONTROL), 0);
}

fn set_pairs_at(bench: &mut Bench, queue: usize, pairs: u16) -> u8 {
    bench.control(queue, 4, 0, &pairs.to_le_bytes())
}

#[test]
fn a_control_queue_that_is_kicked_but_not_set_up_does_nothing() {
    let mut bench = Bench::running(PAIRS, &[bits::CTRL_VQ, bits::MQ], &[0, 1]);
    for queue in 2..12 {
        bench.kick(queue);
    }
    assert!(!bench.is_broken());
    bench.set_up(CONTROL, None).expect("a queue");
    assert_eq!(set_pairs(&mut bench, 4), OK);
    // Three of the four are not set up: the first takes what was for them.
    bench.give(0, 16, 2048);
    for number in 0..16 {
        bench.wire.push(Incoming::new(&flow(number).1));
    }
    bench.poll();
    assert_eq!(bench.frames(0).len(), 16);
}

#[test]
fn receive_side_scaling_goes_by_the_drivers_table() {
    let mut bench = running(&[bits::MQ, bits::RSS]);
    // The first published example has the hash 0x51ccc178, its addresses alone 0x323e8fc2.
    let frame = ipv4(
        6,
        ([66, 9, 149, 187].into(), 2794),
        ([161, 142, 100, 80].into(), 1766),
    );
    let mut table = [0; 128];
    table[0x78] = 3;
    table[0x42] = 2;
    let config = |types, table: &[u16]| rss(types, table, 1, 4, &KEY);
    assert_eq!(bench.control(CONTROL, 4, 1, &config(0x3, &table)), OK);
    assert!(bench.wire.state().guest.heads);
    assert_eq!(comes_on(&mut bench, &frame), Some(3));
    assert_eq!(bench.control(CONTROL, 4, 1, &config(0x1, &table)), OK);
    assert_eq!(comes_on(&mut bench, &frame), Some(2));
    assert_eq!(comes_on(&mut bench, &[0xff; 60]), Some(1), "not classified");
    assert_eq!(bench.control(CONTROL, 4, 1, &config(0, &table)), OK);
    assert_eq!(comes_on(&mut bench, &frame), Some(1), "nothing is hashed");
    // A table of eight: the low three bits.
    assert_eq!(
        bench.control(CONTROL, 4, 1, &config(0x2, &[2, 3, 3, 3, 3, 3, 3, 3])),
        OK
    );
    assert_eq!(comes_on(&mut bench, &frame), Some(2));
    // A queue that is being reset: the frame is lost.
    bench.tell(Command::ResetQueue(4)).expect("reset");
    bench.wire.push(Incoming::new(&frame));
    bench.poll();
    assert_eq!(bench.counter("rx_no_queue"), 1);
    assert!(bench.wire.state().incoming.is_empty());
    // The other way of steering is asked for.
    assert_eq!(set_pairs(&mut bench, 1), OK);
    bench.wire.push(Incoming::new(&frame));
    bench.poll();
    assert_eq!(bench.frames(0), [frame]);
    assert!(!bench.wire.state().guest.heads);
}

#[test]
fn tables_and_keys_that_make_no_sense_are_refused_and_change_nothing() {
    let mut bench = running(&[bits::MQ, bits::RSS]);
    let good = rss(0x3, &[1; 128], 1, 4, &KEY);
    assert_eq!(bench.control(CONTROL, 4, 1, &good), OK);
    let long = [7; 41];
    for (what, config) in [
        ("three entries", rss(3, &[0; 3], 0, 4, &KEY)),
        ("no entries", rss(3, &[], 0, 4, &KEY)),
        ("256 entries", rss(3, &[0; 256], 0, 4, &KEY)),
        ("no such pair", rss(3, &[0, 4], 0, 4, &KEY)),
        ("a reserved bit", rss(3, &[0, 0x8000], 0, 4, &KEY)),
        ("no such pair for the rest", rss(3, &[0, 1], 4, 4, &KEY)),
        ("nothing to send with", rss(3, &[0, 1], 0, 0, &KEY)),
        ("too much to send with", rss(3, &[0, 1], 0, 5, &KEY)),
        ("a long key", rss(3, &[0, 1], 0, 4, &long)),
        ("no key", rss(3, &[0, 1], 0, 4, &[])),
        ("unknown types", rss(0x203, &[0, 1], 0, 4, &KEY)),
    ] {
        assert_eq!(bench.control(CONTROL, 4, 1, &config), ERR, "{what}");
    }
    for len in 0..good.len() {
        assert_eq!(
            bench.control(CONTROL, 4, 1, &good[..len]),
            ERR,
            "{len} bytes"
        );
    }
    assert_eq!(
        comes_on(&mut bench, &flow(1).1),
        Some(1),
        "the good one still holds"
    );
    // Short keys end in zeros; no key will do where nothing is hashed.
    assert_eq!(
        bench.control(CONTROL, 4, 1, &rss(3, &[2], 2, 1, &KEY[..1])),
        OK
    );
    assert_eq!(comes_on(&mut bench, &flow(1).1), Some(2));
    assert_eq!(bench.control(CONTROL, 4, 1, &rss(0, &[0], 3, 1, &[])), OK);
    assert_eq!(comes_on(&mut bench, &flow(1).1), Some(3));
}

#[test]
fn the_hash_stands_in_the_header_if_the_driver_wants_it() {
    // Without multiqueue the control queue is the third.
    let mut bench = Bench::running(PAIRS, &[bits::CTRL_VQ, bits::HASH_REPORT], &[0, 1, 2]);
    bench.give(0, 30, 2048);
    let frame = ipv4(
        6,
        ([66, 9, 149, 187].into(), 2794),
        ([161, 142, 100, 80].into(), 1766),
    );
    let hash_of = |bench: &mut Bench, frame: Incoming| {
        bench.wire.push(frame);
        bench.poll();
        let came = bench.received(0).pop().expect("a frame");
        let value = u32::from_le_bytes(came.header[12..16].try_into().expect("four"));
        let report = u16::from_le_bytes(came.header[16..18].try_into().expect("two"));
        assert_eq!(came.header[18..], [0, 0]);
        (value, report)
    };
    assert_eq!(hash_of(&mut bench, Incoming::new(&frame)), (0, 0));
    let config = |types: u32| {
        let mut config = types.to_le_bytes().to_vec();
        config.extend([0, 0, 0, 0, 0, 0, 1, 0]);
        config.push(40);
        config.extend(KEY);
        config
    };
    assert_eq!(bench.control(2, 4, 2, &config(0x1ff)), OK);
    assert!(bench.wire.state().guest.heads);
    assert_eq!(hash_of(&mut bench, Incoming::new(&frame)), (0x51cc_c178, 2));
    assert_eq!(
        hash_of(&mut bench, Incoming::on(0, &frame)),
        (0x51cc_c178, 2),
        "also when the back end has chosen the pair"
    );
    assert_eq!(hash_of(&mut bench, Incoming::new(&[0xff; 60])), (0, 0));
    assert_eq!(bench.control(2, 4, 2, &config(0x200)), ERR);
    for len in 0..config(1).len() {
        assert_eq!(bench.control(2, 4, 2, &config(1)[..len]), ERR);
    }
    assert_eq!(hash_of(&mut bench, Incoming::new(&frame)), (0x51cc_c178, 2));
    bench.send(1, &frame);
    assert_eq!(
        bench.wire.state().sent[0].2,
        frame,
        "headers of 20 bytes both ways"
    );
}
