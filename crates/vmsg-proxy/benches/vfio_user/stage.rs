// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host, and fronts of its devices.

use crate::client::Client;
use crate::device::{Touch, Wire};
use crate::guest::{self, BASE, BUFFERS, Driver, Ram, SIZE};
use crate::vhost_client::front_end;
use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::thread::JoinHandle;
use vhost::vhost_user::Frontend;
use virtio_msg::{DevNum, FeatureSet, QueueIndex, feature};
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_driver::{BusClient, Client as BusDriver, Device, DmaPool, Wanted};
use vmsg_mem::BusAddr;
use vmsg_proxy::front::vfio_user::{VfioUserFront, VfioUserOptions};
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Options, Session, Target};
use vmsg_queue::{DriverSlot, Layout};

/// Devices of each kind: the first half of them, and the second half.
const DEVICES: u16 = 16;

/// A running device host; ends when dropped.
pub(crate) struct Stage {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
    bus: BusSpec,
    used: Cell<(u16, u16)>,
}

/// What stands between guest and host, in the order of its end.
pub(crate) struct Vfio {
    pub(crate) client: Rc<Client>,
    _front: VfioUserFront,
    _link: Link,
}

/// The same for vhost-user.
pub(crate) struct Vhost {
    _connection: Frontend,
    _front: VhostUserFront,
    _link: Link,
}

impl Stage {
    /// A host with one worker. Its threads, and those of fronts, run where this one may run then.
    pub(crate) fn new() -> Stage {
        let dir = tempfile::tempdir().expect("a folder");
        let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
        let listener = bus.listen("benchmark host").expect("a socket");
        let mut host = Host::new(1).expect("a host");
        let index = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
            .expect("a bus");
        for number in 0..DEVICES {
            let name = format!("dev{number}");
            let device: Box<dyn vmsg_device::device::Device> = if number < DEVICES / 2 {
                Box::new(Touch::new())
            } else {
                let settings = Settings::new(Mac([2, 0, 0, 0, 0, 1]));
                Box::new(Net::new(&settings, Box::new(Wire::new())))
            };
            host.add_device(index, &name, Some(number), None, device)
                .expect("a device");
        }
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().expect("served"));
        Stage {
            stop,
            thread: Some(thread),
            dir,
            bus,
            used: Cell::new((0, DEVICES / 2)),
        }
    }

    /// A device that nobody has.
    fn block(&self) -> DevNum {
        let (block, net) = self.used.get();
        assert!(block < DEVICES / 2, "a device for each");
        self.used.set((block + 1, net));
        DevNum(block)
    }

    /// The same of a network device.
    fn net(&self) -> DevNum {
        let (block, net) = self.used.get();
        assert!(net < DEVICES, "a device for each");
        self.used.set((block, net + 1));
        DevNum(net)
    }

    /// A client of the bus.
    pub(crate) fn bus_client(&self) -> BusClient {
        BusDriver::on_bus(self.bus.connector("benchmark").connect().expect("a host"))
    }

    fn link(&self, device: DevNum) -> Link {
        let connector = self.bus.connector("benchmark");
        let session = Session::new(Target::Number(device), Options::default());
        Link::start("bench", session, Source::Bus(connector)).expect("a link")
    }

    fn vfio(&self, device: DevNum, isolate: bool) -> Vfio {
        let link = self.link(device);
        let socket = self.dir.path().join(format!("vfio{}.sock", device.0));
        let mut options = VfioUserOptions::new(&socket);
        options.isolate = isolate;
        let front = VfioUserFront::start("bench", link.handle(), options).expect("a front");
        Vfio {
            client: Rc::new(Client::new(&socket)),
            _front: front,
            _link: link,
        }
    }

    /// A device behind a vfio-user front.
    pub(crate) fn vfio_block(&self, isolate: bool) -> Vfio {
        self.vfio(self.block(), isolate)
    }

    /// A network device behind a vfio-user front.
    pub(crate) fn vfio_net(&self, isolate: bool) -> Vfio {
        self.vfio(self.net(), isolate)
    }

    /// A device behind a vhost-user front, and its driver.
    pub(crate) fn vhost_block(&self, ram: &Ram) -> (Vhost, Driver<'static>) {
        let device = self.block();
        let link = self.link(device);
        let socket = self.dir.path().join("vhost.sock");
        let options = VhostUserOptions::new(&socket);
        let front = VhostUserFront::start("bench", link.handle(), options).expect("a front");
        let (vmm, driver) = front_end(&socket, ram, 0, 1);
        let front = Vhost {
            _connection: vmm,
            _front: front,
            _link: link,
        };
        (front, driver)
    }

    /// A device without a front: its driver is a program on the bus, with the library for such.
    pub(crate) fn bus_block(&self) -> (BusClient, Driver<'static>) {
        let mut client = self.bus_client();
        let pool = DmaPool::new("guest", BusAddr(BASE), 64 << 20).expect("memory");
        // Kept until the end: the queue refers to it.
        let pool: &'static DmaPool = Box::leak(Box::new(pool));
        pool.ram().fill(1);
        pool.lend(&mut client, 1).expect("lent");
        let wanted = Wanted {
            supported: FeatureSet::from_bits(&[feature::RING_EVENT_IDX]),
            ..Wanted::default()
        };
        let number = self.block();
        let mut device = Device::open(&mut client, number, &wanted).expect("a device");
        let layout = Layout::new(SIZE, 0).expect("a power of two");
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let memory = (pool.ram(), pool.base());
        let queue = device
            .create_queue(&mut client, QueueIndex(0), layout, memory, slots)
            .expect("a queue");
        let (kick, call) = (guest::bell(), guest::bell());
        client
            .queue_notify(
                number,
                QueueIndex(0),
                Some(kick.as_fd()),
                Some(call.as_fd()),
            )
            .expect("a bus with descriptors");
        device.start(&mut client).expect("a device that starts");
        let driver = Driver {
            queue,
            kick: Box::new(move || guest::ring(&kick)),
            call,
            buffers: BASE + BUFFERS,
        };
        (client, driver)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the host panicked"
            );
        }
    }
}
