// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy before a real device host on the unix bus: random bytes through real rings, over restarts of either side.
#![allow(missing_docs, clippy::cast_possible_truncation)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
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
use vmsg_mem::{BusAddr, Mapping};
use vmsg_proxy::{FrontSpec, Proxy};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const GUEST: u64 = 0x8000_0000;
const USER: u64 = 0x5555_0000_0000;
const RAM: u64 = 0x10_0000;
/// Where the buffers are.
const BUFFERS: u64 = 0x8_0000;
const SIZE: u16 = 64;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const FEATURES: u64 = 1 << 32 | 1 << 29 | PROTOCOL_FEATURES;

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl DeviceHost {
    fn start(bus: &Path) -> DeviceHost {
        let listener = UnixSpec::new(bus).listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let bus = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
            .unwrap();
        host.add_device(bus, "rng0", Some(1), None, Box::new(Rng::new()))
            .unwrap();
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
}

impl<'m> Guest<'m> {
    fn new(socket: &Path, ram: &'m Mapping, file: &'m OwnedFd) -> Guest<'m> {
        let layout = Layout::new(SIZE, 0).unwrap();
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let queue = DriverQueue::new(layout, features, ram.ram(), BusAddr(GUEST), slots).unwrap();
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
        let at = BUFFERS + 64 * slot;
        self.ram.ram().get(at as usize, 64).unwrap().fill(0);
        self.queue.add(&[], &[(BusAddr(GUEST + at), 64)]).unwrap();
        if self.queue.publish().unwrap() {
            self.kick.write(1).unwrap();
        }
    }

    /// Sleeps on the call eventfd until a chain comes back.
    #[track_caller]
    fn finish(&mut self, slot: u64) {
        let end = Instant::now() + Duration::from_secs(20);
        let used = loop {
            if let Some(used) = self.queue.pop_used().unwrap() {
                break used;
            }
            if self.queue.enable_notifications().unwrap() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(self.called.recv_timeout(left).is_ok(), "no answer");
        };
        self.used = self.used.wrapping_add(1);
        assert_eq!(used.written, 64);
        let mut bytes = [0; 64];
        self.ram
            .ram()
            .read((BUFFERS + 64 * slot) as usize, &mut bytes);
        assert_ne!(bytes, [0; 64], "random bytes");
    }

    fn read(&mut self, slot: u64) {
        self.add(slot);
        self.finish(slot);
    }
}

fn proxy(dir: &Path, bus: &Path) -> (Proxy, PathBuf) {
    let socket = dir.join("rng.sock");
    let spec = format!(
        "vhost-user,socket={},dev=rng0",
        keyval::escape(&socket.to_string_lossy())
    );
    let spec: FrontSpec = keyval::from_str(&spec).unwrap();
    let mut ready = 0;
    let proxy = Proxy::start(&[BusSpec::Unix(UnixSpec::new(bus))], &[spec], |_| {
        ready += 1
    })
    .unwrap();
    assert_eq!(ready, 1);
    (proxy, socket)
}

#[test]
fn random_bytes_reach_the_guest_and_the_host_may_die_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus.sock");
    let mut host = Some(DeviceHost::start(&bus));
    let (proxy, socket) = proxy(dir.path(), &bus);
    let (ram, file) = Mapping::memfd("guest", RAM, false).unwrap();
    let mut guest = Guest::new(&socket, &ram, &file);
    for i in 0..500 {
        guest.read(i % 32);
    }
    for round in 0..5 {
        drop(host.take());
        // Asked for while nobody is there: done by the next host.
        guest.add(1);
        host = Some(DeviceHost::start(&bus));
        guest.finish(1);
        for i in 0..50 {
            guest.read(i);
        }
        // The device works before the answer to DRIVER_OK has arrived, and the replay ends with that answer.
        let (_, handle, _) = proxy.fronts().next().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while handle.stats().unwrap().session.replays != round + 1 {
            assert!(Instant::now() < end, "{:?}", handle.stats());
        }
    }
}

#[test]
fn either_side_may_start_first() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus.sock");
    let (_proxy, socket) = proxy(dir.path(), &bus);
    let (ram, file) = Mapping::memfd("guest", RAM, false).unwrap();
    let later = std::thread::spawn({
        let bus = bus.clone();
        move || {
            std::thread::sleep(Duration::from_millis(100));
            DeviceHost::start(&bus)
        }
    });
    // Waits in its first request.
    let mut guest = Guest::new(&socket, &ram, &file);
    guest.read(0);
    drop(later.join().unwrap());
}

#[test]
fn the_proxy_may_die_and_come_back_if_the_vmm_connects_again() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus.sock");
    let _host = DeviceHost::start(&bus);
    let (ram, file) = Mapping::memfd("guest", RAM, false).unwrap();
    let (first, socket) = proxy(dir.path(), &bus);
    let mut guest = Guest::new(&socket, &ram, &file);
    for i in 0..40 {
        guest.read(i);
    }
    drop(first);
    guest.add(3);
    let (_second, socket) = proxy(dir.path(), &bus);
    guest.front = Frontend::connect(&socket, 1).unwrap();
    // QEMU takes the base from the used index.
    let base = guest.used;
    guest.set_up(base);
    guest.finish(3);
    for i in 0..40 {
        guest.read(i);
    }
}

#[test]
fn a_guest_follows_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus.sock");
    let _host = DeviceHost::start(&bus);
    let (_proxy, socket) = proxy(dir.path(), &bus);
    for _ in 0..4 {
        let (ram, file) = Mapping::memfd("guest", RAM, false).unwrap();
        let mut guest = Guest::new(&socket, &ram, &file);
        for i in 0..10 {
            guest.read(i);
        }
        assert_eq!(guest.front.get_vring_base(0).unwrap(), 10);
    }
}

#[test]
fn the_arguments_for_qemu_name_what_the_device_is() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus.sock");
    let _host = DeviceHost::start(&bus);
    let spec: FrontSpec = keyval::from_str("vhost-user,socket=rng.sock,dev=1").unwrap();
    let link = vmsg_proxy::connect(&BusSpec::Unix(UnixSpec::new(&bus)), &spec.dev, "test").unwrap();
    let text = vmsg_proxy::print_qemu(&spec, &link.handle(), &Default::default()).unwrap();
    assert_eq!(
        text,
        "-chardev socket,id=vmsg-rng,path=rng.sock \\\n-device vhost-user-rng-pci,chardev=vmsg-rng"
    );
}
