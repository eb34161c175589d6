// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands behind the registers: the session's device, which reaches the guest's memory itself or gets copies.

use super::calls::{Calls, Rung};
use super::lending::Lending;
use crate::link::SessionHandle;
use crate::log_limit::LogLimit;
use crate::memory::{DmaMemory, GuestMemory};
use crate::session::{DeviceFacts, Op, OpError, QueueSetup, ResetReason, Window};
use crate::shadow::{self, Shadow};
use crate::transport::pci::Route;
use crate::transport::{Backend, Direct};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex, feature};
use vmsg_mem::Doorbell;

/// Features that a session which resumes queues, and queues that are copied, do not have.
const WITHHELD: [u32; 2] = [feature::RING_PACKED, feature::IN_ORDER];

/// Ranges as large as this are not made by a guest's IOMMU driver for a device without queues.
const UNTRANSLATED: u64 = 4 << 20;

/// Behind an IOMMU neighbouring pages of a ring may lie anywhere, and what a device needs in one piece must lie in one page of 4096 bytes. Linux
/// puts the descriptors of so many entries in one page, and the rest of the ring in the next.
const TRANSLATED_SIZE: u16 = 256;

/// How the device gets at what the guest gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It reaches the guest's memory itself.
    Lent,
    /// It gets copies.
    Copied,
}

/// See the [module](self).
pub(super) struct Behind {
    name: String,
    direct: Direct,
    facts: DeviceFacts,
    memory: Arc<DmaMemory>,
    /// `None`: no memory of the guest is ever lent.
    lending: Option<Lending>,
    shadow: Option<Shadow>,
    /// Where its segment comes from.
    segment: shadow::Source,
    /// The segment is lent.
    segment_lent: bool,
    calls: Calls,
    /// By queue.
    routes: Vec<Route>,
    /// As the driver has accepted and written them last.
    features: FeatureSet,
    status: DeviceStatus,
    /// Since the driver has started its first queue.
    way: Option<Way>,
    told_remedy: bool,
    told_copying: bool,
    limit: Arc<LogLimit>,
}

impl Behind {
    /// `session` is `None` where the guest's memory is to be kept from the device host: without it nothing here can lend any.
    ///
    /// # Errors
    /// No descriptors are left, or the queues of the device do not fit the memory for copies.
    pub(super) fn new(
        direct: Direct,
        memory: Arc<DmaMemory>,
        session: Option<SessionHandle>,
        (name, segment): (String, shadow::Source),
        limit: Arc<LogLimit>,
    ) -> Result<Behind, shadow::NewError> {
        let os = |source| shadow::NewError::Os {
            what: "an epoll set",
            source,
        };
        let mut behind = Behind {
            name,
            routes: vec![Route::Through; direct.facts().queue_sizes.len()],
            facts: direct.facts().clone(),
            direct,
            memory,
            lending: session.map(Lending::new),
            shadow: None,
            segment,
            segment_lent: false,
            calls: Calls::new().map_err(os)?,
            features: FeatureSet::EMPTY,
            status: DeviceStatus::RESET,
            way: None,
            told_remedy: false,
            told_copying: false,
            limit,
        };
        if behind.lending.is_none() {
            behind.shadow()?;
        }
        behind.look_again();
        Ok(behind)
    }

    /// Settles what the driver is shown of what the device has.
    fn look_again(&mut self) {
        let device = self.direct.facts();
        self.facts = device.clone();
        if self.lending.is_none() {
            self.facts.offered = shadow::offered(&device.offered);
        } else if self.memory.largest() < UNTRANSLATED {
            for size in &mut self.facts.queue_sizes {
                *size = TRANSLATED_SIZE.min(*size);
            }
        }
        for bit in WITHHELD {
            self.facts.offered.remove(bit);
        }
    }

    /// The queues that are copies, made when they are first needed.
    fn shadow(&mut self) -> Result<&Shadow, shadow::NewError> {
        if self.shadow.is_none() {
            let memory: Arc<dyn GuestMemory> = self.memory.clone();
            let options = shadow::Options {
                name: self.name.clone(),
                segment: self.segment.segment()?,
            };
            let shadow = Shadow::new(memory, self.direct.facts(), options)?;
            self.shadow = Some(shadow);
        }
        Ok(self.shadow.as_ref().expect("made just now"))
    }

    /// Readable when [`Self::take_news`] may have some.
    pub(super) fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.shadow.as_ref().map(Shadow::event_fd)
    }

    /// News of the copies.
    pub(super) fn take_news(&self) -> Vec<shadow::Event> {
        let Some(shadow) = &self.shadow else {
            return Vec::new();
        };
        shadow.clear();
        // Each queue is told of once until it is taken.
        let most = self.routes.len() + 1;
        std::iter::from_fn(|| shadow.poll_event())
            .take(most)
            .collect()
    }

    pub(super) fn memory(&self) -> &DmaMemory {
        &self.memory
    }

    /// The client has opened memory.
    pub(super) fn opened(&mut self, window: Window) -> Result<(), OpError> {
        match &mut self.lending {
            Some(lending) => lending.add(window),
            None => Ok(()),
        }
    }

    /// The client has closed what lies between `from` and `to`. Done when nobody uses it any more.
    pub(super) fn closed(&mut self, from: u64, to: u64) -> Result<(), OpError> {
        match &mut self.lending {
            Some(lending) => lending.remove(from, to),
            None => Ok(()),
        }
    }

    /// Passes on what was rung.
    pub(super) fn take_calls(&self, rung: impl FnMut(Rung)) -> io::Result<()> {
        self.calls.take(rung)
    }

    /// The eventfd by which the client unmasks the interrupt line.
    pub(super) fn set_unmask(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        self.calls.set_unmask(fd)
    }

    /// Readable when there is something to take.
    pub(super) fn calls(&self) -> &Calls {
        &self.calls
    }

    /// How the driver learns of used buffers from now on.
    pub(super) fn set_route(&mut self, queue: QueueIndex, route: Route) -> Result<(), OpError> {
        if let Some(known) = self.routes.get_mut(queue.to_usize()) {
            *known = route;
        }
        self.tell_route(queue)
    }

    fn tell_route(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        let route = self.routes.get(queue.to_usize());
        if self.way == Some(Way::Copied) || self.lending.is_none() {
            let interrupt = match route {
                Some(Route::Direct(fd)) => shadow::Interrupt::Eventfd(fd.clone()),
                Some(Route::Nobody) => shadow::Interrupt::Nobody,
                Some(Route::Through) | None => shadow::Interrupt::Front,
            };
            if let Some(shadow) = &self.shadow {
                shadow.set_interrupt(queue, interrupt);
            }
            return Ok(());
        }
        let call = match route {
            Some(Route::Direct(fd)) => Some(fd.clone()),
            Some(Route::Through | Route::Nobody) | None => self.calls.of(queue),
        };
        self.direct.set_call(queue, call)
    }

    /// Tells the driver to look into a queue.
    pub(super) fn ring_route(&self, queue: QueueIndex) {
        if let Some(Route::Direct(fd)) = self.routes.get(queue.to_usize()) {
            ring(fd);
        }
    }

    /// Says what to do about an error, if that is known and was not said yet.
    pub(super) fn tell_remedy(&mut self, error: &OpError) {
        match error {
            OpError::OtherMemory(other) => {
                let remedy = crate::front::qemu::memory_remedy(other);
                self.tell(remedy.unwrap_or_else(|| other.to_string()));
            }
            OpError::NeedsReset(reason) => self.tell_remedy_of(reason),
            _ => {}
        }
    }

    /// Says what to do about a device that needs a reset, if that is known and was not said yet.
    pub(super) fn tell_remedy_of(&mut self, reason: &ResetReason) {
        if let ResetReason::OtherMemory(other) = reason {
            let remedy = crate::front::qemu::memory_remedy(other);
            self.tell(remedy.unwrap_or_else(|| other.to_string()));
        }
    }

    fn tell(&mut self, remedy: String) {
        if !std::mem::replace(&mut self.told_remedy, true) && self.limit.admit().is_some() {
            tracing::error!(front = self.name, "{remedy}");
        }
    }

    /// Settles how the device gets at the memory of a queue, which is the same for all queues.
    fn choose(&mut self, setup: &QueueSetup) -> Result<Way, OpError> {
        let rings = [setup.descriptor, setup.driver, setup.device];
        let unshared = rings.iter().any(|at| self.memory.is_unshared(*at));
        let way = if self.lending.is_none() || unshared {
            Way::Copied
        } else {
            Way::Lent
        };
        if self.way.is_some_and(|other| other != way) {
            return Err(OpError::Invalid(
                "some queues are in memory that can be lent, and some are not",
            ));
        }
        match way {
            Way::Lent => self.lend()?,
            Way::Copied => self.copy()?,
        }
        self.way = Some(way);
        Ok(way)
    }

    fn lend(&mut self) -> Result<(), OpError> {
        if self.segment_lent {
            self.set_renewal(None)?;
            self.set_windows(Vec::new())?;
            self.segment_lent = false;
        }
        match &mut self.lending {
            Some(lending) if !lending.is_on() => lending.lend(self.memory.windows()),
            _ => Ok(()),
        }
    }

    fn copy(&mut self) -> Result<(), OpError> {
        if self.way == Some(Way::Copied) {
            return Ok(());
        }
        if let Some(lending) = &mut self.lending {
            lending.take_back()?;
            if !std::mem::replace(&mut self.told_copying, true) && self.limit.admit().is_some() {
                tracing::warn!(front = self.name, "{}", crate::front::qemu::COPY_REMEDY);
            }
        }
        let features = self.features;
        let limit = self.limit.clone();
        let shadow = self.shadow().map_err(|error| {
            if let Some(unsaid) = limit.admit() {
                tracing::error!(%error, unsaid, "the guest's memory is not shared, and cannot be copied");
            }
            OpError::Invalid("there is no memory for copies")
        })?;
        let (wanted, window) = (shadow.set_features(features), shadow.window());
        let renewal = shadow.renewal();
        if !self.segment_lent {
            self.set_windows(vec![window])?;
            self.set_renewal(Some(renewal))?;
            self.segment_lent = true;
        }
        // Where this was not known when the driver chose its features, the device has those of a driver without copies.
        if self.lending.is_some() && wanted != features {
            let status = self.status;
            self.direct.set_status(DeviceStatus::RESET)?;
            self.direct
                .set_status(status & !(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK))?;
            self.direct.set_features(wanted)?;
            let result = self.direct.set_status(status)?;
            if !result.contains(status) {
                return Err(OpError::Invalid("the device does not take other features"));
            }
        }
        Ok(())
    }

    fn set_renewal(&self, renewal: Option<shadow::Renewal>) -> Result<(), OpError> {
        self.direct
            .session()
            .call(Op::SetRenewal(renewal))
            .map(drop)
    }

    fn set_windows(&self, windows: Vec<Window>) -> Result<(), OpError> {
        self.direct
            .session()
            .call(Op::SetWindows(windows))
            .map(drop)
    }
}

/// Rings an eventfd of the client. It may have made it unusable: that is its loss.
fn ring(fd: &Arc<OwnedFd>) {
    let rung = fd
        .try_clone()
        .and_then(Doorbell::from_fd)
        .map(|bell| bell.ring().is_ok());
    if !matches!(rung, Ok(true)) {
        tracing::debug!("an eventfd of the client cannot be rung");
    }
}

impl Backend for Behind {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn set_features(&mut self, features: FeatureSet) -> Result<(), OpError> {
        self.features = features;
        let features = if self.lending.is_none() {
            let shadow = self.shadow();
            let shadow = shadow.map_err(|_| OpError::Invalid("there is no memory for copies"))?;
            shadow.set_features(features)
        } else {
            features
        };
        self.direct.set_features(features)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError> {
        let result = self.direct.set_status(status);
        if status.is_empty() {
            if let Some(shadow) = &self.shadow {
                // Whatever the device does now, it does not concern the guest any more.
                shadow.reset();
            }
            if self.shadow.as_ref().is_some_and(Shadow::is_lost) {
                // Another one is made when it is needed.
                self.shadow = None;
                self.segment_lent = false;
            }
            self.look_again();
            self.features = FeatureSet::EMPTY;
            if result.is_ok() {
                self.way = None;
            }
        }
        if let Ok(now) = result {
            self.status = now;
            if let Some(shadow) = &self.shadow
                && now.contains(DeviceStatus::DRIVER_OK)
            {
                shadow.run();
            }
        }
        result
    }

    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        let way = match self.choose(&setup) {
            Ok(way) => way,
            Err(error) => {
                self.tell_remedy(&error);
                return Err(error);
            }
        };
        self.tell_route(queue)?;
        let Some(shadow) = self.shadow.as_ref().filter(|_| way == Way::Copied) else {
            return self.direct.start_queue(queue, setup);
        };
        let started = shadow.start_queue(queue, setup).map_err(|error| {
            if let Some(unsaid) = self.limit.admit() {
                tracing::warn!(front = self.name, %error, unsaid, "a queue cannot be copied");
            }
            OpError::Invalid("the queue cannot be copied")
        })?;
        let begun = self
            .direct
            .start_queue_with(queue, started.setup, started.kick, started.call);
        if begun.is_err() {
            shadow.stop_queue(queue);
        }
        begun
    }

    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        let stopped = self.direct.stop_queue(queue);
        if let Some(shadow) = &self.shadow {
            shadow.stop_queue(queue);
        }
        stopped
    }

    fn kick(&mut self, queue: QueueIndex) {
        match &self.shadow {
            Some(shadow) if self.way == Some(Way::Copied) => shadow.kick(queue),
            _ => self.direct.kick(queue),
        }
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError> {
        self.direct.read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError> {
        self.direct.write_config(offset, data)
    }
}
