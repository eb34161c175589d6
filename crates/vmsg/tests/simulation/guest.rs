// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest: memory, queues, and the steps in which a front sets its device up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex};
use vmsg_device::device::transport_features;
use vmsg_mem::{BusAddr, Doorbell, Mapping, RamSlice};
use vmsg_proxy::places::{Found, Place, PlaceError, Places};
use vmsg_proxy::session::{CommonMemory, FileId, InflightMemory, Op, QueueSetup, ResumeAt, Window};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures, Token};

use crate::echo::{QUEUE_SIZE, QUEUES};
use crate::line::Bus;
use crate::wire::{FRAME, HEADER, NUMBER};

pub(crate) const BASE: u64 = 0x4000_0000;
const QUEUE_BYTES: usize = 4096;
/// Where the buffers begin. Of a request 16 bytes are to be read and 16 to be written; a frame has all to itself.
const BUFFERS: usize = QUEUES * QUEUE_BYTES;
const SLOT: usize = 128;
/// Of a network device.
const RECEIVE: usize = 0;
/// Where the IOMMU shows buffers, each in a page of its own.
const SHOWN: u64 = 0x10_0000_0000;
/// What is in a buffer that no device can reach.
const POISON: u8 = 0xa5;
const BYTES: usize = BUFFERS + QUEUES * QUEUE_SIZE as usize * SLOT;

/// Bytes of a page of the guest's memory.
const PAGE: usize = 4096;
/// Pages of the memory that a bus has in common; more than the guest has.
const COMMON_PAGES: usize = 7;

/// Where in the common memory the guest's page with this number is: no two are neighbours.
fn scattered(page: usize) -> usize {
    (page * 3 + 1) % COMMON_PAGES
}

/// The guest's memory; queues borrow from it.
pub(crate) struct Memory {
    mapping: Arc<Mapping>,
    fd: Arc<OwnedFd>,
    /// Its pages are anywhere in the mapping.
    scattered: bool,
}

impl Memory {
    /// For a guest on such a bus.
    pub(crate) fn of(bus: Bus) -> Self {
        let scattered = bus == Bus::Common;
        let pages = if scattered {
            COMMON_PAGES
        } else {
            BYTES.div_ceil(PAGE)
        };
        let (mapping, fd) = Mapping::memfd("guest", (pages * PAGE) as u64, true).expect("memfd");
        Self {
            mapping: Arc::new(mapping),
            fd: Arc::new(fd),
            scattered,
        }
    }

    /// All of it, and what else is in common.
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A part of a page.
    fn part(&self, at: usize, len: usize) -> RamSlice<'_> {
        let page = if self.scattered {
            scattered(at / PAGE)
        } else {
            at / PAGE
        };
        let part = self.mapping.ram().get(page * PAGE + at % PAGE, len);
        part.filter(|_| at % PAGE + len <= PAGE)
            .expect("within a page")
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        self.part(at, into.len()).read(0, into);
    }

    fn write(&self, at: usize, from: &[u8]) {
        self.part(at, from.len()).write(0, from);
    }

    /// The file under a name.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// What a bus has in common whose memory this is.
    pub(crate) fn common(&self) -> CommonMemory {
        let window = self.window();
        CommonMemory {
            base: window.base,
            len: window.len,
            file_offset: 0,
            file: window.file,
            path: self.path().into(),
        }
    }

    /// Bytes of it that the guest's IOMMU shows at another address.
    fn view(&self, base: u64, at: usize, len: usize) -> Window {
        Window {
            base,
            len: len as u64,
            file_offset: at as u64,
            ..self.window()
        }
    }

    fn window(&self) -> Window {
        Window {
            base: BASE,
            len: (BYTES.div_ceil(PAGE) * PAGE) as u64,
            file_offset: 0,
            writable: true,
            fd: Arc::clone(&self.fd),
            file: FileId {
                device: 1,
                inode: 1,
            },
        }
    }
}

/// Finds the guest's pages.
#[derive(Debug)]
pub(crate) struct Scattered;

impl Places for Scattered {
    fn places(
        &self,
        _: BorrowedFd<'_>,
        _: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        let page = PAGE as u64;
        let mut places = Vec::new();
        let mut at = file_offset;
        while at < file_offset + len {
            let number = usize::try_from(at / page).expect("small");
            let place = Place {
                offset_in_common: scattered(number) as u64 * page + at % page,
                len: (page - at % page).min(file_offset + len - at),
            };
            at += place.len;
            places.push(place);
        }
        Ok(Found { places, hold: None })
    }
}

/// Where a buffer is in the memory.
fn place(queue: usize, slot: usize) -> usize {
    BUFFERS + (queue * usize::from(QUEUE_SIZE) + slot) * SLOT
}

/// Where the IOMMU shows it.
fn address(queue: usize, slot: usize) -> u64 {
    let at = place(queue, slot);
    let page = (at - BUFFERS) / SLOT;
    SHOWN + page as u64 * 4096 + (at % 4096) as u64
}

struct Queue<'m> {
    ring: DriverQueue<'m, Vec<DriverSlot>>,
    outstanding: HashMap<Token, u64>,
    free: Vec<usize>,
    slots: HashMap<Token, usize>,
    /// The request that came back last.
    last: u64,
    /// Buffers that are shown to the device.
    shown: BTreeSet<usize>,
    /// Buffers that were, and are not any more.
    hidden: BTreeSet<usize>,
    /// Buffers hidden, or on the way to it, although their requests were not back; true: by now they are.
    early: BTreeMap<usize, bool>,
}

/// What the guest's kernel and the front in front of it do together.
pub(crate) struct Guest<'m> {
    memory: &'m Memory,
    queues: Vec<Queue<'m>>,
    sequence: u64,
    /// Requests that came back, with the right contents.
    pub(crate) completed: u64,
    /// Steps of set-up that are still to be done, the next one last.
    pub(crate) steps: Vec<Op>,
    /// Kicks and interrupts go through eventfds.
    pub(crate) eventfds: Option<Eventfds>,
    habits: Habits,
    /// Buffers of requests that came back, to be hidden from the device: queue and place.
    pub(crate) back: Vec<(usize, usize)>,
    /// Where what is in flight is kept, if it is kept here.
    inflight: Option<InflightMemory>,
    /// It puts its queues into memory when the device is reset.
    fresh: bool,
}

/// How a guest and its front end do things.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Habits {
    /// Kicks and interrupts go through eventfds.
    pub(crate) eventfds: bool,
    /// The front end keeps what is in flight.
    pub(crate) keeps_inflight: bool,
    /// Requests have to come back in the order in which they were asked.
    pub(crate) in_order: bool,
    /// Queue 0 is for frames that come, queue 1 for frames that go.
    pub(crate) frames: bool,
    /// Each buffer is shown to the device for its request only.
    pub(crate) iommu: bool,
}

/// The eventfds of each queue.
pub(crate) struct Eventfds {
    kicks: Vec<Doorbell>,
    calls: Vec<Doorbell>,
}

impl<'m> Guest<'m> {
    pub(crate) fn new(memory: &'m Memory, habits: Habits) -> Self {
        let doorbells = || {
            (0..QUEUES)
                .map(|_| Doorbell::new().expect("eventfd"))
                .collect()
        };
        let eventfds = habits.eventfds.then(|| Eventfds {
            kicks: doorbells(),
            calls: doorbells(),
        });
        let mut guest = Self {
            memory,
            queues: Vec::new(),
            sequence: 0,
            completed: 0,
            steps: Vec::new(),
            eventfds,
            habits,
            back: Vec::new(),
            inflight: None,
            fresh: false,
        };
        guest.boot();
        guest
    }

    /// Starts over: new queues, nothing outstanding, all steps to be done.
    pub(crate) fn boot(&mut self) {
        self.make_queues();
        self.back.clear();
        self.inflight = self.habits.keeps_inflight.then(|| {
            let queues = u16::try_from(QUEUES).expect("few queues");
            InflightMemory::new(queues, QUEUE_SIZE).expect("memory")
        });
        self.fresh = false;
        self.set_up_again();
    }

    /// Starts over where nobody has said that the memory is free: whatever device host there is may write until the device was claimed and reset, so
    /// the queues are made after that.
    pub(crate) fn boot_later(&mut self) {
        self.boot();
        self.fresh = true;
    }

    /// The device is reset, for the driver that has claimed it.
    pub(crate) fn device_is_reset(&mut self) {
        if std::mem::take(&mut self.fresh) {
            self.make_queues();
        }
    }

    fn make_queues(&mut self) {
        self.memory.mapping.ram().fill(0);
        let layout = Layout::new(QUEUE_SIZE, 0).expect("a size");
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        self.queues = (0..QUEUES)
            .map(|index| {
                let at = index * QUEUE_BYTES;
                let ram = self.memory.part(at, layout.total_len());
                let base = BusAddr(BASE + at as u64);
                let slots = vec![DriverSlot::default(); QUEUE_SIZE.into()];
                Queue {
                    ring: DriverQueue::new(layout, features, ram, base, slots).expect("a queue"),
                    outstanding: HashMap::new(),
                    free: (0..usize::from(QUEUE_SIZE) / 2).collect(),
                    slots: HashMap::new(),
                    last: 0,
                    shown: BTreeSet::new(),
                    hidden: BTreeSet::new(),
                    early: BTreeMap::new(),
                }
            })
            .collect();
    }

    /// All steps are to be done, with the queues as they are: the front end has lost its back end.
    pub(crate) fn set_up_again(&mut self) {
        self.steps = self.script();
        self.steps.reverse();
    }

    /// Where the front end of a vhost-user socket says that a queue goes on.
    pub(crate) fn resume(&self, queue: usize) -> ResumeAt {
        let config = self.queues[queue].ring.config();
        let at = usize::try_from(config.device.0 - BASE).expect("small") + 2;
        let mut used = [0; 2];
        self.memory.read(at, &mut used);
        match u16::from_le_bytes(used) {
            0 => ResumeAt::Start,
            _ => ResumeAt::UsedIndex,
        }
    }

    fn script(&self) -> Vec<Op> {
        let features: FeatureSet = transport_features();
        let status = |bits: DeviceStatus| Op::SetStatus(bits);
        let mut steps = vec![
            Op::Describe,
            Op::Claim,
            self.windows(),
            status(DeviceStatus::RESET),
            status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
            Op::SetFeatures(features),
            status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK),
        ];
        if self.inflight.is_some() {
            steps.push(Op::KeepInflight(self.inflight.clone()));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let number = QueueIndex(u32::try_from(index).expect("few queues"));
            if let Some(Eventfds { kicks, calls }) = &self.eventfds {
                let fd = |bell: &Doorbell| {
                    Some(Arc::new(bell.as_fd().try_clone_to_owned().expect("dup")))
                };
                steps.push(Op::SetNotify {
                    queue: number,
                    kick: fd(&kicks[index]),
                    call: fd(&calls[index]),
                });
            }
            let config = queue.ring.config();
            steps.push(Op::SetQueue(
                number,
                QueueSetup {
                    size: config.size,
                    descriptor: config.desc.0,
                    driver: config.driver.0,
                    device: config.device.0,
                    resume: ResumeAt::Start,
                },
            ));
        }
        steps.push(status(
            DeviceStatus::ACKNOWLEDGE
                | DeviceStatus::DRIVER
                | DeviceStatus::FEATURES_OK
                | DeviceStatus::DRIVER_OK,
        ));
        steps
    }

    /// All memory, or what the IOMMU shows of it.
    fn windows(&self) -> Op {
        if !self.habits.iommu {
            return Op::SetWindows(vec![self.memory.window()]);
        }
        let rings = (0..QUEUES).map(|queue| queue * QUEUE_BYTES);
        let rings = rings.map(|at| self.memory.view(BASE + at as u64, at, QUEUE_BYTES));
        let shown = self.queues.iter().enumerate().flat_map(|(index, queue)| {
            let slots = queue.shown.iter();
            slots.map(move |slot| self.shown(index, *slot))
        });
        Op::ChangeWindows {
            remove: Vec::new(),
            add: rings.chain(shown).collect(),
        }
    }

    /// The window in which the device finds a buffer.
    pub(crate) fn shown(&self, queue: usize, slot: usize) -> Window {
        let at = place(queue, slot);
        self.memory.view(address(queue, slot), at, SLOT)
    }

    /// The room for another request, if there is any; for a device to which it has to be shown first.
    pub(crate) fn take_room(&mut self, queue: usize) -> Option<usize> {
        let slot = self.queues[queue].free.pop()?;
        self.check_hidden(queue, slot);
        self.queues[queue].hidden.remove(&slot);
        Some(slot)
    }

    /// It will not be used.
    pub(crate) fn give_back(&mut self, queue: usize, slot: usize) {
        self.queues[queue].free.push(slot);
    }

    /// No device can reach a buffer any more: from now on nobody else writes there.
    pub(crate) fn is_hidden(&mut self, queue: usize, slot: usize) {
        self.memory.write(place(queue, slot), &[POISON; SLOT]);
        let queue = &mut self.queues[queue];
        assert!(queue.shown.remove(&slot), "hidden once");
        queue.hidden.insert(slot);
        // The device may still give it back.
        if queue.early.get(&slot) != Some(&false) {
            queue.early.remove(&slot);
            queue.free.push(slot);
        }
    }

    /// No device will be shown a buffer again that one may still write to.
    pub(crate) fn lose(&mut self, queue: usize, slot: usize) {
        self.queues[queue].shown.remove(&slot);
    }

    /// A buffer that the device has is hidden: the guest gives its request up.
    pub(crate) fn give_up(&mut self, queue: usize, slot: usize) {
        self.queues[queue].early.insert(slot, false);
    }

    fn check_hidden(&self, queue: usize, slot: usize) {
        if self.queues[queue].hidden.contains(&slot) {
            let mut bytes = [0; SLOT];
            self.memory.read(place(queue, slot), &mut bytes);
            assert_eq!(bytes, [POISON; SLOT], "written although it was hidden");
        }
    }

    /// What was hidden is as it was.
    pub(crate) fn check_all_hidden(&self) {
        for (index, queue) in self.queues.iter().enumerate() {
            for &slot in &queue.hidden {
                self.check_hidden(index, slot);
            }
        }
    }

    pub(crate) fn is_set_up(&self) -> bool {
        self.steps.is_empty()
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.queues
            .iter()
            .enumerate()
            // Buffers for frames that may come are always out.
            .filter(|(index, _)| !(self.habits.frames && *index == RECEIVE))
            .map(|(_, queue)| queue.outstanding.len())
            .sum()
    }

    /// Puts a request into a queue, if there is room; true if the device must be kicked.
    pub(crate) fn submit(&mut self, index: usize) -> bool {
        match self.queues[index].free.pop() {
            Some(slot) => self.submit_at(index, slot),
            None => false,
        }
    }

    /// The same with a buffer that the device can reach by now.
    pub(crate) fn submit_shown(&mut self, index: usize, slot: usize) -> bool {
        self.queues[index].shown.insert(slot);
        self.submit_at(index, slot)
    }

    fn submit_at(&mut self, index: usize, slot: usize) -> bool {
        let queue = &mut self.queues[index];
        let at = place(index, slot);
        self.sequence += 1;
        let number = if self.habits.frames {
            HEADER + NUMBER
        } else {
            0
        };
        let ram = self.memory;
        ram.write(at, &[0; SLOT]);
        ram.write(at + number, &self.sequence.to_le_bytes());
        let base = if self.habits.iommu {
            address(index, slot)
        } else {
            BASE + at as u64
        };
        let address = |offset: usize| BusAddr(base + offset as u64);
        let whole = [(address(0), u32::try_from(HEADER + FRAME).expect("short"))];
        let added = match (self.habits.frames, index) {
            (false, _) => queue.ring.add(&[(address(0), 16)], &[(address(16), 16)]),
            (true, RECEIVE) => queue.ring.add(&[], &whole),
            (true, _) => queue.ring.add(&whole, &[]),
        };
        let token = added.expect("half of the descriptors are kept free");
        queue.outstanding.insert(token, self.sequence);
        queue.slots.insert(token, slot);
        queue.ring.publish().expect("a sound queue")
    }

    /// The eventfds that were rung: the guest looks at those queues only.
    pub(crate) fn take_interrupts(&mut self) {
        for queue in 0..QUEUES {
            let rung = self
                .eventfds
                .as_ref()
                .is_some_and(|eventfds| eventfds.calls[queue].drain().is_ok_and(|rings| rings > 0));
            if rung {
                self.collect(queue);
            }
        }
    }

    /// Takes what came back in a queue; panics if it is not what was asked for.
    pub(crate) fn collect(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        loop {
            while let Some(used) = queue
                .ring
                .pop_used()
                .expect("the device keeps to the rules")
            {
                let sequence = queue
                    .outstanding
                    .remove(&used.token)
                    .expect("asked for once");
                let slot = queue.slots.remove(&used.token).expect("as above");
                let at = place(index, slot);
                if let Some(back) = queue.early.get_mut(&slot) {
                    *back = true;
                    if queue.hidden.contains(&slot) {
                        queue.early.remove(&slot);
                        queue.free.push(slot);
                    }
                    continue;
                }
                let ram = self.memory;
                let mut bytes = [0; 8];
                let number = match (self.habits.frames, index) {
                    (false, _) => {
                        ram.read(at + 16, &mut bytes);
                        assert_eq!(used.written, 16);
                        assert_eq!(
                            bytes,
                            (!sequence).to_le_bytes(),
                            "the answer to another request"
                        );
                        sequence
                    }
                    (true, RECEIVE) => {
                        ram.read(at + HEADER + NUMBER, &mut bytes);
                        assert_eq!(used.written as usize, HEADER + FRAME);
                        u64::from_le_bytes(bytes)
                    }
                    (true, _) => sequence,
                };
                assert!(
                    !self.habits.in_order || number > queue.last,
                    "{number} comes back after {}",
                    queue.last
                );
                queue.last = number;
                if self.habits.iommu {
                    self.back.push((index, slot));
                } else {
                    queue.free.push(slot);
                }
                self.completed += 1;
            }
            if !queue.ring.enable_notifications().expect("a sound queue") {
                return;
            }
        }
    }
}
