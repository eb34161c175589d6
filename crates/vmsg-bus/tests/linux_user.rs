// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `linux-user`: how the two sides find each other, part and come back.
#![cfg(feature = "linux-user")]

mod place;

use place::{LONG, accept, spec, wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::thread;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::linux_user::{Connector, Listener};
use vmsg_bus::{ConnectError, DeviceBus, DriverBus, LinuxUserSpec};

fn connect(connector: &Connector) -> thread::JoinHandle<DriverBus> {
    let connector = connector.clone().timeout(LONG);
    thread::spawn(move || connector.connect().unwrap())
}

fn message(n: u8) -> Vec<u8> {
    let mut bytes = vec![0, 2, 0, 0, 0, 0, 12, 0];
    bytes.extend([n, 0, 0, 0]);
    bytes
}

fn recv(bus: &mut impl Ends) -> Result<Vec<u8>, ChannelError> {
    let mut buf = [0; 48];
    loop {
        if let Some(len) = bus.try_recv(&mut buf)? {
            return Ok(buf[..len].to_vec());
        }
        assert!(bus.sleep(), "never woken");
    }
}

trait Ends: Channel {
    fn sleep(&mut self) -> bool;
}

impl Ends for DriverBus {
    fn sleep(&mut self) -> bool {
        self.wait(Some(LONG)).unwrap()
    }
}

impl Ends for DeviceBus {
    fn sleep(&mut self) -> bool {
        self.wait(Some(LONG)).unwrap()
    }
}

fn talk(driver: &mut DriverBus, device: &mut DeviceBus) {
    for n in 0..3 {
        driver.try_send(&message(n)).unwrap();
        driver.flush().unwrap();
        assert_eq!(recv(device), Ok(message(n)));
        device.try_send(&message(!n)).unwrap();
        device.flush().unwrap();
        assert_eq!(recv(driver), Ok(message(!n)));
    }
}

#[test]
fn either_side_may_listen_and_either_may_come_first() {
    for driver_listens in [false, true] {
        for host_first in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut spec = spec(dir.path());
            spec.server = Some(driver_listens);
            let connector = Connector::new(&spec, "test driver");
            spec.server = Some(!driver_listens);
            let host = |spec: &LinuxUserSpec| Listener::bind(spec, "test host").unwrap();
            let (driver, mut listener) = if host_first {
                let listener = host(&spec);
                (connect(&connector), listener)
            } else {
                let mut watch = vmsg_bus::Connector::LinuxUser(connector.clone())
                    .watch()
                    .unwrap();
                let refused = connector.start().unwrap_err();
                assert!(refused.is_not_there(), "{refused}");
                let listener = host(&spec);
                if !driver_listens {
                    wait(&watch, None);
                    assert!(watch.ready().unwrap());
                }
                (connect(&connector), listener)
            };
            let mut device = accept(&mut listener);
            let mut driver = driver.join().unwrap();
            assert_eq!(device.peer_name(), "test driver");
            assert_eq!(driver.peer_name(), "test host");
            talk(&mut driver, &mut device);
        }
    }
}

#[test]
fn a_second_driver_and_a_second_host_hear_who_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut listener = Listener::bind(&spec, "host A").unwrap();
    let refused = Listener::bind(&spec, "host B").unwrap_err().to_string();
    assert!(refused.contains("host A (pid"), "{refused}");
    let connector = Connector::new(&spec, "driver A");
    let driver = connect(&connector);
    let device = accept(&mut listener);
    let refused = Connector::new(&spec, "driver B").connect().unwrap_err();
    assert!(matches!(refused, ConnectError::Held { .. }));
    assert!(refused.to_string().contains("driver A (pid"), "{refused}");
    drop((driver.join().unwrap(), connector, device));
    let next = connect(&Connector::new(&spec, "driver B"));
    let device = accept(&mut listener);
    assert_eq!(device.peer_name(), "driver B");
    drop(next.join().unwrap());
}

#[test]
fn who_is_turned_away_for_a_driver_without_a_lock_hears_so() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut listener = Listener::bind(&spec, "test host").unwrap();
    // As QEMU does.
    let qemu = std::os::unix::net::UnixStream::connect(listener.path()).unwrap();
    let _device = accept(&mut listener);
    let late = thread::spawn(move || Connector::new(&spec, "late").connect().unwrap_err());
    while !late.is_finished() {
        wait(&listener, Some(Instant::now() + Duration::from_millis(10)));
        // It may have been in the middle of something, and is looked at again then.
        let taken = listener.accept(Instant::now());
        assert!(!matches!(taken, Ok(Some(_))));
    }
    let refused = late.join().unwrap();
    assert!(matches!(refused, ConnectError::Held { .. }), "{refused}");
    assert!(refused.to_string().contains("another driver"), "{refused}");
    drop(qemu);
}

#[test]
fn a_host_that_dialed_sleeps_while_files_come_and_go_in_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path());
    spec.server = Some(true);
    let connector = Connector::new(&spec, "test driver");
    spec.server = Some(false);
    let mut listener = Listener::bind(&spec, "test host").unwrap();
    let driver = connect(&connector);
    let mut device = accept(&mut listener);
    let mut driver = driver.join().unwrap();

    std::fs::write(dir.path().join("ram"), b"").unwrap();
    wait(&listener, None);
    assert!(listener.accept(Instant::now()).unwrap().is_none());
    let mut fds = [PollFd::new(&listener, PollFlags::IN)];
    let ready = poll(&mut fds, Some(&Timespec::default())).unwrap();
    assert_eq!(ready, 0, "the listener wants something again and again");
    talk(&mut driver, &mut device);

    // And finds the next driver all the same.
    drop((driver, device));
    let driver = connect(&connector);
    let mut device = accept(&mut listener);
    talk(&mut driver.join().unwrap(), &mut device);
}

#[test]
fn a_peer_that_is_gone_is_noticed_after_its_last_message() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut listener = Listener::bind(&spec, "host").unwrap();
    let connector = Connector::new(&spec, "driver");
    for n in 0..5 {
        let driver = connect(&connector);
        let mut device = accept(&mut listener);
        let mut driver = driver.join().unwrap();
        talk(&mut driver, &mut device);
        // What a dead driver was not told any more is not told the next one.
        device.try_send(&message(99)).unwrap();
        device.flush().unwrap();
        driver.try_send(&message(n)).unwrap();
        drop(driver);
        assert_eq!(recv(&mut device), Ok(message(n)));
        assert_eq!(recv(&mut device), Err(ChannelError::Closed));
    }
}
