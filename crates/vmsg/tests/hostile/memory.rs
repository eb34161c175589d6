// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows onto files that are none, that are too large, or that go away.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, OFlags};

use crate::host::{Host, NET, RNG};
use crate::peer::{
    BAD_FD, EXISTS, NEEDS_RESET, OK, Peer, TOO_MANY, WINDOW_ADD, WINDOW_REMOVE, message, words,
};
use crate::rings::{Memory, WRITE};

const BASE: u64 = 0x1_0000_0000;

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("evil", MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("a sparse file");
    fd
}

fn remove(peer: &mut Peer, id: u32, flags: u32) -> u32 {
    peer.bus(WINDOW_REMOVE, &words(&[id, flags]), &[])
}

#[test]
fn descriptors_that_cannot_be_windows_are_refused() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    peer.claim(RNG);
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .expect("/dev/zero");
    let (pipe, _other) = std::io::pipe().expect("a pipe");
    let folder = File::open("/tmp").expect("a folder");
    let shm = File::open("/dev/shm").expect("a folder in memory");
    let proc = File::open("/proc/self/mem").expect("a file in /proc");
    let path = host.path().with_extension("o");
    let opened = rustix::fs::open(&path, OFlags::PATH | OFlags::CREATE, 0o600.into());
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
    let mut fds: Vec<OwnedFd> = vec![
        zero.into(),
        pipe.into(),
        folder.into(),
        shm.into(),
        proc.into(),
    ];
    fds.push(eventfd);
    fds.push(peer.socket.try_clone().expect("a descriptor"));
    fds.extend(opened);
    for fd in &fds {
        assert_eq!(peer.window(1, 1, (BASE, 4096, 0), fd.as_fd()), BAD_FD);
    }
    // Read-only, and to be written; none at all; two of them.
    let file = memfd(4096);
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(link).expect("the same file");
    assert_eq!(
        peer.window(1, 1, (BASE, 4096, 0), read_only.as_fd()),
        BAD_FD
    );
    let payload = [words(&[1, 1]), words(&[0, 1, 4096, 0, 0, 0])].concat();
    assert_eq!(peer.bus(WINDOW_ADD, &payload, &[]), BAD_FD);
    assert_eq!(
        peer.bus(WINDOW_ADD, &payload, &[file.as_fd(), file.as_fd()]),
        BAD_FD
    );
    // Beyond the end, empty, around the corner, nowhere.
    for (base, len, offset) in [
        (BASE, 8192, 0),
        (BASE, 4096, 1),
        (BASE, 4096, u64::MAX),
        (BASE, u64::MAX, 1),
        (BASE, 0, 0),
    ] {
        assert_ne!(peer.window(1, 1, (base, len, offset), file.as_fd()), OK);
    }
    assert_eq!(
        peer.window(1, 1, (u64::MAX - 100, 4096, 0), file.as_fd()),
        EXISTS
    );
    assert_eq!(peer.window(1, 0, (BASE, 4096, 0), read_only.as_fd()), OK);
    assert_eq!(
        peer.window(1, 0, (BASE << 1, 4096, 0), file.as_fd()),
        EXISTS
    );
    assert_eq!(
        peer.window(2, 0, (BASE + 4095, 4096, 0), file.as_fd()),
        EXISTS
    );
    // A queue whose used ring cannot be written.
    peer.negotiate(RNG, 0);
    peer.set_queue(RNG, 0, 16, [BASE, BASE + 1024, BASE + 2048]);
    assert_eq!(peer.ask(0x09, RNG, &words(&[0]))[8..12], [0; 4]);
    drop((peer, fds));
    host.finish();
}

#[test]
fn nobody_takes_all_of_the_address_space_or_all_mappings() {
    let mut host = Host::start();
    let huge = memfd(1 << 45);
    let small = memfd(4096);
    let mut peers: Vec<Peer> = (0..6).map(|_| Peer::connect(&host.path())).collect();
    for peer in &mut peers {
        assert_eq!(peer.window(0, 1, (0, 1 << 45, 0), huge.as_fd()), TOO_MANY);
        let mut id = 0;
        while peer.window(id, 1, (u64::from(id) << 40, 1 << 38, 0), huge.as_fd()) == OK {
            id += 1;
        }
        assert!(id <= 4, "{id} windows of 256 GiB");
        for id in 0..id {
            assert_eq!(remove(peer, id, 0), OK);
        }
    }
    // 5,000 windows, and then the largest table changed again and again.
    let peer = &mut peers[0];
    let window = |id: u32| (u64::from(id) * 4096, 4096, 0);
    for id in 0..4096 {
        let more = if id % 1000 == 999 || id == 4095 { 0 } else { 2 };
        assert_eq!(peer.window(id, 1 | more, window(id), small.as_fd()), OK);
    }
    for id in 4096..5000 {
        assert_eq!(peer.window(id, 1, window(id), small.as_fd()), TOO_MANY);
    }
    for id in 0..100 {
        assert_eq!(remove(peer, id, 0), OK);
        assert_eq!(peer.window(id, 1, window(id), small.as_fd()), OK);
    }
    // Somebody else still gets windows.
    let mut late = Peer::connect(&host.path());
    for id in 0..64 {
        let window = (u64::from(id) << 20, 4096, 0);
        assert_eq!(late.window(id, 1, window, small.as_fd()), OK);
    }
    host.ping();
    drop((peers, late));
    host.finish();
}

#[test]
fn staged_changes_are_all_applied_or_none() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    let file = memfd(1 << 20);
    peer.claim(RNG);
    for id in 0..2000 {
        assert_eq!(
            peer.window(id, 2, (u64::from(id) << 21, 1 << 20, 0), file.as_fd()),
            OK
        );
    }
    // The last one overlaps.
    assert_eq!(
        peer.window(5000, 0, (1 << 19, 1 << 20, 0), file.as_fd()),
        EXISTS
    );
    assert_ne!(remove(&mut peer, 0, 0), OK, "none was applied");
    for _ in 0..10_000 {
        if remove(&mut peer, 7, 2) != OK {
            break;
        }
    }
    assert_ne!(remove(&mut peer, 7, 0), OK);
    assert_eq!(peer.window(1, 1, (0, 1 << 20, 0), file.as_fd()), OK);
    assert_eq!(remove(&mut peer, 1, 2), OK);
    assert_eq!(peer.window(1, 1, (0, 1 << 20, 0), file.as_fd()), OK);
    drop(peer);
    host.finish();
}

#[test]
fn files_that_shrink_under_running_rings_cost_the_device_and_nothing_else() {
    let mut host = Host::start();
    let before = host.resident();
    for round in 0..6 {
        let mut peer = Peer::connect(&host.path());
        let memory = Memory::lend(&mut peer, 512 << 20);
        let dev = if round % 2 == 0 { RNG } else { NET };
        let base = memory.base;
        let fd = memory.fd.try_clone().expect("a descriptor");
        peer.negotiate(dev, 0);
        let ring = memory.ring(&mut peer, dev, 0, 64);
        assert_eq!(peer.set_status(dev, 15), 15);
        if round < 4 {
            // The buffers are gone, the rings are there.
            rustix::fs::ftruncate(&fd, 1 << 20).expect("truncated");
        }
        for head in 0..30 {
            // Not where the rings are.
            let addr = base + (u64::from(head + 1) << 24);
            ring.descriptor(head, addr, 1 << 24, WRITE, 0);
            ring.offer(head);
        }
        if round >= 4 {
            // Everything is gone; what was written there must not be read here any more.
            rustix::fs::ftruncate(&fd, 0).expect("truncated");
        }
        peer.kick(dev, 0);
        peer.barrier();
        if dev == RNG && round < 4 {
            peer.wait_for_needs_reset(dev);
            assert_ne!(peer.status(dev) & NEEDS_RESET, 0);
        }
        peer.ping();
    }
    assert!(host.resident() < before + (16 << 10), "{before} KiB before");
    host.ping();
    host.finish();
}

#[test]
fn windows_that_go_while_a_queue_runs_stop_it_before_the_answer() {
    let host = Host::start();
    let mut peer = Peer::connect(&host.path());
    for round in 0..30 {
        let memory = Memory::lend(&mut peer, 8 << 20);
        let base = memory.base;
        peer.negotiate(RNG, 0);
        let ring = memory.ring(&mut peer, RNG, 0, 64);
        assert_eq!(peer.set_status(RNG, 15), 15);
        for head in 0..60 {
            ring.descriptor(head, base + (4 << 20), 1 << 20, WRITE, 0);
            ring.offer(head);
        }
        peer.kick(RNG, 0);
        if round % 2 == 0 {
            // Released, and the window taken away at once: the reset may not be over.
            let release = words(&[u32::from(RNG.0) | 1 << 16]);
            peer.push(&message(2, 0x84, 0, 0, &release));
        }
        assert_eq!(remove(&mut peer, 1, 0), OK);
        // From here on the memory is ours alone.
        let ram = memory.mapping.ram();
        let ours = ram.get(4 << 20, 64 << 10).expect("inside");
        ours.fill(0);
        peer.ping();
        if round % 2 == 1 {
            peer.barrier();
        }
        let mut bytes = vec![1; 64 << 10];
        ours.read(0, &mut bytes);
        assert!(
            bytes.iter().all(|byte| *byte == 0),
            "written after the answer"
        );
        peer.events.clear();
    }
    drop(peer);
    host.finish();
}
