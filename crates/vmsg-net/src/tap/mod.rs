// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tap interface of the host: what the guest sends arrives at the host's own network stack, and
//! the other way round.
//!
//! An existing interface is joined, or one is created, or descriptors are taken that somebody else
//! has opened. Frames go between the kernel and the guest's memory without a copy in this process;
//! checksums and segmentation are left to whoever is at the other end, as far as the guest has
//! agreed. Each queue pair of the guest has a queue of the interface.
//!
//! The interface has a carrier only while the guest has a driver, and the guest's link is up only
//! while the interface is.
//!
//! Sources: Documentation/networking/tuntap.rst and drivers/net/tun.c of Linux.

mod ioctl;
mod netlink;
mod open;
mod queue;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll;

pub use self::open::{TapConfig, TapError};

use self::ioctl::{Value, offload};
use self::netlink::{Change, Monitor};
use self::queue::{Queue, Sent, Step};
use crate::{Backend, Guest, Offloads, RxSink, TxFrame, VnetHeader};

/// Longest frame: an IP packet of 65535 bytes behind an Ethernet header with a VLAN tag.
const LONGEST: usize = 65535 + 18;
/// Shorter than an Ethernet header is no frame.
const SHORTEST: usize = 14;
/// Frames of one queue in a row while others wait.
const TURN: usize = 32;
/// Turns in one [`Backend::receive`].
const TURNS: usize = 64;
/// Frames that the kernel keeps for us at most, usually 500 or 1000 for each queue.
const BACKLOG: usize = 4096;
/// Marks the monitor among the events; queues have their numbers.
const MONITOR: u64 = u64::MAX;

/// What went through a tap interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounters {
    /// Frames that the kernel has taken.
    pub sent: u64,
    /// Frames that the guest has got.
    pub received: u64,
    /// Frames of the guest that cannot be: too short or long, or with offloads that were not agreed on.
    pub tx_bad: u64,
    /// Frames of the guest that the kernel refused: the interface is down, a header does not fit its frame.
    pub tx_refused: u64,
    /// Frames for a driver that is gone, or that it cannot take.
    pub rx_dropped: u64,
}

/// A tap interface as a back end of one network device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Queue>,
    epoll: OwnedFd,
    /// Without one nothing is known of the interface: it is in another network namespace.
    monitor: Option<Monitor>,
    up: bool,
    gone: bool,
    offloads: Offloads,
    guest: Guest,
    /// The queue whose turn it is.
    next: usize,
    counters: TapCounters,
    complained: bool,
}

impl Tap {
    /// Joins or creates the interface.
    ///
    /// # Errors
    ///
    /// [`TapError`] says what is missing and how it can be had.
    pub fn open(config: &TapConfig) -> Result<Self, TapError> {
        let opened = config.open()?;
        let system = |what| {
            move |error: rustix::io::Errno| TapError::Os {
                what,
                source: error.into(),
            }
        };
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("an epoll instance"))?;
        let mut up = true;
        let mut monitor = None;
        if let Some(link) = &opened.link {
            up = link.up;
            let new = Monitor::new(link.index).map_err(|source| TapError::Os {
                what: "listening for changes of the interface",
                source,
            })?;
            epoll::add(
                &epoll,
                new.fd(),
                epoll::EventData::new_u64(MONITOR),
                epoll::EventFlags::IN,
            )
            .map_err(system("an epoll instance"))?;
            monitor = Some(new);
        }
        let mut queues = Vec::with_capacity(opened.queues.len());
        for (number, fd) in (0..).zip(opened.queues) {
            // By edges: frames that wait for room of the guest would wake us all the time.
            let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
            epoll::add(&epoll, &fd, epoll::EventData::new_u64(number), flags)
                .map_err(system("an epoll instance"))?;
            queues.push(Queue::new(fd, opened.vnet));
        }
        let mut tap = Self {
            name: opened.name,
            queues,
            epoll,
            monitor,
            up,
            gone: false,
            offloads: opened.offloads,
            guest: Guest::NONE,
            next: 0,
            counters: TapCounters::default(),
            complained: false,
        };
        // What changed between the first look and the monitor.
        tap.look_at_link();
        tap.set_guest(&Guest::NONE);
        Ok(tap)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What went through so far.
    pub const fn counters(&self) -> TapCounters {
        self.counters
    }

    fn look_at_link(&mut self) {
        let Some(monitor) = &mut self.monitor else {
            return;
        };
        match monitor.last_change() {
            Some(Change::Is(link)) => self.up = link.up,
            Some(Change::Gone) => self.interface_is_gone(),
            None => {}
        }
    }

    fn interface_is_gone(&mut self) {
        if !self.gone {
            self.gone = true;
            tracing::error!(interface = self.name, "the tap interface was deleted");
        }
    }

    fn set_carrier(&self, on: bool) {
        let Some(first) = self.queues.first() else {
            return;
        };
        // Before Linux 5.0 the carrier is always on.
        if let Err(error) = ioctl::set(first.fd(), Value::Carrier, on.into()) {
            tracing::debug!(interface = self.name, on, %error, "carrier");
        }
    }

    /// Has as many queues take part as the guest has pairs.
    fn attach_queues(&mut self, pairs: usize) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let wanted = index < pairs.max(1);
            if queue.attached == wanted {
                continue;
            }
            if !wanted {
                queue.discard(BACKLOG);
            }
            match ioctl::set_queue(queue.fd(), wanted) {
                Ok(()) => {
                    queue.attached = wanted;
                    queue.readable = wanted;
                }
                Err(error) if !self.gone => {
                    tracing::warn!(interface = self.name, queue = index, %error, "a queue stays as it is");
                }
                Err(_) => {}
            }
        }
    }

    /// What the guest claims about its frame has been agreed on, and it is one.
    fn is_good(&self, frame: &TxFrame<'_>) -> bool {
        let TxFrame { header, payload } = frame;
        let agreed = &self.guest.offloads;
        let ecn = header.gso_type & VnetHeader::GSO_ECN != 0;
        let gso = match header.gso_type & !VnetHeader::GSO_ECN {
            VnetHeader::GSO_NONE => !ecn,
            VnetHeader::GSO_TCPV4 => agreed.tso4,
            VnetHeader::GSO_TCPV6 => agreed.tso6,
            VnetHeader::GSO_UDP => agreed.ufo,
            VnetHeader::GSO_UDP_L4 => agreed.uso,
            _ => false,
        };
        gso && (!ecn || agreed.ecn)
            && (!header.needs_csum() || agreed.csum)
            && (SHORTEST..=LONGEST).contains(&payload.len())
    }

    fn complain(&mut self, refused: Option<&io::Error>) {
        if std::mem::replace(&mut self.complained, true) {
            return;
        }
        let error = refused.map(tracing::field::display);
        tracing::warn!(
            interface = self.name,
            error,
            "frames of the guest are no good; they are dropped and counted from now on"
        );
    }
}

impl Backend for Tap {
    fn queue_pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_guest(&mut self, guest: &Guest) {
        let mut guest = *guest;
        guest.offloads = self.offloads.intersection(guest.offloads);
        if !guest.running {
            // What waits was meant for the driver before, with what it had agreed on.
            self.set_carrier(false);
            for queue in &mut self.queues {
                queue.discard(BACKLOG);
            }
        }
        self.attach_queues(usize::from(guest.pairs));
        let agreed = &guest.offloads;
        let mut bits = 0;
        for (given, bit) in [
            (agreed.guest_tso4, offload::TSO4),
            (agreed.guest_tso6, offload::TSO6),
            (agreed.guest_ecn, offload::ECN),
            (agreed.guest_ufo, offload::UFO),
            (agreed.guest_uso4 && agreed.guest_uso6, offload::USO),
        ] {
            if given && agreed.guest_csum {
                bits |= bit;
            }
        }
        if agreed.guest_csum {
            bits |= offload::CSUM;
        }
        if bits & (offload::TSO4 | offload::TSO6) == 0 {
            bits &= !offload::ECN;
        }
        if let Some(first) = self.queues.first()
            && self.offloads.guest_csum
            && let Err(error) = ioctl::set_offload(first.fd(), bits)
        {
            tracing::warn!(interface = self.name, bits, %error, "offloads stay as they are");
        }
        if guest.running {
            self.set_carrier(true);
        }
        self.guest = guest;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    fn poll(&mut self, _: Instant) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 32];
        // One round takes a part of many queues; the rest keeps the descriptor readable.
        let mut changed = false;
        for event in crate::events::waiting(&self.epoll, &mut events) {
            match event.data.u64() {
                MONITOR => changed = true,
                number => {
                    let queue = usize::try_from(number).ok();
                    if let Some(queue) = queue.and_then(|number| self.queues.get_mut(number)) {
                        queue.readable = true;
                    }
                }
            }
        }
        if changed {
            self.look_at_link();
        }
    }

    fn link_is_up(&self) -> bool {
        self.up && !self.gone
    }

    fn transmit(&mut self, _: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        let attached = self.queues.iter().take_while(|queue| queue.attached);
        let number = usize::from(pair) % attached.count().max(1);
        for (index, frame) in frames.iter().enumerate() {
            if !self.is_good(frame) {
                self.counters.tx_bad += 1;
                self.complain(None);
                continue;
            }
            let mut frame = *frame;
            frame.header.flags &= VnetHeader::NEEDS_CSUM;
            match self.queues.get(number).map(|queue| queue.send(&frame)) {
                Some(Ok(Sent::Taken)) => self.counters.sent += 1,
                Some(Ok(Sent::Full)) => return index,
                Some(Ok(Sent::Dropped)) | None => self.counters.tx_bad += 1,
                Some(Err(error)) => {
                    self.counters.tx_refused += 1;
                    match error.raw_os_error() {
                        // The interface is down, which the guest hears by its link.
                        Some(libc::EIO) => {}
                        Some(libc::EBADFD) => self.interface_is_gone(),
                        _ => self.complain(Some(&error)),
                    }
                }
            }
        }
        frames.len()
    }

    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let before = self.counters.received;
        let count = self.queues.len();
        let (heads, allowed) = (self.guest.heads, self.guest.offloads);
        // Queues in a row that had nothing to give.
        let mut idle = 0;
        for _ in 0..TURNS {
            if idle >= count {
                break;
            }
            let number = self.next % count;
            self.next = number + 1;
            idle += 1;
            let pair = u16::try_from(number).unwrap_or(u16::MAX);
            for _ in 0..TURN {
                let Some(queue) = self.queues.get_mut(number) else {
                    break;
                };
                match queue.receive(pair, heads, &allowed, sink) {
                    Step::Delivered => {
                        self.counters.received += 1;
                        idle = 0;
                    }
                    Step::Dropped => {
                        self.counters.rx_dropped += 1;
                        idle = 0;
                    }
                    Step::Empty | Step::NoRoom => break,
                    Step::Gone => {
                        self.interface_is_gone();
                        break;
                    }
                }
            }
        }
        usize::try_from(self.counters.received - before).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        self.queues.iter().any(Queue::has_frames)
    }

    fn shutdown(&mut self) {
        self.set_carrier(false);
    }
}
