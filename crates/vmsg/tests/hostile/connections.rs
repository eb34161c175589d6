// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections that end at a bad moment, never begin, or are too many.

use std::process::{Command, Stdio};

use crate::host::{Host, NET, RNG, connect};
use crate::peer::{
    CLAIM, HELD, MARKER, OK, Peer, SET_STATUS, TOO_MANY, hello, message, receive, send, socket,
    words,
};
use crate::rings::Memory;

#[test]
fn two_hundred_connections_are_too_many_and_cost_nothing_later() {
    let mut host = Host::start();
    let mut peers = Vec::new();
    let mut refused = 0;
    for _ in 0..200 {
        match Peer::try_connect(&host.path()) {
            Some(peer) => peers.push(peer),
            None => refused += 1,
        }
    }
    assert!(peers.len() <= 62 && refused >= 138, "{refused} refused");
    for peer in &mut peers {
        peer.ping();
    }
    host.ping();
    drop(peers);
    host.finish();
}

#[test]
fn who_connects_and_says_nothing_or_half_of_it_holds_nobody_up() {
    let mut host = Host::start();
    let mut silent = Vec::new();
    for cut in (0..100).map(|n| n % 28) {
        let socket = socket(&host.path());
        if cut > 0 {
            send(&socket, &hello()[..cut], &[]);
        }
        silent.push(socket);
        if cut == 9 {
            host.ping();
        }
    }
    // A HELLO with descriptors, and more than one may have.
    let fds = [std::os::fd::AsFd::as_fd(&silent[0]); 9];
    let socket = socket(&host.path());
    send(&socket, &hello(), &fds);
    assert_eq!(&receive(&socket).0[..4], b"VMSG");
    let mut late = Peer::connect(&host.path());
    late.ping();
    drop((silent, socket, late));
    host.finish();
}

#[test]
fn a_driver_that_is_stopped_in_its_set_up_is_waited_for_by_nobody() {
    let mut host = Host::start();
    // A program of ours that connects and asks; it is stopped at no moment in particular.
    for _ in 0..10 {
        let mut stopped = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(["ls", "--bus"])
            .arg(format!("unix,path={}", host.path().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("vmsg starts");
        let pid = stopped.id().to_string();
        let _ = Command::new("kill").args(["-STOP", &pid]).status();
        host.ping();
        stopped.kill().expect("killed");
        stopped.wait().expect("a child");
    }
    host.finish();
}

#[test]
fn connections_may_end_after_any_step_of_a_set_up() {
    let host = Host::start();
    // Every request is sent without waiting for the answers, so that the host is in the middle of
    // one of them when the connection ends.
    for step in 0..120 {
        let mut peer = Peer::connect(&host.path());
        let memory = Memory::lend(&mut peer, 1 << 20);
        let dev = if step % 2 == 0 { RNG } else { NET };
        let status = |status| message(0, SET_STATUS, dev.0, 1, &words(&[status]));
        let claim = |flags: u32| message(2, CLAIM, 0, 1, &words(&[u32::from(dev.0) | flags]));
        let features = message(0, 0x04, dev.0, 1, &words(&[0, 2, 0, 1]));
        let mut queue = words(&[0, 0, 64, 0]);
        for area in [0, 0x1000, 0x2000] {
            queue.extend((memory.base + area).to_le_bytes());
        }
        let queue = message(0, 0x0a, dev.0, 1, &queue);
        let kick = message(0, 0x41, dev.0, 0, &words(&[0, 0]));
        let steps = [
            claim(0),
            status(0),
            status(3),
            features.clone(),
            status(11),
            queue,
            status(15),
            kick,
            message(0, 0x0b, dev.0, 1, &words(&[0])),
            message(2, 0x81, 0, 1, &words(&[1, 0])),
            status(0),
            claim(1 << 16),
            claim(0),
            status(1),
            status(0),
        ];
        for step in &steps[..step / 2 % (steps.len() + 1)] {
            peer.push(step);
        }
        // A reset and a claim come when the device is still busy.
        if step % 3 == 0 {
            peer.push(&status(0));
        }
    }
    host.finish();
}

#[test]
fn a_device_that_many_want_while_it_is_reset_goes_to_one_of_them() {
    let mut host = Host::start();
    let mut peers: Vec<Peer> = (0..20).map(|_| Peer::connect(&host.path())).collect();
    for round in 0..20 {
        let holder = round % peers.len();
        let _ = peers[holder].claim(RNG);
        // The reset at the end, and then everybody asks, some of them again and again.
        for (index, peer) in peers.iter_mut().enumerate() {
            if index == holder {
                peer.push(&message(
                    2,
                    CLAIM,
                    0,
                    0,
                    &words(&[u32::from(RNG.0) | 1 << 16]),
                ));
            }
            for _ in 0..if index == 3 { 200 } else { 1 } {
                peer.push(&message(2, CLAIM, 0, 9, &words(&[RNG.0.into()])));
                while peer.pop().is_some() {}
            }
        }
        let status: Vec<u32> = peers.iter_mut().map(|peer| peer.claim(RNG)).collect();
        let holders = status.iter().filter(|status| **status == OK).count();
        assert!(holders <= 1, "{status:?}");
        for status in status {
            assert!([OK, HELD, TOO_MANY].contains(&status), "{status}");
        }
        for peer in &mut peers {
            peer.release(RNG);
            peer.events.clear();
        }
    }
    host.ping();
    drop(peers);
    host.finish();
}

#[test]
fn fast_loops_of_connecting_claiming_and_leaving_leave_nothing_behind() {
    let host = Host::start();
    for round in 0..300 {
        let mut peer = Peer::connect(&host.path());
        match round % 3 {
            0 => {
                peer.push(&message(2, CLAIM, 0, 1, &words(&[NET.0.into()])));
            }
            1 => {
                peer.push(&message(0, SET_STATUS, NET.0, 1, &words(&[1])));
                peer.push(&message(0, SET_STATUS, NET.0, 1, &words(&[0])));
            }
            _ => {
                peer.claim(NET);
            }
        }
    }
    host.finish();
}

#[test]
fn a_broken_bus_ends_its_connection_and_no_other() {
    let host = Host::start();
    for round in 0..60 {
        let mut peer = Peer::connect(&host.path());
        let _ = peer.claim(RNG);
        match round % 6 {
            // Indices that cannot be.
            0 => peer.spoil(0, u32::MAX),
            1 => peer.spoil(0, 256),
            // A marker without its packet, and packets without markers.
            2 => {
                peer.push(&MARKER);
            }
            3 => {
                while send(
                    &peer.socket,
                    &[0; 64],
                    &[std::os::fd::AsFd::as_fd(&peer.device_bell)],
                ) {}
            }
            // A packet longer than a message.
            4 => {
                send(&peer.socket, &[0; 5000], &[]);
                peer.push(&MARKER);
            }
            // Neither.
            _ => {
                send(&peer.socket, &[0; 3], &[]);
                peer.push(&MARKER);
            }
        }
        if round % 6 == 3 {
            peer.ping();
        } else {
            assert!(crate::peer::ends(&peer), "round {round}");
        }
    }
    let mut client = connect(host.path(), "after");
    client.ping(1).expect("an answer");
    drop(client);
    host.finish();
}
