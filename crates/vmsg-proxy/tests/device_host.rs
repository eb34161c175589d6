// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy before a real device host, on each bus: random bytes through real rings, over restarts of either side.
#![allow(missing_docs, clippy::cast_possible_truncation)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmsg_bus::{BusSpec, UnixSpec, keyval};
use vmsg_device::host::{Host, Stop};
use vmsg_device::rng::Rng;
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Op, Options, Outcome, Session};
use vmsg_proxy::{FrontSpec, Proxy};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const GUEST: u64 = 0x8000_0000;
const USER: u64 = 0x5555_0000_0000;
const RAM: u64 = 0x10_0000;
/// Where the buffers are.
const BUFFERS: u64 = 0x4_0000;
const SIZE: u16 = 64;
/// Nothing takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
const PROTOCOL_FEATURES: u64 = 1 << 30;
const FEATURES: u64 = 1 << 32 | 1 << 29 | PROTOCOL_FEATURES;

/// Where a test takes place.
struct Place {
    dir: tempfile::TempDir,
    bus: BusSpec,
    message_size: usize,
    /// By name or number.
    dev: &'static str,
    /// The guest's memory lies in one that is there before and after it.
    lasting: bool,
    /// What the bus lives on.
    _server: Option<Server>,
}

/// An ivshmem server.
struct Server {
    stop: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(socket: PathBuf, vectors: u16) -> Server {
        let port = ivshmem::server::Port::new(socket, vectors);
        let options = ivshmem::server::Options::new(vec![port], 1 << 20);
        let mut server = ivshmem::server::Server::bind(options).unwrap();
        let stop = Arc::new(Doorbell::new().unwrap());
        let bell = stop.clone();
        let thread = std::thread::spawn(move || {
            server.run(bell.as_fd()).unwrap();
        });
        Server {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.ring().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Place {
    fn unix() -> Place {
        let dir = tempfile::tempdir().unwrap();
        Place {
            bus: BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock"))),
            message_size: vmsg_bus::DEFAULT_MESSAGE_SIZE,
            dev: "rng0",
            dir,
            lasting: false,
            _server: None,
        }
    }

    /// Memory for messages, and memory for the guest, which is looked for by the file that it is; with a server there are doorbells for queues.
    fn ivshmem(vectors: Option<u16>) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        for (name, len) in [("messages", 1 << 16), ("ram", RAM)] {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            file.set_len(len).unwrap();
        }
        let socket = dir.path().join("ivshmem.sock");
        let place = match vectors {
            Some(_) => format!("socket={}", socket.display()),
            None => format!("file={at}/messages"),
        };
        Place {
            bus: format!("ivshmem,{place},memory=segment,ram={at}/ram")
                .parse()
                .unwrap(),
            message_size: 64,
            dev: "rng0",
            dir,
            lasting: true,
            _server: vectors.map(|vectors| Server::start(socket, vectors)),
        }
    }

    fn linux_user(revision: &str, dev: &'static str) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let spec =
            format!("linux-user,dir={at},ram={at}/ram,mem-offset={GUEST:#x},revision={revision}");
        Place {
            bus: spec.parse().unwrap(),
            message_size: 48,
            dev,
            dir,
            lasting: false,
            _server: None,
        }
    }

    fn all() -> [Place; 7] {
        [
            Place::ivshmem(None),
            Place::ivshmem(Some(1)),
            Place::ivshmem(Some(3)),
            Place::unix(),
            Place::linux_user("1", "1"),
            Place::linux_user("1", "rng0"),
            Place::linux_user("r1", "0"),
        ]
    }

    /// The guest's memory, made by its VMM.
    fn memory(&self) -> (Mapping, OwnedFd) {
        let path = self.dir.path().join("ram");
        if !self.lasting {
            let _ = std::fs::remove_file(&path);
        }
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(!self.lasting)
            .open(path)
            .unwrap();
        file.set_len(RAM).unwrap();
        let mapping = Mapping::of_fd(file.as_fd(), 0, RAM, Access::ReadWrite).unwrap();
        (mapping, file.into())
    }
}

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl DeviceHost {
    fn start(place: &Place) -> DeviceHost {
        let listener = place.bus.listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let bus = host.add_bus(place.message_size, Some(listener)).unwrap();
        // The older messages know one device, number 0.
        let first = if place.dev == "0" { 0 } else { 1 };
        for (number, name) in [(first, "rng0"), (2, "rng1")] {
            host.add_device(bus, name, Some(number), None, Box::new(Rng::new()))
                .unwrap();
        }
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().unwrap());
        DeviceHost {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A guest and its VMM, in one.
struct Guest<'m> {
    front: Frontend,
    queue: DriverQueue<'m, Vec<DriverSlot>>,
    ram: &'m Mapping,
    file: &'m OwnedFd,
    kick: EventFd,
    call: EventFd,
    /// A message for each ring of `call`.
    called: Receiver<()>,
    /// Chains given back so far: what the used index is.
    used: u16,
    /// Where its part of the memory begins.
    at: u64,
    /// Times the device had to be kicked: who looks at the queue anyhow does not ask for that.
    kicks: u64,
    /// Times it slept until the device called.
    sleeps: u64,
}

impl<'m> Guest<'m> {
    fn new(socket: &Path, ram: &'m Mapping, file: &'m OwnedFd) -> Guest<'m> {
        Guest::at(socket, ram, file, 0)
    }

    fn at(socket: &Path, ram: &'m Mapping, file: &'m OwnedFd, at: u64) -> Guest<'m> {
        let layout = Layout::new(SIZE, 0).unwrap();
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let part = ram.ram().get(at as usize, (RAM - at) as usize).unwrap();
        let queue = DriverQueue::new(layout, features, part, BusAddr(GUEST + at), slots).unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let (rung, called) = mpsc::channel();
        let bell = call.try_clone().unwrap();
        // The device side makes the eventfd non-blocking, so it is waited for. Ends with the first ring after the guest is gone.
        std::thread::spawn(move || {
            let epoll = Epoll::new().unwrap();
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll
                .ctl(ControlOperation::Add, bell.as_raw_fd(), event)
                .unwrap();
            let mut events = [EpollEvent::default()];
            loop {
                let woken = epoll.wait(-1, &mut events);
                if woken.is_ok() && rung.send(()).is_err() {
                    return;
                }
            }
        });
        let front = Frontend::connect(socket, 1).unwrap();
        let mut guest = Guest {
            front,
            queue,
            ram,
            file,
            kick,
            call,
            called,
            used: 0,
            at,
            kicks: 0,
            sleeps: 0,
        };
        guest.set_up(0);
        guest
    }

    fn set_up(&mut self, base: u16) {
        let front = &mut self.front;
        front.get_features().unwrap();
        let protocol = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_owner().unwrap();
        front.set_features(FEATURES).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: RAM,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        front.set_mem_table(&[region]).unwrap();
        front.set_vring_num(0, SIZE).unwrap();
        front.set_vring_base(0, base).unwrap();
        let config = self.queue.config();
        let user = |at: BusAddr| at.0 - GUEST + USER;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user(config.desc),
            avail_ring_addr: user(config.driver),
            used_ring_addr: user(config.device),
            log_addr: None,
        };
        front.set_vring_addr(0, &addresses).unwrap();
        front.set_vring_kick(0, &self.kick).unwrap();
        front.set_vring_call(0, &self.call).unwrap();
        front.set_vring_enable(0, true).unwrap();
    }

    fn add(&mut self, slot: u64) {
        let at = self.at + BUFFERS + 64 * slot;
        self.ram.ram().get(at as usize, 64).unwrap().fill(0);
        self.queue.add(&[], &[(BusAddr(GUEST + at), 64)]).unwrap();
        if self.queue.publish().unwrap() {
            self.kick.write(1).unwrap();
            self.kicks += 1;
        }
    }

    /// Sleeps on the call eventfd until a chain comes back.
    #[track_caller]
    fn finish(&mut self, slot: u64) {
        let end = Instant::now() + PATIENCE;
        let used = loop {
            if let Some(used) = self.queue.pop_used().unwrap() {
                break used;
            }
            if self.queue.enable_notifications().unwrap() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(self.called.recv_timeout(left).is_ok(), "no answer");
            self.sleeps += 1;
        };
        self.used = self.used.wrapping_add(1);
        assert_eq!(used.written, 64);
        let mut bytes = [0; 64];
        self.ram
            .ram()
            .read((self.at + BUFFERS + 64 * slot) as usize, &mut bytes);
        assert_ne!(bytes, [0; 64], "random bytes");
    }

    fn read(&mut self, slot: u64) {
        self.add(slot);
        self.finish(slot);
    }
}

fn proxy(place: &Place) -> (Proxy, PathBuf) {
    let socket = place.dir.path().join("rng.sock");
    let spec = format!(
        "vhost-user,socket={},dev={}",
        keyval::escape(&socket.to_string_lossy()),
        place.dev
    );
    let spec: FrontSpec = keyval::from_str(&spec).unwrap();
    let mut ready = 0;
    let proxy = Proxy::start(std::slice::from_ref(&place.bus), &[spec], |_| ready += 1).unwrap();
    assert_eq!(ready, 1);
    (proxy, socket)
}

#[test]
fn random_bytes_reach_the_guest_and_the_host_may_die_and_come_back() {
    for place in Place::all() {
        let mut host = Some(DeviceHost::start(&place));
        let (proxy, socket) = proxy(&place);
        let (ram, file) = place.memory();
        let mut guest = Guest::new(&socket, &ram, &file);
        for i in 0..500 {
            guest.read(i % 32);
        }
        for round in 0..5 {
            drop(host.take());
            // Asked for while nobody is there: done by the next host.
            guest.add(1);
            host = Some(DeviceHost::start(&place));
            guest.finish(1);
            for i in 0..50 {
                guest.read(i);
            }
            // The device works before the answer to DRIVER_OK has arrived, and the replay ends with that answer.
            let (_, handle, _) = proxy.fronts().next().unwrap();
            let end = Instant::now() + PATIENCE;
            while handle.stats().unwrap().session.replays != round + 1 {
                assert!(Instant::now() < end, "{}: {:?}", place.bus, handle.stats());
            }
        }
    }
}

#[test]
fn kicks_and_calls_between_machines_are_no_messages_where_there_are_doorbells() {
    for (vectors, by_message) in [(1, true), (2, false)] {
        let place = Place::ivshmem(Some(vectors));
        let _host = DeviceHost::start(&place);
        let (proxy, socket) = proxy(&place);
        let (ram, file) = place.memory();
        let mut guest = Guest::new(&socket, &ram, &file);
        guest.read(0);
        let (_, handle, _) = proxy.fronts().next().unwrap();
        let before = handle.stats().unwrap();
        let (kicks, sleeps) = (guest.kicks, guest.sleeps);
        // How often either side has to wake the other is up to who is faster.
        let end = Instant::now() + PATIENCE;
        for i in 0.. {
            let woken = (guest.kicks - kicks).min(guest.sleeps - sleeps);
            if i >= 100 && woken >= 20 {
                break;
            }
            assert!(Instant::now() < end, "woken {woken} times");
            guest.read(i % 32);
        }
        let after = handle.stats().unwrap();
        let sent = after.sent - before.sent;
        let received = after.received - before.received;
        if by_message {
            assert!(sent > 0 && received > 0, "{sent}, {received}");
        } else {
            assert_eq!((sent, received), (0, 0));
        }
    }
}

#[test]
fn either_side_may_start_first() {
    for place in Place::all() {
        let (_proxy, socket) = proxy(&place);
        let (ram, file) = place.memory();
        let place = std::sync::Arc::new(place);
        let later = std::thread::spawn({
            let place = place.clone();
            move || {
                std::thread::sleep(Duration::from_millis(100));
                DeviceHost::start(&place)
            }
        });
        // Waits in its first request.
        let mut guest = Guest::new(&socket, &ram, &file);
        guest.read(0);
        drop(later.join().unwrap());
    }
}

#[test]
fn the_proxy_may_die_and_come_back_if_the_vmm_connects_again() {
    for place in Place::all() {
        let _host = DeviceHost::start(&place);
        let (ram, file) = place.memory();
        let (first, socket) = proxy(&place);
        let mut guest = Guest::new(&socket, &ram, &file);
        for i in 0..40 {
            guest.read(i);
        }
        drop(first);
        guest.add(3);
        let (_second, socket) = proxy(&place);
        guest.front = Frontend::connect(&socket, 1).unwrap();
        // QEMU takes the base from the used index.
        let base = guest.used;
        guest.set_up(base);
        guest.finish(3);
        for i in 0..40 {
            guest.read(i);
        }
    }
}

#[test]
fn a_guest_follows_the_last_one() {
    for place in Place::all() {
        let _host = DeviceHost::start(&place);
        let (_proxy, socket) = proxy(&place);
        for _ in 0..4 {
            let (ram, file) = place.memory();
            let mut guest = Guest::new(&socket, &ram, &file);
            for i in 0..10 {
                guest.read(i);
            }
            assert_eq!(guest.front.get_vring_base(0).unwrap(), 10);
        }
    }
}

#[test]
fn devices_of_a_bus_for_one_driver_share_its_connection() {
    for place in [
        Place::linux_user("1", "1"),
        Place::linux_user("1", "rng0"),
        Place::ivshmem(Some(2)),
    ] {
        let mut host = Some(DeviceHost::start(&place));
        let at = place.dir.path().display();
        let other = if place.dev == "1" { "2" } else { "rng1" };
        let fronts: Vec<FrontSpec> = [("a", place.dev), ("b", other)]
            .iter()
            .map(|(name, dev)| {
                keyval::from_str(&format!("vhost-user,socket={at}/{name}.sock,dev={dev}")).unwrap()
            })
            .collect();
        let proxy = Proxy::start(std::slice::from_ref(&place.bus), &fronts, |_| {}).unwrap();
        assert_eq!(proxy.connections(), 1);
        // Two devices of one guest have their rings in the same memory.
        let (ram, file) = place.memory();
        let mut one = Guest::at(&fronts[0].socket, &ram, &file, 0);
        let mut two = Guest::at(&fronts[1].socket, &ram, &file, RAM / 2);
        for i in 0..200 {
            one.add(i % 16);
            two.add(i % 16);
            two.finish(i % 16);
            one.finish(i % 16);
        }
        drop(host.take());
        one.add(0);
        two.add(0);
        host = Some(DeviceHost::start(&place));
        one.finish(0);
        two.finish(0);
        for i in 0..50 {
            one.read(i % 16);
            two.read(i % 16);
        }
        // One guest's device ends, the other goes on.
        drop(one);
        for i in 0..50 {
            two.read(i % 16);
        }
        drop(host);
    }
}

#[test]
fn a_guest_with_memory_of_its_own_is_sent_away() {
    let place = Place::linux_user("1", "1");
    let _host = DeviceHost::start(&place);
    let (_proxy, socket) = proxy(&place);
    let connect = |file: &OwnedFd| {
        let mut front = Frontend::connect(&socket, 1).unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        let protocol = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_owner().unwrap();
        front.set_features(FEATURES).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: RAM,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        front.set_mem_table(&[region])
    };
    let (_ram, file) = Mapping::memfd("guest", RAM, false).unwrap();
    assert!(connect(&file).is_err(), "there is no such file");
    let (_other, right) = place.memory();
    assert!(connect(&file).is_err(), "it is another file");
    connect(&right).unwrap();
}

#[test]
fn the_arguments_for_qemu_name_what_the_device_is() {
    for place in Place::all() {
        let _host = DeviceHost::start(&place);
        let spec: FrontSpec =
            keyval::from_str(&format!("vhost-user,socket=rng.sock,dev={}", place.dev)).unwrap();
        let source = Source::Bus(place.bus.connector("test").observer());
        let session = Session::new(spec.dev.0.clone(), Options::default());
        let link = Link::start("test", session, source).unwrap();
        let Ok(Outcome::Device(facts)) = link.handle().call(Op::Describe) else {
            panic!("there is a device");
        };
        let words = vmsg_proxy::print_qemu(&spec, &facts, &[], &Default::default());
        assert_eq!(
            words,
            [
                "-chardev",
                "socket,id=vmsg-rng,path=rng.sock",
                "-device",
                "vhost-user-rng-pci,chardev=vmsg-rng",
            ]
        );
    }
}
