// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The suite itself, and what its tests need.

use rustix::event::{PollFd, PollFlags, poll};
use std::any::Any;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::{DeviceBus, DriverBus, Listener};

/// What a bus is to be like.
#[derive(Clone, Copy)]
pub(crate) struct Want {
    pub(crate) message_size: usize,
    pub(crate) slots: u32,
}

/// A bus for a test.
pub(crate) struct Made {
    pub(crate) driver: DriverBus,
    pub(crate) device: DeviceBus,
    /// Messages that fit into a queue.
    pub(crate) room: u32,
    #[allow(dead_code)]
    pub(crate) keep: Box<dyn Any>,
}

/// Longer than anything here takes; only a failing test waits so long.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A message of `len` bytes (at least 12) that begins with a header and its number.
pub(crate) fn message(number: u32, len: usize) -> Vec<u8> {
    let size = u16::try_from(len).unwrap();
    let mut bytes = vec![0x00, 0x02, 0, 0, 0, 0];
    bytes.extend(size.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend((12..len).map(|at| (at ^ number as usize).to_le_bytes()[0]));
    bytes
}

pub(crate) fn number(message: &[u8]) -> u32 {
    u32::from_le_bytes(message[8..12].try_into().unwrap())
}

/// Waits for a connection.
pub(crate) fn accept(listener: &mut Listener) -> DeviceBus {
    let until = Instant::now() + LONG;
    loop {
        // Who is held up in the middle of something may be looked for again.
        let result = listener.accept(Instant::now());
        if let Ok(Some(bus)) = result {
            return bus;
        }
        let now = Instant::now();
        assert!(now < until, "nobody connected: {result:?}");
        let due = listener.next_deadline().map_or(until, |due| due.min(until));
        let left = rustix::event::Timespec::try_from(due.saturating_duration_since(now)).unwrap();
        poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&left)).unwrap();
    }
}

/// Receives one message, asleep until it is there.
pub(crate) fn recv(bus: &mut DeviceBus, buf: &mut [u8]) -> Result<usize, ChannelError> {
    loop {
        if let Some(len) = bus.try_recv(buf)? {
            return Ok(len);
        }
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    }
}

/// As [`recv`], on the driver's end.
pub(crate) fn driver_recv(bus: &mut DriverBus, buf: &mut [u8]) -> Result<usize, ChannelError> {
    loop {
        if let Some(len) = bus.try_recv(buf)? {
            return Ok(len);
        }
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    }
}

/// Waits on the descriptors of [`DriverBus::wake_fds`] the way a reactor does.
pub(crate) fn sleep_on(bus: &mut DriverBus) {
    let fd = bus.poll_fd().unwrap();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let long = rustix::event::Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut fds, Some(&long)).unwrap(), 1, "never woken");
    assert!(bus.clear_poll_fd().unwrap());
}

/// Sends, asleep while there is no room.
pub(crate) fn send(bus: &mut DriverBus, message: &[u8]) {
    loop {
        match bus.try_send(message) {
            Ok(()) => return,
            Err(ChannelError::Full) => {
                if bus.arm_for_room() {
                    sleep_on(bus);
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// An eventfd that holds `value`.
pub(crate) fn eventfd(value: u32) -> rustix::fd::OwnedFd {
    rustix::event::eventfd(value, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

/// What an eventfd holds.
pub(crate) fn value(fd: impl AsFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

/// Tests for the bus that `$make` makes, as large as it likes.
macro_rules! bus_suite {
    ($make:ident) => {
        use crate::suite::*;
        use std::thread;
        use std::time::Duration;
        use virtio_msg::{Channel, ChannelError};

        const SMALL: Want = Want {
            message_size: 64,
            slots: 8,
        };

        #[test]
        fn messages_arrive_whole_and_in_order_both_ways() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            for round in 0..100 {
                for n in 0..3 {
                    driver
                        .try_send(&message(round * 3 + n, 12 + n as usize))
                        .unwrap();
                    device.try_send(&message(!(round * 3 + n), 48)).unwrap();
                }
                driver.flush().unwrap();
                device.flush().unwrap();
                for n in 0..3 {
                    let len = recv(&mut device, &mut buf).unwrap();
                    assert_eq!(buf[..len], message(round * 3 + n, 12 + n as usize));
                    let len = driver_recv(&mut driver, &mut buf).unwrap();
                    assert_eq!(buf[..len], message(!(round * 3 + n), 48));
                }
            }
            assert_eq!(device.try_recv(&mut buf), Ok(None));
            assert_eq!(driver.counters().sent, 300);
            assert_eq!(device.counters().received, 300);
        }

        #[test]
        fn nothing_is_seen_before_the_flush() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            driver.try_send(&message(1, 12)).unwrap();
            assert_eq!(device.try_recv(&mut buf), Ok(None));
            driver.flush().unwrap();
            assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
        }

        #[test]
        fn a_full_bus_pushes_back_and_goes_on_when_there_is_room() {
            let Made {
                mut driver,
                mut device,
                room,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            for n in 0..room {
                driver.try_send(&message(n, 12)).unwrap();
            }
            assert_eq!(driver.try_send(&message(room, 12)), Err(ChannelError::Full));
            assert!(driver.arm_for_room());
            // The messages in the way are visible although nobody flushed.
            assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
            assert_eq!(number(&buf), 0);
            while device.try_recv(&mut buf).unwrap().is_some() {}
            assert_eq!(number(&buf), room - 1);
            assert!(!driver.arm_for_room());
            driver.try_send(&message(room, 12)).unwrap();
        }

        #[test]
        fn who_waits_for_room_is_woken() {
            let Made {
                driver,
                mut device,
                keep: _keep,
                ..
            } = $make(SMALL);
            let sender = thread::spawn(move || {
                let mut driver = driver;
                for n in 0..20_000 {
                    send(&mut driver, &message(n, 12));
                }
                driver.flush().unwrap();
                driver
            });
            let mut buf = [0; 64];
            for n in 0..20_000 {
                recv(&mut device, &mut buf).unwrap();
                assert_eq!(number(&buf), n);
            }
            drop(sender.join().unwrap());
        }

        #[test]
        fn no_wake_is_lost_when_both_sides_sleep_all_the_time() {
            let Made {
                driver,
                mut device,
                keep: _keep,
                ..
            } = $make(Want {
                message_size: 48,
                slots: 4,
            });
            let other = thread::spawn(move || {
                let mut driver = driver;
                let mut buf = [0; 64];
                for n in 0..10_000 {
                    driver.try_send(&message(n, 48)).unwrap();
                    driver.flush().unwrap();
                    driver_recv(&mut driver, &mut buf).unwrap();
                    assert_eq!(number(&buf), !n);
                }
                driver
            });
            let mut buf = [0; 64];
            for n in 0..10_000 {
                recv(&mut device, &mut buf).unwrap();
                assert_eq!(number(&buf), n);
                device.try_send(&message(!n, 48)).unwrap();
                device.flush().unwrap();
            }
            drop(other.join().unwrap());
        }

        #[test]
        fn an_idle_bus_sleeps_until_the_time_is_over() {
            let Made {
                mut driver,
                device: _device,
                ..
            } = $make(SMALL);
            // Once or twice it may wake for nothing, more and more seldom.
            let mut tries = 0..20;
            assert!(tries.any(|_| !driver.wait(Some(Duration::from_millis(20))).unwrap()));
        }

        #[test]
        fn arming_flushes_what_was_sent() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            driver.try_send(&message(1, 12)).unwrap();
            assert!(driver.arm());
            assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
        }

        #[test]
        fn the_other_side_sees_the_end_after_the_last_message() {
            let Made {
                mut driver,
                device,
                keep: _keep,
                ..
            } = $make(SMALL);
            let other = thread::spawn(move || {
                let mut device = device;
                let mut buf = [0; 64];
                recv(&mut device, &mut buf).unwrap();
                device.try_send(&message(5, 12)).unwrap();
            });
            let mut buf = [0; 64];
            driver.try_send(&message(1, 12)).unwrap();
            driver.flush().unwrap();
            assert_eq!(driver_recv(&mut driver, &mut buf), Ok(12));
            assert_eq!(
                driver_recv(&mut driver, &mut buf),
                Err(ChannelError::Closed)
            );
            assert!(driver.is_closed());
            assert_eq!(driver.try_send(&message(2, 12)), Err(ChannelError::Closed));
            assert!(!driver.arm());
            other.join().unwrap();
        }

        #[test]
        fn who_waits_for_room_sees_the_end() {
            let Made {
                mut driver,
                device,
                keep: _keep,
                ..
            } = $make(SMALL);
            while driver.try_send(&message(1, 12)).is_ok() {}
            assert!(driver.arm_for_room());
            let other = thread::spawn(move || drop(device));
            sleep_on(&mut driver);
            while driver.arm_for_room() {
                sleep_on(&mut driver);
            }
            assert_eq!(driver.try_send(&message(1, 12)), Err(ChannelError::Closed));
            other.join().unwrap();
        }

        #[test]
        fn a_message_that_looks_like_a_marker_is_not_sent() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let marker = [0x02, 0xc0, 0, 0, 0, 0, 8, 0];
            assert_eq!(driver.try_send(&marker), Err(ChannelError::TooLong));
            driver.flush().unwrap();
            assert_eq!(device.try_recv(&mut [0; 64]), Ok(None));
        }

        #[test]
        fn both_sides_know_each_other() {
            let Made { driver, device, .. } = $make(SMALL);
            assert!(!driver.peer_name().is_empty());
            assert!(!device.peer_name().is_empty());
            assert_eq!(driver.epoch(), device.epoch());
            assert_eq!(driver.capabilities(), device.capabilities());
        }
    };
}

/// Tests for a bus of ours, as large as is wanted and with doorbells only for who sleeps.
macro_rules! shaped_suite {
    ($make:ident) => {
        use crate::suite::*;
        use virtio_msg::{Channel, ChannelError};

        const SMALL: Want = Want {
            message_size: 64,
            slots: 8,
        };

        #[test]
        fn messages_of_every_size_of_the_bus_fit_and_longer_ones_are_refused() {
            for size in [48, 50, 64, 104, 264, 320, 4096, 65535, 65536] {
                let Made {
                    mut driver,
                    mut device,
                    ..
                } = $make(Want {
                    message_size: size,
                    slots: 4,
                });
                assert_eq!(driver.max_message_size(), size);
                assert_eq!(device.capabilities().max_message_size, size);
                let longest = size.min(65535);
                driver.try_send(&message(1, longest)).unwrap();
                assert_eq!(
                    driver.try_send(&vec![0; size + 1]),
                    Err(ChannelError::TooLong)
                );
                driver.flush().unwrap();
                let mut buf = vec![0; size];
                assert_eq!(
                    device.try_recv(&mut buf[..size - 1]),
                    Err(ChannelError::TooLong)
                );
                assert_eq!(device.try_recv(&mut buf), Ok(Some(longest)));
                assert_eq!(buf[..longest], message(1, longest));
            }
        }

        #[test]
        fn a_message_with_an_impossible_size_is_handed_up_to_be_refused() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            for size in [0u16, 7, 65, 0xffff] {
                let mut bad = message(1, 12);
                bad[6..8].copy_from_slice(&size.to_le_bytes());
                driver.try_send(&bad).unwrap();
                driver.flush().unwrap();
                assert_eq!(device.try_recv(&mut buf), Ok(Some(64)));
                assert_eq!(buf[..12], bad);
            }
        }

        #[test]
        fn doorbells_are_rung_only_for_who_sleeps() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            for n in 0..1000 {
                driver.try_send(&message(n, 12)).unwrap();
                driver.flush().unwrap();
                device.try_recv(&mut buf).unwrap();
            }
            assert_eq!(driver.counters().rings, 0);
            assert_eq!(device.try_recv(&mut buf), Ok(None));
            assert!(device.arm());
            driver.try_send(&message(1, 12)).unwrap();
            driver.flush().unwrap();
            driver.try_send(&message(2, 12)).unwrap();
            driver.flush().unwrap();
            assert_eq!(driver.counters().rings, 1);
            assert!(!device.arm(), "there are messages");
        }
    };
}

/// Tests for a bus that passes descriptors.
macro_rules! descriptor_suite {
    ($make:ident) => {
        use crate::suite::*;
        use std::os::fd::AsFd;
        use std::thread;
        use virtio_msg::{Channel, ChannelError};

        const SMALL: Want = Want {
            message_size: 64,
            slots: 8,
        };

        #[test]
        fn descriptors_arrive_with_their_message_and_in_order() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            let mut fds = Vec::new();
            let (a, b) = (eventfd(11), eventfd(22));
            driver.try_send(&message(1, 12)).unwrap();
            driver
                .try_send_with_fds(&message(2, 40), &[a.as_fd(), b.as_fd()])
                .unwrap();
            driver.try_send(&message(3, 12)).unwrap();
            driver
                .try_send_with_fds(&message(4, 12), &[a.as_fd(); 4])
                .unwrap();
            driver.flush().unwrap();
            drop((a, b));
            assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
            assert_eq!((number(&buf), fds.len()), (1, 0));
            assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(40)));
            assert_eq!(buf[..40], message(2, 40));
            assert_eq!(fds.iter().map(value).collect::<Vec<_>>(), [11, 22]);
            assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
            assert_eq!((number(&buf), fds.len()), (3, 0));
            assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
            assert_eq!((number(&buf), fds.len()), (4, 4));
            assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(None));
            assert!(fds.is_empty());
        }

        #[test]
        fn descriptors_wake_a_sleeper_and_go_the_other_way_too() {
            let Made {
                driver,
                mut device,
                keep: _keep,
                ..
            } = $make(SMALL);
            let other = thread::spawn(move || {
                let mut driver = driver;
                let mut buf = [0; 64];
                let mut fds = Vec::new();
                while driver
                    .try_recv_with_fds(&mut buf, &mut fds)
                    .unwrap()
                    .is_none()
                {
                    assert!(driver.wait(Some(LONG)).unwrap());
                }
                value(&fds[0])
            });
            device
                .try_send_with_fds(&message(1, 12), &[eventfd(33).as_fd()])
                .unwrap();
            assert_eq!(other.join().unwrap(), 33);
        }

        #[test]
        fn descriptors_nobody_asked_for_are_closed_and_counted() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            driver
                .try_send_with_fds(&message(1, 12), &[writer.as_fd()])
                .unwrap();
            drop(writer);
            assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
            assert_eq!(device.counters().fds_dropped, 1);
            // Nobody holds the writing end any more.
            assert_eq!(rustix::io::read(&reader, &mut buf), Ok(0));
        }

        #[test]
        fn too_many_descriptors_and_a_full_bus_send_nothing() {
            let Made {
                mut driver,
                mut device,
                ..
            } = $make(SMALL);
            let mut buf = [0; 64];
            let fd = eventfd(1);
            assert_eq!(
                driver.try_send_with_fds(&message(1, 12), &[fd.as_fd(); 5]),
                Err(ChannelError::TooLong)
            );
            assert_eq!(
                driver.try_send_with_fds(&[0; 65], &[fd.as_fd()]),
                Err(ChannelError::TooLong)
            );
            for n in 0..7 {
                driver
                    .try_send_with_fds(&message(n, 12), &[fd.as_fd()])
                    .unwrap();
            }
            assert_eq!(
                driver.try_send_with_fds(&message(7, 12), &[fd.as_fd()]),
                Err(ChannelError::Full)
            );
            for n in 0..7 {
                assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
                assert_eq!(number(&buf), n);
            }
            assert_eq!(device.try_recv(&mut buf), Ok(None));
            driver
                .try_send_with_fds(&message(7, 12), &[fd.as_fd()])
                .unwrap();
            assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
        }
    };
}
