// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What shadow queues cost: a driver and a device with one copy of their own, directly and through a segment, in turns of one run.
//! `cargo bench -p vmsg-proxy --bench shadow`

use rustix::event::{PollFd, PollFlags, epoll, poll};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_msg::{DevNum, DeviceInfo, FeatureSet, QueueIndex, feature};
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, RamSlice, TableEntry, WindowTable};
use vmsg_proxy::memory::{GuestMemory, MemoryError};
use vmsg_proxy::session::{DeviceFacts, QueueSetup, ResumeAt};
use vmsg_proxy::shadow::{Common, Interrupt, Options, Segment, Shadow};
use vmsg_queue::remote::Memory;
use vmsg_queue::{ChainStorage, DeviceQueue, DriverQueue, DriverSlot, Layout, QueueConfig};

const GUEST: u64 = 0x4000_0000;
const RAM: u64 = 64 << 20;
const BUFFERS: u64 = GUEST + (1 << 20);
const SIZE: u16 = 256;
/// Memory that both sides have in common.
const COMMON: u64 = 32 << 20;
/// How long each figure is measured, and how often.
const TIME: Duration = Duration::from_millis(250);
const ROUNDS: usize = 7;

/// A guest's memory, all of it mapped.
struct Ram(WindowTable);

impl Memory for Ram {
    type Error = MemoryError;
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        Ok(self.0.space().read(addr, into)?)
    }
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), MemoryError> {
        Ok(self.0.space().write(addr, from)?)
    }
    fn load_u16(&self, addr: BusAddr) -> Result<u16, MemoryError> {
        Ok(self.0.space().load_u16(addr)?)
    }
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), MemoryError> {
        Ok(self.0.space().store_u16(addr, value)?)
    }
    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), MemoryError> {
        Ok(self.0.space().read_into(addr, to)?)
    }
    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), MemoryError> {
        Ok(self.0.space().write_from(addr, from)?)
    }
}

impl GuestMemory for Ram {
    fn cancel(&self) {}
}

fn table(mapping: Arc<Mapping>, base: u64) -> WindowTable {
    let len = mapping.len();
    let entry = TableEntry {
        base: BusAddr(base),
        mapping,
        offset: 0,
        len,
        access: Access::ReadWrite,
    };
    WindowTable::new(vec![entry]).expect("one window")
}

/// Reads what there is to read and fills what there is to write, `most` bytes of each request at most, until it is stopped.
fn serve(
    table: &WindowTable,
    config: QueueConfig,
    features: FeatureSet,
    kick: &OwnedFd,
    call: &OwnedFd,
    most: usize,
    stop: &AtomicBool,
) {
    let space = table.space();
    let features = vmsg_queue::QueueFeatures::from_bits(features.low_u64());
    let mut queue = DeviceQueue::new(config, features, space).expect("a queue");
    let mut storage = ChainStorage::with_capacity(1024);
    let call = Doorbell::from_fd(call.try_clone().expect("dup")).expect("an eventfd");
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&set, kick, epoll::EventData::new_u64(0), flags).expect("epoll");
    let mut scratch = vec![0x77; 1 << 20];
    while !stop.load(Ordering::Relaxed) {
        queue.disable_notifications(space).expect("works");
        let batch = queue.pop(space, &mut storage, 64).expect("works");
        for chain in batch.iter() {
            let n = chain.readable().len();
            chain.readable().read(&mut scratch[..n]);
            let n = chain.writable().len().min(most);
            chain.writable().write(&scratch[..n]);
            let written = u32::try_from(n).expect("small");
            queue.complete(space, chain.head(), written).expect("works");
        }
        if queue.publish(space).expect("works") {
            let _ = call.ring();
        }
        if batch.is_empty() && !queue.enable_notifications(space).expect("works") {
            let mut space = [MaybeUninit::<epoll::Event>::uninit()];
            let _ = epoll::wait(&set, &mut space, None);
        }
    }
}

fn eventfd() -> Arc<OwnedFd> {
    Arc::new(Doorbell::new().expect("eventfd").into())
}

/// One kind of traffic.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    /// Bytes that the device reads, and has room to write.
    readable: u32,
    writable: u32,
    /// Bytes that it writes.
    written: u32,
    /// Requests on their way at a time.
    depth: usize,
}

/// Requests per second of a driver that keeps `depth` of them on their way.
fn drive(
    driver: &mut DriverQueue<'_, Vec<DriverSlot>>,
    load: Load,
    kick: &dyn Fn(),
    bell: &impl AsFd,
) -> f64 {
    let mut begin = Instant::now();
    let (mut done, mut out, mut n) = (0u64, 0, 0u64);
    let mut warm = false;
    loop {
        let elapsed = begin.elapsed();
        if !warm && elapsed > TIME / 5 {
            (begin, done, warm) = (Instant::now(), 0, true);
        } else if warm && elapsed > TIME {
            break;
        }
        while out < load.depth {
            let at = BUFFERS + n % 64 * (256 << 10);
            let readable = [(BusAddr(at), load.readable)];
            let writable = [(BusAddr(at + (128 << 10)), load.writable)];
            let parts = |list, len| if len > 0 { list } else { &[][..] };
            let added = driver.add(
                parts(&readable[..], load.readable),
                parts(&writable[..], load.writable),
            );
            if added.is_err() {
                break;
            }
            n += 1;
            out += 1;
        }
        if driver.publish().expect("works") {
            kick();
        }
        driver.disable_notifications().expect("works");
        let before = out;
        while driver.pop_used().expect("works").is_some() {
            out -= 1;
            done += 1;
        }
        if out == before && !driver.enable_notifications().expect("works") {
            poll(&mut [PollFd::new(bell, PollFlags::IN)], None).expect("poll");
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
    }
    let rate = done as f64 / begin.elapsed().as_secs_f64();
    // What is on its way comes back before the rings go.
    while out > 0 {
        if driver.pop_used().expect("works").is_some() {
            out -= 1;
        } else if !driver.enable_notifications().expect("works") {
            poll(&mut [PollFd::new(bell, PollFlags::IN)], None).expect("poll");
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
    }
    rate
}

fn driver(mapping: &Mapping, features: FeatureSet) -> DriverQueue<'_, Vec<DriverSlot>> {
    let layout = Layout::new(SIZE, 4).expect("a size");
    let features = vmsg_queue::QueueFeatures::from_bits(features.low_u64());
    let slots = vec![DriverSlot::default(); SIZE.into()];
    DriverQueue::new(layout, features, mapping.ram(), BusAddr(GUEST), slots).expect("a queue")
}

fn features() -> FeatureSet {
    FeatureSet::from_bits(&[
        feature::VERSION_1,
        feature::RING_EVENT_IDX,
        feature::RING_INDIRECT_DESC,
    ])
}

fn directly(mapping: &Arc<Mapping>, load: Load) -> f64 {
    let guest = table(mapping.clone(), GUEST);
    let mut driver = driver(mapping, features());
    let (kick, call) = (eventfd(), eventfd());
    let stop = AtomicBool::new(false);
    let config = driver.config();
    let ring = Doorbell::from_fd(kick.try_clone().expect("dup")).expect("an eventfd");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            serve(
                &guest,
                config,
                features(),
                &kick,
                &call,
                load.written as usize,
                &stop,
            )
        });
        let kick = || {
            let _ = ring.ring();
        };
        let rate = drive(&mut driver, load, &kick, &*call);
        stop.store(true, Ordering::Relaxed);
        kick();
        rate
    })
}

/// `given`: it lies in memory that both have from the start, and is not lent.
fn through_a_segment(mapping: &Arc<Mapping>, load: Load, given: Option<&Arc<Common>>) -> f64 {
    let guest = Arc::new(Ram(table(mapping.clone(), GUEST)));
    let facts = DeviceFacts {
        number: DevNum(1),
        info: DeviceInfo::ABSENT,
        offered: features(),
        queue_sizes: vec![SIZE; 3],
    };
    let segment = given.map_or_else(Segment::default, |common| {
        let parts = common.divide(0..common.len(), &[None]);
        Segment::Given(parts.expect("room").remove(0))
    });
    let name = "shadow".to_owned();
    let shadow = Shadow::new(guest, &facts, Options { name, segment }).expect("a segment");
    let towards = shadow.set_features(features());
    let mut driver = driver(mapping, features());
    let config = driver.config();
    let setup = QueueSetup {
        size: SIZE,
        descriptor: config.desc.0,
        driver: config.driver.0,
        device: config.device.0,
        resume: ResumeAt::Start,
    };
    let queue = QueueIndex(0);
    let started = shadow.start_queue(queue, setup).expect("a queue");
    let bell = eventfd();
    shadow.set_interrupt(queue, Interrupt::Eventfd(bell.clone()));
    let window = shadow.window();
    let segment = Mapping::of_fd(
        window.fd.as_fd(),
        window.file_offset,
        window.len,
        Access::ReadWrite,
    );
    let segment = table(Arc::new(segment.expect("mapped")), window.base);
    let config = QueueConfig {
        size: SIZE,
        desc: BusAddr(started.setup.descriptor),
        driver: BusAddr(started.setup.driver),
        device: BusAddr(started.setup.device),
    };
    let stop = AtomicBool::new(false);
    let ring = Doorbell::from_fd(started.kick.try_clone().expect("dup")).expect("an eventfd");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            serve(
                &segment,
                config,
                towards,
                &started.kick,
                &started.call,
                load.written as usize,
                &stop,
            );
        });
        shadow.run();
        let rate = drive(&mut driver, load, &|| shadow.kick(queue), &*bell);
        stop.store(true, Ordering::Relaxed);
        let _ = ring.ring();
        rate
    })
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let (mapping, _file) = Mapping::memfd("guest", RAM, true).expect("memory");
    let mapping = Arc::new(mapping);
    mapping.ram().fill(0x55);
    let (common, file) = Mapping::memfd("common", COMMON, true).expect("memory");
    let common = Common::new(Arc::new(common), Arc::new(file), 0, 1 << 30).expect("memory");
    let common = Arc::new(common);
    let load = |name, readable, writable, depth| Load {
        name,
        readable,
        writable,
        written: writable,
        depth,
    };
    let loads = [
        load("64 B there and back, one by one", 64, 64, 1),
        load("64 B there, 64 at a time", 64, 0, 64),
        load("1500 B there, 64 at a time", 1500, 0, 64),
        load("1500 B back, 64 at a time", 0, 1500, 64),
        Load {
            written: 1500,
            ..load("1500 B back, room for 64 KiB, 64 at a time", 0, 65536, 64)
        },
        load("4 KiB there and back, 32 at a time", 4096, 4096, 32),
        load("64 KiB there, 16 at a time", 65536, 0, 16),
        load("64 KiB back, 16 at a time", 0, 65536, 16),
    ];
    println!(
        "{:44} {:>10} {:>11} {:>10} {:>7} {:>7} {:>7}",
        "", "direct/s", "segment/s", "given/s", "ratio", "given", "GB/s"
    );
    for load in loads {
        let (mut direct, mut segment, mut given) = (Vec::new(), Vec::new(), Vec::new());
        let (mut ratio, mut ratio_given) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            // The one, the others, the one again: what the machine does meanwhile shows in all.
            let before = directly(&mapping, load);
            let through = through_a_segment(&mapping, load, None);
            let through_given = through_a_segment(&mapping, load, Some(&common));
            let after = directly(&mapping, load);
            let mean = (before + after) / 2.0;
            direct.push(mean);
            segment.push(through);
            given.push(through_given);
            ratio.push(through / mean);
            ratio_given.push(through_given / mean);
        }
        let [direct, segment, given, ratio, ratio_given] =
            [direct, segment, given, ratio, ratio_given].map(median);
        let bytes = f64::from(load.readable + load.written) / 1e9;
        println!(
            "{:44} {direct:>10.0} {segment:>11.0} {given:>10.0} {ratio:>7.2} {ratio_given:>7.2} {:>7.2}",
            load.name,
            given * bytes
        );
    }
}
