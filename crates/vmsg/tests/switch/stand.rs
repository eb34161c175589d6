// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host, and the drivers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::device::Snapshot;
use vmsg_device::host::{Handle, Host, Stop};
use vmsg_device::net::{Net, Settings};
use vmsg_device::switch::Pump;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::{BusClient, DmaPool, Error, QueueOptions, Sleep};
use vmsg_mem::BusAddr;
use vmsg_net::Mac;
use vmsg_net::switch::{Control, PortConfig, PortReport, Switch, SwitchConfig};

use crate::frames::{self, Seen};

/// Nothing takes so long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Buffers that each driver has, each way.
pub(crate) const BUFFERS: u16 = 64;
const BUFFER: usize = 2048;
/// Descriptors that 256 drivers and their devices take, and some.
const FILES: u64 = 16_384;

/// A running device host with one switch.
pub(crate) struct Stand {
    pub(crate) switch: Switch,
    pub(crate) control: Control,
    pub(crate) handle: Handle,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Stand {
    pub(crate) fn new(config: SwitchConfig) -> Self {
        let limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|now| now < FILES) {
            let current = Some(limit.maximum.map_or(FILES, |most| most.min(FILES)));
            let maximum = limit.maximum;
            setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("more descriptors");
        }
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("b0.sock");
        let options = ListenerOptions {
            max_connections: 512,
            ..ListenerOptions::default()
        };
        let listener = Listener::bind(&path, options).expect("a socket");
        let mut host = Host::new(1).expect("a host");
        let bus = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
            .expect("a bus");
        assert_eq!(bus, 0);
        let switch = Switch::new(config).expect("a switch");
        host.add_resident(0, Box::new(Pump(switch.pump())))
            .expect("a worker");
        let (stop, handle) = (host.stop_handle(), host.handle());
        let thread = std::thread::spawn(move || host.run().expect("a host"));
        Self {
            control: switch.control(),
            switch,
            handle,
            stop,
            thread: Some(thread),
            path,
            _dir: dir,
        }
    }

    /// Adds a device, with a port of the same name.
    pub(crate) fn add(&self, port: PortConfig, mac: Mac) -> DevNum {
        let name = port.name.clone();
        let port = self.switch.add_port(port).expect("a port");
        let net = Net::new(&Settings::new(mac), Box::new(port));
        self.handle
            .add_device(0, &name, None, Some(0), Box::new(net))
            .expect("a device")
    }

    /// Adds a device whose port knows its address, and a driver for it.
    pub(crate) fn plug(&self, port: PortConfig, id: u16) -> Station {
        let mac = frames::mac(id);
        let port = PortConfig {
            statics: vec![Mac(mac)],
            ..port
        };
        let number = self.add(port, Mac(mac));
        Station::new(self, number, id)
    }

    pub(crate) fn client(&self) -> BusClient {
        let bus = Connector::new(&self.path, "test").connect();
        let mut client = BusClient::on_bus(bus.expect("a connection"));
        client.set_timeout(PATIENCE);
        client
    }

    /// The counters of all ports, by their names.
    pub(crate) fn ports(&self) -> BTreeMap<String, PortReport> {
        let ports = self.control.report().ports.into_iter();
        ports.map(|port| (port.name.clone(), port)).collect()
    }

    /// What the devices have counted, by their names.
    pub(crate) fn devices(&self) -> BTreeMap<String, Snapshot> {
        let reports = self.handle.list().expect("an answer").into_iter();
        let snapshot = |report: vmsg_device::host::Report| {
            (report.name, report.snapshot.expect("a network device"))
        };
        reports.map(snapshot).collect()
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// A counter of a device or a pair.
pub(crate) fn counter(list: &[(&str, u64)], name: &str) -> u64 {
    let found = list.iter().find(|(other, _)| *other == name);
    found.expect("a counter of that name").1
}

pub(crate) type Driver = NetDriver<'static, DriverBus, Sleep, Vec<u8>>;

/// A driver, and what it has sent.
pub(crate) struct Station {
    pub(crate) id: u16,
    pub(crate) number: DevNum,
    /// `None` while there is none.
    pub(crate) net: Option<Driver>,
    /// Its memory. Leaked: rings borrow it, and a test's process is short.
    pool: &'static DmaPool,
    /// What it has sent last.
    pub(crate) sequence: u32,
}

impl Station {
    pub(crate) fn new(stand: &Stand, number: DevNum, id: u16) -> Self {
        let bytes = 3 * usize::from(BUFFERS) * BUFFER + (1 << 16);
        let pool = DmaPool::new("station", BusAddr(0x4000_0000), bytes).expect("memory");
        let mut station = Self {
            id,
            number,
            net: None,
            pool: Box::leak(Box::new(pool)),
            sequence: 0,
        };
        station.start(stand);
        station
    }

    /// A new driver, over a new connection.
    pub(crate) fn start(&mut self, stand: &Stand) {
        self.net = None;
        let mut client = stand.client();
        self.pool.lend(&mut client, 1).expect("lent");
        let options = NetOptions {
            queue: QueueOptions {
                size: BUFFERS,
                ..QueueOptions::default()
            },
            buffer_len: BUFFER,
            ..NetOptions::default()
        };
        let end = Instant::now() + PATIENCE;
        self.net = loop {
            // The last one may not be buried yet.
            match NetDriver::new(client, self.number, self.pool, &options) {
                Ok(net) => break Some(net),
                Err(error) => assert!(Instant::now() < end, "{}: {error}", self.number),
            }
            client = stand.client();
            self.pool.lend(&mut client, 1).expect("lent");
        };
    }

    pub(crate) fn net(&mut self) -> &mut Driver {
        self.net.as_mut().expect("a driver")
    }

    /// Sends all of `frames`.
    pub(crate) fn send(&mut self, frames: &[Vec<u8>]) {
        let mut rest = frames;
        let end = Instant::now() + PATIENCE;
        let number = self.number;
        while !rest.is_empty() {
            assert!(Instant::now() < end, "{number} takes no frames");
            let net = self.net();
            let sent = net.transmit(rest.iter().map(Vec::as_slice));
            rest = &rest[sent.expect("a working device")..];
            if !rest.is_empty() {
                net.wait_sent(PATIENCE).expect("a working device");
            }
        }
    }

    /// Waits until the device has taken, and the switch forwarded, all that was sent.
    pub(crate) fn settle(&mut self) {
        let end = Instant::now() + PATIENCE;
        let number = self.number;
        while self.net().in_flight().expect("a working device") > 0 {
            assert!(Instant::now() < end, "{number} takes no frames");
            let left = Duration::from_millis(100);
            self.net().wait_sent(left).expect("a working device");
        }
    }

    /// Takes what has come; who sent it, and what.
    pub(crate) fn drain(&mut self) -> Vec<Seen> {
        let mut all = Vec::new();
        let mut bytes = [0; BUFFER];
        loop {
            let count = self.net().receive(64, |frame| {
                all.push(Seen::read(frame.copy_to(&mut bytes)));
            });
            if count.expect("a working device") == 0 {
                return all;
            }
        }
    }

    /// Sends `count` frames to `to`, which has them all, and nothing else from this one, afterwards.
    pub(crate) fn exchange(&mut self, to: &mut Self, count: u32) {
        let first = self.sequence;
        let frames: Vec<Vec<u8>> = (0..count).map(|_| self.frame(frames::mac(to.id))).collect();
        self.send(&frames);
        let mut wanted = first + 1..=first + count;
        let end = Instant::now() + PATIENCE;
        while !wanted.is_empty() {
            for seen in to.drain() {
                // Others may still come from before.
                if seen.from == self.id && seen.sequence > first {
                    let next = wanted.next();
                    assert_eq!(Some(seen.sequence), next, "{} to {}", self.id, to.id);
                }
            }
            if wanted.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "{} to {}: {wanted:?}", self.id, to.id);
            let left = Duration::from_millis(100);
            to.net().wait(left).expect("a working device");
        }
    }

    /// The next frame, 100 bytes without a tag.
    pub(crate) fn frame(&mut self, to: [u8; 6]) -> Vec<u8> {
        self.sequence += 1;
        frames::build(
            to,
            frames::mac(self.id),
            None,
            (self.id, self.sequence),
            100,
        )
    }

    /// Says that frames for others are not wanted (VIRTIO_NET_CTRL_RX_PROMISC, off).
    pub(crate) fn be_modest(&mut self) {
        let answer = self.net().control(0, 0, &[0], PATIENCE);
        assert_eq!(answer.expect("a control queue"), 0);
    }

    /// The driver is gone, from one moment to the next, and leaves its device as it is.
    pub(crate) fn die(&mut self) {
        let net = self.net.as_mut().expect("a driver");
        let hangup = net.client().channel().wake_fds().hangup.expect("a socket");
        rustix::net::shutdown(hangup, rustix::net::Shutdown::Both).expect("a socket");
        // Its end says goodbye in vain.
        self.net = None;
    }

    /// What a device of which there is no more says.
    pub(crate) fn is_gone(error: &Error) -> bool {
        matches!(error, Error::NoDevice(_))
    }
}
