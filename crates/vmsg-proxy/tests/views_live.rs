// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows that come and go before a real device host, with threads: when a change is acknowledged, when an address is refused, and memory of
//! a device.
#![allow(missing_docs, clippy::cast_possible_truncation)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{DevNum, DeviceStatus, FeatureSet, QueueIndex};
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, SharedRegion, VENDOR_ID, transport_features,
};
use vmsg_device::host::{Counters, Host, Stop};
use vmsg_mem::{BusAddr, Mapping};
use vmsg_proxy::link::{Link, SessionHandle, Source};
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, Options, Outcome, QueueSetup, ResumeAt, Session, Target, Window,
};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const PAGE: u64 = 0x1000;
const RAM: u64 = 64 * PAGE;
/// Where the rings are: at the beginning of the file, and here on the bus.
const RINGS: u64 = 0x4000_0000;
/// A buffer: page 16 of the file.
const BUFFER: u64 = 0x10_0000_0000;
const BUFFER_AT: usize = 16 * PAGE as usize;
const WAIT: Duration = Duration::from_secs(60);

/// Says when it has a chain, and writes into it when it is told to.
struct Gate {
    taken: Sender<()>,
    go: Receiver<()>,
    region: Option<SharedRegion>,
}

impl Device for Gate {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8, 8]
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {}

    fn shared_memory(&self) -> Vec<SharedRegion> {
        self.region.clone().into_iter().collect()
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring.pop(io.space, io.storage, budget).map_err(failed)?;
        for chain in batch.iter() {
            let _ = self.taken.send(());
            let _ = self.go.recv();
            let written = chain.writable().write(b"written");
            ring.complete(io.space, chain.head(), written as u32)
                .map_err(failed)?;
        }
        io.publish(queue)?;
        Ok(Progress::Idle)
    }
}

struct DeviceHost {
    stop: Stop,
    thread: Option<JoinHandle<Counters>>,
    taken: Receiver<()>,
    go: SyncSender<()>,
}

impl DeviceHost {
    fn start(bus: &BusSpec, region: Option<SharedRegion>) -> DeviceHost {
        let listener = bus.listen("test host").unwrap();
        let mut host = Host::new(2).unwrap();
        let index = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
            .unwrap();
        let (took, taken) = mpsc::channel();
        let (go, gone) = mpsc::sync_channel(0);
        let gate = Gate {
            taken: took,
            go: gone,
            region,
        };
        host.add_device(index, "gate", Some(1), None, Box::new(gate))
            .unwrap();
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || {
            host.run().unwrap();
            host.cores().next().unwrap().counters()
        });
        DeviceHost {
            stop,
            thread: Some(thread),
            taken,
            go,
        }
    }

    fn end(mut self) -> Counters {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap()
    }
}

struct Guest {
    ram: Mapping,
    fd: Arc<OwnedFd>,
    file: FileId,
    _link: Link,
    handle: SessionHandle,
}

fn bus(dir: &tempfile::TempDir) -> BusSpec {
    BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")))
}

impl Guest {
    fn new(bus: &BusSpec) -> Guest {
        let (ram, fd) = Mapping::memfd("ram", RAM, true).unwrap();
        let stat = rustix::fs::fstat(&fd).unwrap();
        let session = Session::new(Target::Number(DevNum(1)), Options::default());
        let link = Link::start("test", session, Source::Bus(bus.connector("test"))).unwrap();
        Guest {
            ram,
            fd: Arc::new(fd),
            file: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            handle: link.handle(),
            _link: link,
        }
    }

    fn window(&self, base: u64, file_offset: u64, len: u64) -> Window {
        Window {
            base,
            len,
            file_offset,
            writable: true,
            fd: Arc::clone(&self.fd),
            file: self.file,
        }
    }

    fn change(&self, remove: &[u64], add: Vec<Window>) -> Result<Outcome, OpError> {
        let remove = remove.to_vec();
        self.handle.call(Op::ChangeWindows { remove, add })
    }

    fn buffer(&self) -> Vec<Window> {
        vec![self.window(BUFFER, BUFFER_AT as u64, PAGE)]
    }

    /// The device runs, with a queue whose rings are shown page by page, and nothing else.
    fn bring_up(&self) -> DriverQueue<'_, Vec<DriverSlot>> {
        let layout = Layout::new(8, 0).unwrap();
        let ram = self.ram.ram().get(0, layout.total_len()).unwrap();
        let slots = vec![DriverSlot::default(); 8];
        let features = QueueFeatures::default();
        let queue = DriverQueue::new(layout, features, ram, BusAddr(RINGS), slots).unwrap();
        let config = queue.config();
        let setup = QueueSetup {
            size: 8,
            descriptor: config.desc.0,
            driver: config.driver.0,
            device: config.device.0,
            resume: ResumeAt::Start,
        };
        let pages = [0, 0x80, 0x100, 0x180].map(|at| self.window(RINGS + at, at, 0x80));
        let live = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        for op in [
            Op::Describe,
            Op::Claim,
            Op::ChangeWindows {
                remove: vec![],
                add: pages.to_vec(),
            },
            Op::SetStatus(DeviceStatus::RESET),
            Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
            Op::SetFeatures(FeatureSet::from_bits(&[32])),
            Op::SetStatus(live),
            Op::SetQueue(QueueIndex(0), setup),
            Op::SetStatus(live | DeviceStatus::DRIVER_OK),
        ] {
            self.handle
                .call(op.clone())
                .unwrap_or_else(|error| panic!("{op:?}: {error}"));
        }
        queue
    }

    fn ask(&self, queue: &mut DriverQueue<'_, Vec<DriverSlot>>) {
        queue.add(&[], &[(BusAddr(BUFFER), 64)]).unwrap();
        queue.publish().unwrap();
        self.handle.kick(QueueIndex(0)).unwrap();
    }

    fn wait_for(&self, wanted: impl Fn(&Event) -> bool) {
        let until = Instant::now() + WAIT;
        loop {
            self.handle.clear();
            while let Some(event) = self.handle.poll_event() {
                if wanted(&event) {
                    return;
                }
            }
            assert!(Instant::now() < until, "it never came");
            let fd = self.handle.event_fd();
            let mut fds = [rustix::event::PollFd::new(
                &fd,
                rustix::event::PollFlags::IN,
            )];
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut fds, Some(&second)).unwrap();
        }
    }

    /// Waits until the device has used the buffer: how many bytes it has written. A queue that goes on is notified once without that.
    fn wait_for_used(&self, queue: &mut DriverQueue<'_, Vec<DriverSlot>>) -> u32 {
        loop {
            if let Some(used) = queue.pop_used().unwrap() {
                return used.written;
            }
            self.wait_for(|event| matches!(event, Event::QueueUsed(_)));
        }
    }

    fn there(&self) -> [u8; 7] {
        let mut bytes = [0; 7];
        self.ram.ram().read(BUFFER_AT, &mut bytes);
        bytes
    }
}

#[test]
fn a_window_in_use_is_taken_back_when_the_worker_is_done_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let host = DeviceHost::start(&bus(&dir), None);
    let guest = Guest::new(&bus(&dir));
    let mut queue = guest.bring_up();
    guest.change(&[], guest.buffer()).unwrap();
    guest.ask(&mut queue);
    host.taken.recv_timeout(WAIT).expect("the device has it");
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        let guest = &guest;
        scope.spawn(move || {
            guest.change(&[BUFFER], vec![]).unwrap();
            // What the device was doing is visible now, and nothing comes after it.
            done.send(guest.there()).unwrap();
        });
        let early = ended.recv_timeout(Duration::from_millis(200));
        assert!(early.is_err(), "taken back under the device's hands");
        host.go.send(()).unwrap();
        assert_eq!(&ended.recv_timeout(WAIT).unwrap(), b"written");
    });
    assert_eq!(guest.wait_for_used(&mut queue), 7);
    drop(queue);
    drop(guest);
    assert_eq!(host.end().unmapped, 0);
}

#[test]
fn an_address_that_is_not_mapped_stops_the_device_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let host = DeviceHost::start(&bus(&dir), None);
    let guest = Guest::new(&bus(&dir));
    for round in 0..2 {
        let mut queue = guest.bring_up();
        guest.change(&[], guest.buffer()).unwrap();
        guest.change(&[BUFFER], vec![]).unwrap();
        guest.ask(&mut queue);
        guest.wait_for(|event| matches!(event, Event::NeedsReset(_)));
        assert_eq!(guest.there(), [0; 7]);
        assert!(host.taken.try_recv().is_err(), "round {round}");
        // The driver starts over, and the device works.
        guest.handle.call(Op::Release).unwrap();
        let mut queue = guest.bring_up();
        guest.change(&[], guest.buffer()).unwrap();
        guest.ask(&mut queue);
        host.taken.recv_timeout(WAIT).expect("the device has it");
        host.go.send(()).unwrap();
        assert_eq!(guest.wait_for_used(&mut queue), 7);
        assert_eq!(&guest.there(), b"written");
        guest.ram.ram().write(BUFFER_AT, &[0; 7]);
        guest.handle.call(Op::Release).unwrap();
    }
    drop(guest);
    assert_eq!(host.end().unmapped, 2);
}

#[test]
fn three_hundred_views_come_back_with_the_next_host() {
    let dir = tempfile::tempdir().unwrap();
    let host = DeviceHost::start(&bus(&dir), None);
    let guest = Guest::new(&bus(&dir));
    let mut queue = guest.bring_up();
    let others = (1..300).map(|i| guest.window(BUFFER + i * 2 * PAGE, 32 * PAGE, PAGE));
    guest.change(&[], others.collect()).unwrap();
    guest.change(&[], guest.buffer()).unwrap();
    host.end();
    // It was a thread of this process, which lives on.
    let unmapped = guest.change(&[BUFFER + 2 * PAGE], vec![]);
    assert_eq!(unmapped, Err(OpError::StillInUse));
    let host = DeviceHost::start(&bus(&dir), None);
    guest.wait_for(|event| matches!(event, Event::Ready { replayed: true, .. }));
    guest.ask(&mut queue);
    host.taken.recv_timeout(WAIT).expect("the device has it");
    host.go.send(()).unwrap();
    assert_eq!(guest.wait_for_used(&mut queue), 7);
    assert_eq!(&guest.there(), b"written");
    drop(queue);
    drop(guest);
    assert_eq!(host.end().unmapped, 0);
}

#[test]
fn a_region_of_the_device_is_the_same_memory_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, fd) = Mapping::memfd("region", 4 * PAGE, true).unwrap();
    let region = SharedRegion {
        id: 3,
        len: 2 * PAGE,
        file: Arc::new(fd),
        file_offset: PAGE,
    };
    let host = DeviceHost::start(&bus(&dir), Some(region));
    let guest = Guest::new(&bus(&dir));
    guest.handle.call(Op::Describe).unwrap();
    let refused = guest.handle.call(Op::SharedMemory(3));
    assert!(
        matches!(refused, Err(OpError::Refused { code: 8, .. })),
        "only for who holds the device: {refused:?}"
    );
    guest.handle.call(Op::Claim).unwrap();
    let Ok(Outcome::SharedMemory(Some(region))) = guest.handle.call(Op::SharedMemory(3)) else {
        panic!("there is a region");
    };
    assert_eq!(region.len, 2 * PAGE);
    let access = vmsg_mem::Access::ReadWrite;
    let fd = std::os::fd::AsFd::as_fd(&*region.fd);
    let ours = Mapping::of_fd(fd, region.file_offset, region.len, access).unwrap();
    theirs.ram().write(PAGE as usize, b"hello");
    let mut bytes = [0; 5];
    ours.ram().read(0, &mut bytes);
    assert_eq!(&bytes, b"hello");
    let none = guest.handle.call(Op::SharedMemory(0));
    assert_eq!(none, Ok(Outcome::SharedMemory(None)));
    let connector = bus(&dir).connector("another");
    let mut client = vmsg_driver::Client::on_bus(connector.connect().unwrap());
    let info = client.shared_memory(DevNum(1), 3).unwrap();
    assert_eq!(info.map(|info| info.len), Some(2 * PAGE as u32));
    assert!(client.shared_memory(DevNum(1), 0).unwrap().is_none());
    drop(client);
    drop(guest);
    host.end();
}
