// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory and doorbells as a bus uses them: its own end, one that several buses of this program share, or an AMP FIFO.

use super::fifo::{Fifo, Registers};
use ivshmem::{Client, Device, Event, Memory, PeerId};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use vmsg_mem::Doorbell;

/// How long ringing everybody may take. Doorbells of hostile peers take 20 ms each, once.
const RINGING: Duration = Duration::from_millis(100);

/// What rings the other end.
pub(super) enum Bell {
    Door(Doorbell),
    Fifo(Arc<Fifo<Box<dyn Registers>>>),
}

impl Bell {
    fn ring(&self) {
        match self {
            Self::Door(bell) => drop(bell.ring()),
            Self::Fifo(fifo) => drop(fifo.notify()),
        }
    }
}

/// Rings, for so long; those that have held this up do not the next time.
pub(super) fn ring_all(bells: &[Bell]) {
    let begin = (bells.len() > 1).then(Instant::now);
    for bell in bells {
        bell.ring();
        if begin.is_some_and(|begin| begin.elapsed() > RINGING) {
            return;
        }
    }
}

/// A function that VFIO gives to one process once, and that has several buses.
pub(super) struct Shared {
    device: Device,
    /// Vectors that are a bus's.
    of_buses: Mutex<Vec<u16>>,
}

impl Shared {
    pub(super) fn new(device: Device) -> Arc<Self> {
        Arc::new(Self {
            device,
            of_buses: Mutex::default(),
        })
    }

    fn of_buses(&self) -> Vec<u16> {
        let vectors = self.of_buses.lock();
        vectors.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The functions that this process has open, by address.
static SHARED: Mutex<BTreeMap<String, Weak<Shared>>> = Mutex::new(BTreeMap::new());

/// The function at `address`: opened by `open`, unless it is open already.
pub(super) fn share<E>(
    address: &str,
    open: impl FnOnce() -> Result<Device, E>,
) -> Result<Arc<Shared>, E> {
    // Held meanwhile: nobody else of this process is to try as well.
    let mut all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(shared) = all.get(address).and_then(Weak::upgrade) {
        return Ok(shared);
    }
    let shared = Shared::new(open()?);
    all.retain(|_, shared| shared.strong_count() > 0);
    all.insert(address.to_owned(), Arc::downgrade(&shared));
    Ok(shared)
}

/// One FIFO of a function.
pub(super) struct FifoEnd {
    memory: Arc<Memory>,
    fifo: Arc<Fifo<Box<dyn Registers>>>,
    interrupt: OwnedFd,
}

impl FifoEnd {
    /// The FIFOs' memory, the one of them that it is, and the eventfd of its interrupt.
    pub(super) fn new(
        memory: Arc<Memory>,
        fifo: Fifo<Box<dyn Registers>>,
        interrupt: OwnedFd,
    ) -> Self {
        Self {
            memory,
            fifo: Arc::new(fifo),
            interrupt,
        }
    }
}

/// Where a bus is.
pub(super) enum Doors {
    Own(Box<Device>),
    /// With the vector that is this bus's.
    Shared(Arc<Shared>, u16),
    Fifo(FifoEnd),
}

impl Doors {
    /// Beside others of this process.
    pub(super) fn shared(shared: Arc<Shared>, vector: u16) -> Self {
        let of_buses = shared.of_buses.lock();
        of_buses
            .unwrap_or_else(PoisonError::into_inner)
            .push(vector);
        Self::Shared(shared, vector)
    }

    fn device(&self) -> Option<&Device> {
        match self {
            Self::Own(device) => Some(device),
            Self::Shared(shared, _) => Some(&shared.device),
            Self::Fifo(_) => None,
        }
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        match self {
            Self::Own(device) => device.memory(),
            Self::Shared(shared, _) => shared.device.memory(),
            Self::Fifo(end) => &end.memory,
        }
    }

    pub(super) fn id(&self) -> Option<PeerId> {
        self.device().and_then(Device::id)
    }

    pub(super) fn is_fifo(&self) -> bool {
        matches!(self, Self::Fifo(_))
    }

    /// How many vectors there are to be rung by; a FIFO has one.
    pub(super) fn vectors(&self) -> u16 {
        self.device().map_or(1, Device::vectors)
    }

    pub(super) fn vector_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Fifo(end) => Some(end.interrupt.as_fd()),
            _ => self.device()?.vector_fd(vector),
        }
    }

    /// The vectors that are no bus's.
    pub(super) fn spare(&self, bus: u16) -> impl Iterator<Item = (u16, BorrowedFd<'_>)> {
        let others = match self {
            Self::Shared(shared, _) => shared.of_buses(),
            _ => Vec::new(),
        };
        let device = self.device();
        (0..device.map_or(0, Device::vectors))
            .filter(move |vector| *vector != bus && !others.contains(vector))
            .filter_map(move |vector| Some((vector, device?.vector_fd(vector)?)))
    }

    /// A doorbell of a peer.
    pub(super) fn bell(&self, peer: PeerId, vector: u16) -> Option<Doorbell> {
        self.device()?.bell(peer, vector)
    }

    pub(super) fn ring(&self, peer: PeerId, vector: u16) {
        // Who is not there any more need not be rung.
        drop(self.device().map(|device| device.ring(peer, vector)));
    }

    /// What rings the other end, where there can be only one.
    pub(super) fn only_bell(&self) -> Option<Bell> {
        match self {
            Self::Fifo(end) => Some(Bell::Fifo(Arc::clone(&end.fifo))),
            _ => None,
        }
    }

    pub(super) fn as_client(&self) -> Option<&Client> {
        match self {
            Self::Own(device) => device.as_client(),
            _ => None,
        }
    }

    pub(super) fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.as_client().map(Client::poll_fd)
    }

    pub(super) fn poll(&mut self) -> Option<Event> {
        match self {
            Self::Own(device) => device.poll(),
            _ => None,
        }
    }
}

impl Drop for Doors {
    fn drop(&mut self) {
        if let Self::Shared(shared, vector) = self {
            let of_buses = shared.of_buses.lock();
            let mut of_buses = of_buses.unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = of_buses.iter().position(|other| other == vector) {
                of_buses.swap_remove(at);
            }
        }
    }
}

#[cfg(test)]
#[path = "doors_test.rs"]
mod tests;
