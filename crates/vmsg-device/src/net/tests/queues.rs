// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Features, configuration, buffers, and queues that are reset.

use vmsg_net::{Offloads, VnetHeader};

use super::bench::{Bench, Incoming, MAC};
use crate::net::{Mac, Settings, bits};
use crate::worker::Command;

#[test]
fn features_are_those_of_the_back_end_and_of_the_settings() {
    let bench = Bench::new(1);
    for bit in [bits::MQ, bits::RSS, bits::MTU, bits::SPEED_DUPLEX] {
        assert!(!bench.offered.contains(bit), "{bit}");
    }
    let settings = Settings {
        queue_pairs: 3,
        mtu: Some(9000),
        speed: Some(10_000),
        ..Settings::new(Mac(MAC))
    };
    let bench = Bench::with(&settings);
    let all = [
        bits::CSUM,
        bits::GUEST_CSUM,
        bits::CTRL_GUEST_OFFLOADS,
        bits::MTU,
        bits::MAC,
        bits::GUEST_TSO4,
        bits::GUEST_TSO6,
        bits::GUEST_ECN,
        bits::GUEST_UFO,
        bits::HOST_TSO4,
        bits::HOST_TSO6,
        bits::HOST_ECN,
        bits::HOST_UFO,
        bits::MRG_RXBUF,
        bits::STATUS,
        bits::CTRL_VQ,
        bits::CTRL_RX,
        bits::CTRL_VLAN,
        bits::CTRL_RX_EXTRA,
        bits::GUEST_ANNOUNCE,
        bits::MQ,
        bits::CTRL_MAC_ADDR,
        bits::GUEST_USO4,
        bits::GUEST_USO6,
        bits::HOST_USO,
        bits::HASH_REPORT,
        bits::RSS,
        bits::SPEED_DUPLEX,
    ];
    for bit in all {
        assert!(bench.offered.contains(bit), "{bit}");
    }
}

#[test]
fn a_plain_back_end_has_no_offloads_and_one_pair() {
    use crate::device::Device;
    let wire = super::bench::Wire::new(1);
    wire.state().offloads = Offloads::NONE;
    let settings = Settings {
        queue_pairs: 8,
        rss: false,
        hash_report: false,
        ..Settings::new(Mac(MAC))
    };
    let net = crate::net::Net::new(&settings, Box::new(wire));
    assert_eq!(net.queue_sizes().len(), 3);
    for bit in (0..15).chain(54..64) {
        assert!(!net.features().contains(bit) || bit == bits::MAC, "{bit}");
    }
}

#[test]
fn the_configuration_tells_what_there_is() {
    use crate::device::Device;
    let settings = Settings {
        queue_pairs: 300,
        mtu: Some(9000),
        speed: Some(10_000),
        ..Settings::new(Mac(MAC))
    };
    let wire = super::bench::Wire::new(u16::MAX);
    let net = crate::net::Net::new(&settings, Box::new(wire.clone()));
    let mut expected = MAC.to_vec();
    expected.extend([1, 0, 0, 1]);
    expected.extend(9000_u16.to_le_bytes());
    expected.extend(10_000_u32.to_le_bytes());
    expected.extend([1, 40, 128, 0, 0xff, 1, 0, 0]);
    assert_eq!(net.config(), expected);
    assert_eq!(net.queue_sizes().len(), 513);
    let net = crate::net::Net::new(&Settings::new(Mac(MAC)), Box::new(wire));
    assert_eq!(net.config()[8..17], [1, 0, 0, 0, 255, 255, 255, 255, 255]);
}

#[test]
fn features_that_need_others_are_refused_without_them() {
    let mut bench = Bench::new(4);
    for (alone, needed) in [
        (bits::GUEST_TSO4, bits::GUEST_CSUM),
        (bits::GUEST_USO6, bits::GUEST_CSUM),
        (bits::GUEST_UFO, bits::GUEST_CSUM),
        (bits::HOST_TSO6, bits::CSUM),
        (bits::HOST_USO, bits::CSUM),
        (bits::CTRL_RX, bits::CTRL_VQ),
        (bits::CTRL_VLAN, bits::CTRL_VQ),
        (bits::RSS, bits::CTRL_VQ),
    ] {
        let why = bench.negotiate(&[alone]).expect_err("refused");
        assert!(why.contains(" needs "), "{why}");
        bench.negotiate(&[alone, needed]).expect("together");
    }
    let why = bench.negotiate(&[bits::GUEST_ECN, bits::GUEST_CSUM]);
    assert_eq!(why, Err("GUEST_ECN needs GUEST_TSO4 or GUEST_TSO6".into()));
    bench
        .negotiate(&[bits::GUEST_ECN, bits::GUEST_TSO6, bits::GUEST_CSUM])
        .expect("one of the two");
    // As QEMU's vhost-user front end does it.
    bench
        .negotiate(&[bits::MQ, bits::GUEST_ANNOUNCE, bits::HASH_REPORT])
        .expect("tolerated");
    bench.negotiate(&[]).expect("a driver may want nothing");
    bench.negotiate(&[32, 33]).expect("transport");
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    let mut bench = Bench::running(1, &[bits::MRG_RXBUF], &[0, 1]);
    let frame: Vec<u8> = (0..250).collect();
    bench.give(0, 2, 100);
    bench.wire.push(Incoming::new(&frame));
    bench.poll();
    assert_eq!(bench.received(0), [], "two buffers do not suffice");
    bench.give(0, 1, 100);
    let came = bench.received(0).pop().expect("a frame");
    assert_eq!((came.bytes, came.buffers), (frame, 3));
    assert_eq!(bench.pair_counter(0, "rx_frames"), 1);
    assert_eq!(bench.pair_counter(0, "rx_bytes"), 250);
}

#[test]
fn a_receive_queue_that_is_reset_while_a_frame_waits_gets_it_whole_afterwards() {
    let mut bench = Bench::running(1, &[bits::MRG_RXBUF, bits::CTRL_VQ], &[0, 1, 2]);
    let frame: Vec<u8> = (0..250).collect();
    bench.give(0, 2, 100);
    bench.wire.push(Incoming::new(&frame));
    bench.poll();
    assert_eq!(bench.outstanding(0), 2, "too few for the frame");
    bench.tell(Command::ResetQueue(0)).expect("reset");
    bench.set_up(0, None).expect("a queue");
    bench.give(0, 4, 100);
    let came = bench.received(0);
    assert_eq!(came.len(), 1);
    assert_eq!((came[0].buffers, came[0].bytes.clone()), (3, frame));
    // What comes while there is no receive queue is lost, as it would be on a wire.
    bench.tell(Command::ResetQueue(0)).expect("reset");
    bench.wire.push(Incoming::new(&[1; 60]));
    bench.poll();
    assert_eq!(bench.counter("rx_no_queue"), 1);
    bench.set_up(0, None).expect("a queue");
    bench.give(0, 4, 100);
    assert_eq!(bench.received(0), []);
}

#[test]
fn frames_wait_for_a_driver_that_is_not_there_yet() {
    let mut bench = Bench::new(1);
    bench.wire.push(Incoming::new(&[3; 60]));
    bench.poll();
    bench.bring_up(&[], &[1]);
    bench.poll();
    assert_eq!(bench.wire.state().incoming.len(), 1);
    bench.set_up(0, None).expect("a queue");
    bench.give(0, 1, 100);
    assert_eq!(bench.frames(0), [[3; 60]]);
}

#[test]
fn a_frame_that_no_buffer_can_hold_is_dropped_and_those_behind_it_come() {
    for features in [&[][..], &[bits::MRG_RXBUF]] {
        let mut bench = Bench::running(1, features, &[0, 1]);
        bench.wire.push(Incoming::new(&[1; 5000]));
        bench.wire.push(Incoming::new(&[2; 40]));
        // All of the queue: with mergeable buffers more could come otherwise.
        bench.give(0, 64, 60);
        assert_eq!(bench.frames(0), [[2; 40]]);
        assert_eq!(bench.pair_counter(0, "rx_too_big"), 1);
    }
}

#[test]
fn frames_longer_than_the_negotiated_mtu_are_dropped_unless_they_are_segmented() {
    let settings = Settings {
        mtu: Some(1400),
        ..Settings::new(Mac(MAC))
    };
    let mut bench = Bench::with(&settings);
    bench.bring_up(&[bits::MTU], &[0, 1]);
    bench.give(0, 8, 4096);
    bench.wire.push(Incoming::new(&[1; 1418]));
    bench.wire.push(Incoming::new(&[2; 1419]));
    let header = VnetHeader {
        gso_type: VnetHeader::GSO_TCPV4,
        ..VnetHeader::default()
    };
    bench.wire.push(Incoming {
        header,
        ..Incoming::new(&[3; 3000])
    });
    bench.poll();
    let came: Vec<u8> = bench.frames(0).iter().map(|frame| frame[0]).collect();
    assert_eq!(came, [1, 3]);
    assert_eq!(bench.pair_counter(0, "rx_over_mtu"), 1);
    assert_eq!(bench.wire.state().guest.offloads.mtu, 1400);
}

#[test]
fn a_back_end_that_takes_no_more_is_asked_again_and_the_order_kept() {
    let mut bench = Bench::running(2, &[bits::CTRL_VQ, bits::MQ], &[0, 1, 2, 3, 4]);
    assert_eq!(bench.control(4, 4, 0, &[2, 0]), 0);
    bench.wire.state().patience = 3;
    for number in 0..5_u8 {
        bench.send(1, &[number; 60]);
        bench.send(3, &[number + 100; 60]);
    }
    bench.send_raw(1, &[0; 5]);
    assert_eq!(bench.wire.state().sent.len(), 3);
    bench.wire.state().patience = usize::MAX;
    bench.poll();
    let sent = |pair: u16| -> Vec<u8> {
        let state = bench.wire.state();
        let of_pair = state.sent.iter().filter(|sent| sent.0 == pair);
        of_pair.map(|sent| sent.2[0]).collect()
    };
    assert_eq!(sent(0), [0, 1, 2, 3, 4]);
    assert_eq!(sent(1), [100, 101, 102, 103, 104]);
    assert_eq!(bench.pair_counter(0, "tx_malformed"), 1);
    assert_eq!(bench.pair_counter(0, "tx_frames"), 5);
    assert_eq!(bench.pair_counter(1, "tx_bytes"), 300);
    assert_eq!((bench.reclaim(1), bench.reclaim(3)), (6, 5));
}

#[test]
fn a_device_that_is_reset_in_the_middle_begins_anew() {
    let features = [bits::CTRL_VQ, bits::MQ, bits::RSS, bits::HASH_REPORT];
    let mut bench = Bench::running(4, &features, &[0, 1, 2, 3, 8]);
    assert_eq!(bench.control(8, 4, 0, &[2, 0]), 0);
    bench.wire.state().patience = 0;
    bench.send(3, &[1; 60]);
    bench.give(2, 1, 20);
    bench.wire.push(Incoming::on(1, &[2; 60]));
    bench.poll();
    bench.tell(Command::Reset).expect("reset");
    assert_eq!(bench.wire.state().guest, vmsg_net::Guest::NONE);
    bench.wire.state().patience = usize::MAX;
    bench.poll();
    assert_eq!(bench.wire.state().sent.len(), 0);
    bench.bring_up(&[], &[0, 1]);
    bench.give(0, 4, 100);
    bench.send(1, &[3; 60]);
    assert_eq!(bench.wire.state().sent.len(), 1);
    assert_eq!(bench.wire.state().guest.pairs, 1);
    assert!(!bench.is_broken());
}
