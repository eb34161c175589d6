// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch: between network devices of this process, in one copy.
//!
//! A [`Switch`] has ports. A [`Port`] is the back end of a network device; an uplink is the other way round: any
//! [`Backend`], such as a tap, that is plugged into the switch. One worker serves all of it: the devices at the
//! ports, and the [`Pump`], which looks after the uplinks. When a device sends a batch, the switch finds the receivers of all of
//! its frames, and then each receiver's frames are copied from the sender's memory straight into the receiver's buffers
//! ([`Outlets`]). A receiver without buffers loses its frames and delays nobody.
//!
//! It learns which address is behind which port, keeps VLANs apart, and lets a port send to another only if a [`Rule`] allows
//! it. Each frame that comes in is, for each of its receivers, either delivered or counted as dropped for one [`Reason`].
//!
//! [`Control`] changes it from other threads. They never wait for a lock that the worker holds, nor it for theirs.

mod bucket;
mod config;
mod control;
mod copy;
mod counters;
mod error;
mod fabric;
mod hand;
mod head;
mod port;
mod ports;
mod registry;
mod report;
mod rules;
mod segment;
mod shared;
mod sort;
mod table;
mod uplink;
mod vlan;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::epoll;

use self::bucket::Bucket;
use self::fabric::{Fabric, FabricPort};
use self::registry::{Known, Registry, open_capture};
use self::shared::{Change, Limits, Mailbox, PortShared, Request};
use self::uplink::Uplink;
use crate::{Backend, Outlets};

pub use config::{
    BadRate, MAX_PORTS, MAX_RULES, MAX_TABLE, Mirror, PortChange, PortConfig, Rate, SwitchConfig,
    Unknown, Vlans,
};
pub use control::Control;
pub use copy::{Delivered, TagChange, deliver};
pub use error::SwitchError;
pub use port::Port;
pub use report::{Count, Drops, MacEntry, PortReport, Reason, SwitchReport, Traffic};
pub use rules::{BadRule, Pattern, Rule};
pub use vlan::{BadVlans, VlanSet};

/// Marks the mailbox among the pump's events; uplinks have their numbers.
const MAIL: u64 = u64::MAX;
/// Uplinks that the pump hears of at a time; others have their turn when it is called again.
const EVENTS: usize = 32;
/// The shortest and the longest time that an address can be remembered.
const AGES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(24 * 24 * 3600);

/// What all parts of a switch hold together.
struct Hub {
    name: String,
    table: usize,
    age: Duration,
    /// Control's.
    registry: Mutex<Registry>,
    mailbox: Arc<Mailbox>,
    /// The worker's: no other thread takes this lock.
    fabric: Mutex<Fabric>,
    /// A device has said something while the switch was at work.
    places_changed: AtomicBool,
    /// The mailbox's descriptor and the uplinks'.
    epoll: OwnedFd,
}

impl Hub {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn fabric(&self) -> MutexGuard<'_, Fabric> {
        let mut fabric = self.fabric.lock().unwrap_or_else(PoisonError::into_inner);
        if self.places_changed.load(Ordering::Relaxed)
            && self.places_changed.swap(false, Ordering::Acquire)
        {
            fabric.places_changed();
        }
        fabric
    }

    /// The fabric, unless it is at work.
    fn try_fabric(&self) -> Option<MutexGuard<'_, Fabric>> {
        match self.fabric.try_lock() {
            Ok(fabric) => Some(fabric),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn post(&self, request: Request) -> Result<(), SwitchError> {
        if self.mailbox.put(request) {
            Ok(())
        } else {
            Err(SwitchError::NoAnswer)
        }
    }

    /// Removes the ports whose devices are gone.
    fn reap(&self, registry: &mut Registry) {
        for index in registry.orphans() {
            let changes = registry.take(index);
            // The worker is gone, too: then nothing of it matters.
            let _ = self.post(Request {
                changes,
                reply: None,
            });
        }
    }
}

/// A switch. Clones are the same switch.
#[derive(Clone)]
pub struct Switch {
    hub: Arc<Hub>,
}

impl std::fmt::Debug for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Switch")
            .field("name", &self.hub.name)
            .finish_non_exhaustive()
    }
}

impl Switch {
    /// A switch without ports.
    ///
    /// # Errors
    ///
    /// If it cannot be like that, or the system has no descriptors left.
    pub fn new(config: SwitchConfig) -> Result<Self, SwitchError> {
        if !(1..=MAX_TABLE).contains(&config.table) {
            let reason = format!("{} is not between 1 and {MAX_TABLE}", config.table);
            return Err(SwitchError::setting("table", reason));
        }
        if !AGES.contains(&config.age) {
            let reason = format!("{:?} is not between 1 ms and 24 days", config.age);
            return Err(SwitchError::setting("age", reason));
        }
        let mut registry = Registry::new(config.table, config.rules, config.unknown)?;
        // So that there are tables before there is a port.
        registry.compile();
        let mailbox = Arc::new(Mailbox::new()?);
        let system = |error: rustix::io::Errno| SwitchError::System(error.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system)?;
        let data = epoll::EventData::new_u64(MAIL);
        epoll::add(&epoll, mailbox.event(), data, epoll::EventFlags::IN).map_err(system)?;
        let fabric = Fabric::new(
            Arc::clone(&mailbox),
            config.table,
            config.age,
            registry.tables(),
        );
        Ok(Self {
            hub: Arc::new(Hub {
                name: config.name,
                table: config.table,
                age: config.age,
                registry: Mutex::new(registry),
                mailbox,
                fabric: Mutex::new(fabric),
                places_changed: AtomicBool::new(false),
                epoll,
            }),
        })
    }

    /// Adds a port for a device. It does not wait for the worker, and works while the switch does.
    ///
    /// # Errors
    ///
    /// If its name or an address of it is taken, it cannot be like that, its capture file cannot be made, or the system has no
    /// descriptors left.
    pub fn add_port(&self, config: PortConfig) -> Result<Port, SwitchError> {
        let name = config.name.clone();
        let (index, generation, shared) = self.add(config, None)?;
        Ok(Port {
            hub: Arc::clone(&self.hub),
            shared,
            name,
            index,
            generation,
            until: None,
        })
    }

    /// Adds a port with a back end behind it, which the pump looks after. It does not wait for the worker, and works while the
    /// switch does.
    ///
    /// # Errors
    ///
    /// As of [`add_port`](Self::add_port).
    pub fn add_uplink(
        &self,
        config: PortConfig,
        backend: Box<dyn Backend>,
    ) -> Result<(), SwitchError> {
        self.add(config, Some(backend))?;
        Ok(())
    }

    fn add(
        &self,
        mut config: PortConfig,
        backend: Option<Box<dyn Backend>>,
    ) -> Result<(u16, u32, Arc<PortShared>), SwitchError> {
        let mut registry = self.hub.registry();
        self.hub.reap(&mut registry);
        let index = registry.admit(&config)?;
        let shared = Arc::new(PortShared::new(config.link)?);
        registry.generation = registry.generation.wrapping_add(1);
        let generation = registry.generation;
        let mut port = Box::new(FabricPort::new(Arc::clone(&shared), generation));
        port.capture = match config.capture.as_ref().map(open_capture).transpose() {
            // Everything else is as it was, and worth more than what was recorded.
            Err(error) if config.capture.as_ref().is_some_and(|mirror| mirror.append) => {
                tracing::warn!(port = config.name, %error, "the capture does not go on");
                config.capture = None;
                None
            }
            capture => capture?,
        };
        let capturing = port.capture.is_some();
        shared.capturing.store(capturing, Ordering::Relaxed);
        port.set_limits(Limits {
            macs: config.macs,
            storm: Some(config.storm.map(Bucket::frames)),
            rate_in: Some(config.rate_in.map(Bucket::bytes)),
            rate_out: Some(config.rate_out.map(Bucket::bytes)),
            link: config.link,
        });
        let uplink = backend.is_some();
        if let Some(backend) = backend {
            if let Some(fd) = backend.event_fd() {
                let data = epoll::EventData::new_u64(index.into());
                epoll::add(&self.hub.epoll, fd, data, epoll::EventFlags::IN)
                    .map_err(|error| SwitchError::System(error.into()))?;
            }
            let backend = Uplink::new(backend);
            shared.running.store(backend.carrier, Ordering::Relaxed);
            port.uplink = Some(backend);
        }
        let known = Known {
            config,
            shared: Arc::clone(&shared),
            uplink,
        };
        let mut changes = vec![Change::AddPort(index, port)];
        changes.append(&mut registry.put(index, known));
        self.hub.post(Request {
            changes,
            reply: None,
        })?;
        Ok((index, generation, shared))
    }

    /// What the worker must look after beside the devices at the ports; exactly one is to be made.
    pub fn pump(&self) -> Pump {
        Pump {
            hub: Arc::clone(&self.hub),
        }
    }

    /// What changes the switch while it works.
    pub fn control(&self) -> Control {
        Control {
            hub: Arc::clone(&self.hub),
        }
    }
}

/// What keeps a switch going: it looks after the uplinks, the age of addresses, and what control asks for.
pub struct Pump {
    hub: Arc<Hub>,
}

impl std::fmt::Debug for Pump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pump")
            .field("switch", &self.hub.name)
            .finish_non_exhaustive()
    }
}

impl Pump {
    /// Readable when [`poll`](Self::poll) has something to do.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.hub.epoll.as_fd()
    }

    /// When [`poll`](Self::poll) wants to be called, whatever happens until then. It changes with every call.
    pub fn next_timeout(&self) -> Option<Instant> {
        let fabric = self.hub.fabric();
        [fabric.next_uplink(), fabric.next_sweep()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what there is to do; frames of uplinks go to `others`.
    pub fn poll(&mut self, now: Instant, others: &mut dyn Outlets) {
        self.hub.mailbox.hush();
        let mut fabric = self.hub.fabric();
        let now = fabric.now(now);
        fabric.read_mail(now);
        fabric.sweep(now);
        if fabric.uplinks.is_empty() {
            return;
        }
        let mut room = [const { MaybeUninit::uninit() }; EVENTS];
        let events = crate::events::waiting(&self.hub.epoll, &mut room);
        let woken = |index: u16| events.iter().any(|event| event.data.u64() == index.into());
        fabric.poll_uplinks(woken, now, others);
    }
}
