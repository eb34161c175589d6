// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Real devices in a real device host, over the bus, with the segment as their only memory; over restarts of the host.

use crate::guest::{GUEST, Numbers, PATIENCE, Queue, Ram, of_queue, read, wait};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex, feature};
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::device::Device;
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_mem::BusAddr;
use vmsg_net::Cable;
use vmsg_proxy::link::{Link, SessionHandle, Source};
use vmsg_proxy::session::{Op, Options, Outcome, Session, Target};
use vmsg_proxy::shadow::{self, Shadow};

const RAM: u64 = 0x100_0000;
const BUFFERS: usize = 0x40_0000;

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl DeviceHost {
    fn start(dir: &Path, devices: Vec<(&str, Box<dyn Device>)>) -> DeviceHost {
        let listener = bus(dir).listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let bus = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
            .unwrap();
        for (name, device) in devices {
            host.add_device(bus, name, None, None, device).unwrap();
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

fn bus(dir: &Path) -> BusSpec {
    BusSpec::Unix(UnixSpec::new(dir.join("bus.sock")))
}

/// What a front is, without a VMM.
struct Front {
    // In the order of their ends: the device lets go, then the segment goes.
    link: Link,
    shadow: Shadow,
    negotiated: FeatureSet,
}

impl Front {
    fn new(dir: &Path, device: &str, ram: &Arc<Ram>, wanted: &[u32]) -> Front {
        let session = Session::new(Target::Name(device.to_owned()), Options::default());
        let source = Source::Bus(bus(dir).connector("test"));
        let link = Link::start(device, session, source).unwrap();
        let handle = link.handle();
        let Ok(Outcome::Device(facts)) = handle.call(Op::Describe) else {
            panic!("there is a device");
        };
        let options = shadow::Options::default();
        let shadow = Shadow::new(ram.clone(), &facts, options).unwrap();
        handle.call(Op::Claim).unwrap();
        handle.call(Op::SetWindows(vec![shadow.window()])).unwrap();
        let negotiated =
            shadow::offered(&facts.offered).intersection(&FeatureSet::from_bits(wanted));
        let front = Front {
            link,
            shadow,
            negotiated,
        };
        front.negotiate();
        front
    }

    fn negotiate(&self) {
        let handle = self.handle();
        let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        handle.call(Op::SetStatus(status)).unwrap();
        let towards = self.shadow.set_features(self.negotiated);
        handle.call(Op::SetFeatures(towards)).unwrap();
        status |= DeviceStatus::FEATURES_OK;
        handle.call(Op::SetStatus(status)).unwrap();
    }

    fn handle(&self) -> SessionHandle {
        self.link.handle()
    }

    fn start<'m>(&self, ram: &'m Ram, index: u32, size: u16, at: usize) -> Queue<'m> {
        let features = of_queue(&self.negotiated);
        let queue = Queue::start(&self.shadow, ram, index, size, at, features);
        let handle = self.handle();
        let notify = Op::SetNotify {
            queue: QueueIndex(index),
            kick: Some(queue.started.kick.clone()),
            call: Some(queue.started.call.clone()),
        };
        handle.call(notify).unwrap();
        handle
            .call(Op::SetQueue(QueueIndex(index), queue.started.setup))
            .unwrap();
        queue
    }

    fn run(&self) {
        let status = DeviceStatus::ACKNOWLEDGE
            | DeviceStatus::DRIVER
            | DeviceStatus::FEATURES_OK
            | DeviceStatus::DRIVER_OK;
        self.handle().call(Op::SetStatus(status)).unwrap();
        self.shadow.run();
    }

    fn reset(&self) {
        let empty = DeviceStatus::empty();
        self.handle().call(Op::SetStatus(empty)).unwrap();
        self.shadow.reset();
    }
}

const RINGS: [u32; 3] = [
    feature::VERSION_1,
    feature::RING_EVENT_IDX,
    feature::RING_INDIRECT_DESC,
];

fn rng(dir: &Path) -> DeviceHost {
    DeviceHost::start(dir, vec![("rng0", Box::new(Rng::new()))])
}

#[test]
fn random_bytes_arrive_over_restarts_of_the_host_and_resets_of_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Some(rng(dir.path()));
    let ram = Ram::new(RAM, false);
    let front = Front::new(dir.path(), "rng0", &ram, &RINGS);
    for round in 0..4 {
        let mut queue = front.start(&ram, 0, 64, 0);
        front.run();
        let mut numbers = Numbers(3 + round);
        let mut get = |queue: &mut Queue<'_>, meanwhile: &mut dyn FnMut()| {
            let mut lens = Vec::new();
            for n in 0..16 {
                let at = BUFFERS + n * 0x1_0000;
                ram.ram().get(at, 0x1_0000).unwrap().fill(0);
                let len = 1 + numbers.below(0x8000);
                let addr = BusAddr(GUEST + at as u64);
                let token = queue.driver.add(&[], &[(addr, len as u32)]).unwrap();
                lens.push((token, at, len));
            }
            queue.publish(&front.shadow);
            meanwhile();
            for (token, at, len) in lens {
                let used = queue.next();
                assert_eq!((used.token, used.written as usize), (token, len));
                let bytes = read(ram.ram(), at, 0x1_0000);
                assert!(len < 64 || bytes[..len].iter().any(|&b| b != 0));
                assert!(bytes[len..].iter().all(|&b| b == 0));
            }
        };
        for _ in 0..20 {
            get(&mut queue, &mut || ());
        }
        for _ in 0..4 {
            drop(host.take());
            // Asked for while nobody is there: done by the next host.
            get(&mut queue, &mut || host = Some(rng(dir.path())));
            get(&mut queue, &mut || ());
        }
        assert_eq!(front.shadow.poll_event(), None);
        front.reset();
        front.negotiate();
    }
}

#[test]
fn frames_go_from_one_network_device_to_another() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = Cable::pair().unwrap();
    let net = |seed: &str, end| -> Box<dyn Device> {
        Box::new(Net::new(&Settings::new(Mac::derived(seed)), Box::new(end)))
    };
    let devices = vec![("net0", net("one", one)), ("net1", net("two", two))];
    let _host = DeviceHost::start(dir.path(), devices);
    let ram = [Ram::new(RAM, false), Ram::new(RAM, false)];
    let fronts: Vec<Front> = [("net0", &ram[0]), ("net1", &ram[1])]
        .iter()
        .map(|(name, ram)| Front::new(dir.path(), name, ram, &RINGS))
        .collect();
    let mut rx = Vec::new();
    let mut tx = Vec::new();
    for (front, ram) in fronts.iter().zip(&ram) {
        rx.push(front.start(ram, 0, 256, 0));
        tx.push(front.start(ram, 1, 256, 0x10_0000));
        front.run();
    }
    const HEADER: usize = 12;
    let slot = |n: usize| BUFFERS + n * 2048;
    let mut tokens = [vec![0; 256], vec![0; 256]];
    for (side, rx) in rx.iter_mut().enumerate() {
        for n in 0..128 {
            let addr = BusAddr(GUEST + slot(n) as u64);
            let token = rx.driver.add(&[], &[(addr, 1600)]).unwrap();
            tokens[side][token.index()] = n;
        }
        rx.publish(&fronts[side].shadow);
    }
    let mut numbers = Numbers(11);
    for _ in 0..300 {
        let from = numbers.below(2);
        let to = 1 - from;
        let mut frames = Vec::new();
        for n in 0..1 + numbers.below(30) {
            let mut frame = vec![0; HEADER];
            let len = 46 + numbers.below(1455);
            // To everybody, from itself, of a type of its own.
            frame.extend([0xff; 6]);
            frame.extend(
                if from == 0 {
                    Mac::derived("one")
                } else {
                    Mac::derived("two")
                }
                .0,
            );
            frame.extend([0x88, 0xb5]);
            frame.extend(numbers.bytes(len));
            let at = slot(200 + n);
            ram[from].ram().write(at, &frame);
            let addr = GUEST + at as u64;
            let split = 1 + numbers.below(frame.len() - 1);
            let parts = [
                (BusAddr(addr), split as u32),
                (BusAddr(addr + split as u64), (frame.len() - split) as u32),
            ];
            tx[from].driver.add(&parts, &[]).unwrap();
            frames.push(frame);
        }
        tx[from].publish(&fronts[from].shadow);
        for frame in &frames {
            let used = rx[to].next();
            let n = tokens[to][used.token.index()];
            let bytes = read(ram[to].ram(), slot(n), used.written as usize);
            assert_eq!(&bytes[HEADER..], &frame[HEADER..]);
            let addr = BusAddr(GUEST + slot(n) as u64);
            let token = rx[to].driver.add(&[], &[(addr, 1600)]).unwrap();
            tokens[to][token.index()] = n;
        }
        rx[to].publish(&fronts[to].shadow);
        for _ in &frames {
            tx[from].next();
        }
    }
    for front in &fronts {
        assert_eq!(front.shadow.poll_event(), None);
        let counters = front.shadow.counters();
        assert!(counters.requests > 1000, "{counters:?}");
        front.reset();
    }
}

#[test]
fn an_idle_device_leaves_the_thread_asleep() {
    let dir = tempfile::tempdir().unwrap();
    let _host = rng(dir.path());
    let ram = Ram::new(RAM, false);
    let front = Front::new(dir.path(), "rng0", &ram, &RINGS);
    let mut queue = front.start(&ram, 0, 64, 0);
    front.run();
    let addr = BusAddr(GUEST + BUFFERS as u64);
    queue.driver.add(&[], &[(addr, 64)]).unwrap();
    queue.publish(&front.shadow);
    queue.next();
    let begin = Instant::now();
    loop {
        let before = front.shadow.counters().sleeps;
        let later = Instant::now() + Duration::from_millis(300);
        assert!(!wait(&front.shadow.event_fd(), later));
        if front.shadow.counters().sleeps == before {
            break;
        }
        // What follows the last interrupt ends.
        assert!(begin.elapsed() < PATIENCE, "it does not sleep");
    }
}
