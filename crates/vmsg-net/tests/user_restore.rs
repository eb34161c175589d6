// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP connections outlive the process that holds them: the stack is dropped at random points
//! without any goodbye, and a new one goes on from the kept records and descriptors.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{Exchange, GATEWAY, GATEWAY6, Random, World, guest, pattern, stream};
use smoltcp::socket::tcp;
use vmsg_net::user::{FlowStore, HostForward, Protocol, RestoreError, User, UserConfig};
use vmsg_net::{Backend, Offloads};

/// Records and descriptors by key.
type Kept = BTreeMap<u64, (Vec<u8>, OwnedFd)>;

/// What another process would keep.
#[derive(Clone, Default)]
struct Keeper(Arc<Mutex<Kept>>);

impl FlowStore for Keeper {
    fn put(&mut self, key: u64, record: &[u8], fd: BorrowedFd<'_>) {
        let fd = fd.try_clone_to_owned().expect("duplicate");
        let old = self
            .0
            .lock()
            .expect("lock")
            .insert(key, (record.to_vec(), fd));
        assert!(old.is_none(), "key {key} was taken");
    }

    fn remove(&mut self, key: u64) {
        assert!(
            self.0.lock().expect("lock").remove(&key).is_some(),
            "key {key} was not there"
        );
    }
}

impl Keeper {
    fn len(&self) -> usize {
        self.0.lock().expect("lock").len()
    }
}

/// The process dies, with all frames on the way, and another takes over.
fn kill(world: &mut World, keeper: &Keeper, config: &UserConfig, offloads: Offloads) {
    let mut user = User::new(UserConfig::default()).expect("a stack");
    std::mem::swap(&mut world.user, &mut user);
    drop(user);
    // Forwarded ports are free again only now.
    world.user = User::new(config.clone()).expect("a stack");
    world.user.set_guest(&guest(offloads));
    world.user.set_flow_store(Box::new(keeper.clone()));
    let lost = world.random.below(world.nic.rx.len() as u64 + 1);
    world.nic.rx.truncate(usize::try_from(lost).expect("small"));
    let kept: Vec<_> = keeper
        .0
        .lock()
        .expect("lock")
        .values()
        .map(|(record, fd)| (record.clone(), fd.try_clone().expect("duplicate")))
        .collect();
    for (record, fd) in kept {
        world.user.restore(&record, fd).expect("restore");
    }
}

/// Both ends check what comes and send at the same time, in random pieces and with rests.
fn peer(mut socket: TcpStream, seed: u64, len: usize) -> usize {
    socket
        .set_read_timeout(Some(common::PATIENCE))
        .expect("timeout");
    let mut out = socket.try_clone().expect("clone");
    let writer = thread::spawn(move || {
        let mut random = Random(seed | 1);
        let all = stream(seed + 1, len);
        let mut at = 0;
        while at < len {
            let n = (1 + usize::try_from(random.below(40000)).expect("small")).min(len - at);
            out.write_all(&all[at..at + n]).expect("write");
            at += n;
        }
        out.shutdown(Shutdown::Write).expect("shutdown");
    });
    let mut random = Random(seed | 3);
    let mut buffer = vec![0; 65536];
    let mut at = 0;
    loop {
        let most = 1 + usize::try_from(random.below(65535)).expect("small");
        let n = socket.read(&mut buffer[..most]).expect("read");
        if n == 0 {
            break;
        }
        for byte in &buffer[..n] {
            assert_eq!(*byte, pattern(seed, at), "at {at}");
            at += 1;
        }
    }
    writer.join().expect("writer");
    at
}

/// Returns how often the process was killed.
fn transfer(seed: u64, up: usize, down: usize, offloads: Offloads) -> u32 {
    transfer_to(GATEWAY.into(), seed, up, down, offloads)
}

fn transfer_to(to: IpAddr, seed: u64, up: usize, down: usize, offloads: Offloads) -> u32 {
    let keeper = Keeper::default();
    let config = UserConfig::default();
    let mut world = World::with(config.clone(), offloads);
    world.random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    world.user.set_flow_store(Box::new(keeper.clone()));
    let listener = TcpListener::bind(match to {
        IpAddr::V4(_) => "127.0.0.1:0",
        IpAddr::V6(_) => "[::1]:0",
    })
    .expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || peer(listener.accept().expect("accept").0, seed, down));
    let handle = world.connect((to, port), 40001, 32 << 10);
    world.run("open", |world| world.tcp(handle).may_send());
    let mut exchange = Exchange::new(handle, seed, up);
    let mut kills = 0;
    world.run("exchange", |world| {
        // Also in the middle of a step, between what the guest sends and what it gets.
        if kills < 12 && world.random.below(6) == 0 {
            kill(world, &keeper, &config, offloads);
            kills += 1;
        }
        exchange.step(world)
    });
    assert_eq!(exchange.received, down);
    world.run("closed", |world| {
        matches!(
            world.tcp(handle).state(),
            tcp::State::TimeWait | tcp::State::Closed
        )
    });
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), up, "seed {seed}");
    world.run("forgotten", |_| keeper.len() == 0);
    kills
}

#[test]
fn transfers_in_both_directions_go_on_after_a_kill() {
    let mut kills = 0;
    for seed in 1..=40 {
        let offloads = if seed % 2 == 0 {
            World::offloads()
        } else {
            Offloads::NONE
        };
        kills += transfer(seed, 300_000, 400_000, offloads);
    }
    assert!(kills > 40, "{kills}");
}

#[test]
fn transfers_over_ipv6_go_on_after_a_kill() {
    let mut kills = 0;
    for seed in 201..=220 {
        let offloads = if seed % 2 == 0 {
            World::offloads()
        } else {
            Offloads::NONE
        };
        kills += transfer_to(GATEWAY6.into(), seed, 300_000, 400_000, offloads);
    }
    assert!(kills > 20, "{kills}");
}

#[test]
fn half_closed_connections_go_on_after_a_kill() {
    let mut kills = 0;
    for seed in 100..=115 {
        // One direction is at its end long before the other.
        kills += transfer(seed, 10, 500_000, World::offloads());
        kills += transfer(seed, 300_000, 10, Offloads::NONE);
    }
    assert!(kills > 32, "{kills}");
}

#[test]
fn clients_of_a_forwarded_port_go_on_after_a_kill() {
    let probe = TcpListener::bind("127.0.0.1:0").expect("listen");
    let host = probe.local_addr().expect("address");
    drop(probe);
    let config = UserConfig {
        forwards: vec![HostForward {
            protocol: Protocol::Tcp,
            host,
            guest_addr: None,
            guest_port: 22,
        }],
        ..UserConfig::default()
    };
    let keeper = Keeper::default();
    let mut world = World::new(config.clone());
    world.user.set_flow_store(Box::new(keeper.clone()));
    let handle = world.tcp_socket(32 << 10);
    world.tcp(handle).listen(22).expect("listen");
    let client =
        thread::spawn(move || peer(TcpStream::connect(host).expect("connect"), 5, 300_000));
    world.run("open", |world| {
        world.tcp(handle).may_send() && keeper.len() == 1
    });
    let mut exchange = Exchange::new(handle, 5, 300_000);
    let mut kills = 0;
    world.run("exchange", |world| {
        if kills < 10 && world.random.below(5) == 0 {
            kill(world, &keeper, &config, Offloads::NONE);
            kills += 1;
        }
        exchange.step(world)
    });
    assert_eq!(exchange.received, 300_000);
    world.run("client", |_| client.is_finished());
    assert_eq!(client.join().expect("client"), 300_000);
}

#[test]
fn a_connection_that_broke_meanwhile_is_refused_and_the_guest_learns_of_it() {
    let keeper = Keeper::default();
    let mut world = World::new(UserConfig::default());
    world.user.set_flow_store(Box::new(keeper.clone()));
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("open", |world| {
        world.tcp(handle).may_send() && keeper.len() == 1
    });
    let (socket, _) = listener.accept().expect("accept");
    world.user = User::new(UserConfig::default()).expect("a stack");
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).expect("linger");
    drop(socket);
    let (record, fd) = keeper.0.lock().expect("lock").pop_first().expect("kept").1;
    let error = world.user.restore(&record, fd).expect_err("broken");
    assert!(matches!(error, RestoreError::Socket(_)), "{error}");
    // Even if it only listens.
    world.run("reset", |world| {
        world.tcp(handle).state() == tcp::State::Closed
    });
}

#[test]
fn records_and_descriptors_that_make_no_sense_are_refused() {
    let keeper = Keeper::default();
    let mut world = World::new(UserConfig::default());
    world.user.set_flow_store(Box::new(keeper.clone()));
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY, port), 40001, 4096);
    world.run("open", |world| {
        world.tcp(handle).may_send() && keeper.len() == 1
    });
    let _peer = listener.accept().expect("accept");
    let (record, fd) = keeper.0.lock().expect("lock").pop_first().expect("kept").1;
    let fd = || fd.try_clone().expect("duplicate");
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").expect("open"));
    let mut bad = record.clone();
    bad[7] ^= 1;
    assert!(matches!(
        world.user.restore(&bad, fd()),
        Err(RestoreError::Record)
    ));
    assert!(matches!(
        world.user.restore(&[], fd()),
        Err(RestoreError::Record)
    ));
    assert!(matches!(
        world.user.restore(&record, fd()),
        Err(RestoreError::Taken { .. })
    ));
    let mut fresh = User::new(UserConfig::default()).expect("a stack");
    assert!(matches!(
        fresh.restore(&record, file()),
        Err(RestoreError::Socket(_))
    ));
    assert!(matches!(
        fresh.restore(&record, listener.into()),
        Err(RestoreError::Socket(_))
    ));
    let mut elsewhere = User::new(UserConfig {
        net: ("192.168.5.0".parse().expect("address"), 24),
        ..UserConfig::default()
    })
    .expect("a stack");
    assert!(matches!(
        elsewhere.restore(&record, fd()),
        Err(RestoreError::Guest(_))
    ));
    let mut fresh6 = User::new(UserConfig {
        ipv6: false,
        ..UserConfig::default()
    })
    .expect("a stack");
    assert!(fresh6.restore(&record, fd()).is_ok(), "needs no IPv6");
    assert!(fresh.restore(&record, fd()).is_ok());
    assert!(fresh.has_frames(), "the guest is told");
}

#[test]
fn a_connection_over_ipv6_is_not_taken_up_without_ipv6() {
    let keeper = Keeper::default();
    let mut world = World::new(UserConfig::default());
    world.user.set_flow_store(Box::new(keeper.clone()));
    let listener = TcpListener::bind("[::1]:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY6, port), 40001, 4096);
    world.run("open", |world| {
        world.tcp(handle).may_send() && keeper.len() == 1
    });
    let _peer = listener.accept().expect("accept");
    let (record, fd) = keeper.0.lock().expect("lock").pop_first().expect("kept").1;
    assert!(record.len() <= vmsg_net::user::RECORD_LEN);
    let mut without = User::new(UserConfig {
        ipv6: false,
        ..UserConfig::default()
    })
    .expect("a stack");
    let again = fd.try_clone().expect("duplicate");
    assert!(matches!(
        without.restore(&record, again),
        Err(RestoreError::Guest(_))
    ));
    let mut with = User::new(UserConfig::default()).expect("a stack");
    assert!(with.restore(&record, fd).is_ok());
}
