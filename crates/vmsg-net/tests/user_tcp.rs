// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP through the user-mode stack, between smoltcp as the guest and sockets of the host.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{Exchange, GATEWAY, World, peer};
use smoltcp::socket::tcp;
use vmsg_net::user::{HostForward, Protocol, UserConfig};
use vmsg_net::{Backend, Offloads};

const MIB: usize = 1 << 20;

/// A server for one client of `seed`.
fn server(seed: u64, len: usize) -> (u16, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let thread = thread::spawn(move || peer(listener.accept().expect("accept").0, seed, len));
    (port, thread)
}

fn both_ways(world: &mut World, up: usize, down: usize, buffer: usize) {
    let (port, server) = server(7, down);
    let handle = world.connect((GATEWAY, port), 40001, buffer);
    let mut exchange = Exchange::new(handle, 7, up);
    world.run("exchange", |world| exchange.step(world));
    assert_eq!(exchange.received, down);
    world.run("close", |world| {
        world.tcp(handle).state() == tcp::State::TimeWait
            || world.tcp(handle).state() == tcp::State::Closed
    });
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), up);
}

#[test]
fn sixteen_mebibytes_go_up_and_down_with_right_checksums() {
    let mut world = World::new(UserConfig::default());
    both_ways(&mut world, 16 * MIB, 16 * MIB, 256 << 10);
    world.run("flow is gone", |world| world.user.flows().0 == 0);
    assert_eq!(world.user.counters().malformed, 0);
}

#[test]
fn sixteen_mebibytes_go_up_and_down_in_large_segments() {
    let mut world = World::with(UserConfig::default(), World::offloads());
    both_ways(&mut world, 16 * MIB, 16 * MIB, MIB);
}

#[test]
fn lost_frames_are_sent_again() {
    for (loss, offloads) in [
        (10, Offloads::NONE),
        (20, Offloads::NONE),
        (20, World::offloads()),
    ] {
        let mut world = World::with(UserConfig::default(), offloads);
        world.loss = loss;
        world.random.0 ^= loss << 7;
        // Who has little time sends few and large frames, of which all may come through.
        for _ in 0..20 {
            both_ways(&mut world, MIB / 4, 2 * MIB, 64 << 10);
            if world.user.counters().tcp_retransmits > 0 {
                break;
            }
        }
        assert!(world.user.counters().tcp_retransmits > 0);
    }
}

#[test]
fn a_guest_with_few_buffers_gets_everything() {
    let mut world = World::with(UserConfig::default(), World::offloads());
    world.buffers = 1;
    both_ways(&mut world, MIB, 2 * MIB, 64 << 10);
}

#[test]
fn a_guest_with_a_tiny_window_gets_everything() {
    let mut world = World::new(UserConfig::default());
    both_ways(&mut world, 64 << 10, 64 << 10, 1000);
}

#[test]
fn a_closed_port_is_refused() {
    let mut world = World::new(UserConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    drop(listener);
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("refused", |world| {
        world.tcp(handle).state() == tcp::State::Closed
    });
    assert_eq!(world.user.flows().0, 0);
}

#[test]
fn what_must_not_be_reached_is_refused() {
    let mut world = World::new(UserConfig {
        host_loopback: false,
        ..UserConfig::default()
    });
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    for (i, to) in [GATEWAY, Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 9, 9, 9)]
        .iter()
        .enumerate()
    {
        let handle = world.connect((*to, port), 40001 + u16::try_from(i).expect("few"), 4096);
        world.run("refused", |world| {
            world.tcp(handle).state() == tcp::State::Closed
        });
    }
    assert_eq!(world.user.counters().refused, 3);
}

#[test]
fn the_host_may_close_first_and_still_be_sent_to() {
    let mut world = World::new(UserConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("accept");
        socket.write_all(b"bye").expect("write");
        socket.shutdown(Shutdown::Write).expect("shutdown");
        let mut all = Vec::new();
        socket.read_to_end(&mut all).expect("read");
        all
    });
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("their end", |world| {
        world.tcp(handle).state() == tcp::State::CloseWait
    });
    let socket = world.tcp(handle);
    assert_eq!(
        socket
            .recv(|bytes| (bytes.len(), bytes.to_vec()))
            .expect("data"),
        b"bye"
    );
    socket.send_slice(b"still here").expect("send");
    socket.close();
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), b"still here");
    world.run("closed", |world| {
        world.tcp(handle).state() == tcp::State::Closed
    });
    world.run("flow is gone", |world| world.user.flows().0 == 0);
}

#[test]
fn resets_go_through_both_ways() {
    let mut world = World::new(UserConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("open", |world| world.tcp(handle).may_send());
    let (mut socket, _) = listener.accept().expect("accept");
    world.tcp(handle).abort();
    world.run("gone", |world| world.user.flows().0 == 0);
    let error = socket.read(&mut [0; 10]).expect_err("reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let handle = world.connect((GATEWAY, port), 40002, 4096);
    world.run("open", |world| world.tcp(handle).may_send());
    let (socket, _) = listener.accept().expect("accept");
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).expect("linger");
    drop(socket);
    world.run("reset", |world| {
        world.tcp(handle).state() == tcp::State::Closed
    });
    assert_eq!(world.user.flows().0, 0);
}

#[test]
fn a_slow_host_holds_the_guest_back_and_loses_nothing() {
    let mut world = World::new(UserConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY, port), 40001, 256 << 10);
    let mut exchange = Exchange::new(handle, 3, 32 * MIB);
    let mut last = (0, 0);
    // Nobody reads until the guest cannot send any more.
    world.run("full", |world| {
        exchange.step(world);
        last = if last.0 == exchange.sent {
            (last.0, last.1 + 1)
        } else {
            (exchange.sent, 0)
        };
        exchange.sent > 0 && last.1 > 100
    });
    assert!(exchange.sent < 32 * MIB, "everything fitted into buffers");
    let server = thread::spawn(move || peer(listener.accept().expect("accept").0, 3, 10));
    world.run("exchange", |world| exchange.step(world));
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), 32 * MIB);
}

#[test]
fn a_slow_guest_holds_the_host_back_and_loses_nothing() {
    let mut world = World::with(UserConfig::default(), World::offloads());
    let (port, server) = server(5, 4 * MIB);
    let handle = world.connect((GATEWAY, port), 40001, 16 << 10);
    let mut exchange = Exchange::new(handle, 5, 0);
    exchange.gulp = 3000;
    // A while without reading: the window closes, and is probed.
    world.run("closed window", |world| {
        world.tcp(handle).recv_queue() == 16 << 10 && world.user.next_timeout().is_some()
    });
    world.run("exchange", |world| exchange.step(world));
    assert_eq!(exchange.received, 4 * MIB);
    world.run("server", |_| server.is_finished());
    server.join().expect("server");
}

#[test]
fn many_connections_live_side_by_side() {
    let mut world = World::with(UserConfig::default(), World::offloads());
    const MANY: usize = 100;
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || {
        let threads: Vec<_> = (0..MANY)
            .map(|_| {
                let (socket, _) = listener.accept().expect("accept");
                thread::spawn(move || peer(socket, 11, 20000))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("peer"))
            .sum::<usize>()
    });
    let mut exchanges: Vec<_> = (0..MANY)
        .map(|i| {
            Exchange::new(
                world.connect(
                    (GATEWAY, port),
                    41000 + u16::try_from(i).expect("few"),
                    8192,
                ),
                11,
                30000,
            )
        })
        .collect();
    world.run("all", |world| {
        let mut done = true;
        for exchange in &mut exchanges {
            done &= exchange.step(world);
        }
        done
    });
    assert!(exchanges.iter().all(|exchange| exchange.received == 20000));
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), MANY * 30000);
}

#[test]
fn a_port_of_the_host_leads_into_the_guest() {
    for restrict in [false, true] {
        let mut world = World::new(UserConfig {
            restrict,
            forwards: vec![HostForward {
                protocol: Protocol::Tcp,
                host: "127.0.0.1:0".parse().expect("address"),
                guest_addr: None,
                guest_port: 22,
            }],
            ..UserConfig::default()
        });
        let addr: SocketAddr = world.user.forward_addresses()[0].expect("address");
        let handle = world.tcp_socket(64 << 10);
        world.tcp(handle).listen(22).expect("listen");
        let client =
            thread::spawn(move || peer(TcpStream::connect(addr).expect("connect"), 13, MIB));
        world.run("connected", |world| world.tcp(handle).may_send());
        assert_eq!(
            world.tcp(handle).remote_endpoint().expect("peer").addr,
            smoltcp::wire::IpAddress::Ipv4(GATEWAY)
        );
        let mut exchange = Exchange::new(handle, 13, MIB);
        world.run("exchange", |world| exchange.step(world));
        assert_eq!(exchange.received, MIB);
        world.run("client", |_| client.is_finished());
        assert_eq!(client.join().expect("client"), MIB);
    }
}

#[test]
fn a_client_is_turned_away_if_the_guest_does_not_listen() {
    let mut world = World::new(UserConfig {
        forwards: vec![HostForward {
            protocol: Protocol::Tcp,
            host: "127.0.0.1:0".parse().expect("address"),
            guest_addr: None,
            guest_port: 22,
        }],
        ..UserConfig::default()
    });
    let addr = world.user.forward_addresses()[0].expect("address");
    let mut client = TcpStream::connect(addr).expect("connect");
    client.set_nonblocking(true).expect("nonblocking");
    world.run("reset", |_| match client.read(&mut [0; 1]) {
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    });
    assert_eq!(world.user.flows().0, 0);
}

#[test]
fn urgent_bytes_are_bytes() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let mut world = World::new(UserConfig::default());
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("open", |world| world.tcp(handle).may_send());
    let (socket, _) = listener.accept().expect("accept");
    for (bytes, flags) in [
        (&b"abc"[..], rustix::net::SendFlags::empty()),
        (b"d", rustix::net::SendFlags::OOB),
        (b"ef", rustix::net::SendFlags::empty()),
    ] {
        rustix::net::send(&socket, bytes, flags).expect("send");
    }
    let mut all = Vec::new();
    world.run("all", |world| {
        let socket = world.tcp(handle);
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), all.extend_from_slice(bytes)))
                .expect("open");
        }
        all.len() >= 6
    });
    assert_eq!(all, b"abcdef");
}
