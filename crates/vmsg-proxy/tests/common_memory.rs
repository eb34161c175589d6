// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Real devices of a real device host before a guest whose memory lies scattered in what both ends have in common: entropy and frames, with kicks and
//! calls by the bus's vectors or by messages, over restarts of either side. Nothing but messages of 64 bytes, doorbells and the one memory goes between
//! the two.
#![allow(missing_docs, clippy::cast_possible_truncation)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{DevNum, DeviceStatus, FeatureSet, QueueIndex};
use vmsg_bus::loopback::{self, Common};
use vmsg_bus::{Capabilities, CommonMode, CommonRam, DriverBus};
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_mem::{BusAddr, Doorbell, Mapping, RamSlice};
use vmsg_net::socket::{Dgram, DgramConfig};
use vmsg_proxy::link::{Link, SessionHandle, Source};
use vmsg_proxy::places::{Found, Place, PlaceError, Places};
use vmsg_proxy::session::{
    FileId, Op, OpError, Options, QueueSetup, ResumeAt, Session, Target, Window,
};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const HUGE: u64 = 2 << 20;
/// Pages of the common memory, and of each guest.
const COMMON_PAGES: u64 = 11;
const GUEST_PAGES: u64 = 3;
const RAM: u64 = GUEST_PAGES * HUGE;
/// Guest physical address of the memory.
const BASE: u64 = 0x4000_0000;
const SIZE: u16 = 16;
/// Where a queue's buffers are in the guest's memory: each in another page than its ring.
const BUFFERS: u64 = HUGE;
const BUFFER: u64 = 4096;
const WAIT: Duration = Duration::from_secs(60);

/// Where a page of the guest with this number is.
fn place_of(guest: u64, page: u64) -> u64 {
    ((guest * GUEST_PAGES + page) * 4 + 2) % COMMON_PAGES * HUGE
}

#[derive(Debug)]
struct Scattered(u64);

impl Places for Scattered {
    fn places(
        &self,
        _: BorrowedFd<'_>,
        _: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        assert!(file_offset == 0 && len == RAM, "the whole memory");
        let places = (0..GUEST_PAGES).map(|page| Place {
            offset_in_common: place_of(self.0, page),
            len: HUGE,
        });
        Ok(Found {
            places: places.collect(),
            hold: None,
        })
    }
}

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    /// The frames that came out of the network device, and those that go in.
    wire: UnixDatagram,
    _dir: tempfile::TempDir,
}

impl DeviceHost {
    /// With connections to it.
    fn start(memory: &Arc<Mapping>, vectors: u16, epoch: u64) -> (DeviceHost, DriverBus) {
        let options = loopback::Options {
            capabilities: Capabilities::common(64),
            slots: 60,
            epoch,
            ..loopback::Options::default()
        };
        let device = CommonRam::of_mapping(CommonMode::Segment, Arc::clone(memory), "window");
        let common = Common {
            driver: None,
            device: Some(Arc::new(device)),
            vectors,
        };
        let (driver, device) = loopback::pair_with(&options, &common).unwrap();
        let mut host = Host::new(2).unwrap();
        let bus = host.add_bus(64, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (local, remote) = (dir.path().join("net"), dir.path().join("wire"));
        let wire = UnixDatagram::bind(&remote).unwrap();
        wire.set_read_timeout(Some(WAIT)).unwrap();
        let config = DgramConfig::Unix {
            local: local.clone(),
            remote,
        };
        let backend = Dgram::open(&config).unwrap();
        wire.connect(local).unwrap();
        let net = Net::new(&Settings::new(Mac([2, 0, 0, 0, 0, 1])), Box::new(backend));
        host.add_device(bus, "net0", Some(0), None, Box::new(net))
            .unwrap();
        for number in 1..3 {
            let name = format!("rng{number}");
            host.add_device(bus, &name, Some(number), None, Box::new(Rng::new()))
                .unwrap();
        }
        host.attach(bus, device).unwrap();
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().unwrap());
        let host = DeviceHost {
            stop,
            thread: Some(thread),
            wire,
            _dir: dir,
        };
        (host, driver)
    }
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn memory() -> Arc<Mapping> {
    let (mapping, _) = Mapping::memfd("window", COMMON_PAGES * HUGE, true).unwrap();
    Arc::new(mapping)
}

/// A guest's memory, as it sees it.
struct Memory {
    common: Arc<Mapping>,
    guest: u64,
    fd: Arc<OwnedFd>,
}

impl Memory {
    fn new(common: &Arc<Mapping>, guest: u64) -> Memory {
        // What the VMM lends is another file, as far as the proxy sees.
        let (_, fd) = Mapping::memfd("guest", RAM, true).unwrap();
        Memory {
            common: Arc::clone(common),
            guest,
            fd: Arc::new(fd),
        }
    }

    fn part(&self, at: u64, len: usize) -> RamSlice<'_> {
        let offset = place_of(self.guest, at / HUGE) + at % HUGE;
        let ram = self.common.ram();
        let part = ram.get(offset as usize, len);
        part.filter(|_| at % HUGE + len as u64 <= HUGE).unwrap()
    }

    fn window(&self) -> Window {
        let stat = rustix::fs::fstat(&self.fd).unwrap();
        Window {
            base: BASE,
            len: RAM,
            file_offset: 0,
            writable: true,
            fd: Arc::clone(&self.fd),
            file: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        }
    }
}

/// A queue of the guest's driver.
struct Queue<'m> {
    memory: &'m Memory,
    index: u32,
    ring: DriverQueue<'m, Vec<DriverSlot>>,
    kick: Doorbell,
    call: Doorbell,
    next: u64,
}

impl<'m> Queue<'m> {
    fn new(memory: &'m Memory, index: u32) -> Queue<'m> {
        let layout = Layout::new(SIZE, 0).unwrap();
        let at = u64::from(index) * 0x4000;
        let ram = memory.part(at, layout.total_len());
        ram.fill(0);
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let features = QueueFeatures::default();
        let ring = DriverQueue::new(layout, features, ram, BusAddr(BASE + at), slots).unwrap();
        Queue {
            memory,
            index,
            ring,
            kick: Doorbell::new().unwrap(),
            call: Doorbell::new().unwrap(),
            next: 0,
        }
    }

    fn ops(&self, resume: ResumeAt) -> [Op; 2] {
        let config = self.ring.config();
        let fd = |bell: &Doorbell| Some(Arc::new(bell.as_fd().try_clone_to_owned().unwrap()));
        let queue = QueueIndex(self.index);
        let setup = QueueSetup {
            size: SIZE,
            descriptor: config.desc.0,
            driver: config.driver.0,
            device: config.device.0,
            resume,
        };
        let notify = Op::SetNotify {
            queue,
            kick: fd(&self.kick),
            call: fd(&self.call),
        };
        [notify, Op::SetQueue(queue, setup)]
    }

    /// The next buffer: in another page than the ring, and the last one reaches from one page into the next.
    fn buffer(&mut self) -> u64 {
        self.next += 1;
        let slot = u64::from(self.index) * u64::from(SIZE) + self.next % u64::from(SIZE);
        BUFFERS + slot * BUFFER
    }

    fn kick(&mut self) {
        if self.ring.publish().unwrap() {
            self.kick.ring().unwrap();
        }
    }

    /// What was written, once it is used; woken by the call and nothing else.
    fn wait(&mut self) -> u32 {
        let until = Instant::now() + WAIT;
        loop {
            if let Some(used) = self.ring.pop_used().unwrap() {
                return used.written;
            }
            if self.ring.enable_notifications().unwrap() {
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "queue {} is not served", self.index);
            let left = rustix::event::Timespec::try_from(left).unwrap();
            let mut fds = [rustix::event::PollFd::new(
                &self.call,
                rustix::event::PollFlags::IN,
            )];
            let _ = rustix::event::poll(&mut fds, Some(&left));
            self.call.drain().unwrap();
        }
    }

    /// Asks for random bytes: `len` of them came.
    fn random(&mut self, at: u64, len: usize) -> Vec<u8> {
        self.memory.part(at, 1).fill(0);
        self.ring
            .add(&[], &[(BusAddr(BASE + at), len as u32)])
            .unwrap();
        self.kick();
        assert_eq!(self.wait() as usize, len);
        let mut bytes = vec![0; len.min((HUGE - at % HUGE) as usize)];
        self.memory.part(at, bytes.len()).read(0, &mut bytes);
        bytes
    }
}

fn call(handle: &SessionHandle, op: Op) {
    handle
        .call(op.clone())
        .unwrap_or_else(|error| panic!("{op:?}: {error}"));
}

const ACCEPTED: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK);

fn bring_up(handle: &SessionHandle, memory: &Memory, queues: &[&Queue<'_>], resume: ResumeAt) {
    let mut ops = vec![
        Op::Describe,
        Op::Claim,
        Op::SetWindows(vec![memory.window()]),
        Op::SetStatus(DeviceStatus::RESET),
        Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
        Op::SetFeatures(FeatureSet::from_bits(&[32])),
        Op::SetStatus(ACCEPTED),
    ];
    ops.extend(queues.iter().flat_map(|queue| queue.ops(resume)));
    ops.push(Op::SetStatus(ACCEPTED | DeviceStatus::DRIVER_OK));
    ops.into_iter().for_each(|op| call(handle, op));
}

fn session(device: u16, guest: u64) -> (String, Session) {
    let mut session = Session::new(Target::Number(DevNum(device)), Options::default());
    session.set_places(Arc::new(Scattered(guest)));
    (format!("device {device}"), session)
}

/// Messages of the link so far.
fn messages(handle: &SessionHandle) -> u64 {
    let stats = handle.stats().unwrap();
    stats.sent + stats.received
}

#[test]
fn entropy_comes_into_scattered_pages_and_no_message_carries_a_kick() {
    for vectors in [0, 1, 4] {
        let common = memory();
        let (_host, bus) = DeviceHost::start(&common, vectors, 1);
        let link = Link::start_shared(
            "test",
            vec![session(1, 0), session(2, 1)],
            Source::Given(Box::new(bus)),
        )
        .unwrap();
        let memories = [Memory::new(&common, 0), Memory::new(&common, 1)];
        let mut queues = [Queue::new(&memories[0], 0), Queue::new(&memories[1], 0)];
        for (index, queue) in queues.iter().enumerate() {
            let handle = &link.handles()[index];
            bring_up(handle, queue.memory, &[queue], ResumeAt::Start);
        }
        let before = messages(&link.handle());
        let mut seen = Vec::new();
        for turn in 0..100 {
            let queue = &mut queues[turn % 2];
            let at = queue.buffer();
            let bytes = queue.random(at, 64);
            assert!(!seen.contains(&bytes), "the same twice");
            seen.push(bytes);
        }
        let after = messages(&link.handle()) - before;
        if vectors == 0 {
            assert!(after >= 200, "kicks and calls are messages: {after}");
        } else {
            assert_eq!(after, 0, "{vectors} vectors");
        }
        // A buffer in two pages that are no neighbours is filled on both sides.
        let at = 2 * HUGE - 32;
        let queue = &mut queues[0];
        queue.random(at, 64);
        for half in [at, 2 * HUGE] {
            let mut bytes = [0; 32];
            memories[0].part(half, 32).read(0, &mut bytes);
            assert_ne!(bytes, [0; 32], "{half:#x}");
        }
    }
}

#[test]
fn frames_go_both_ways_through_scattered_pages() {
    let common = memory();
    let (host, bus) = DeviceHost::start(&common, 2, 1);
    let link =
        Link::start_shared("net", vec![session(0, 0)], Source::Given(Box::new(bus))).unwrap();
    let memory = Memory::new(&common, 0);
    let (mut rx, mut tx) = (Queue::new(&memory, 0), Queue::new(&memory, 1));
    bring_up(&link.handle(), &memory, &[&rx, &tx], ResumeAt::Start);
    for number in 0..50u8 {
        let frame = [
            &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0][..],
            &[number; 86],
        ]
        .concat();
        let at = tx.buffer();
        // The virtio header and the frame.
        memory.part(at, 12).fill(0);
        memory.part(at + 12, frame.len()).write(0, &frame);
        let len = 12 + frame.len() as u32;
        tx.ring.add(&[(BusAddr(BASE + at), len)], &[]).unwrap();
        tx.kick();
        let mut sent = [0; 2048];
        let count = host.wire.recv(&mut sent).unwrap();
        assert_eq!(&sent[..count], frame);
        assert_eq!(tx.wait(), 0);

        let at = rx.buffer();
        rx.ring.add(&[], &[(BusAddr(BASE + at), 2048)]).unwrap();
        rx.kick();
        host.wire.send(&frame).unwrap();
        assert_eq!(rx.wait(), len);
        let mut came = vec![0; frame.len()];
        memory.part(at + 12, came.len()).read(0, &mut came);
        assert_eq!(came, frame);
    }
}

#[test]
fn a_guest_goes_on_where_it_was_with_the_next_device_host() {
    let common = memory();
    let memory = Memory::new(&common, 0);
    let mut queue = Queue::new(&memory, 0);
    let mut resume = ResumeAt::Start;
    for epoch in 1..5 {
        // Each is another process, with other vectors; what stays is the memory.
        let (host, bus) = DeviceHost::start(&common, (epoch % 3) as u16, epoch);
        let link =
            Link::start_shared("rng", vec![session(1, 0)], Source::Given(Box::new(bus))).unwrap();
        // Asked for while nobody was there.
        let at = queue.buffer();
        memory.part(at, 64).fill(0);
        queue.ring.add(&[], &[(BusAddr(BASE + at), 64)]).unwrap();
        queue.kick();
        bring_up(&link.handle(), &memory, &[&queue], resume);
        assert_eq!(queue.wait(), 64);
        let mut bytes = [0; 64];
        memory.part(at, 64).read(0, &mut bytes);
        assert_ne!(bytes, [0; 64]);
        for _ in 0..20 {
            let at = queue.buffer();
            queue.random(at, 64);
        }
        resume = ResumeAt::UsedIndex;
        // Killed without a word.
        drop(host);
        drop(link);
    }
}

#[test]
fn a_driver_that_is_gone_is_forgotten_and_the_next_one_is_served() {
    let common = memory();
    let options = loopback::Options {
        capabilities: Capabilities::common(64),
        ..loopback::Options::default()
    };
    let ram = CommonRam::of_mapping(CommonMode::Segment, Arc::clone(&common), "window");
    let shared = Common {
        driver: None,
        device: Some(Arc::new(ram)),
        vectors: 1,
    };
    let mut host = Host::new(1).unwrap();
    let bus = host.add_bus(64, None).unwrap();
    host.add_device(bus, "rng1", Some(1), None, Box::new(Rng::new()))
        .unwrap();
    let mut ends = Vec::new();
    for _ in 0..3 {
        let (driver, device) = loopback::pair_with(&options, &shared).unwrap();
        host.attach(bus, device).unwrap();
        ends.push(driver);
    }
    let stop = host.stop_handle();
    let thread = std::thread::spawn(move || host.run().unwrap());
    let memory = Memory::new(&common, 0);
    for driver in ends {
        let source = Source::Given(Box::new(driver));
        let link = Link::start_shared("rng", vec![session(1, 0)], source).unwrap();
        // The device may still be at the last driver's request: its memory is used again when it has been reset.
        call(&link.handle(), Op::SetStatus(DeviceStatus::RESET));
        let mut queue = Queue::new(&memory, 0);
        bring_up(&link.handle(), &memory, &[&queue], ResumeAt::Start);
        queue.random(BUFFERS, 64);
        // Gone in the middle of everything: the connection ends.
        queue
            .ring
            .add(&[], &[(BusAddr(BASE + BUFFERS), 64)])
            .unwrap();
        queue.kick();
        drop(link);
    }
    stop.stop();
    thread.join().unwrap();
    // Nothing of any guest is held on to.
    drop(shared);
    drop(memory);
    assert_eq!(Arc::strong_count(&common), 1);
}

#[test]
fn a_queue_outside_of_the_memory_is_refused_and_the_device_host_lives_on() {
    let common = memory();
    let (_host, bus) = DeviceHost::start(&common, 1, 1);
    let link =
        Link::start_shared("rng", vec![session(1, 0)], Source::Given(Box::new(bus))).unwrap();
    let memory = Memory::new(&common, 0);
    let mut queue = Queue::new(&memory, 0);
    let handle = link.handle();
    bring_up(&handle, &memory, &[], ResumeAt::Start);
    call(&handle, Op::SetStatus(DeviceStatus::RESET));
    call(
        &handle,
        Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
    );
    call(&handle, Op::SetFeatures(FeatureSet::from_bits(&[32])));
    call(&handle, Op::SetStatus(ACCEPTED));
    let outside = QueueSetup {
        size: SIZE,
        descriptor: BASE + RAM,
        driver: BASE + RAM + 0x1000,
        device: BASE + RAM + 0x2000,
        resume: ResumeAt::Start,
    };
    let refused = handle.call(Op::SetQueue(QueueIndex(0), outside));
    assert!(
        matches!(
            refused,
            Err(OpError::Refused { .. } | OpError::NeedsReset(_))
        ),
        "{refused:?}"
    );
    bring_up(&handle, &memory, &[&queue], ResumeAt::Start);
    queue.random(BUFFERS, 64);
}
