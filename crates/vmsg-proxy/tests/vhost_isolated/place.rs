// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host on a bus of sockets, and isolated fronts, whose segments are their own or parts of memory that is given.

use crate::late::{Late, Platter};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_mem::Mapping;
use vmsg_net::Cable;
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Options, Session, Target};
use vmsg_proxy::shadow::{self, Common, Parts};

pub(crate) const COMMON: u64 = 2 << 20;
/// Not given to any front, before and behind what is.
pub(crate) const MARGIN: u64 = 0x1000;

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

pub(crate) struct Front {
    pub(crate) socket: PathBuf,
    // In this order: a thread that waits for the link ends when it is gone.
    _link: Link,
    _front: VhostUserFront,
}

/// Devices: `late`, which inverts what it reads, at once; `wide`, a network device of two pairs, and `other` at the end of its cable.
pub(crate) struct Place {
    pub(crate) fronts: Vec<Front>,
    /// What is given to the fronts.
    pub(crate) common: Option<Arc<Mapping>>,
    host: Option<DeviceHost>,
    source: Vec<shadow::Source>,
    bus: BusSpec,
    dir: tempfile::TempDir,
}

impl Place {
    /// With fronts for these devices.
    pub(crate) fn new(devices: &[&str], given: bool) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
        let mut place = Place {
            fronts: Vec::new(),
            common: None,
            host: None,
            source: vec![shadow::Source::Own { size: 1 << 20 }; devices.len()],
            bus,
            dir,
        };
        if given {
            place.give(devices.len());
        }
        place.start_host();
        place.start_fronts(devices);
        place
    }

    fn give(&mut self, fronts: usize) {
        let (mapping, file) = Mapping::memfd("common", COMMON, true).unwrap();
        let mapping = Arc::new(mapping);
        // As somebody has left it who was killed.
        mapping.ram().fill(0x66);
        let common = Common::new(mapping.clone(), Arc::new(file), 0, 1 << 32).unwrap();
        let parts = Arc::new(Parts::new(vec![None; fronts]));
        parts
            .provide(&Arc::new(common), MARGIN..COMMON - MARGIN)
            .unwrap();
        self.common = Some(mapping);
        self.source = (0..fronts)
            .map(|front| shadow::Source::Common {
                parts: parts.clone(),
                front,
            })
            .collect();
    }

    pub(crate) fn start_host(&mut self) {
        let listener = self.bus.listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let index = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
            .unwrap();
        let late = Late::new(true, Platter::default());
        host.add_device(index, "late", None, None, Box::new(late))
            .unwrap();
        let (one, two) = Cable::pair().unwrap();
        for (name, end) in [("wide", one), ("other", two)] {
            let mut settings = Settings::new(Mac::derived(name));
            settings.queue_pairs = 2;
            let net = Net::new(&settings, Box::new(end));
            host.add_device(index, name, None, None, Box::new(net))
                .unwrap();
        }
        let stop = host.stop_handle();
        let thread = Some(std::thread::spawn(move || host.run().unwrap()));
        self.host = Some(DeviceHost { stop, thread });
    }

    pub(crate) fn end_host(&mut self) {
        self.host = None;
    }

    fn start_fronts(&mut self, devices: &[&str]) {
        let fronts = devices.iter().zip(&self.source);
        self.fronts = fronts
            .map(|(name, segment)| self.front(name, name, segment.clone()))
            .collect();
    }

    /// A front whose segment is a part of memory that is not known yet.
    pub(crate) fn another_front(&self, device: &str, parts: Arc<Parts>) -> Front {
        let segment = shadow::Source::Common { parts, front: 0 };
        self.front(device, "another", segment)
    }

    pub(crate) fn provide(&self, parts: &Parts) {
        let (mapping, file) = Mapping::memfd("common", COMMON, true).unwrap();
        let common = Common::new(Arc::new(mapping), Arc::new(file), 0, 1 << 32).unwrap();
        parts.provide(&Arc::new(common), 0..COMMON).unwrap();
    }

    fn front(&self, device: &str, name: &str, segment: shadow::Source) -> Front {
        let session = Session::new(Target::Name(device.to_owned()), Options::default());
        let connector = self.bus.connector("test");
        let link = Link::start(name, session, Source::Bus(connector)).unwrap();
        let socket = self.dir.path().join(format!("{name}.sock"));
        let mut options = VhostUserOptions::new(&socket);
        options.isolate = true;
        options.segment = segment;
        let front = VhostUserFront::start(name, link.handle(), options).unwrap();
        Front {
            socket,
            _link: link,
            _front: front,
        }
    }

    /// All of the memory that is given.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let common = self.common.as_ref().unwrap();
        let mut bytes = vec![0; common.len()];
        common.ram().read(0, &mut bytes);
        bytes
    }

    /// Whether all that fronts may have of the memory that is given is zero, now or soon: an end is not waited for by those who cause it.
    #[track_caller]
    pub(crate) fn until_empty(&self) {
        for _ in 0..12_000 {
            let bytes = self.bytes();
            let margin = MARGIN as usize;
            let (before, rest) = bytes.split_at(margin);
            let (parts, behind) = rest.split_at(rest.len() - margin);
            assert!(before.iter().chain(behind).all(|b| *b == 0x66), "margins");
            if parts.iter().all(|b| *b == 0) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("something stays in the memory in common");
    }
}
