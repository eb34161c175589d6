// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands behind the registers: the session's device, which reaches the guest's memory itself or gets copies.

use super::calls::Calls;
use super::lending::Lending;
use crate::memory::DmaMemory;
use crate::session::{DeviceFacts, OpError, QueueSetup, ResetReason, Window};
use crate::transport::pci::Route;
use crate::transport::{Backend, Direct};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex, feature};
use vmsg_mem::Doorbell;

/// Features that neither our queues nor a session that resumes them have.
const WITHHELD: [u32; 1] = [feature::RING_PACKED];

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
    calls: Calls,
    /// By queue.
    routes: Vec<Route>,
    /// Since the driver has started its first queue.
    way: Option<Way>,
    told_remedy: bool,
}

impl Behind {
    /// `lending` is `None` where the guest's memory is to be kept from the device host.
    pub(super) fn new(
        name: &str,
        direct: Direct,
        memory: Arc<DmaMemory>,
        lending: Option<Lending>,
    ) -> io::Result<Behind> {
        let facts = withhold(direct.facts());
        Ok(Behind {
            name: name.to_owned(),
            routes: vec![Route::Through; facts.queue_sizes.len()],
            facts,
            direct,
            memory,
            lending,
            calls: Calls::new()?,
            way: None,
            told_remedy: false,
        })
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

    /// Passes on what the device rang.
    pub(super) fn take_calls(&self, used: impl FnMut(QueueIndex)) -> io::Result<()> {
        self.calls.take(used)
    }

    /// Readable when there is something to take.
    pub(super) fn calls(&self) -> &Calls {
        &self.calls
    }

    /// How the driver learns of used buffers from now on.
    pub(super) fn set_route(&mut self, queue: QueueIndex, route: Route) -> Result<(), OpError> {
        let call = match &route {
            Route::Direct(fd) => Some(fd.clone()),
            Route::Through | Route::Nobody => self.calls.of(queue),
        };
        if let Some(known) = self.routes.get_mut(queue.to_usize()) {
            *known = route;
        }
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
        if !std::mem::replace(&mut self.told_remedy, true) {
            tracing::error!(front = self.name, "{remedy}");
        }
    }

    /// Settles how the device gets at the memory of a queue, which is the same for all queues.
    fn choose(&mut self, setup: &QueueSetup) -> Result<Way, OpError> {
        let rings = [setup.descriptor, setup.driver, setup.device];
        let unshared = rings.iter().any(|at| self.memory.is_without_file(*at));
        let way = if self.lending.is_none() || unshared {
            Way::Copied
        } else {
            Way::Lent
        };
        match self.way {
            Some(other) if other != way => Err(OpError::Invalid(
                "some queues are in memory that can be lent, and some are not",
            )),
            _ => {
                if way == Way::Lent
                    && let Some(lending) = &mut self.lending
                    && !lending.is_on()
                {
                    lending.lend(self.memory.windows())?;
                }
                self.way = Some(way);
                Ok(way)
            }
        }
    }
}

fn withhold(facts: &DeviceFacts) -> DeviceFacts {
    let mut facts = facts.clone();
    for bit in WITHHELD {
        facts.offered.remove(bit);
    }
    facts
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
        self.direct.set_features(features)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError> {
        let result = self.direct.set_status(status);
        if status.is_empty() {
            self.facts = withhold(self.direct.facts());
            if result.is_ok() {
                self.way = None;
            }
        }
        result
    }

    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        match self.choose(&setup) {
            Ok(Way::Lent) => {
                let route = self.routes.get(queue.to_usize()).cloned();
                self.set_route(queue, route.unwrap_or(Route::Through))?;
                self.direct.start_queue(queue, setup)
            }
            Ok(Way::Copied) => Err(OpError::Invalid("no copies yet")),
            Err(error) => {
                self.tell_remedy(&error);
                Err(error)
            }
        }
    }

    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        self.direct.stop_queue(queue)
    }

    fn kick(&mut self, queue: QueueIndex) {
        self.direct.kick(queue);
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError> {
        self.direct.read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError> {
        self.direct.write_config(offset, data)
    }
}
