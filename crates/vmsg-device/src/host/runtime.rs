// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control thread: epoll around [`Core`], and the workers it commands.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use virtio_msg::{Channel, ChannelError, DevNum};
use vmsg_bus::{DeviceBus, Listener};
use vmsg_mem::Doorbell;

use super::bus::Bus;
use super::connection::{ConnId, Peer};
use super::core::{AddError, Core};
use super::handle::{Handle, HandleError, Request};
use super::operators::Operators;
use super::slots::Slots;
use crate::device::Device;
use crate::worker::thread::{StartError, Worker};
use crate::worker::{Command, Outbox, Reply};

const EVENTS: usize = 64;

const REPLIES: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
/// Set in the event data of a listener; the rest is the bus's index.
const LISTENER: u64 = 1 << 63;
/// Where the bus's index lies in the event data of a connection and in tickets.
const BUS_SHIFT: u32 = 48;

/// Why a host cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// A worker could not be started.
    #[error(transparent)]
    Worker(#[from] StartError),
    /// A device could not be added.
    #[error(transparent)]
    Add(#[from] AddError),
    /// There are fewer workers.
    #[error("there is no worker {0}")]
    NoWorker(usize),
}

fn os(what: &'static str) -> impl Fn(io::Error) -> HostError {
    move |source| HostError::Os { what, source }
}

/// Ends a running [`Host`] from another thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<Doorbell>);

impl Stop {
    /// Makes [`Host::run`] return soon.
    pub fn stop(&self) {
        let _ = self.0.ring();
    }
}

/// Buses, devices and the workers that serve them.
#[derive(Debug)]
pub struct Host {
    epoll: OwnedFd,
    buses: Vec<Bus>,
    workers: Vec<Worker>,
    /// The places of each worker.
    slots: Vec<Slots>,
    replies: Arc<Outbox>,
    bell: Arc<Doorbell>,
    stop: Arc<Doorbell>,
    operators: Operators,
    begin: Instant,
}

impl Host {
    /// A host with `workers` workers, at least one.
    ///
    /// # Errors
    ///
    /// [`HostError`] if the system has no descriptor or thread left.
    pub fn new(workers: usize) -> Result<Self, HostError> {
        vmsg_mem::fault::install().map_err(os("SIGBUS handler"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| os("epoll_create1")(error.into()))?;
        let bell = Arc::new(Doorbell::new().map_err(os("eventfd"))?);
        let stop = Arc::new(Doorbell::new().map_err(os("eventfd"))?);
        let replies = Arc::new(Outbox::default());
        let workers = (0..workers.max(1))
            .map(|index| {
                let name = format!("worker{index}");
                Worker::start(&name, index, Arc::clone(&replies), Arc::clone(&bell))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let host = Self {
            epoll,
            buses: Vec::new(),
            slots: workers.iter().map(|_| Slots::default()).collect(),
            workers,
            replies,
            operators: Operators::new(Arc::clone(&bell)),
            bell,
            stop,
            begin: Instant::now(),
        };
        host.watch(host.bell.as_fd(), REPLIES, EventFlags::IN)?;
        host.watch(host.stop.as_fd(), STOP, EventFlags::IN)?;
        Ok(host)
    }

    /// Adds a bus whose messages have up to `max_message` bytes; drivers come
    /// through `listener`, or by [`attach`](Self::attach). Returns its index.
    ///
    /// # Errors
    ///
    /// [`HostError::Os`] if the listener cannot be watched.
    pub fn add_bus(
        &mut self,
        max_message: usize,
        listener: Option<Listener>,
    ) -> Result<usize, HostError> {
        let index = self.buses.len();
        if let Some(listener) = &listener {
            self.watch(listener.as_fd(), LISTENER | index as u64, EventFlags::IN)?;
        }
        let core = Core::new(max_message, (index as u64) << BUS_SHIFT);
        self.buses.push(Bus::new(core, listener));
        Ok(index)
    }

    /// Puts a device on a bus. `worker` chooses who serves it; `None` leaves
    /// that to the host.
    ///
    /// # Errors
    ///
    /// [`HostError::Add`] if the number or the name is taken.
    pub fn add_device(
        &mut self,
        bus: usize,
        name: &str,
        num: Option<u16>,
        worker: Option<usize>,
        device: Box<dyn Device>,
    ) -> Result<DevNum, HostError> {
        Ok(self.put_device(bus, name, num, worker, device)?)
    }

    fn put_device(
        &mut self,
        bus: usize,
        name: &str,
        num: Option<u16>,
        worker: Option<usize>,
        device: Box<dyn Device>,
    ) -> Result<DevNum, AddError> {
        let worker = worker
            .filter(|worker| *worker < self.workers.len())
            .unwrap_or_else(|| {
                let workers = self.slots.iter().enumerate();
                let least = workers.min_by_key(|(_, slots)| slots.taken());
                least.map_or(0, |(index, _)| index)
            });
        let slot = self.slots[worker].peek();
        let num = self.buses[bus]
            .core
            .add_device(name, num, worker, slot, device)?;
        self.slots[worker].take();
        self.send_orders(bus);
        Ok(num)
    }

    /// A device may come to the bus with index `bus` that passes the driver's memory on: the files of memory that is lent before are kept
    /// for it, and so is the number `num`, which only a device that asks for it gets.
    ///
    /// # Panics
    ///
    /// If there is no bus with this index.
    pub fn expect_passthrough(&mut self, bus: usize, num: Option<u16>) {
        self.buses[bus].core.expect_passthrough(num);
    }

    /// Has a worker poll something that is on no bus: a device without queues.
    ///
    /// # Errors
    ///
    /// [`HostError::NoWorker`] if there is no worker with this index.
    pub fn add_resident(
        &mut self,
        worker: usize,
        device: Box<dyn Device>,
    ) -> Result<(), HostError> {
        let (Some(slots), Some(thread)) = (self.slots.get_mut(worker), self.workers.get(worker))
        else {
            return Err(HostError::NoWorker(worker));
        };
        // Not answered.
        let _ = thread.send(slots.take(), 0, Command::Add(device));
        Ok(())
    }

    /// Adds a connection that was made in some other way, such as a loopback.
    ///
    /// # Errors
    ///
    /// [`HostError::Os`] if it cannot be watched.
    pub fn attach(&mut self, bus: usize, mut connection: DeviceBus) -> Result<(), HostError> {
        let peer = connection.peer();
        let peer = Peer {
            name: peer.name.clone(),
            pid: peer.pid,
        };
        let max = connection.max_message_size();
        let capabilities = *connection.capabilities();
        let bare = !capabilities.runtime_windows;
        let common = connection.common().and_then(|ram| ram.mapping.clone());
        let vectors = connection.vectors().cloned();
        let ram = connection.static_ram().cloned();
        let fd = connection.poll_fd().map_err(os("connection"))?;
        let conn = self.buses[bus].core.connect(peer, max);
        if bare {
            self.buses[bus].core.set_bare(conn, ram);
        } else if !capabilities.passes_fds {
            self.buses[bus].core.set_common(conn, common, vectors);
        }
        let data = (bus as u64) << BUS_SHIFT | conn.0;
        if let Err(error) = epoll::add(&self.epoll, fd, EventData::new_u64(data), EventFlags::IN) {
            let now = self.now();
            self.buses[bus].core.disconnect(now, conn);
            return Err(os("epoll_ctl")(error.into()));
        }
        self.buses[bus].connections.insert(conn, connection);
        self.buses[bus].unread.insert(conn);
        Ok(())
    }

    /// Something that ends [`run`](Self::run).
    pub fn stop_handle(&self) -> Stop {
        Stop(Arc::clone(&self.stop))
    }

    /// Something with which other threads ask things of this host while it runs.
    pub fn handle(&self) -> Handle {
        self.operators.handle()
    }

    /// The buses' cores, in order of their indices.
    pub fn cores(&self) -> impl Iterator<Item = &Core> {
        self.buses.iter().map(|bus| &bus.core)
    }

    /// Serves until [`Stop::stop`].
    ///
    /// # Errors
    ///
    /// [`HostError::Os`] if epoll fails, which it does not while its descriptors live.
    pub fn run(&mut self) -> Result<(), HostError> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        loop {
            self.wait(&mut events)?;
            for event in events.drain(..) {
                match event.data.u64() {
                    STOP => return Ok(()),
                    REPLIES => {
                        // Ours alone; an empty one just means that nothing was missed.
                        let _ = self.bell.drain();
                        self.take_requests();
                    }
                    data if data & LISTENER != 0 => self.accept(index_of(data & !LISTENER)),
                    data => {
                        let bus = &mut self.buses[index_of(data >> BUS_SHIFT)];
                        bus.unread.insert(ConnId(data & ((1 << BUS_SHIFT) - 1)));
                    }
                }
            }
            self.take_replies();
            for bus in 0..self.buses.len() {
                let due = self.buses[bus]
                    .listener
                    .as_ref()
                    .and_then(Listener::next_deadline);
                if due.is_some_and(|due| due <= Instant::now()) {
                    self.accept(bus);
                }
                self.serve(bus);
                let core = &mut self.buses[bus].core;
                while let Some((worker, slot)) = core.poll_freed() {
                    self.slots[worker].give_back(slot);
                }
                self.operators.answer(core);
            }
        }
    }

    /// Does what other threads ask for.
    fn take_requests(&mut self) {
        let (requests, more) = self.operators.take_requests();
        for request in requests {
            self.obey(request);
        }
        if more {
            // Full: then it is readable anyhow.
            let _ = self.bell.ring();
        }
    }

    /// Does one thing. Who has given up waiting wants no answer.
    fn obey(&mut self, request: Request) {
        let now = self.now();
        let mut cores: Vec<&mut Core> = self.buses.iter_mut().map(|bus| &mut bus.core).collect();
        match request {
            Request::List(answer) => {
                let buses = cores.iter().enumerate();
                let all = buses.flat_map(|(index, core)| core.reports(index));
                let _ = answer.send(all.collect());
            }
            Request::Operate {
                bus,
                device,
                operation,
                answer,
            } => {
                let begin = |core: &mut Core, name: &str| core.operate(name, operation);
                self.operators.begin(&mut cores, bus, device, answer, begin);
            }
            Request::Remove {
                bus,
                device,
                answer,
            } => {
                let begin = |core: &mut Core, name: &str| core.remove_device(now, name);
                self.operators.begin(&mut cores, bus, device, answer, begin);
            }
            Request::Add {
                bus,
                name,
                num,
                worker,
                device,
                answer,
            } => {
                let result = if bus >= self.buses.len() {
                    Err(HandleError::NoBus(bus))
                } else if let Some(none) = worker.filter(|worker| *worker >= self.workers.len()) {
                    Err(HandleError::NoWorker(none))
                } else {
                    self.put_device(bus, &name, num, worker, device)
                        .map_err(HandleError::Add)
                };
                let _ = answer.send(result);
            }
            Request::AddResident {
                worker,
                device,
                answer,
            } => {
                let result = self.add_resident(worker, device);
                let _ = answer.send(result.map_err(|_| HandleError::NoWorker(worker)));
            }
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>, data: u64, flags: EventFlags) -> Result<(), HostError> {
        epoll::add(&self.epoll, fd, EventData::new_u64(data), flags)
            .map_err(|error| os("epoll_ctl")(error.into()))
    }

    fn now(&self) -> virtio_msg::Instant {
        let nanos = self.begin.elapsed().as_nanos();
        virtio_msg::Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn wait(&self, events: &mut Vec<epoll::Event>) -> Result<(), HostError> {
        let more = self
            .buses
            .iter()
            .any(|bus| bus.unread.iter().any(|conn| bus.core.wants_input(*conn)));
        let listening = self
            .buses
            .iter()
            .filter_map(|bus| bus.listener.as_ref()?.next_deadline())
            .min()
            .map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = if more {
            Some(Duration::ZERO)
        } else {
            listening
        };
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(os("epoll_wait")(error.into())),
        }
    }

    fn accept(&mut self, bus: usize) {
        loop {
            let Some(listener) = &mut self.buses[bus].listener else {
                return;
            };
            match listener.accept(Instant::now()) {
                Ok(Some(connection)) => {
                    tracing::debug!(peer = connection.peer_name(), "connected");
                    if let Err(error) = self.attach(bus, connection) {
                        tracing::warn!(%error, "connection dropped");
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let now = self.now();
                    if self.buses[bus].listener_log.admit(now) {
                        tracing::warn!(%error, "cannot accept");
                    }
                    return;
                }
            }
        }
    }

    fn take_replies(&mut self) {
        let now = self.now();
        let mut replies = Vec::new();
        self.replies.take(&mut replies);
        for (worker, reply) in replies {
            let bus = self.buses.iter_mut().find(|bus| match &reply {
                Reply::Done { ticket, .. } => bus.core.awaits(*ticket),
                Reply::Notice(slot, _) => bus.core.owns(worker, *slot),
            });
            if let Some(bus) = bus {
                bus.core.handle_reply(now, worker, reply);
            }
        }
    }

    /// Moves messages of one bus as far as they go.
    fn serve(&mut self, bus: usize) {
        let now = self.now();
        self.send_orders(bus);
        let unread: Vec<ConnId> = self.buses[bus].unread.iter().copied().collect();
        for conn in unread {
            if let Err(error) = self.buses[bus].read(now, conn) {
                // Before others are read: who came later may ask for what this one held.
                self.bury(now, bus, conn, error);
            }
            self.send_orders(bus);
        }
        let all: Vec<ConnId> = self.buses[bus].connections.keys().copied().collect();
        for conn in all {
            if let Err(error) = self.buses[bus].write(conn) {
                self.bury(now, bus, conn, error);
                self.send_orders(bus);
            }
        }
    }

    /// A connection is over.
    fn bury(&mut self, now: virtio_msg::Instant, bus: usize, conn: ConnId, error: ChannelError) {
        let Bus {
            core,
            connections,
            unread,
            ..
        } = &mut self.buses[bus];
        if let Some(mut connection) = connections.remove(&conn) {
            // On a bus with room for one driver the descriptor outlives the connection, and is the next one's.
            if let Ok(fd) = connection.poll_fd() {
                let _ = epoll::delete(&self.epoll, fd);
            }
            match error {
                ChannelError::Closed => {
                    tracing::debug!(peer = connection.peer_name(), "disconnected");
                }
                error if core.may_log(now) => {
                    tracing::warn!(peer = connection.peer_name(), %error, "connection closed");
                }
                _ => {}
            }
        }
        unread.remove(&conn);
        core.disconnect(now, conn);
    }

    fn send_orders(&mut self, bus: usize) {
        while let Some(order) = self.buses[bus].core.poll_order() {
            let worker = &self.workers[order.worker];
            if worker.send(order.slot, order.ticket, order.command) {
                let reply = Reply::Done {
                    ticket: order.ticket,
                    result: Ok(()),
                };
                let now = self.now();
                self.buses[bus].core.handle_reply(now, order.worker, reply);
            }
        }
    }
}

fn index_of(data: u64) -> usize {
    usize::try_from(data & 0xffff).expect("sixteen bits")
}
