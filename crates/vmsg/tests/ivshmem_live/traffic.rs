// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM with a vhost-user front end whose guest has a random number generator and a network device.

use super::vhost_guest::{Guest, RAM, Ram};
use super::{Ends, program};
use ivshmem::{Client, PeerId};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;
use vmsg_mem::{Access, Mapping};

/// Requests of both devices, each answered.
fn traffic(rng: &mut Guest, net: &mut Guest, rounds: usize) {
    for round in 0..rounds {
        let wanted = 64 + round % 512;
        rng.ask(0, &[], wanted);
        let bytes = rng.answer(0);
        assert_eq!(bytes.len(), wanted);
        assert!(bytes.iter().any(|byte| *byte != 0), "random bytes");
        let mut frame = vec![0; 12];
        frame.resize(12 + 60 + round * 7 % 1400, 0xff);
        net.ask(1, &frame, 0);
        assert!(net.answer(1).is_empty());
    }
}

/// What a driver is told when its host is killed: nothing; requests under way are answered by the next one.
fn over_kills(dir: &Path, ends: &Ends, ram: impl Fn() -> Ram, check: impl Fn()) {
    let mut host = ends.serve();
    let proxy = ends.proxy(dir);
    let mut rng = Guest::start(&dir.join("rng"), ram(), 1);
    let mut net = Guest::start(&dir.join("net"), ram(), 2);
    traffic(&mut rng, &mut net, 200);
    for _ in 0..3 {
        host.kill();
        // Nobody is there for these.
        rng.ask(0, &[], 100);
        net.ask(1, &[0; 100], 0);
        check();
        host = ends.serve();
        assert_eq!(rng.answer(0).len(), 100);
        assert!(net.answer(1).is_empty());
        traffic(&mut rng, &mut net, 50);
        check();
    }
    // Its driver stays where it is.
    host.end();
    rng.ask(0, &[], 100);
    let host = ends.serve();
    assert_eq!(rng.answer(0).len(), 100);
    traffic(&mut rng, &mut net, 50);
    drop((rng, net));
    proxy.end();
    host.end();
}

/// The memory of a guest in a file that both sides have open.
fn in_file(path: &Path) -> Ram {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path).expect("a file");
    file.set_len(RAM).expect("room");
    let mapping = Mapping::of_fd(file.as_fd(), 0, RAM, Access::ReadWrite).expect("mapped");
    Ram {
        mapping: Box::leak(Box::new(mapping)),
        file: Box::leak(Box::new(file.into())),
    }
}

const BOUNCE: &str = ",memory=bounce,ram=bar";

#[test]
fn traffic_goes_on_over_kills_through_a_server_with_all_copied() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    for layout in ["amp", "spsc"] {
        let ends = Ends::socket(dir.path(), &format!(",layout={layout}{BOUNCE}"));
        over_kills(dir.path(), &ends, Ram::new, || ());
    }
}

#[test]
fn traffic_goes_on_over_kills_through_a_held_server_that_stays() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let ends = Ends::listen(dir.path(), BOUNCE);
    let path = dir.path().join("held");
    // A client that stock ones are like: it never comes a second time.
    let client = std::cell::OnceCell::new();
    let check = || {
        let client = client.get_or_init(|| Client::connect(&path, Duration::from_secs(20)));
        let client = client.as_ref().expect("a client");
        let host = client.peers().find(|(peer, _)| *peer == PeerId(0));
        assert!(host.is_some() && client.has_server(), "{client:?}");
        let other = Client::connect(&path, Duration::from_secs(20)).expect("another client");
        let inode = |client: &Client| {
            rustix::fs::fstat(client.memory_fd())
                .expect("a file")
                .st_ino
        };
        assert_eq!(inode(client), inode(&other), "the same memory");
    };
    over_kills(dir.path(), &ends, Ram::new, check);
}

#[test]
fn traffic_goes_on_over_kills_with_the_guest_in_a_segment() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let ram = dir.path().join("ram");
    let keys = format!(",memory=segment,ram={}", ram.display());
    let memory = in_file(&ram);
    let ends = Ends::socket(dir.path(), &keys);
    let host = ends.serve();
    let proxy = ends.proxy(dir.path());
    let mut rng = Guest::start(&dir.path().join("rng"), memory, 1);
    let ask = |rng: &mut Guest| {
        for wanted in 1..300 {
            rng.ask(0, &[], wanted);
            assert_eq!(rng.answer(0).len(), wanted);
        }
    };
    ask(&mut rng);
    host.kill();
    rng.ask(0, &[], 77);
    let host = ends.serve();
    assert_eq!(rng.answer(0).len(), 77);
    ask(&mut rng);
    drop(rng);
    proxy.end();
    host.end();
}

#[test]
fn a_device_host_ends_when_it_is_told_to_whoever_is_still_connected() {
    let dir = tempfile::tempdir().expect("a folder");
    for ends in [Ends::listen(dir.path(), ""), Ends::socket(dir.path(), "")] {
        let host = ends.serve();
        let name = if ends.server.is_some() { "iv" } else { "held" };
        let path = dir.path().join(name);
        let mut client = Client::connect(&path, Duration::from_secs(20)).expect("a client");
        // Rings as a driver does that is not there yet.
        for (peer, _) in client.peers().collect::<Vec<_>>() {
            drop(client.ring(peer, 0));
        }
        host.end();
        while client.poll().is_some() {}
        assert!(client.has_server(), "the server stays");
        let host = ends.serve();
        let listed = program::text(&["ls", "--bus", &ends.driver]);
        assert!(listed.contains("rng0"), "{listed}");
        host.end();
    }
}
