// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Eventfds that are none, that block, and that are rung without end.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

use crate::host::{Host, NET, RNG, readable};
use crate::peer::{BAD_FD, OK, Peer};
use crate::rings::{Memory, WRITE};

const KICK: u16 = 1;
const CALL: u16 = 2;

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

fn ring(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

/// Fills an eventfd and has writes to it block.
fn fill(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &(u64::MAX - 1).to_ne_bytes());
    let flags = rustix::fs::fcntl_getfl(bell).expect("flags");
    rustix::fs::fcntl_setfl(bell, flags & !OFlags::NONBLOCK).expect("flags");
}

#[test]
fn only_eventfds_ring() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    peer.claim(RNG);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    let socket = peer.socket.try_clone().expect("a descriptor");
    let null: OwnedFd = File::options()
        .write(true)
        .open("/dev/null")
        .expect("/dev/null")
        .into();
    let epoll =
        rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).expect("epoll");
    for fd in [&reader, &writer, &socket, &null, &epoll] {
        assert_eq!(peer.notify(RNG, 0, KICK, &[fd.as_fd()]), BAD_FD);
        assert_eq!(peer.notify(RNG, 0, CALL, &[fd.as_fd()]), BAD_FD);
    }
    let bell = bell();
    // As many as are announced.
    assert_eq!(peer.notify(RNG, 0, KICK | CALL, &[bell.as_fd()]), BAD_FD);
    assert_eq!(
        peer.notify(RNG, 0, KICK, &[bell.as_fd(), bell.as_fd()]),
        BAD_FD
    );
    assert_eq!(
        peer.notify(RNG, 0, 0, &[bell.as_fd(), bell.as_fd(), bell.as_fd()]),
        BAD_FD
    );
    assert_ne!(peer.notify(RNG, 9, KICK, &[bell.as_fd()]), OK);
    drop((peer, socket));
    host.finish();
}

#[test]
fn one_eventfd_for_everything_is_watched_until_the_end_and_no_longer() {
    let mut host = Host::start();
    let before = host.count_fds();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let bell = bell();
    for round in 0..50 {
        memory.restart();
        peer.negotiate(NET, 0);
        peer.negotiate(RNG, 0);
        // The same for kick and call, of all queues of two devices, again and again.
        for queue in [0, 1, 2, 0, 1] {
            assert_eq!(
                peer.notify(NET, queue, KICK | CALL, &[bell.as_fd(), bell.as_fd()]),
                OK
            );
        }
        assert_eq!(
            peer.notify(RNG, 0, KICK | CALL, &[bell.as_fd(), bell.as_fd()]),
            OK
        );
        let base = memory.base;
        let queue = memory.ring(&mut peer, RNG, 0, 64);
        assert_eq!(peer.set_status(RNG, 15), 15);
        queue.descriptor(0, base, 64, WRITE, 0);
        queue.offer(0);
        ring(&bell);
        peer.barrier();
        // Its own doorbells, too.
        let bells = [peer.device_bell.try_clone(), peer.driver_bell.try_clone()];
        let [kick, call] = bells.map(|bell| bell.expect("a descriptor"));
        if round % 2 == 0 {
            assert_eq!(
                peer.notify(NET, 0, KICK | CALL, &[kick.as_fd(), call.as_fd()]),
                OK
            );
        }
    }
    // 4 queues with 2 each, and the connection.
    let most = before + 8 + 8;
    assert!(host.count_fds() <= most, "{} descriptors", host.count_fds());
    drop(peer);
    host.ping();
    // Rung when nobody should hear it any more.
    for _ in 0..100 {
        ring(&bell);
    }
    host.assert_idle();
    host.finish();
}

#[test]
fn eventfds_that_block_stop_nobody_else() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let semaphore = eventfd(7, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE).expect("eventfd");
    for round in 0..12 {
        memory.restart();
        let base = memory.base;
        peer.negotiate(RNG, 0);
        let bell = if round % 4 == 3 {
            semaphore.try_clone().expect("a descriptor")
        } else {
            bell()
        };
        let flags = [CALL, KICK | CALL, KICK][round % 3];
        let fds = vec![bell.as_fd(); flags.count_ones() as usize];
        assert_eq!(peer.notify(RNG, 0, flags, &fds), OK);
        fill(&bell);
        let queue = memory.ring(&mut peer, RNG, 0, 64);
        queue.descriptor(0, base, 64, WRITE, 0);
        queue.offer(0);
        assert_eq!(peer.set_status(RNG, 15), 15);
        peer.barrier();
        assert_eq!(queue.used_index(), 1);
        queue.offer(0);
        peer.kick(RNG, 0);
        peer.barrier();
        assert_eq!(queue.used_index(), 2);
    }
    drop(peer);
    host.finish();
}

#[test]
fn a_connection_whose_doorbell_blocks_is_closed() {
    let mut host = Host::start();
    for _ in 0..5 {
        let mut peer = Peer::connect(&host.path());
        peer.claim(RNG);
        fill(&peer.driver_bell);
        // The host believes that we sleep, and rings.
        peer.expect_a_ring();
        assert!(crate::peer::ends(&peer));
    }
    host.ping();
    host.finish();
}

#[test]
fn a_storm_of_kicks_ends_with_whoever_makes_it() {
    let mut host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let (kick, call) = (bell(), bell());
    peer.negotiate(RNG, 0);
    assert_eq!(
        peer.notify(RNG, 0, KICK | CALL, &[kick.as_fd(), call.as_fd()]),
        OK
    );
    let base = memory.base;
    let queue = memory.ring(&mut peer, RNG, 0, 64);
    assert_eq!(peer.set_status(RNG, 15), 15);
    for _ in 0..50_000 {
        ring(&kick);
    }
    peer.barrier();
    // No kick is lost for all that.
    queue.descriptor(0, base, 64, WRITE, 0);
    queue.offer(0);
    ring(&kick);
    assert!(readable(&call, crate::host::PATIENCE), "no interrupt");
    assert_eq!(queue.used_index(), 1);
    host.assert_idle();
    drop(peer);
    host.finish();
}

#[test]
fn requests_with_descriptors_do_not_pile_up() {
    let mut host = Host::start();
    let before = host.count_fds();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 1 << 20);
    let base = memory.base;
    peer.negotiate(RNG, 0);
    let queue = memory.ring(&mut peer, RNG, 0, 64);
    assert_eq!(peer.set_status(RNG, 15), 15);
    for head in 0..64 {
        queue.descriptor(head, base, 1 << 20, WRITE, 0);
        queue.offer(head);
    }
    let bell = bell();
    let mut most = 0;
    let flags = u32::from(KICK | CALL) << 16;
    let payload = crate::peer::words(&[u32::from(RNG.0) | flags, 0]);
    let request = crate::peer::message(2, crate::peer::QUEUE_NOTIFY, 0, 1, &payload);
    for round in 0..3000 {
        peer.push_with(&request, &[bell.as_fd(), bell.as_fd()]);
        while peer.pop().is_some() {}
        if round % 50 == 0 {
            most = most.max(host.count_fds());
            peer.kick(RNG, 0);
        }
    }
    assert!(most < before + 200, "{most} descriptors, {before} before");
    peer.ping();
    drop(peer);
    host.ping();
    host.finish();
}
