// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The console device (VIRTIO 1.3, 5.3), and who watches it.
//!
//! Each port of a device has a [`Hub`]: clients on a socket, a pseudoterminal, a log. What the guest writes is never
//! held up by them. Hubs can also be had without a device, for a serial line: [`Serial`].
//!
//! A driver whose device host was killed goes on with the next one without saying anything again: it is taken to be
//! ready, with all ports open, and is told of all ports once more, for what it was told may have been lost.

mod backlog;
mod client;
mod control;
mod handle;
mod hub;
mod pty;
mod serial;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::epoll::{self, EventData, EventFlags};
use virtio_msg::FeatureSet;

use self::control::Pending;
pub use self::handle::{Handle, Report, Size};
pub use self::hub::{
    BACKLOG, Hub, HubConfig, HubError, MAX_CLIENTS, MAX_INPUT, default_socket, is_plain_name,
};
pub use self::serial::Serial;
use crate::device::{
    Device, DeviceError, Identity, Io, Monitor, Progress, ReadOnly, Snapshot, VENDOR_ID,
    transport_features,
};

/// Device id of a console device.
pub const DEVICE_ID: u32 = 3;

/// Ports that a device may have, the console included.
pub const MAX_PORTS: usize = 31;

/// Entries of each queue. Linux fills a receive queue with a page for each.
pub const QUEUE_SIZE: u16 = 64;

/// Feature bits (VIRTIO 1.3, 5.3.3).
pub mod bits {
    /// The configuration has the terminal's size.
    pub const SIZE: u32 = 0;
    /// There may be several ports, and control queues.
    pub const MULTIPORT: u32 = 1;
    /// A character can be written to the configuration.
    pub const EMERG_WRITE: u32 = 2;
}

/// Bytes of the configuration: columns, rows, ports, the emergency character.
const CONFIG: usize = 12;
/// Where the emergency character is written.
const EMERG_WR: usize = 8;

/// Chains taken at a time.
const BATCH: usize = 32;
/// Bytes taken from a guest in one turn, after which others have theirs.
const MAX_TURN: usize = 64 * 1024;
/// Bytes that are copied at a time.
const CHUNK: usize = 4096;

/// How a console device looks to its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Names of the ports after the console, at most [`MAX_PORTS`] less one.
    pub ports: Vec<String>,
    /// Offer several ports even if there is only the console.
    pub multiport: bool,
    /// How a size is written in control messages.
    pub size_order: SizeOrder,
}

/// The order in which RESIZE tells columns and rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SizeOrder {
    /// As the standard has it.
    #[default]
    ColsFirst,
    /// As Linux before 6.15 reads it, and distributions' kernels that have not taken over its commit 5326ab737a47.
    RowsFirst,
}

/// A console device.
#[derive(Debug)]
pub struct Console {
    settings: Settings,
    ports: Vec<Port>,
    /// Readable when one of the hubs has work.
    epoll: OwnedFd,
    /// The size that the configuration tells.
    size: Size,
    session: Session,
    counters: Arc<Counters>,
}

/// What the driver has negotiated and said.
#[derive(Clone, Copy, Debug, Default)]
struct Session {
    multiport: bool,
    size: bool,
    /// DEVICE_READY has come.
    ready: bool,
}

#[derive(Debug)]
struct Port {
    hub: Hub,
    /// What is called so in the guest; `None` for the console.
    name: Option<String>,
    /// The guest takes input.
    open: bool,
    /// Control messages that the driver is still to be told.
    pending: Pending,
    /// Bytes of the first chain of the transmit queue that are dealt with.
    sent: usize,
    /// The size that the driver was told last.
    size: Option<Size>,
}

#[derive(Debug, Default)]
struct Counters {
    output: AtomicU64,
    input: AtomicU64,
    control: AtomicU64,
    refused: AtomicU64,
    too_small: AtomicU64,
    emergency: AtomicU64,
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

impl Monitor for Counters {
    fn snapshot(&self) -> Snapshot {
        let counters = [
            ("output_bytes", &self.output),
            ("input_bytes", &self.input),
            ("control_messages", &self.control),
            ("control_refused", &self.refused),
            ("control_too_small", &self.too_small),
            ("emergency_bytes", &self.emergency),
        ];
        Snapshot {
            counters: counters
                .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
                .to_vec(),
            ..Snapshot::default()
        }
    }
}

/// Which queue of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

const CONTROL_RECEIVE: usize = 2;

const fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

/// What the queue with this index is for.
fn queue_at(index: usize, multiport: bool) -> Option<Queue> {
    match index {
        0 => Some(Queue::Receive(0)),
        1 => Some(Queue::Transmit(0)),
        _ if !multiport => None,
        2 => Some(Queue::ControlReceive),
        3 => Some(Queue::ControlTransmit),
        _ if index.is_multiple_of(2) => Some(Queue::Receive(index / 2 - 1)),
        _ => Some(Queue::Transmit(index / 2 - 1)),
    }
}

/// A device cannot be as it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// There are not as many hubs as ports, or too many ports.
    #[error("a console device has a hub for each of its 1 to {MAX_PORTS} ports")]
    Ports,
    /// No descriptor is left.
    #[error("cannot watch the consoles: {0}")]
    Os(#[from] std::io::Error),
}

impl Console {
    /// A device with a hub for its console, and one for each of `settings.ports`.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`].
    pub fn new(settings: &Settings, hubs: Vec<Hub>) -> Result<Self, ConsoleError> {
        if hubs.len() != settings.ports.len() + 1 || hubs.len() > MAX_PORTS {
            return Err(ConsoleError::Ports);
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(std::io::Error::from)?;
        for hub in &hubs {
            let data = EventData::new_u64(0);
            epoll::add(&epoll, hub.event_fd(), data, EventFlags::IN)
                .map_err(std::io::Error::from)?;
        }
        let names = std::iter::once(None).chain(settings.ports.iter().cloned().map(Some));
        let ports = hubs.into_iter().zip(names).map(|(hub, name)| Port {
            size: None,
            hub,
            name,
            open: false,
            pending: Pending::default(),
            sent: 0,
        });
        Ok(Self {
            settings: settings.clone(),
            ports: ports.collect(),
            epoll,
            size: Size { cols: 0, rows: 0 },
            session: Session::default(),
            counters: Arc::default(),
        })
    }

    /// Ways to its hubs from other threads: the console, then the ports.
    pub fn handles(&self) -> Vec<Handle> {
        self.ports.iter().map(|port| port.hub.handle()).collect()
    }

    fn offers_multiport(&self) -> bool {
        self.settings.multiport || !self.settings.ports.is_empty()
    }

    fn size_bytes(&self) -> [u8; 4] {
        let [a, b] = self.size.cols.to_le_bytes();
        let [c, d] = self.size.rows.to_le_bytes();
        [a, b, c, d]
    }

    fn set_open(&mut self, port: usize, open: bool, io: &mut Io<'_>) {
        if let Some(of) = self.ports.get_mut(port) {
            of.open = open;
            of.hub.set_guest_open(open);
            // What was typed before waits.
            io.again(receive_queue(port));
        }
    }

    /// Tells the driver of sizes that have changed.
    fn look_at_sizes(&mut self, io: &mut Io<'_>) {
        if let Some(size) = self.ports[0].hub.size()
            && size != self.size
        {
            self.size = size;
            io.config_changed(0, &self.size_bytes());
        }
        let session = self.session;
        for port in &mut self.ports {
            let size = port.hub.size();
            if size == port.size {
                continue;
            }
            port.size = size;
            // A port that is no console has no size.
            if port.name.is_none() && session.multiport && session.size && session.ready {
                port.pending.insert(Pending::RESIZE);
                io.again(CONTROL_RECEIVE);
            }
        }
    }

    /// Gives the driver what was typed, as far as it has buffers.
    fn receive(
        &mut self,
        queue: usize,
        port: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let session = self.session;
        let Some(port) = self.ports.get_mut(port) else {
            return Ok(Progress::Blocked);
        };
        // A port that is not open throws away what comes.
        if port.hub.input().is_empty() || (session.multiport && !port.open) {
            return Ok(Progress::Blocked);
        }
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Blocked);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring.pop(io.space, io.storage, BATCH).map_err(failed)?;
        let count = batch.len();
        let mut left = count;
        for chain in batch.iter() {
            if port.hub.input().is_empty() {
                break;
            }
            let mut written = 0;
            let mut to = chain.writable();
            for part in [
                port.hub.input().as_slices().0,
                port.hub.input().as_slices().1,
            ] {
                let done = to.write(part);
                to = to.skip(done);
                written += done;
            }
            port.hub.consume(written);
            add(&self.counters.input, written);
            let written = u32::try_from(written).expect("MAX_INPUT fits in 32 bits");
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
            left -= 1;
        }
        ring.rewind(left);
        io.publish(queue)?;
        // Without buffers the driver must say when there are some.
        Ok(match (port.hub.input().is_empty(), count) {
            (true, _) => Progress::Blocked,
            (false, 0) => Progress::Idle,
            (false, _) => Progress::More,
        })
    }

    /// Takes what the guest writes.
    fn transmit(
        &mut self,
        queue: usize,
        port: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let (Some(port), Some(Some(active))) = (self.ports.get_mut(port), io.queues.get_mut(queue))
        else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring
            .pop(io.space, io.storage, budget.min(BATCH))
            .map_err(failed)?;
        let count = batch.len();
        let mut left = count;
        let mut room = MAX_TURN;
        let mut chunk = [0; CHUNK];
        for chain in batch.iter() {
            // A chain may be of any length: the next turn goes on in it.
            let mut rest = chain.readable().skip(port.sent);
            while !rest.is_empty() && room > 0 {
                let read = rest.read(&mut chunk[..CHUNK.min(room)]);
                if read == 0 {
                    break;
                }
                port.hub.output(&chunk[..read]);
                add(&self.counters.output, read);
                port.sent += read;
                room -= read;
                rest = rest.skip(read);
            }
            if !rest.is_empty() && room == 0 {
                break;
            }
            port.sent = 0;
            ring.complete(io.space, chain.head(), 0).map_err(failed)?;
            left -= 1;
        }
        ring.rewind(left);
        io.publish(queue)?;
        Ok(if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}

impl Device for Console {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        let mut features = transport_features();
        features.insert(bits::SIZE);
        features.insert(bits::EMERG_WRITE);
        if self.offers_multiport() {
            features.insert(bits::MULTIPORT);
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let queues = if self.offers_multiport() {
            2 * (self.ports.len() + 1)
        } else {
            2
        };
        vec![QUEUE_SIZE; queues]
    }

    fn config(&self) -> Vec<u8> {
        let ports = u32::try_from(self.ports.len()).expect("at most MAX_PORTS");
        let mut config = Vec::with_capacity(CONFIG);
        config.extend(self.size_bytes());
        config.extend(ports.to_le_bytes());
        config.extend([0; 4]);
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), ReadOnly> {
        let [character, rest @ ..] = data else {
            return Ok(());
        };
        if offset != EMERG_WR || rest.len() > 3 {
            return Err(ReadOnly);
        }
        // Possibly the last that is heard of it.
        self.ports[0].hub.output(&[*character]);
        add(&self.counters.emergency, 1);
        Ok(())
    }

    fn activate(&mut self, features: &FeatureSet) {
        self.session = Session {
            multiport: features.contains(bits::MULTIPORT),
            size: features.contains(bits::SIZE),
            ready: false,
        };
    }

    fn reset(&mut self) {
        let Self {
            settings: _,
            ports,
            epoll: _,
            size: _,
            session,
            counters: _,
        } = self;
        *session = Session::default();
        for port in ports {
            let Port {
                hub,
                name: _,
                open,
                pending,
                sent,
                size: _,
            } = port;
            // What was typed stays: whoever typed it may have waited for the guest to start.
            hub.set_guest_open(false);
            *open = false;
            *pending = Pending::default();
            *sent = 0;
        }
    }

    fn queues_changed(&mut self, io: &mut Io<'_>, resumed: bool) {
        if resumed && self.session.multiport {
            // The driver has said that it is ready, and what it has open, to a process that is no more. What that
            // process had still to tell is not known either: a driver that hears of a port again just answers.
            self.session.ready = true;
            for port in 0..self.ports.len() {
                self.set_open(port, true, io);
                self.ports[port].pending = Pending::ADD;
            }
            io.again(CONTROL_RECEIVE);
        }
        for port in 0..self.ports.len() {
            let there = |queue: usize| matches!(io.queues.get(queue), Some(Some(_)));
            if !there(receive_queue(port) + 1) {
                self.ports[port].sent = 0;
            }
            if !self.session.multiport && port == 0 && there(receive_queue(0)) {
                self.set_open(0, true, io);
            }
        }
        if self.session.size && !self.session.multiport && self.ports[0].hub.size().is_some() {
            // Linux does not look at the size before it is told of a change.
            io.config_changed(0, &self.size_bytes());
        }
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        Some(Arc::<Counters>::clone(&self.counters))
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        match queue_at(queue, self.session.multiport) {
            Some(Queue::Receive(port)) => self.receive(queue, port, io),
            Some(Queue::Transmit(port)) => self.transmit(queue, port, budget, io),
            Some(Queue::ControlReceive) => self.tell(queue, io),
            Some(Queue::ControlTransmit) => self.hear(queue, io),
            // A queue that does not exist with these features.
            None => Ok(Progress::Blocked),
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for (index, port) in self.ports.iter_mut().enumerate() {
            port.hub.poll();
            if !port.hub.input().is_empty() {
                io.again(receive_queue(index));
            }
        }
        self.look_at_sizes(io);
        Ok(())
    }
}
