// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Flows and the queue pairs that they are on.

use super::*;

/// A UDP datagram of the guest to the host, without a checksum.
fn datagram(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 0x0a, 0, 2, 2];
    frame.extend_from_slice(&guest_tcp::MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    let short = |len: usize| u16::try_from(len).expect("short").to_be_bytes();
    frame.extend_from_slice(&short(28 + payload.len()));
    frame.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend_from_slice(&[10, 0, 2, 15]);
    frame.extend_from_slice(&HOST.octets());
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = u16::try_from(!((sum & 0xffff) + (sum >> 16)) & 0xffff).expect("masked");
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&ports.0.to_be_bytes());
    frame.extend_from_slice(&ports.1.to_be_bytes());
    frame.extend_from_slice(&short(8 + payload.len()));
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(payload);
    frame
}

/// A flow, the pair on which its answer came, and the hash that came with it and its type.
type Answered = (u16, usize, Option<(u32, u16)>);

/// Sends datagrams of 16 flows, each on one of the pairs, to the host, which answers; gives the pairs on which answers came,
/// with their hashes.
fn answers(net: &mut NetDriver<'_, DriverBus, Sleep, Vec<u8>>, length: usize) -> Vec<Answered> {
    let socket = std::net::UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let pairs = net.pairs();
    let mut all = Vec::new();
    for flow in 0..16u16 {
        let frame = datagram((1000 + flow, port), &vec![1; length]);
        let pair = usize::from(flow) % pairs;
        let sent = net.transmit_on(pair, [([0; HEADER_LEN], frame.as_slice())]);
        assert_eq!(sent.unwrap(), 1);
        let mut bytes = vec![0; 10000];
        let (got, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!(got, length);
        socket.send_to(&vec![2; length], from).unwrap();
        let begin = Instant::now();
        let mut found = None;
        while found.is_none() {
            for pair in 0..pairs {
                net.receive_on(pair, 64, |frame| {
                    let bytes = frame.copy_to(&mut bytes);
                    if bytes[12..14] == [8, 0] && bytes[23] == 17 {
                        assert_eq!(bytes[42..], vec![2; length]);
                        found = Some((flow, pair, frame.hash));
                    }
                })
                .unwrap();
            }
            if found.is_none() {
                net.wait(Duration::from_millis(20)).unwrap();
            }
            assert!(begin.elapsed() < PATIENCE, "no answer to flow {flow}");
        }
        all.extend(found);
    }
    all
}

#[test]
fn flows_have_queue_pairs_from_the_guest_to_the_kernel() {
    if !in_own_network("flows_have_queue_pairs_from_the_guest_to_the_kernel") {
        return;
    }
    gateway_with("t0", " multi_queue");
    ip("link set t0 mtu 9000");
    let serve = Serve::start("net,backend=tap,ifname=t0,queues=4");
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 256 << 20).expect("memory");
    let four = |features: &[u32]| NetOptions {
        pairs: 4,
        rx_buffer_len: Some(2048),
        buffer_len: 10 << 10,
        ..options(features)
    };
    let start = |serve: &Serve, options: &NetOptions| {
        let mut client = serve.connect();
        pool.lend(&mut client, 1).expect("lent");
        let net = NetDriver::new(client, NET, &pool, options).expect("a device");
        let begin = Instant::now();
        while !ip("link show t0").contains("state UP") {
            assert!(begin.elapsed() < PATIENCE, "no carrier");
        }
        net
    };
    // The kernel answers on the queue that the flow was last seen on.
    let mut net = start(&serve, &four(&[bits::MQ]));
    assert_eq!(net.pairs(), 4);
    for length in [100, 8900] {
        for (flow, pair, hash) in answers(&mut net, length) {
            assert_eq!((pair, hash), (usize::from(flow) % 4, None));
        }
    }
    drop(net);
    // One pair of them.
    let mut net = start(&serve, &options(&[]));
    assert_eq!(net.pairs(), 1);
    assert_eq!(answers(&mut net, 100).len(), 16);
    drop(net);
    // The device looks at each frame, and tells its hash.
    let mut net = start(&serve, &four(&[bits::MQ, bits::HASH_REPORT]));
    for length in [100, 8900] {
        let all = answers(&mut net, length);
        assert!(all.iter().all(|(.., hash)| hash.is_some()), "{all:?}");
    }
    drop(net);
    // All the same with a capture between.
    drop(serve);
    let dir = tempfile::tempdir().unwrap();
    let pcap = dir.path().join("net.pcap");
    let device = format!("net,backend=tap,ifname=t0,queues=4,pcap={}", pcap.display());
    let serve = Serve::start(&device);
    let mut net = start(&serve, &four(&[bits::MQ]));
    for (flow, pair, _) in answers(&mut net, 8900) {
        assert_eq!(pair, usize::from(flow) % 4);
    }
    let recorded = std::fs::read(&pcap).unwrap();
    assert!(recorded.len() > 2 * 16 * 8942, "{} bytes", recorded.len());
}
