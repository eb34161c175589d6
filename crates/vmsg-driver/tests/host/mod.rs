// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host with an entropy device and a network device that sends back what it gets, in a thread of its own.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared by tests that each use a part"
)]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::loopback::{self, Options};
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::host::{Handle, Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_driver::BusClient;
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

pub const RNG: DevNum = DevNum(0);
pub const NET: DevNum = DevNum(5);
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
pub const MTU: u16 = 1400;
pub const PAIRS: u16 = 4;

/// Generous: a machine under load is no reason to fail.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Sends every frame back.
#[derive(Default)]
struct Echo {
    frames: VecDeque<Vec<u8>>,
}

impl Backend for Echo {
    fn queue_pairs(&self) -> u16 {
        u16::MAX
    }
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }
    fn set_guest(&mut self, _: &Guest) {}
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        for frame in frames {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            self.frames.push_back(bytes);
        }
        frames.len()
    }
    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut count = 0;
        while let Some(frame) = self.frames.front() {
            let Some(room) = sink.offer(
                Target::Head(&frame[..frame.len().min(Target::HEAD)]),
                frame.len(),
            ) else {
                break;
            };
            room.write(frame);
            sink.commit(&VnetHeader::default(), frame.len());
            self.frames.pop_front();
            count += 1;
        }
        count
    }
    fn has_frames(&self) -> bool {
        !self.frames.is_empty()
    }
    fn shutdown(&mut self) {}
}

/// A running host; ends when dropped.
pub struct Running {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    _dir: Option<tempfile::TempDir>,
    pub path: PathBuf,
    pub handle: Handle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn with_devices(host: &mut Host, bus: usize) {
    let settings = Settings {
        mtu: Some(MTU),
        queue_pairs: PAIRS,
        ..Settings::new(Mac(MAC))
    };
    let net = Net::new(&settings, Box::new(Echo::default()));
    assert_eq!(
        host.add_device(bus, "rng0", Some(RNG.0), None, Box::new(Rng::new()))
            .unwrap(),
        RNG
    );
    assert_eq!(
        host.add_device(bus, "net0", Some(NET.0), None, Box::new(net))
            .unwrap(),
        NET
    );
}

fn run(mut host: Host, dir: Option<tempfile::TempDir>, path: PathBuf) -> Running {
    let stop = host.stop_handle();
    let handle = host.handle();
    let thread = std::thread::spawn(move || host.run().unwrap());
    Running {
        stop,
        thread: Some(thread),
        _dir: dir,
        path,
        handle,
    }
}

/// A host in this process, and the driver's end of a bus to it.
pub fn over_loopback(options: &Options) -> (Running, DriverBus) {
    let (driver, device) = loopback::pair(options).unwrap();
    let mut host = Host::new(1).unwrap();
    let bus = host
        .add_bus(options.capabilities.max_message_size, None)
        .unwrap();
    with_devices(&mut host, bus);
    host.attach(bus, device).unwrap();
    (run(host, None, PathBuf::new()), driver)
}

/// A host in this process with one device, and the driver's end of a bus to it.
pub fn device_over_loopback(
    options: &Options,
    name: &str,
    number: DevNum,
    device: Box<dyn vmsg_device::device::Device>,
) -> (Running, DriverBus) {
    let (driver, end) = loopback::pair(options).unwrap();
    let mut host = Host::new(1).unwrap();
    let bus = host
        .add_bus(options.capabilities.max_message_size, None)
        .unwrap();
    let at = host.add_device(bus, name, Some(number.0), None, device);
    assert_eq!(at.unwrap(), number);
    host.attach(bus, end).unwrap();
    (run(host, None, PathBuf::new()), driver)
}

/// A host that listens on a socket.
pub fn over_unix() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b0.sock");
    let mut running = over_unix_at(path);
    running._dir = Some(dir);
    running
}

/// A host that listens on this socket.
pub fn over_unix_at(path: PathBuf) -> Running {
    let listener = Listener::bind(&path, ListenerOptions::default()).unwrap();
    let mut host = Host::new(1).unwrap();
    let bus = host
        .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
        .unwrap();
    with_devices(&mut host, bus);
    run(host, None, path)
}

/// A host with one device, which listens on this socket.
pub fn serve_on(
    path: PathBuf,
    name: &str,
    number: DevNum,
    device: Box<dyn vmsg_device::device::Device>,
) -> Running {
    let listener = Listener::bind(&path, ListenerOptions::default()).unwrap();
    let mut host = Host::new(1).unwrap();
    let bus = host
        .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
        .unwrap();
    let at = host.add_device(bus, name, Some(number.0), None, device);
    assert_eq!(at.unwrap(), number);
    run(host, None, path)
}

/// A driver's connection to `host`.
pub fn connect(host: &Running, name: &str) -> BusClient {
    client(Connector::new(&host.path, name).connect().unwrap())
}

/// A patient client.
pub fn client(bus: DriverBus) -> BusClient {
    let mut client = BusClient::on_bus(bus);
    client.set_timeout(PATIENCE);
    client
}
