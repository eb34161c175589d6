// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device as VFIO describes it: regions, interrupts and memory, over the PCI function.

use super::behind::Behind;
use super::calls::Rung;
use super::server::Ready;
use crate::link::{Deadline, SessionHandle};
use crate::log_limit::LogLimit;
use crate::memory::{MapError, Range};
use crate::session::{Event, OpError};
use crate::shadow;
use crate::transport::pci::{Function, Irq, NOTIFICATIONS, Region as Part, Route};
use crate::transport::{Options, SharedMemory};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmsg_vfio_user::{
    Device, DeviceInfo, DmaMap, DmaUnmap, Errno, IrqAction, IrqData, IrqInfo, MapArea, Region,
    RegionMap, SetIrqs,
};

/// How long one message of the client may take, with those before it that it had to wait for. QEMU gives up after 5 s.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is done as fast as this does not count: there may be any number of such messages behind each other.
const AT_ONCE: Duration = Duration::from_millis(50);

/// Regions of a PCI device in `<linux/vfio.h>`: BARs, then ROM, configuration space, VGA.
const BARS: u32 = 6;
const CONFIG: u32 = 7;
const REGIONS: u32 = 9;

/// Kinds of interrupt of a PCI device in `<linux/vfio.h>`.
const INTX: u32 = 0;
const MSIX: u32 = 2;
const ERR: u32 = 3;
const REQ: u32 = 4;
const IRQS: u32 = 5;

/// A function being served to a client.
pub(super) struct Served {
    name: String,
    function: Function<Behind>,
    deadline: Deadline,
    /// When the message under way was begun.
    begun: Option<Instant>,
    /// What messages have taken since there was none that waited.
    spent: Duration,
    limit: Arc<LogLimit>,
    /// Requests that could not be done.
    pub(super) refused: u64,
}

impl Served {
    pub(super) fn new(
        name: &str,
        behind: Behind,
        deadline: Deadline,
        shared: Vec<SharedMemory>,
        limit: Arc<LogLimit>,
    ) -> Served {
        let mut function = Function::new(behind, Options::default(), shared);
        function.log_with(limit.clone());
        Served {
            name: name.to_owned(),
            function,
            deadline,
            begun: None,
            spent: Duration::ZERO,
            limit,
            refused: 0,
        }
    }

    pub(super) fn behind(&self) -> &Behind {
        self.function.backend()
    }

    /// What happens from now on is to end in time. Whoever has sent many messages without waiting for an answer waits for all of them with the next one.
    fn begin(&mut self) {
        self.count_time();
        let now = Instant::now();
        self.begun = Some(now);
        self.deadline
            .set(Some(now + PATIENCE.saturating_sub(self.spent)));
    }

    fn count_time(&mut self) {
        let took = self.begun.take().map(|begun| begun.elapsed());
        self.spent += took.filter(|took| *took > AT_ONCE).unwrap_or_default();
    }

    /// Whether messages have taken so long that those which wait behind them have less time. Asked when all that were read are done.
    pub(super) fn is_late(&mut self) -> bool {
        self.count_time();
        self.spent > Duration::ZERO
    }

    /// No message waits.
    pub(super) fn rested(&mut self) {
        self.spent = Duration::ZERO;
    }

    /// The device cannot be trusted any more until it is reset.
    pub(super) fn broken(&mut self) {
        self.function.needs_reset();
    }

    /// Passes news of the device on.
    fn news(&mut self, event: &Event) {
        match event {
            Event::ConfigChanged => self.function.config_changed(),
            Event::QueueUsed(queue) => self.function.queue_used(*queue),
            Event::NeedsReset(reason) => {
                self.function.backend_mut().tell_remedy_of(reason);
                self.function.needs_reset();
            }
            _ => {}
        }
    }

    /// Passes on what there is.
    pub(super) fn pass_on(&mut self, session: &SessionHandle, ready: Ready) -> io::Result<()> {
        self.begin();
        if ready.news {
            session.clear();
            // Those that are there now: a device host can make new ones faster than they are passed on.
            for event in session.take_events() {
                self.news(&event);
            }
        }
        if ready.calls {
            self.take_calls()?;
        }
        self.settle();
        Ok(())
    }

    /// Passes on what rang without going to the client itself.
    fn take_calls(&mut self) -> io::Result<()> {
        let mut used = Vec::new();
        let mut unmask = false;
        let result = self.function.backend().take_calls(|rung| match rung {
            Rung::Queue(queue) => used.push(queue),
            Rung::Unmask => unmask = true,
        });
        if unmask {
            self.function.unmask(Irq::Intx);
        }
        for event in self.function.backend().take_news() {
            match event {
                shadow::Event::QueueUsed(queue) => used.push(queue),
                shadow::Event::NeedsReset(broken) => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::error!(front = self.name, why = %broken, unsaid, "the device needs a reset");
                    }
                    self.function.needs_reset();
                }
            }
        }
        for queue in used {
            self.function.queue_used(queue);
        }
        result
    }

    /// Lets the device ring where the driver waits, now that something has happened.
    fn settle(&mut self) {
        for (queue, route) in self.function.take_route_changes() {
            let result = self.function.backend_mut().set_route(queue, route.clone());
            if let Err(error) = result {
                self.trouble("telling the device whom to interrupt", &error);
                self.function.needs_reset();
            }
            // What the device told the one before may have been lost on the way.
            match route {
                Route::Direct(_) if self.function.core().is_live(queue) => {
                    self.function.backend().ring_route(queue);
                }
                // Before the driver is ready it must not be interrupted.
                Route::Direct(_) => {}
                Route::Through => self.function.queue_used(queue),
                Route::Nobody => {}
            }
        }
    }

    fn trouble(&mut self, what: &'static str, error: &OpError) {
        self.function.backend_mut().tell_remedy(error);
        if let Some(unsaid) = self.limit.admit() {
            tracing::warn!(front = self.name, what, %error, unsaid, "the device needs a reset");
        }
    }

    /// Refuses something, and says so.
    fn refuse(&mut self, what: &'static str, why: &dyn std::fmt::Display, errno: Errno) -> Errno {
        self.refused += 1;
        if let Some(unsaid) = self.limit.admit() {
            tracing::warn!(front = self.name, what, %why, unsaid, "refused");
        }
        errno
    }

    fn set_triggers(&mut self, set: SetIrqs) -> Result<(), Errno> {
        let files: Vec<(u32, Option<OwnedFd>)> = match set.data {
            IrqData::Eventfds(fds) => (set.start..).zip(fds).collect(),
            // Takes all away.
            IrqData::None if set.count == 0 => {
                let count = self.irq(set.index).count;
                (0..count).map(|index| (index, None)).collect()
            }
            // Ring them by hand.
            IrqData::None => {
                for index in set.start..set.start.saturating_add(set.count) {
                    if let Some(irq) = irq(set.index, index) {
                        self.function.trigger(irq);
                    }
                }
                return Ok(());
            }
            IrqData::Bools(bools) => {
                for (index, on) in (set.start..).zip(bools) {
                    if let Some(irq) = irq(set.index, index).filter(|_| on) {
                        self.function.trigger(irq);
                    }
                }
                return Ok(());
            }
        };
        for (index, file) in files {
            let Some(irq) = irq(set.index, index) else {
                return Err(Errno::INVAL);
            };
            if let Err(error) = self.function.set_trigger(irq, file.map(Arc::new)) {
                return Err(self.refuse("an eventfd for an interrupt", &error, Errno::INVAL));
            }
        }
        Ok(())
    }

    fn set_masks(&mut self, set: SetIrqs, masked: bool) -> Result<(), Errno> {
        let set = match set.data {
            // KVM tells the end of an interrupt past its VMM.
            IrqData::Eventfds(mut fds) if set.index == INTX && !masked => {
                let fd = fds.pop().flatten();
                return match self.function.backend_mut().set_unmask(fd) {
                    Ok(()) => Ok(()),
                    Err(error) => Err(self.refuse("an eventfd to unmask", &error, Errno::INVAL)),
                };
            }
            IrqData::Eventfds(_) => return Err(Errno::INVAL),
            _ => set,
        };
        let all = self.irq(set.index).count;
        let (start, count) = if set.count == 0 {
            (0, all)
        } else {
            (set.start, set.count)
        };
        let on = |at: usize| match &set.data {
            IrqData::None => true,
            IrqData::Bools(bools) => bools.get(at).copied().unwrap_or(false),
            IrqData::Eventfds(_) => false,
        };
        for (at, index) in (start..start.saturating_add(count)).enumerate() {
            if let Some(irq) = irq(set.index, index).filter(|_| on(at)) {
                if masked {
                    self.function.mask(irq);
                } else {
                    self.function.unmask(irq);
                }
            }
        }
        Ok(())
    }
}

fn part(region: u32) -> Option<Part> {
    match region {
        CONFIG => Some(Part::Config),
        bar if bar < BARS => u8::try_from(bar).ok().map(Part::Bar),
        _ => None,
    }
}

fn irq(kind: u32, index: u32) -> Option<Irq> {
    match (kind, index) {
        (INTX, 0) => Some(Irq::Intx),
        (MSIX, vector) => u16::try_from(vector).ok().map(Irq::Msix),
        (ERR, 0) => Some(Irq::Err),
        (REQ, 0) => Some(Irq::Req),
        _ => None,
    }
}

impl Device for Served {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            regions: REGIONS,
            irqs: IRQS,
            can_reset: true,
        }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        if index >= BARS && index != CONFIG {
            return (index != 6).then_some(Region {
                size: 0,
                readable: false,
                writable: false,
                mmap: None,
            });
        }
        let size = self.function.region_size(part(index)?);
        let mut mmap = None;
        // One file behind the BAR can be mapped; several regions have several files.
        if index == 2
            && let [shared] = self.function.shared_layout()
        {
            let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
            let fits = shared.memory.len.is_multiple_of(page)
                && shared.memory.file_offset.is_multiple_of(page);
            mmap = fits.then(|| RegionMap {
                areas: vec![MapArea {
                    offset: shared.offset,
                    len: shared.memory.len,
                }],
                fd: shared.memory.file.as_fd(),
                offset: shared.memory.file_offset,
            });
        }
        Some(Region {
            size,
            readable: size > 0,
            writable: size > 0,
            mmap,
        })
    }

    fn irq(&self, index: u32) -> IrqInfo {
        let one = IrqInfo {
            count: 1,
            eventfd: true,
            ..IrqInfo::NONE
        };
        match index {
            INTX => IrqInfo {
                maskable: true,
                automasked: true,
                ..one
            },
            MSIX => IrqInfo {
                count: self.function.vectors().into(),
                maskable: true,
                ..one
            },
            ERR | REQ => one,
            _ => IrqInfo::NONE,
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.begin();
        let part = part(region).ok_or(Errno::INVAL)?;
        self.function.read(part, offset, data);
        self.settle();
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.begin();
        let part = part(region).ok_or(Errno::INVAL)?;
        self.function.write(part, offset, data);
        // A kick is to take no time, and changes nothing.
        if part != NOTIFICATIONS.0 || offset < NOTIFICATIONS.1 {
            self.settle();
        }
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> Result<(), Errno> {
        self.begin();
        let result = match set.action {
            IrqAction::Trigger => self.set_triggers(set),
            IrqAction::Mask => self.set_masks(set, true),
            IrqAction::Unmask => self.set_masks(set, false),
        };
        self.settle();
        result
    }

    fn map(&mut self, map: DmaMap) -> Result<(), Errno> {
        self.begin();
        let range = Range {
            address: map.address,
            size: map.size,
            offset: map.offset,
            readable: map.readable,
            writable: map.writable,
            fd: map.fd,
        };
        let window = match self.behind().memory().map(range) {
            Ok(window) => window,
            Err(error) => {
                let errno = match &error {
                    MapError::Overlap(_) => Errno::EXIST,
                    MapError::TooMany | MapError::TooManyFiles => Errno::NOSPC,
                    MapError::BadRange | MapError::File(_) => Errno::INVAL,
                };
                return Err(self.refuse("memory for the device", &error, errno));
            }
        };
        if let Some(window) = window
            && let Err(error) = self.function.backend_mut().opened(window)
        {
            // The client has done nothing wrong, and QEMU may end if it hears of an error here. The device finds nothing at these addresses.
            self.trouble("lending memory", &error);
            self.function.needs_reset();
        }
        Ok(())
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result<u64, Errno> {
        self.begin();
        let memory = self.behind().memory();
        let (gone, from, to) = if unmap.all {
            (Ok(memory.clear()), 0, u64::MAX)
        } else {
            let last = unmap.address.saturating_add(unmap.size.saturating_sub(1));
            let gone = memory.unmap(unmap.address, unmap.size);
            (gone, unmap.address, last)
        };
        let gone = match gone {
            Ok(gone) => gone,
            Err(error) => return Err(self.refuse("taking memory back", &error, Errno::INVAL)),
        };
        match self.function.backend_mut().closed(from, to) {
            Ok(()) => Ok(gone),
            Err(error) => {
                self.trouble("taking memory back", &error);
                // A host that has lost its connection may have the memory; the next one does not get it, and goes on.
                if error != OpError::StillInUse {
                    self.function.needs_reset();
                }
                self.refused += 1;
                Err(Errno::IO)
            }
        }
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.begin();
        self.function.reset();
        self.settle();
        Ok(())
    }
}

/// The shared-memory regions of the device, for kinds that have any.
pub(super) fn shared_memory(session: &SessionHandle, device_id: u32) -> Vec<SharedMemory> {
    use crate::session::{Op, Outcome};
    // Virtio 1.3 §5.7, §5.11, §5.19.
    let ids: &[u8] = match device_id {
        // gpu: host-visible memory.
        16 => &[1],
        // fs: the DAX window; pmem: the memory itself.
        26 | 27 => &[0],
        _ => &[],
    };
    let ask = |id: &u8| match session.call(Op::SharedMemory(*id)) {
        Ok(Outcome::SharedMemory(Some(region))) => Some(SharedMemory {
            id: *id,
            len: region.len,
            file_offset: region.file_offset,
            file: region.fd,
        }),
        _ => None,
    };
    ids.iter().filter_map(ask).collect()
}
