// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::loopback::{self, Options};
use crate::tap::{Direction, Tap};
use crate::{Bus, DeviceBus, DriverBus};
use std::os::fd::AsFd;

fn pair(slots: u32) -> (DriverBus, DeviceBus) {
    loopback::pair(&Options {
        slots,
        doorbells: false,
        ..Options::default()
    })
    .unwrap()
}

/// A message of 12 bytes with its number behind the header.
fn message(number: u32) -> Vec<u8> {
    let mut bytes = vec![0, 2, 0, 0, 0, 0, 12, 0];
    bytes.extend(number.to_le_bytes());
    bytes
}

fn numbers(bus: &mut impl Channel) -> Vec<u32> {
    let mut buf = [0; 320];
    let mut got = Vec::new();
    while let Some(len) = bus.try_recv(&mut buf).unwrap() {
        assert_eq!(len, 12);
        got.push(u32::from_le_bytes(buf[8..12].try_into().unwrap()));
    }
    got
}

/// Sends 0…99 through the injector, and again what was received through another one.
fn run(seed: u64, rates: Rates) -> (Vec<u32>, Faults) {
    let (driver, mut device) = pair(512);
    let mut driver = FaultInjector::new(driver, seed, rates, Rates::default());
    for n in 0..100 {
        driver.try_send(&message(n)).unwrap();
    }
    driver.release();
    driver.flush().unwrap();
    (numbers(&mut device), *driver.faults())
}

#[test]
fn without_rates_nothing_happens() {
    assert_eq!(
        run(1, Rates::default()),
        ((0..100).collect(), Faults::default())
    );
}

#[test]
fn dropped_messages_are_missing_and_the_others_keep_their_order() {
    let (got, faults) = run(
        2,
        Rates {
            drop: 5,
            ..Rates::default()
        },
    );
    assert!(faults.dropped > 5 && got.is_sorted());
    assert_eq!(got.len() as u64, 100 - faults.dropped);
}

#[test]
fn duplicated_messages_come_once_more_right_away() {
    let (got, faults) = run(
        3,
        Rates {
            duplicate: 5,
            ..Rates::default()
        },
    );
    assert!(faults.duplicated > 5 && got.is_sorted());
    assert_eq!(got.len() as u64, 100 + faults.duplicated);
}

#[test]
fn delayed_messages_come_after_at_most_so_many_others() {
    let (mut got, faults) = run(
        4,
        Rates {
            delay: 4,
            delay_by: 3,
            ..Rates::default()
        },
    );
    assert!(faults.delayed > 5 && !got.is_sorted());
    for (at, n) in got.iter().enumerate() {
        assert!(at.abs_diff(*n as usize) <= 6, "{n} at {at}");
    }
    got.sort_unstable();
    assert_eq!(got, (0..100).collect::<Vec<_>>());
}

#[test]
fn the_same_seed_gives_the_same_faults() {
    let rates = Rates {
        drop: 7,
        duplicate: 7,
        delay: 7,
        delay_by: 5,
        ..Rates::default()
    };
    assert_eq!(run(5, rates), run(5, rates));
    assert_ne!(run(5, rates).0, run(6, rates).0);
}

#[test]
fn corrupted_messages_differ_in_one_bit() {
    let (mut driver, device) = pair(64);
    let rates = Rates {
        corrupt: 1,
        ..Rates::default()
    };
    let mut device = FaultInjector::new(device, 7, Rates::default(), rates);
    driver.try_send(&message(0)).unwrap();
    driver.flush().unwrap();
    let mut buf = [0; 320];
    let len = device.try_recv(&mut buf).unwrap().unwrap();
    let flipped: u32 = buf[..len]
        .iter()
        .zip(message(0))
        .map(|(a, b)| (a ^ b).count_ones())
        .sum();
    assert_eq!((flipped, device.faults().corrupted), (1, 1));
}

#[test]
fn faults_on_the_receiving_side_count_the_same() {
    let (mut driver, device) = pair(512);
    let rates = Rates {
        drop: 5,
        duplicate: 5,
        delay: 5,
        delay_by: 4,
        ..Rates::default()
    };
    let mut device = FaultInjector::new(device, 8, Rates::default(), rates);
    for n in 0..100 {
        driver.try_send(&message(n)).unwrap();
    }
    driver.flush().unwrap();
    let mut got = numbers(&mut device);
    device.release();
    got.extend(numbers(&mut device));
    let faults = device.faults();
    assert_eq!(got.len() as u64, 100 - faults.dropped + faults.duplicated);
}

#[test]
fn a_full_queue_leaves_the_faults_as_they_were() {
    let (driver, mut device) = pair(8);
    let rates = Rates {
        drop: 3,
        ..Rates::default()
    };
    let mut driver = FaultInjector::new(driver, 9, rates, Rates::default());
    let mut got = Vec::new();
    for n in 0..200 {
        while driver.try_send(&message(n)) == Err(ChannelError::Full) {
            let before = *driver.faults();
            assert_eq!(driver.try_send(&message(n)), Err(ChannelError::Full));
            assert_eq!(*driver.faults(), before);
            got.extend(numbers(&mut device));
        }
    }
    driver.flush().unwrap();
    got.extend(numbers(&mut device));
    assert!(got.is_sorted());
    assert_eq!(got.len() as u64, 200 - driver.faults().dropped);
}

#[test]
fn descriptors_come_through_the_wrappers_with_their_message() {
    let (driver, device) = pair(8);
    let mut seen = Vec::new();
    let mut driver = Tap::new(driver, |way, bytes: &[u8]| seen.push((way, bytes.to_vec())));
    let mut device = FaultInjector::new(
        device,
        10,
        Rates::default(),
        Rates {
            duplicate: 1,
            ..Rates::default()
        },
    );
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    driver
        .try_send_with_fds(&message(1), &[fd.as_fd()])
        .unwrap();
    driver.try_send(&message(2)).unwrap();
    driver.flush().unwrap();
    let mut buf = [0; 320];
    let mut fds = Vec::new();
    assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
    assert_eq!(fds.len(), 1);
    assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
    assert!(fds.is_empty());
    assert!(!device.arm(), "the duplicate is there to be received");
    assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
    assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(None));
    drop(driver);
    assert_eq!(
        seen,
        [(Direction::Sent, message(1)), (Direction::Sent, message(2))]
    );
}
