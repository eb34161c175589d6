// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `linux-user` with QEMU at the other end, well-behaved and not.
#![cfg(feature = "linux-user")]

mod place;
mod qemu;

use place::{LONG, Place, accept, driver_recv, message, number, recv, wait};
use qemu::{End, Qemu, Queues, SLOTS, set_word, word};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::linux_user::{Connector, Listener, QueueError};
use vmsg_bus::{BindError, ConnectError, DeviceBus};

/// Answers every message with itself until the end.
fn echo(mut bus: DeviceBus) -> ChannelError {
    loop {
        match recv(&mut bus) {
            Ok(n) => {
                bus.try_send(&message(n)).unwrap();
                // QEMU has the answer before it is rung for, and may be gone by then.
                if let Err(error) = bus.flush() {
                    return error;
                }
            }
            Err(error) => return error,
        }
    }
}

/// QEMU as device host: what it does, in a thread of its own, until the driver is gone.
fn qemu_host(mut qemu: Qemu) -> thread::JoinHandle<Qemu> {
    thread::spawn(move || {
        use std::io::Read;
        let mut bytes = [0; 128];
        while qemu.socket.read(&mut bytes).is_ok_and(|read| read > 0) {
            while let Some(request) = qemu.queues.pop() {
                assert!(qemu.queues.push(&request));
                let _ = qemu.socket.write_all(&[0xed]);
            }
        }
        qemu
    })
}

#[test]
fn a_driver_that_polls_for_answers_and_never_reads_its_socket_is_served() {
    let place = Place::new();
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let bus = accept(&mut listener);
    let host = thread::spawn(move || echo(bus));
    for n in 0..2000 {
        assert_eq!(number(&qemu.ask(&message(n))), n);
    }
    drop(qemu);
    assert_eq!(host.join().unwrap(), ChannelError::Closed);
}

#[test]
fn files_that_are_removed_before_qemu_starts_are_made_anew() {
    let place = Place::new();
    let mut listener = place.host();
    for name in ["queue-t-driver", "queue-t-device"] {
        fs::remove_file(place.path().join(name)).unwrap();
    }
    let mut qemu = {
        let socket = UnixStream::connect(place.socket()).unwrap();
        let bus = accept(&mut listener);
        thread::spawn(move || echo(bus));
        let queues = Queues::open(place.path(), End::Driver);
        Qemu { queues, socket }
    };
    assert_eq!(number(&qemu.ask(&message(5))), 5);
}

#[test]
fn what_qemu_asks_before_it_is_accepted_is_answered() {
    let place = Place::new();
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    qemu.send(&message(1));
    let mut bus = accept(&mut listener);
    assert_eq!(recv(&mut bus), Ok(1));
}

#[test]
fn what_a_dead_qemu_leaves_is_gone_for_the_next() {
    let place = Place::new();
    let mut listener = place.host();
    for n in 0..3 {
        let mut qemu = Qemu::connect(place.path(), End::Driver);
        let mut bus = accept(&mut listener);
        assert_eq!(word(&qemu.queues.tx, 0), 0, "begun anew");
        qemu.send(&message(n));
        assert_eq!(recv(&mut bus), Ok(n));
        bus.try_send(&message(99)).unwrap();
        bus.flush().unwrap();
        drop(qemu);
        assert_eq!(recv(&mut bus), Err(ChannelError::Closed));
        drop(bus);
        // Not waiting for the next driver.
        assert!(listener.accept(Instant::now()).unwrap().is_none());
    }
    // A QEMU that was killed while we were away as well.
    drop(listener);
    let qemu = Queues::open(place.path(), End::Driver);
    assert!(qemu.push(&message(1)));
    drop(qemu);
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    qemu.send(&message(2));
    assert_eq!(recv(&mut bus), Ok(2));
}

#[test]
fn queues_go_on_where_they_are_while_qemu_lives() {
    let place = Place::new();
    let mut spec = place.spec.clone();
    spec.server = Some(false);
    // QEMU listens, and goes on when its device host comes back.
    let socket = UnixListener::bind(place.socket()).unwrap();
    let queues = Queues::open(place.path(), End::Driver);
    for n in 0..3 {
        let mut listener = Listener::bind(&spec, "host").unwrap();
        let mut bus = accept(&mut listener);
        let (mut stream, _) = socket.accept().unwrap();
        assert_eq!(word(&queues.tx, 0), n);
        assert!(queues.push(&message(n)));
        stream.write_all(&[0xed]).unwrap();
        assert_eq!(recv(&mut bus), Ok(n));
        bus.try_send(&message(n)).unwrap();
        bus.flush().unwrap();
        assert_eq!(number(&queues.pop().unwrap()), n);
    }
}

#[test]
fn a_driver_of_ours_drives_qemu_over_and_over() {
    let place = Place::new();
    let socket = UnixListener::bind(place.socket()).unwrap();
    let mut queues = Some(Queues::open(place.path(), End::Device));
    const STALE: u32 = 7777;
    for round in 0..3 {
        let connector = Connector::new(&place.spec, "driver").timeout(LONG);
        let driver = thread::spawn(move || connector.connect().unwrap());
        let (stream, _) = socket.accept().unwrap();
        let qemu = qemu_host(Qemu {
            queues: queues.take().unwrap(),
            socket: stream,
        });
        let mut driver = driver.join().unwrap();
        for n in 0..500 {
            driver.try_send(&message(n)).unwrap();
            driver.flush().unwrap();
            let answer = loop {
                // QEMU may have taken the last driver's and not have answered it when it is looked whether anything is left.
                match driver_recv(&mut driver) {
                    Ok(STALE) => {}
                    answer => break answer,
                }
            };
            assert_eq!(answer, Ok(n), "round {round}");
        }
        // An answer that nobody waits for any more.
        driver.try_send(&message(STALE)).unwrap();
        drop(driver);
        queues = Some(qemu.join().unwrap().queues);
    }
}

#[test]
fn a_driver_says_nothing_before_qemu_has_taken_its_connection() {
    let place = Place::new();
    let socket = UnixListener::bind(place.socket()).unwrap();
    let queues = Queues::open(place.path(), End::Device);
    let connector = Connector::new(&place.spec, "driver");
    let refused = connector
        .clone()
        .timeout(Duration::from_millis(100))
        .connect();
    assert!(matches!(refused, Err(ConnectError::NotTaken { .. })));
    assert_eq!(word(&queues.rx, 0), 0);
    drop(socket.accept().unwrap());
    // What a driver before has left is taken first.
    set_word(&queues.rx, 0, 3);
    let driver = thread::spawn(move || connector.timeout(LONG).connect().unwrap());
    let (stream, _) = socket.accept().unwrap();
    let mut qemu = Qemu {
        queues,
        socket: stream,
    };
    let mut taken = 0;
    qemu.turn(|queues, _| {
        taken += 1;
        assert!(queues.push(&message(1)));
    });
    assert_eq!(taken, 3);
    let mut driver = driver.join().unwrap();
    let mut buf = [0; 48];
    let stale = std::iter::from_fn(|| driver.try_recv(&mut buf).unwrap()).count();
    // QEMU takes a request before it answers it.
    assert!(stale <= 1, "{stale} answers meant for another one");
}

#[test]
fn a_flood_of_doorbells_holds_up_nobody() {
    let place = Place::new();
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    let mut flood = qemu.socket.try_clone().unwrap();
    let flooding = thread::spawn(move || while flood.write_all(&[0; 4096]).is_ok() {});
    for n in 0..200 {
        assert!(qemu.queues.push(&message(n)));
        assert_eq!(recv(&mut bus), Ok(n));
    }
    drop(bus);
    flooding.join().unwrap();
    qemu.socket.write_all(&[0xed]).unwrap_err();
}

#[test]
fn a_side_that_does_not_want_to_receive_reads_its_socket_all_the_same() {
    let place = Place::new();
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    for n in 0..2000 {
        // Blocks for good when nobody reads.
        qemu.send(&message(n));
        assert!(bus.clear_poll_fd().unwrap());
    }
    assert_eq!(recv(&mut bus), Ok(0));
}

#[test]
fn a_peer_that_takes_nothing_makes_its_sender_wait_and_then_go_on() {
    let place = Place::new();
    let mut listener = place.host();
    let qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    let mut sent = 0;
    while bus.try_send(&message(sent)).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, SLOTS - 1);
    let begin = Instant::now();
    let mut wakes = 0;
    while begin.elapsed() < Duration::from_millis(300) {
        assert!(bus.arm_for_room());
        let fd = bus.poll_fd().unwrap();
        poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&Timespec::try_from(LONG).unwrap()),
        )
        .unwrap();
        assert!(bus.clear_poll_fd().unwrap());
        wakes += 1;
    }
    assert!(wakes < 20, "woken {wakes} times in 0.3 s for nothing");
    assert_eq!(number(&qemu.queues.pop().unwrap()), 0);
    while bus.arm_for_room() {
        let fd = bus.poll_fd().unwrap();
        wait(fd, None);
        bus.clear_poll_fd().unwrap();
    }
    bus.try_send(&message(sent)).unwrap();
    bus.flush().unwrap();
    for n in 1..=sent {
        assert_eq!(number(&qemu.queues.pop().unwrap()), n);
    }
    assert!(qemu.queues.pop().is_none());
}

#[test]
fn damaged_files_are_begun_anew_if_nobody_has_them_and_refused_otherwise() {
    for (at, device_queue) in [(0, false), (0x40, false), (0, true), (0x40, true)] {
        for value in [SLOTS, u32::MAX, 0x8000_0000] {
            let place = Place::new();
            let damage = |queues: &Queues| {
                let file = if device_queue { &queues.tx } else { &queues.rx };
                set_word(file, at, value);
            };
            damage(&Queues::open(place.path(), End::Device));
            let mut listener = place.host();
            let mut qemu = Qemu::connect(place.path(), End::Driver);
            qemu.send(&message(3));
            assert_eq!(recv(&mut accept(&mut listener)), Ok(3));
            drop((qemu, listener));
            // Somebody lives and has damaged what is his.
            let queues = Queues::open(place.path(), End::Device);
            damage(&queues);
            let socket = UnixListener::bind(place.socket()).unwrap();
            let driver = Connector::new(&place.spec, "driver").timeout(LONG);
            let begin = Instant::now();
            let host = thread::spawn(move || {
                let (mut stream, _) = socket.accept().unwrap();
                std::io::Read::read(&mut stream, &mut [0; 8]).unwrap();
                stream
            });
            let error = driver.connect().unwrap_err();
            assert!(
                matches!(error, ConnectError::Queue(QueueError::Damaged { .. })),
                "{error}"
            );
            assert!(error.to_string().contains("remove it"));
            assert!(begin.elapsed() < LONG);
            drop(host.join().unwrap());
        }
    }
}

#[test]
fn an_index_that_jumps_ends_the_connection() {
    for (at, value) in [(0, SLOTS), (0, u32::MAX), (0x40, SLOTS), (0x40, u32::MAX)] {
        let place = Place::new();
        let mut listener = place.host();
        let mut qemu = Qemu::connect(place.path(), End::Driver);
        let mut bus = accept(&mut listener);
        qemu.send(&message(1));
        assert_eq!(recv(&mut bus), Ok(1));
        let file = if at == 0 {
            &qemu.queues.tx
        } else {
            &qemu.queues.rx
        };
        set_word(file, at, value);
        let error = if at == 0 {
            recv(&mut bus).unwrap_err()
        } else {
            // Its own index is only looked at when there seems to be no room.
            loop {
                if let Err(error) = bus.try_send(&message(1)) {
                    break error;
                }
            }
        };
        assert!(matches!(error, ChannelError::Corrupt(_)), "{error}");
        let mut byte = [0; 4096];
        while std::io::Read::read(&mut qemu.socket, &mut byte).is_ok_and(|read| read > 0) {}
        drop((qemu, bus));
        // The next one is none the worse.
        assert!(listener.accept(Instant::now()).unwrap().is_none());
        let mut qemu = Qemu::connect(place.path(), End::Driver);
        let mut bus = accept(&mut listener);
        qemu.send(&message(2));
        assert_eq!(recv(&mut bus), Ok(2));
    }
}

#[test]
fn a_file_that_shrinks_ends_the_connection_and_not_the_program() {
    for name in ["queue-t-driver", "queue-t-device"] {
        let place = Place::new();
        let mut listener = place.host();
        let _qemu = Qemu::connect(place.path(), End::Driver);
        let mut bus = accept(&mut listener);
        let file = OpenOptions::new()
            .write(true)
            .open(place.path().join(name))
            .unwrap();
        file.set_len(0).unwrap();
        // Until something is touched that is gone, nothing is known of it.
        let mut buf = [0; 48];
        let error = loop {
            let result = bus
                .try_send(&message(1))
                .and_then(|()| bus.flush())
                .and_then(|()| bus.try_recv(&mut buf).map(drop));
            if let Err(error) = result {
                break error;
            }
            bus.arm();
        };
        assert!(matches!(error, ChannelError::Corrupt(_)), "{error}");
    }
}

#[test]
fn a_second_driver_is_turned_away_and_one_that_comes_after_the_end_is_not() {
    let place = Place::new();
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    for _ in 0..40 {
        let mut second = UnixStream::connect(place.socket()).unwrap();
        wait(&listener, None);
        assert!(listener.accept(Instant::now()).unwrap().is_none());
        let read = std::io::Read::read(&mut second, &mut [0]);
        assert!(matches!(read, Ok(0)), "{read:?}");
    }
    qemu.send(&message(1));
    assert_eq!(recv(&mut bus), Ok(1));
    // The host has not heard yet that the first one is gone.
    drop(qemu);
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    assert!(listener.accept(Instant::now()).unwrap().is_none());
    assert_eq!(recv(&mut bus), Err(ChannelError::Closed));
    drop(bus);
    let mut bus = accept(&mut listener);
    qemu.send(&message(2));
    assert_eq!(recv(&mut bus), Ok(2));
}

#[test]
fn a_socket_on_which_somebody_listens_is_not_taken_and_a_stale_one_is() {
    let place = Place::new();
    let other = UnixListener::bind(place.socket()).unwrap();
    assert!(matches!(
        Listener::bind(&place.spec, "host"),
        Err(BindError::InUse { .. })
    ));
    drop(other);
    assert!(place.socket().exists());
    drop(place.host());
    let mut spec = place.spec.clone();
    spec.server = Some(true);
    let _other = UnixListener::bind(place.socket()).unwrap();
    assert!(matches!(
        Connector::new(&spec, "driver").start(),
        Err(ConnectError::Bind(BindError::InUse { .. }))
    ));
}
