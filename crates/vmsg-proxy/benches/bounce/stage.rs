// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host on several buses, and a front on each.

use crate::device::{Touch, Wire};
use crate::guest::{Driver, LEN, Ram};
use crate::vhost_client::front_end;
use ivshmem::server::{Options, Port, Server};
use std::fs::File;
use std::path::Path;
use std::thread::JoinHandle;
use vhost::vhost_user::Frontend;
use vmsg_bus::{BusSpec, keyval};
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_mem::Doorbell;
use vmsg_proxy::Proxy;

/// Doorbell vectors of each peer: one for the bus, others for queues.
const VECTORS: u16 = 4;
/// Bytes of memory for copies.
const COMMON: u64 = 64 << 20;

/// What device it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    Net,
}

/// Where the guest's memory is, for the device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Segment,
    Bounce,
    Lent,
    Isolated,
}

impl Way {
    /// The first is what the others are divided by.
    pub(crate) const ALL: [Way; 4] = [Way::Segment, Way::Bounce, Way::Lent, Way::Isolated];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Segment => "ivshmem, memory=segment",
            Self::Bounce => "ivshmem, memory=bounce",
            Self::Lent => "unix, memory lent",
            Self::Isolated => "unix, isolate=on",
        }
    }

    fn front(self) -> &'static str {
        match self {
            Self::Segment => "segment",
            Self::Bounce => "bounce",
            Self::Lent => "lent",
            Self::Isolated => "isolated",
        }
    }

    /// Its position among the buses.
    fn bus(self) -> usize {
        match self {
            Self::Segment => 0,
            Self::Bounce => 1,
            Self::Lent | Self::Isolated => 2,
        }
    }

    fn dev(self) -> u16 {
        u16::from(self == Self::Isolated)
    }
}

/// Something that runs in a thread until it is told to stop.
struct Running {
    stop: Box<dyn Fn()>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "it panicked");
        }
    }
}

/// In the order of its end.
pub(crate) struct Stage {
    _proxy: Proxy,
    _host: Running,
    _server: Running,
    dir: tempfile::TempDir,
    queues: usize,
}

fn server(socket: &Path) -> Running {
    let port = Port::new(socket, VECTORS);
    let mut server = Server::bind(Options::new(vec![port], 1 << 20)).expect("a server");
    let stop = Doorbell::new().expect("an eventfd");
    let stopped = stop.try_clone().expect("an eventfd");
    let thread = std::thread::spawn(move || {
        let stopped = stopped.eventfd().expect("an eventfd");
        server.run(stopped).expect("served");
    });
    Running {
        stop: Box::new(move || stop.ring().expect("an eventfd")),
        thread: Some(thread),
    }
}

fn host(buses: &[BusSpec], kind: Kind) -> Running {
    let mut host = Host::new(1).expect("a host");
    let mut indices = Vec::new();
    for bus in buses {
        let listener = bus.listen("benchmark host").expect("a bus");
        let size = match bus {
            BusSpec::Ivshmem(_) => 64,
            _ => vmsg_bus::DEFAULT_MESSAGE_SIZE,
        };
        indices.push(host.add_bus(size, Some(listener)).expect("a bus"));
    }
    for way in Way::ALL {
        let device: Box<dyn vmsg_device::device::Device> = match kind {
            Kind::Block => Box::new(Touch::new()),
            Kind::Net => {
                let settings = Settings::new(Mac([2, 0, 0, 0, 0, 1]));
                Box::new(Net::new(&settings, Box::new(Wire::new())))
            }
        };
        host.add_device(
            indices[way.bus()],
            way.front(),
            Some(way.dev()),
            None,
            device,
        )
        .expect("a device");
    }
    let stop: Stop = host.stop_handle();
    let thread = std::thread::spawn(move || host.run().expect("served"));
    Running {
        stop: Box::new(move || stop.stop()),
        thread: Some(thread),
    }
}

impl Stage {
    /// Its threads run where this one may run now.
    pub(crate) fn new(kind: Kind) -> Stage {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let at = dir.path().display();
        for (name, len) in [("window", LEN), ("common", COMMON)] {
            let file = File::create(dir.path().join(name)).expect("a file");
            file.set_len(len).expect("room");
        }
        let socket = dir.path().join("server");
        let server = server(&socket);
        let buses = [
            format!("ivshmem,socket={at}/server,memory=segment,ram={at}/window"),
            format!("ivshmem,socket={at}/server,offset=0x10000,memory=bounce,ram={at}/common"),
            format!("unix,path={at}/bus.sock"),
        ]
        .map(|bus| bus.parse().expect("a bus"));
        let host = host(&buses, kind);
        let fronts = Way::ALL.map(|way| {
            let isolate = match way {
                Way::Isolated => ",isolate=on",
                _ => "",
            };
            let (name, dev, bus) = (way.front(), way.dev(), way.bus());
            let text = format!("vhost-user,socket={at}/{name}.sock,dev={dev},bus={bus}{isolate}");
            keyval::from_str(&text).expect("a front")
        });
        Stage {
            _proxy: Proxy::start(&buses, &fronts, |_| {}).expect("a proxy"),
            _host: host,
            _server: server,
            dir,
            queues: match kind {
                Kind::Block => 1,
                Kind::Net => 2,
            },
        }
    }

    /// A guest, and its driver of one queue.
    pub(crate) fn drive(&self, way: Way, queue: usize) -> (Frontend, Driver<'static>) {
        let ram = match way {
            Way::Segment => {
                let mut options = File::options();
                let window = options.read(true).write(true);
                Ram::in_file(window.open(self.dir.path().join("window")).expect("a file"))
            }
            _ => Ram::new(),
        };
        let socket = self.dir.path().join(format!("{}.sock", way.front()));
        front_end(&socket, &ram, queue, self.queues)
    }
}
