// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Thousands of connections at a time, and how those that send much and those that send little
//! get along.

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use common::{Exchange, GATEWAY, GATEWAY6, Sink, World, memory, peer, receive, transmit};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use vmsg_net::user::{Limits, User, UserConfig};
use vmsg_net::{Backend, Offloads, VnetHeader};

/// As many descriptors as there may be; returns how many connections they are good for.
fn connections(wished: usize) -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
    .expect("the soft limit may be raised to the hard one");
    let most = maximum.map_or(wished, |most| usize::try_from(most).expect("64 bits"));
    // Both ends are here, and other tests beside.
    wished.min(most.saturating_sub(1000) / 2)
}

fn listen(to: IpAddr) -> (TcpListener, u16) {
    let listener = TcpListener::bind(match to {
        IpAddr::V4(_) => "127.0.0.1:0",
        IpAddr::V6(_) => "[::1]:0",
    })
    .expect("listen");
    let port = listener.local_addr().expect("address").port();
    (listener, port)
}

/// Half of them over IPv6. All stay open and alive while 64 of them transfer much in both
/// directions.
#[test]
fn two_thousand_connections_of_which_64_are_busy() {
    const BUSY: usize = 64;
    const BYTES: usize = 128 << 10;
    let count = connections(2000);
    assert!(count > 2 * BUSY, "descriptors for {count} connections only");
    let mut world = World::new(UserConfig::default());
    let targets = [IpAddr::from(GATEWAY), GATEWAY6.into()];
    let listeners = targets.map(listen);
    for (listener, _) in &listeners {
        listener.set_nonblocking(true).expect("nonblocking");
    }
    let mut handles: Vec<SocketHandle> = Vec::new();
    let mut peers: HashMap<(usize, u16), TcpStream> = HashMap::new();
    let buffer = |index: usize| if index < BUSY { 16 << 10 } else { 64 };
    while handles.len() < count {
        // Not more at once than may be half open.
        let wave = (count - handles.len()).min(200);
        for _ in 0..wave {
            let index = handles.len();
            let to = (targets[index % 2], listeners[index % 2].1);
            let port = 10_000 + u16::try_from(index).expect("few");
            handles.push(world.connect(to, port, buffer(index)));
        }
        let fresh = handles[handles.len() - wave..].to_vec();
        let mut accepted: Vec<(usize, TcpStream)> = Vec::new();
        world.run("open", |world| {
            for (version, (listener, _)) in listeners.iter().enumerate() {
                while let Ok((socket, _)) = listener.accept() {
                    accepted.push((version, socket));
                }
            }
            accepted.len() == wave && fresh.iter().all(|handle| world.tcp(*handle).may_send())
        });
        // Each says who it is.
        for (handle, n) in fresh.iter().zip(handles.len() - wave..) {
            let name = u16::try_from(n).expect("few").to_be_bytes();
            assert_eq!(world.tcp(*handle).send_slice(&name), Ok(2));
        }
        let mut left = accepted;
        world.run("names", |_| {
            left.retain_mut(|(version, socket)| {
                socket.set_nonblocking(true).expect("nonblocking");
                let mut name = [0; 2];
                match socket.read_exact(&mut name) {
                    Ok(()) => {
                        socket.set_nonblocking(false).expect("blocking");
                        let socket = socket.try_clone().expect("clone");
                        peers.insert((*version, u16::from_be_bytes(name)), socket);
                        false
                    }
                    Err(_) => true,
                }
            });
            left.is_empty()
        });
    }
    assert_eq!(peers.len(), count);
    assert_eq!(world.user.flows().0, count);
    let mut peer_of = |index: usize| {
        let name = u16::try_from(index).expect("few");
        peers.remove(&(index % 2, name)).expect("known")
    };
    // None begins before all are there: one that the kernel lets begin late has not been treated badly here.
    let all_there = Arc::new(Barrier::new(BUSY));
    let servers: Vec<_> = (0..BUSY)
        .map(|index| {
            let socket = peer_of(index);
            let all_there = Arc::clone(&all_there);
            thread::spawn(move || {
                all_there.wait();
                peer(socket, 2 * index as u64, BYTES)
            })
        })
        .collect();
    let mut exchanges: Vec<_> = (0..BUSY)
        .map(|index| Exchange::new(handles[index], 2 * index as u64, BYTES))
        .collect();
    let mut least = None;
    world.run("transfers", |world| {
        let mut done = 0;
        for exchange in &mut exchanges {
            done += usize::from(exchange.step(world));
        }
        if least.is_none() && exchanges.iter().any(|exchange| exchange.received == BYTES) {
            least = exchanges.iter().map(|exchange| exchange.received).min();
        }
        done == BUSY
    });
    for exchange in &exchanges {
        assert_eq!(exchange.received, BYTES);
    }
    let least = least.expect("somebody was first");
    assert!(least > BYTES / 4, "one had {least} when the first was done");
    world.run("servers", |_| {
        servers.iter().all(|server| server.is_finished())
    });
    for server in servers {
        assert_eq!(server.join().expect("server"), BYTES);
    }
    // The others were not forgotten.
    for index in BUSY..count {
        let mut socket = peer_of(index);
        socket.write_all(&[7]).expect("write");
        drop(socket);
    }
    world.run("last words", |world| {
        handles[BUSY..].iter().all(|handle| {
            let socket = world.tcp(*handle);
            socket.recv_queue() == 1 && socket.state() == tcp::State::CloseWait
        })
    });
    for handle in &handles[BUSY..] {
        world.tcp(*handle).close();
    }
    world.run("all gone", |world| world.user.flows().0 == 0);
    assert_eq!(world.user.counters().malformed, 0);
    assert_eq!(world.user.counters().limited, 0);
}

/// Connections that are over make room for new ones at once, however many there are.
#[test]
fn connections_that_are_over_give_way() {
    let (listener, port) = listen(GATEWAY.into());
    let mut world = World::new(UserConfig {
        limits: Limits {
            tcp_flows: 20,
            ..Limits::default()
        },
        ..UserConfig::default()
    });
    listener.set_nonblocking(true).expect("nonblocking");
    let start = Instant::now();
    for n in 0..200 {
        let handle = world.connect((GATEWAY, port), 20_000 + n, 64);
        world.run("open", |world| world.tcp(handle).may_send());
        let mut accepted = None;
        world.run("accepted", |_| {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        drop(accepted);
        world.tcp(handle).close();
        world.run("closed", |world| {
            matches!(
                world.tcp(handle).state(),
                tcp::State::TimeWait | tcp::State::Closed
            )
        });
        world.sockets.remove(handle);
        assert!(world.user.flows().0 <= 20);
    }
    // Each would stay for a second.
    assert!(start.elapsed() < Duration::from_secs(9));
    assert_eq!(world.user.counters().tcp_flows, 200);
}

/// Where the payload of a TCP segment over IPv4 goes, and how long it is.
fn payload(frame: &[u8]) -> Option<(u16, usize)> {
    if frame[12..14] != [8, 0] || frame[23] != 6 {
        return None;
    }
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let len = total - 20 - 4 * usize::from(frame[46] >> 4);
    Some((u16::from_be_bytes([frame[36], frame[37]]), len))
}

/// A step of the world in which frames are counted: those before the first one with payload for
/// `port`, or all.
fn frames_before(
    world: &mut World,
    port: u16,
    store: &[std::sync::atomic::AtomicU64],
) -> (usize, bool) {
    world
        .iface
        .poll(world.guest_now(), &mut world.nic, &mut world.sockets);
    while let Some(frame) = world.nic.tx.pop_front() {
        transmit(&mut world.user, VnetHeader::default(), &frame);
    }
    let now = Instant::now();
    world.user.poll(now);
    let mut sink = Sink::new(store, 64);
    world.user.receive(now, &mut sink);
    let at = sink
        .frames
        .iter()
        .position(|(_, frame)| payload(frame).is_some_and(|(to, len)| to == port && len > 0));
    let frames = at.unwrap_or(sink.frames.len());
    world
        .nic
        .rx
        .extend(sink.frames.into_iter().map(|(_, frame)| frame));
    (frames, at.is_some())
}

/// Bytes that the kernel holds at the other end of `socket`, received and not read (`/proc/net/tcp`: addresses in hexadecimal, fifth
/// field the transmit and the receive queue).
fn received(socket: &TcpStream) -> u64 {
    let port = |address: std::io::Result<SocketAddr>| {
        format!(":{:04X}", address.expect("a TCP socket").port())
    };
    let (here, there) = (port(socket.local_addr()), port(socket.peer_addr()));
    let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc/net/tcp");
    let line = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| fields[1].ends_with(&there) && fields[2].ends_with(&here))
        .expect("the other end");
    let queue = line[4].split_once(':').expect("two queues").1;
    u64::from_str_radix(queue, 16).expect("hexadecimal")
}

/// What the host has for a small flow reaches the guest after a bounded number of frames of 64
/// large ones.
#[test]
fn a_small_flow_waits_for_few_frames_of_64_downloads() {
    const BULK: u16 = 64;
    for offloads in [Offloads::NONE, World::offloads()] {
        let mut world = World::with(UserConfig::default(), offloads);
        let (listener, port) = listen(GATEWAY.into());
        listener.set_nonblocking(true).expect("nonblocking");
        let store = memory(66_000);
        let mut bulk = Vec::new();
        let mut sources = Vec::new();
        let mut handles = Vec::new();
        for n in 0..=BULK {
            let handle = world.connect((GATEWAY, port), 30_000 + n, 256 << 10);
            let mut accepted: Option<(TcpStream, SocketAddr)> = None;
            world.run("open", |world| {
                accepted = accepted.take().or_else(|| listener.accept().ok());
                accepted.is_some() && world.tcp(handle).may_send()
            });
            let socket = accepted.expect("accepted").0;
            socket.set_nonblocking(true).expect("nonblocking");
            socket.set_nodelay(true).expect("nodelay");
            sources.push(socket);
            handles.push(handle);
            bulk.push(0usize);
        }
        let small = sources.pop().expect("the last");
        let small_handle = handles.pop().expect("the last");
        let chunk = vec![1; 1 << 20];
        let mut waits = Vec::new();
        let mut waiting = None;
        // Since the last one.
        let mut start = Instant::now();
        let mut round = 0u32;
        while waits.len() < 200 {
            // The large ones never run dry.
            for source in &sources {
                let _ = { source }.write(&chunk);
            }
            for (handle, received) in handles.iter().zip(&mut bulk) {
                let socket = world.tcp(*handle);
                if socket.can_recv() {
                    *received += socket
                        .recv(|bytes| (bytes.len(), bytes.len()))
                        .expect("open");
                }
            }
            let socket = world.tcp(small_handle);
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), ())).expect("open");
            }
            round += 1;
            if waiting.is_none() && round.is_multiple_of(3) {
                // The kernel may take its time from one end of a socket to the other.
                let before = received(&small);
                { &small }.write_all(b"key").expect("write");
                while received(&small) < before + 3 {
                    assert!(start.elapsed() < common::PATIENCE, "not received");
                    std::thread::yield_now();
                }
                waiting = Some(0);
            }
            let (frames, found) = frames_before(&mut world, 30_000 + BULK, &store);
            if let Some(waited) = &mut waiting {
                *waited += frames;
                if found {
                    waits.extend(waiting.take());
                    start = Instant::now();
                }
            }
            assert!(start.elapsed() < common::PATIENCE, "{waits:?}");
        }
        waits.sort_unstable();
        let total: usize = bulk.iter().sum();
        eprintln!(
            "waits in frames: median {}, 90 % {}, most {}; {total} bytes beside",
            waits[100], waits[180], waits[199]
        );
        let most = *bulk.iter().max().expect("some");
        let least = *bulk[..usize::from(BULK)].iter().min().expect("some");
        assert!(
            least > 0 && most < 3 * least + (512 << 10),
            "{least} {most}"
        );
        assert!(waits[100] <= 16, "median {}", waits[100]);
        assert!(waits[199] <= 160, "most {}", waits[199]);
    }
}

/// A peer that reads nothing stops the flow that it is at the end of.
#[test]
fn a_host_that_reads_nothing_stops_one_flow() {
    let (listener, port) = listen(GATEWAY.into());
    let mut world = World::new(UserConfig::default());
    let stuck = world.connect((GATEWAY, port), 30_000, 64 << 10);
    world.run("open", |world| world.tcp(stuck).may_send());
    let (deaf, _) = listener.accept().expect("accept");
    let mut sent = 0;
    let mut push = |world: &mut World| {
        let socket = world.tcp(stuck);
        while socket.can_send() {
            sent += socket.send_slice(&[1; 4096]).expect("open");
        }
        sent
    };
    let mut before = usize::MAX;
    let mut still = 0;
    world.run("stuck", |world| {
        let sent = push(world);
        still = if sent == before { still + 1 } else { 0 };
        before = sent;
        still > 20
    });
    let server = thread::spawn(move || {
        let (socket, _) = listener.accept().expect("accept");
        (peer(socket, 7, 2 << 20), listener)
    });
    let handle = world.connect((GATEWAY, port), 30_001, 64 << 10);
    let mut exchange = Exchange::new(handle, 7, 2 << 20);
    world.run("exchange", |world| {
        push(world);
        exchange.step(world)
    });
    assert_eq!(exchange.received, 2 << 20);
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server").0, 2 << 20);
    assert!(push(&mut world) < 16 << 20, "no more than buffers hold");
    assert_eq!(world.user.flows().0, 1 + 1);
    drop(deaf);
}

/// Neither those that come nor those that go make the stack keep anything.
#[test]
fn ten_thousand_short_connections_leave_nothing_behind() {
    let mut user = User::new(UserConfig::default()).expect("a stack");
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let closed = listener.local_addr().expect("address").port();
    drop(listener);
    for n in 0..10_000u16 {
        let mut frame = common::GATEWAY_MAC.to_vec();
        frame.extend_from_slice(&common::MAC);
        frame.extend_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend_from_slice(&common::GUEST.octets());
        frame.extend_from_slice(&GATEWAY.octets());
        let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame.extend_from_slice(&(20_000 + n).to_be_bytes());
        frame.extend_from_slice(&closed.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 255, 255, 0, 0, 0, 0]);
        let header = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..VnetHeader::default()
        };
        transmit(&mut user, header, &frame);
        user.poll(Instant::now());
        receive(&mut user);
    }
    assert_eq!(user.flows(), (0, 0));
    assert!(!user.has_frames());
    assert_eq!(user.next_timeout(), None);
}
