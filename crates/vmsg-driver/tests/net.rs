// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network devices with everything on, from a driver's side of a bus.

mod host;

use std::time::Instant;

use host::{MTU, NET, PAIRS, PATIENCE, Running, connect, over_unix};
use vmsg_device::device::Operation;
use vmsg_device::host::HandleError;
use vmsg_driver::net::{NetDriver, NetOptions, RxFrame, feature_bit};
use vmsg_driver::{BusClient, DmaPool, Error, Event, Sleep};
use vmsg_mem::BusAddr;

type Driver<'p> = NetDriver<'p, vmsg_bus::DriverBus, Sleep, Vec<u8>>;

/// Hash types, and the key of the published examples.
const ALL_TYPES: u32 = 0x1ff;
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

fn pool(client: &mut BusClient) -> DmaPool {
    let pool = DmaPool::new("test", BusAddr(0x1_0000_0000), 16 << 20).unwrap();
    pool.lend(client, 1).unwrap();
    pool
}

fn open<'p>(client: BusClient, pool: &'p DmaPool, pairs: u16, features: &[u32]) -> Driver<'p> {
    let mut options = NetOptions {
        pairs,
        ..NetOptions::default()
    };
    for bit in features {
        options.features.insert(*bit);
    }
    NetDriver::new(client, NET, pool, &options).unwrap()
}

/// A TCP packet over IPv4, in a frame.
fn packet(src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Vec<u8> {
    let mut frame = vec![0xff; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(src.0);
    frame.extend(dst.0);
    frame.extend(src.1.to_be_bytes());
    frame.extend(dst.1.to_be_bytes());
    frame.extend([0; 24]);
    frame
}

/// Waits for the next frame and gives the pair it came on with what `look` sees in it.
fn next<T>(net: &mut Driver<'_>, mut look: impl FnMut(RxFrame<'_>) -> T) -> (usize, T) {
    let start = Instant::now();
    loop {
        for pair in 0..net.pairs() {
            let mut found = None;
            net.receive_on(pair, 1, |frame| found = Some(look(frame)))
                .unwrap();
            if let Some(found) = found {
                return (pair, found);
            }
        }
        assert!(start.elapsed() < PATIENCE, "nothing comes");
        net.wait(PATIENCE).unwrap();
    }
}

fn status(net: &mut Driver<'_>) -> u16 {
    let mut bytes = [0; 2];
    net.read_config(6, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

/// Waits until the device has told that its configuration has changed, and gives the status.
fn status_after_event(net: &mut Driver<'_>) -> u16 {
    let start = Instant::now();
    while net
        .client()
        .take_event(|event| matches!(event, Event::Config { .. }))
        .unwrap()
        .is_none()
    {
        assert!(start.elapsed() < PATIENCE, "no event comes");
        net.client().poll().unwrap();
    }
    status(net)
}

#[test]
fn an_echo_comes_back_on_the_pair_on_which_it_was_sent() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let mut net = open(client, &pool, PAIRS, &[feature_bit::MQ]);
    assert_eq!(net.pairs(), usize::from(PAIRS));
    for number in 0..64_u16 {
        let pair = usize::from(number % PAIRS);
        let frame = packet(([10, 0, 0, 1], number), ([10, 0, 0, 2], 80));
        net.transmit_on(pair, [([0; 12], frame.as_slice())])
            .unwrap();
        let mut bytes = [0; 256];
        let (came_on, same) = next(&mut net, |came| came.copy_to(&mut bytes) == frame);
        assert_eq!((came_on, same), (pair, true));
    }
    let reports = host.handle.list().unwrap();
    let pairs = &reports.iter().find(|report| report.name == "net0").unwrap();
    for pair in &pairs.snapshot.as_ref().unwrap().pairs {
        assert!(pair.contains(&("rx_frames", 16)), "{pair:?}");
        assert!(pair.contains(&("tx_frames", 16)), "{pair:?}");
    }
}

#[test]
fn a_driver_may_use_fewer_pairs_than_there_are() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let mut net = open(client, &pool, 2, &[feature_bit::MQ]);
    assert_eq!(net.pairs(), 2);
    let frame = packet(([10, 0, 0, 1], 7), ([10, 0, 0, 2], 80));
    net.transmit_on(1, [([0; 12], frame.as_slice())]).unwrap();
    assert_eq!(next(&mut net, |_| ()).0, 1);
    // More than there are, and none at all.
    for pairs in [0, PAIRS + 1] {
        let ack = net.control(4, 0, &pairs.to_le_bytes(), PATIENCE).unwrap();
        assert_eq!(ack, 1);
    }
    drop(net);
    let mut client = connect(&host, "one");
    let pool = self::pool(&mut client);
    let mut net = open(client, &pool, PAIRS, &[]);
    assert_eq!(net.pairs(), 1, "without multiqueue");
    net.transmit([frame.as_slice()]).unwrap();
    next(&mut net, |_| ());
    assert_eq!(net.control(0, 0, &[0], PATIENCE).unwrap(), 0);
}

#[test]
fn hashes_are_reported_and_steer() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let features = [feature_bit::MQ, feature_bit::RSS, feature_bit::HASH_REPORT];
    let mut net = open(client, &pool, PAIRS, &features);
    let mut config = ALL_TYPES.to_le_bytes().to_vec();
    config.extend(127_u16.to_le_bytes());
    config.extend([0, 0]);
    for entry in 0..128_u16 {
        config.extend((entry % PAIRS).to_le_bytes());
    }
    config.extend(PAIRS.to_le_bytes());
    config.push(40);
    config.extend(KEY);
    assert_eq!(net.control(4, 1, &config, PATIENCE).unwrap(), 0);
    for (src, dst, hash) in [
        (
            ([66, 9, 149, 187], 2794),
            ([161, 142, 100, 80], 1766),
            0x51cc_c178,
        ),
        (
            ([199, 92, 111, 2], 14230),
            ([65, 69, 140, 83], 4739),
            0xc626_b0ea,
        ),
        (
            ([24, 19, 198, 95], 12898),
            ([12, 22, 207, 184], 38024),
            0x5c2b_394a_u32,
        ),
    ] {
        let frame = packet(src, dst);
        net.transmit_on(1, [([0; 12], frame.as_slice())]).unwrap();
        let mut bytes = [0; 256];
        let (pair, (found, same)) = next(&mut net, |came| {
            (came.hash, came.copy_to(&mut bytes) == frame)
        });
        assert_eq!(found, Some((hash, 2)));
        assert!(same, "the frame begins after a header of 20 bytes");
        assert_eq!(u32::try_from(pair), Ok(hash % u32::from(PAIRS)));
    }
}

fn link(host: &Running, up: bool) {
    let operation = Operation::SetLink(up);
    host.handle.operate(None, "net0", operation).unwrap();
}

#[test]
fn the_driver_hears_that_the_link_goes_down_and_up() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let mut net = open(client, &pool, 1, &[]);
    assert_eq!(status(&mut net), 1);
    let frame = packet(([10, 0, 0, 1], 7), ([10, 0, 0, 2], 80));
    link(&host, false);
    assert_eq!(status_after_event(&mut net), 0);
    net.transmit([frame.as_slice()]).unwrap();
    let start = Instant::now();
    while net.in_flight().unwrap() > 0 {
        assert!(start.elapsed() < PATIENCE, "the frame is not taken");
        net.wait_sent(PATIENCE).unwrap();
    }
    link(&host, true);
    assert_eq!(status_after_event(&mut net), 1);
    let mut second = frame.clone();
    second[50] = 9;
    net.transmit([second.as_slice()]).unwrap();
    let mut bytes = [0; 256];
    let (_, same) = next(&mut net, |came| came.copy_to(&mut bytes) == second);
    assert!(same, "the first one is lost");
}

#[test]
fn the_driver_is_asked_to_announce_itself_and_says_that_it_did() {
    let host = over_unix();
    let announce = || host.handle.operate(None, "net0", Operation::Announce);
    assert!(matches!(announce(), Err(HandleError::Refused { .. })));
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let mut net = open(client, &pool, 1, &[feature_bit::GUEST_ANNOUNCE]);
    announce().unwrap();
    assert_eq!(status_after_event(&mut net), 3);
    assert_eq!(net.control(3, 0, &[], PATIENCE).unwrap(), 0);
    assert_eq!(status_after_event(&mut net), 1);
}

#[test]
fn features_without_what_they_need_are_refused() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool(&mut client);
    let options = NetOptions {
        features: virtio_msg::FeatureSet::from_bits(&[32, feature_bit::RSS]),
        ..NetOptions::default()
    };
    match NetDriver::new(client, NET, &pool, &options) {
        Err(Error::FeaturesRefused(_)) => {}
        other => panic!("{:?}", other.map(|_| ())),
    }
    // The device is free for the next one.
    let mut client = connect(&host, "next");
    let pool = self::pool(&mut client);
    let mut net = open(client, &pool, 1, &[]);
    let mut mtu = [0; 2];
    net.read_config(10, &mut mtu).unwrap();
    assert_eq!(u16::from_le_bytes(mtu), MTU);
}
