// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two buses of one program on one device, which is opened once.

use super::super::open::{Opened, arrange};
use super::super::{Connector, Listener, Site};
use super::*;
use crate::{DeviceBus, DriverBus, IvshmemSpec};
use ivshmem::Client;
use ivshmem::client::Limits;
use ivshmem::server::{Options, Port, Server};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_msg::Channel;

const LONG: Duration = Duration::from_secs(60);
const OFFSETS: [u64; 2] = [0x1000, 0x1_0000];

fn client(path: &Path) -> Device {
    // All that it has, however long the server takes for them.
    let limits = Limits {
        vectors: Some(3),
        ..Limits::default()
    };
    Device::client(Client::connect_with(path, limits, LONG).unwrap()).unwrap()
}

/// Bus `number` of the device, whose vector is its number, with the one of the other end.
fn spec(number: usize, peer: u16) -> IvshmemSpec {
    let vector = u16::try_from(number).unwrap();
    IvshmemSpec {
        pci: Some("0000:00:04.0".into()),
        offset: Some(OFFSETS[number]),
        vector: Some(vector),
        peer: Some(peer),
        ..IvshmemSpec::default()
    }
}

fn opened(spec: &IvshmemSpec, shared: &Arc<Shared>) -> Opened {
    let doors = Doors::shared(Arc::clone(shared), spec.vector.unwrap());
    arrange(spec, doors).unwrap()
}

fn accept(listener: &mut Listener) -> DeviceBus {
    let long = Timespec::try_from(LONG).unwrap();
    loop {
        if let Some(bus) = listener.accept(Instant::now()).unwrap() {
            return bus;
        }
        let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&long));
        assert_eq!(ready.unwrap(), 1, "never woken");
    }
}

/// Sends back what comes, until the other end has gone.
fn echo(mut bus: DeviceBus) {
    let mut buf = [0; 64];
    loop {
        match bus.try_recv(&mut buf) {
            Ok(Some(len)) => {
                // There is always room: one message at a time.
                if bus.try_send(&buf[..len]).is_err() || bus.flush().is_err() {
                    return;
                }
            }
            Ok(None) => assert!(bus.wait(Some(LONG)).unwrap(), "never woken"),
            Err(_) => return,
        }
    }
}

fn ping(bus: &mut DriverBus, number: u32) -> Duration {
    let mut message = vec![2, 3, 0, 0, 1, 0, 12, 0];
    message.extend(number.to_le_bytes());
    let begin = Instant::now();
    bus.try_send(&message).unwrap();
    bus.flush().unwrap();
    let mut buf = [0; 64];
    while bus.try_recv(&mut buf).unwrap().is_none() {
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    }
    assert_eq!(buf[..12], *message);
    begin.elapsed()
}

#[test]
fn buses_of_one_device_wake_each_for_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut server = Server::bind(Options::new(vec![Port::new(&path, 3)], 1 << 20)).unwrap();
    let stop = Doorbell::new().unwrap();
    let stopped = stop.try_clone().unwrap();
    let server = std::thread::spawn(move || server.run(stopped.eventfd().unwrap()).unwrap());
    let (mut hosts, drivers) = (client(&path), client(&path));
    // In a guest every doorbell is there from the start.
    while hosts.bell(drivers.id().unwrap(), 2).is_none() {
        if hosts.poll().is_none() {
            let fd = hosts.news_fd().unwrap();
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            assert_eq!(poll(&mut fds, None).unwrap(), 1);
        }
    }
    let (hosts, drivers) = (Shared::new(hosts), Shared::new(drivers));
    let id = |shared: &Arc<Shared>| shared.device.id().unwrap().0;
    let (host, driver) = (id(&hosts), id(&drivers));
    let mut buses = [0, 1].map(|number| {
        let spec = spec(number, driver);
        let name = format!("host{number}");
        let mut listener = Listener::on(Site::new(&spec, &name), opened(&spec, &hosts)).unwrap();
        let spec = super::super::IvshmemSpec {
            peer: Some(host),
            ..spec
        };
        let connector = Connector::on(&spec, "driver", opened(&spec, &drivers));
        let connecting = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        let driver = connecting.join().unwrap();
        assert_eq!(driver.peer().name, name, "each has its own place");
        let echo = std::thread::spawn(move || {
            echo(device);
            drop(listener);
        });
        (driver, echo)
    });
    assert_eq!(hosts.of_buses(), [0, 1]);
    // The first one is kept busy: with messages, and with a doorbell that never rests.
    let over = AtomicBool::new(false);
    let storm = drivers.device.bell(PeerId(host), 0).unwrap();
    let [(busy, first), (quiet, second)] = &mut buses;
    let times: Vec<Duration> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                drop(storm.ring());
            }
        });
        scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::SeqCst) {
                ping(busy, number);
                number += 1;
            }
        });
        let times = (0..300).map(|number| ping(quiet, number)).collect();
        over.store(true, Ordering::SeqCst);
        times
    });
    // A wake-up that is lost costs a heartbeat of half a second; so may a busy machine, now and then.
    let slow = times.iter().filter(|time| time.as_millis() > 400).count();
    assert!(slow < 30, "{times:?}");
    let _ = (first, second);
    for (driver, echo) in buses {
        drop(driver);
        echo.join().unwrap();
    }
    assert_eq!(hosts.of_buses(), [0; 0], "vectors are given back");
    stop.ring().unwrap();
    server.join().unwrap();
}

#[test]
fn a_function_is_opened_once_as_long_as_a_bus_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    let opened = std::cell::Cell::new(0);
    let open = || {
        opened.set(opened.get() + 1);
        Device::plain(&ivshmem::Plain::File(memory.clone()), Some(4096))
    };
    let one = share("test:00:04.0", open).unwrap();
    let other = share("test:00:04.0", open).unwrap();
    assert!(Arc::ptr_eq(&one, &other));
    let elsewhere = share("test:00:05.0", open).unwrap();
    assert_eq!(opened.get(), 2);
    drop((one, other));
    let again = share("test:00:04.0", open).unwrap();
    assert_eq!(opened.get(), 3);
    drop((elsewhere, again));
    let failed: Result<_, &str> = share("test:00:04.0", || Err("no"));
    assert!(failed.is_err_and(|error| error == "no"));
}
