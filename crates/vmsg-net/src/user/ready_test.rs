// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who waits for a guest that takes nothing.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vmsg_mem::{Pieces, RamSlice};

use super::*;

fn question(src: u16, dst: u16) -> Vec<u8> {
    let headers = ETHERNET + packet::IPV4;
    let mut frame = vec![0; headers + udp::HEADER];
    let guest = EthernetAddress([2, 0, 0, 0, 0, 1]);
    packet::emit_ethernet(&mut frame, guest, EthernetAddress::BROADCAST, 0x0800);
    let header = packet::IpOut::new(
        Ipv4Addr::new(10, 0, 2, 15).into(),
        Ipv4Addr::new(10, 0, 2, 2).into(),
        UDP,
    );
    header.emit(&mut frame[ETHERNET..], udp::HEADER);
    let at = headers;
    frame[at..at + 2].copy_from_slice(&src.to_be_bytes());
    frame[at + 2..at + 4].copy_from_slice(&dst.to_be_bytes());
    frame[at + 5] = 8;
    frame
}

#[test]
fn those_that_are_gone_do_not_wait_for_ever() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut user = User::new(UserConfig {
        limits: Limits {
            datagram_flows: 4,
            ..Limits::default()
        },
        ..UserConfig::default()
    })
    .unwrap();
    let memory = [const { AtomicU64::new(0) }; 8];
    let pieces = [RamSlice::from_atomics(&memory)];
    let room = Pieces::new(&pieces);
    let mut most = 0;
    for src in 1000..3000 {
        let frame = question(src, port);
        room.write(&frame);
        let frame = TxFrame {
            header: VnetHeader::default(),
            payload: room.take(frame.len()),
        };
        let now = Instant::now();
        user.transmit(now, 0, &[frame]);
        let (_, from) = server.recv_from(&mut []).unwrap();
        server.send_to(b"answer", from).unwrap();
        user.poll(now);
        most = most.max(user.net.line.len());
    }
    assert_eq!(user.net.counters.datagram_flows, 2000);
    assert!(most > 4, "some were gone while they waited");
    eprintln!("{most}");
    assert!(most < 100, "{most} wait");
    assert_eq!(user.flows().1, 4);
    // Those that are there still have their turn.
    user.poll(Instant::now() + Duration::from_millis(1));
    assert!(
        user.net
            .line
            .iter()
            .any(|source| matches!(source, Source::Datagram(_)))
    );
}
