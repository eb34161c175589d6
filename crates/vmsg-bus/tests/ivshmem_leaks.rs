// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is left behind by a thousand connections of the bus `ivshmem`. A test of its own, as it counts the descriptors of the process.
#![cfg(feature = "ivshmem")]

use ivshmem::server::{Options, Port, Server};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use virtio_msg::Channel;
use vmsg_bus::ivshmem::QueueLayout;
use vmsg_bus::{BusSpec, DeviceBus, IvshmemSpec};
use vmsg_mem::Doorbell;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("ivshmem")).count()
}

/// Connects again and again in one thread, both ends by turns.
fn reconnect(layout: QueueLayout, times: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut server = Server::bind(Options::new(vec![Port::new(&path, 4)], 1 << 20)).unwrap();
    let stop = Doorbell::new().unwrap();
    let stopped = stop.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        server.run(stopped.eventfd().unwrap()).unwrap();
    });
    let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec {
        layout,
        ..IvshmemSpec::socket(&path)
    }));
    let mut listener = spec.listen("host").unwrap();
    let connector = spec.connector("driver");
    let mut before = None;
    for round in 0..times {
        let mut connecting = connector.start().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        let mut device: Option<DeviceBus> = None;
        let mut driver = None;
        while device.is_none() || driver.is_none() {
            assert!(Instant::now() < until, "round {round}");
            if driver.is_none() {
                driver = connecting.advance().unwrap();
            }
            if device.is_none() {
                device = listener.accept(Instant::now()).unwrap();
            }
            let tenth = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            let mut fds = vec![PollFd::new(&listener, PollFlags::IN)];
            if driver.is_none() {
                fds.push(PollFd::new(&connecting, PollFlags::IN));
            }
            if device.is_none() || driver.is_none() {
                poll(&mut fds, Some(&tenth)).unwrap();
            }
        }
        let (mut device, mut driver) = (device.unwrap(), driver.unwrap());
        // What a reactor would wait on is made, too.
        device.poll_fd().unwrap();
        driver.poll_fd().unwrap();
        let mut message = [0u8; 48];
        message[1] = 2;
        message[6] = 48;
        driver.try_send(&message).unwrap();
        driver.flush().unwrap();
        assert_eq!(device.try_recv(&mut [0; 64]), Ok(Some(48)));
        // Either side may end it.
        if round % 2 == 0 {
            drop(driver);
            drop(device);
        } else {
            drop(device);
            drop(driver);
        }
        listener.accept(Instant::now()).unwrap();
        if round == 3 {
            before = Some((descriptors(), mappings()));
        }
    }
    assert_eq!(before, Some((descriptors(), mappings())));
    drop((listener, connector));
    assert!(stop.as_fd().try_clone_to_owned().is_ok());
    stop.ring().unwrap();
    thread.join().unwrap();
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let begin = descriptors();
    for layout in [QueueLayout::Amp, QueueLayout::Spsc] {
        reconnect(layout, 1000);
        assert_eq!(descriptors(), begin);
    }
}
