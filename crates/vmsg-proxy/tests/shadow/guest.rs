// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest: its memory, mapped or behind messages that may not be answered, and its driver.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use virtio_msg::{DevNum, DeviceInfo, FeatureSet, QueueIndex, feature};
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, RamSlice, TableEntry, WindowTable};
use vmsg_proxy::memory::{GuestMemory, MemoryError};
use vmsg_proxy::session::{DeviceFacts, QueueSetup, ResumeAt};
use vmsg_proxy::shadow::{Event, Interrupt, Options, Segment, Shadow, Started};
use vmsg_queue::remote::Memory;
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueConfig, QueueFeatures, Used};

/// Where the guest's memory begins.
pub(crate) const GUEST: u64 = 0x1_4000_0000;
/// Nothing takes so long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Indirect tables have so many entries.
pub(crate) const TABLE: u16 = 16;

#[derive(Debug, Default)]
struct Gate {
    closed: bool,
    /// Accesses that wait.
    waiting: usize,
    /// Times that those who wait were sent away.
    cancelled: u64,
}

/// The memory of a guest. With `far` it is as one behind messages.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) mapping: Arc<Mapping>,
    table: WindowTable,
    far: bool,
    gate: Mutex<Gate>,
    changed: Condvar,
    is_gated: AtomicBool,
    pub(crate) accesses: AtomicU64,
}

impl Ram {
    pub(crate) fn new(len: u64, far: bool) -> Arc<Ram> {
        let (mapping, _) = Mapping::memfd("guest", len, true).unwrap();
        let mapping = Arc::new(mapping);
        let entry = TableEntry {
            base: BusAddr(GUEST),
            mapping: mapping.clone(),
            offset: 0,
            len: len as usize,
            access: Access::ReadWrite,
        };
        Arc::new(Ram {
            mapping,
            table: WindowTable::new(vec![entry]).unwrap(),
            far,
            gate: Mutex::default(),
            changed: Condvar::new(),
            is_gated: AtomicBool::new(false),
            accesses: AtomicU64::new(0),
        })
    }

    pub(crate) fn ram(&self) -> RamSlice<'_> {
        self.mapping.ram()
    }

    /// From now on accesses wait, until it is opened again.
    pub(crate) fn close(&self) {
        self.gate.lock().unwrap().closed = true;
        self.is_gated.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.is_gated.store(false, Ordering::SeqCst);
        self.gate.lock().unwrap().closed = false;
        self.changed.notify_all();
    }

    /// Waits until somebody waits.
    pub(crate) fn until_stuck(&self) {
        let mut gate = self.gate.lock().unwrap();
        while gate.waiting == 0 {
            gate = self.changed.wait(gate).unwrap();
        }
    }

    pub(crate) fn cancelled(&self) -> u64 {
        self.gate.lock().unwrap().cancelled
    }

    fn pass(&self) -> Result<(), MemoryError> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        if !self.is_gated.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut gate = self.gate.lock().unwrap();
        let before = gate.cancelled;
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.closed && gate.cancelled == before {
            gate = self.changed.wait(gate).unwrap();
        }
        gate.waiting -= 1;
        if gate.cancelled == before {
            Ok(())
        } else {
            Err(MemoryError::Cancelled)
        }
    }
}

impl Memory for Ram {
    type Error = MemoryError;

    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.pass()?;
        Ok(self.table.space().read(addr, into)?)
    }
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), MemoryError> {
        self.pass()?;
        Ok(self.table.space().write(addr, from)?)
    }
    fn load_u16(&self, addr: BusAddr) -> Result<u16, MemoryError> {
        self.pass()?;
        Ok(self.table.space().load_u16(addr)?)
    }
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), MemoryError> {
        self.pass()?;
        Ok(self.table.space().store_u16(addr, value)?)
    }
    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), MemoryError> {
        self.pass()?;
        if self.far {
            // As messages would bring it.
            let mut bytes = vec![0; to.len()];
            self.table.space().read(addr, &mut bytes)?;
            to.write(0, &bytes);
            return Ok(());
        }
        Ok(self.table.space().read_into(addr, to)?)
    }
    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), MemoryError> {
        self.pass()?;
        Ok(self.table.space().write_from(addr, from)?)
    }
    fn read_ahead(&self) -> usize {
        if self.far { 65536 } else { 256 }
    }
}

impl GuestMemory for Ram {
    fn cancel(&self) {
        let mut gate = self.gate.lock().unwrap();
        if gate.waiting > 0 {
            gate.cancelled += 1;
            self.changed.notify_all();
        }
    }
}

pub(crate) fn features(event_idx: bool, indirect: bool) -> FeatureSet {
    let mut set = FeatureSet::from_bits(&[feature::VERSION_1]);
    set.set(feature::RING_EVENT_IDX, event_idx);
    set.set(feature::RING_INDIRECT_DESC, indirect);
    set
}

pub(crate) fn of_queue(set: &FeatureSet) -> QueueFeatures {
    QueueFeatures::from_bits(set.low_u64())
}

pub(crate) fn facts(offered: FeatureSet, sizes: &[u16]) -> DeviceFacts {
    DeviceFacts {
        number: DevNum(1),
        info: DeviceInfo::ABSENT,
        offered,
        queue_sizes: sizes.to_vec(),
    }
}

pub(crate) fn shadow(ram: &Arc<Ram>, offered: FeatureSet, sizes: &[u16], segment: u64) -> Shadow {
    let options = Options {
        segment: Segment::sealed(segment),
        ..Options::default()
    };
    Shadow::new(ram.clone(), &facts(offered, sizes), options).unwrap()
}

pub(crate) fn setup(config: QueueConfig) -> QueueSetup {
    QueueSetup {
        size: config.size,
        descriptor: config.desc.0,
        driver: config.driver.0,
        device: config.device.0,
        resume: ResumeAt::Start,
    }
}

/// A queue of the guest's driver.
pub(crate) struct Queue<'m> {
    pub(crate) index: QueueIndex,
    pub(crate) driver: DriverQueue<'m, Vec<DriverSlot>>,
    /// Rung for the driver, which sleeps on it.
    pub(crate) bell: Arc<OwnedFd>,
    pub(crate) started: Started,
}

impl<'m> Queue<'m> {
    /// Its rings begin at `at` of the guest's memory.
    pub(crate) fn start(
        shadow: &Shadow,
        ram: &'m Ram,
        index: u32,
        size: u16,
        at: usize,
        features: QueueFeatures,
    ) -> Queue<'m> {
        let index = QueueIndex(index);
        let layout = Layout::new(size, TABLE).unwrap();
        let part = ram.ram().get(at, layout.total_len()).unwrap();
        let slots = vec![DriverSlot::default(); size.into()];
        let base = BusAddr(GUEST + at as u64);
        let driver = DriverQueue::new(layout, features, part, base, slots).unwrap();
        let bell: Arc<OwnedFd> = Arc::new(Doorbell::new().unwrap().into());
        let started = shadow.start_queue(index, setup(driver.config())).unwrap();
        shadow.set_interrupt(index, Interrupt::Eventfd(bell.clone()));
        Queue {
            index,
            driver,
            bell,
            started,
        }
    }

    /// Shows the device what was added.
    pub(crate) fn publish(&mut self, shadow: &Shadow) {
        if self.driver.publish().unwrap() {
            shadow.kick(self.index);
        }
    }

    /// Sleeps until a chain comes back.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Used {
        self.next_within(PATIENCE).expect("the request comes back")
    }

    pub(crate) fn next_within(&mut self, time: Duration) -> Option<Used> {
        let end = Instant::now() + time;
        loop {
            if let Some(used) = self.driver.pop_used().unwrap() {
                return Some(used);
            }
            if self.driver.enable_notifications().unwrap() {
                continue;
            }
            if !wait(&*self.bell, end) {
                return None;
            }
        }
    }
}

/// Waits for an eventfd that only this end reads, and reads it. False when the time is over.
pub(crate) fn wait(bell: &impl AsFd, end: Instant) -> bool {
    let left = end.saturating_duration_since(Instant::now());
    let time = Timespec::try_from(left).unwrap();
    let mut fds = [PollFd::new(bell, PollFlags::IN)];
    if poll(&mut fds, Some(&time)).unwrap() == 0 {
        return false;
    }
    let _ = rustix::io::read(bell, &mut [0; 8]);
    true
}

/// Waits for the shadow queues to stand still.
#[track_caller]
pub(crate) fn broken(shadow: &Shadow) -> vmsg_proxy::shadow::Broken {
    let end = Instant::now() + PATIENCE;
    loop {
        shadow.clear();
        if let Some(Event::NeedsReset(why)) = shadow.poll_event() {
            return why;
        }
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "they do not stand still");
        let time = Timespec::try_from(left).unwrap();
        let fd = shadow.event_fd();
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)).unwrap();
    }
}

/// Bytes of the guest's memory.
pub(crate) fn read(ram: RamSlice<'_>, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(ram.read(at, &mut bytes), len);
    bytes
}

/// A stream of numbers that is the same each time.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
