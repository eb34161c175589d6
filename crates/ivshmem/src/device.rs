// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One type for all ways to the memory and the doorbells.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmsg_mem::Doorbell;

use crate::memory::Memory;
use crate::pci;
use crate::plain::{self, Plain, PlainError};
use crate::{Client, Event, PeerId, RingError};

/// An end: memory and, where there are some, doorbells.
#[derive(Debug)]
pub struct Device {
    memory: Arc<Memory>,
    doors: Doors,
}

/// The ways to doorbells.
#[derive(Debug)]
enum Doors {
    None,
    Client(Box<Client>),
    Pci(pci::Doors),
}

impl Device {
    /// A client of a server, on the host.
    ///
    /// # Errors
    ///
    /// The memory cannot be mapped.
    pub fn client(client: Client) -> Result<Self, vmsg_mem::Error> {
        let memory = Memory::of_file(client.memory_fd(), client.memory_size())?;
        Ok(Self {
            memory: Arc::new(memory),
            doors: Doors::Client(Box::new(client)),
        })
    }

    /// Memory alone, on the host: the first `size` bytes, or all that there are. With a size the memory is made
    /// if it is not there.
    ///
    /// # Errors
    ///
    /// [`PlainError`].
    pub fn plain(place: &Plain, size: Option<u64>) -> Result<Self, PlainError> {
        Ok(Self {
            memory: Arc::new(plain::open(place, size)?),
            doors: Doors::None,
        })
    }

    /// A PCI function, in a guest. By VFIO it is taken: nobody else can have it so until this is dropped.
    ///
    /// # Errors
    ///
    /// [`pci::Error`], which says what to do.
    pub fn pci(function: &pci::Function, access: pci::Access) -> Result<Self, pci::Error> {
        let (memory, doors) = pci::open(function, access)?;
        Ok(Self {
            memory: Arc::new(memory),
            doors: Doors::Pci(doors),
        })
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// This end's number; `None` where there are no doorbells.
    pub fn id(&self) -> Option<PeerId> {
        match &self.doors {
            Doors::None => None,
            Doors::Client(client) => Some(client.id()),
            Doors::Pci(doors) => doors.id(),
        }
    }

    /// How many doorbells this end can be rung by; 0 if it hears none.
    pub fn vectors(&self) -> u16 {
        match &self.doors {
            Doors::None => 0,
            Doors::Client(client) => client.vectors(),
            Doors::Pci(doors) => doors.vectors(),
        }
    }

    /// The eventfd that counts the rings of a vector, to be waited for edge-triggered and never read: on the host
    /// others hold it too.
    pub fn vector_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        match &self.doors {
            Doors::None => None,
            Doors::Client(client) => client.vector_fd(vector),
            Doors::Pci(doors) => doors.vector_fd(vector),
        }
    }

    /// Rings a peer. In a guest nobody says whether it is there.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    pub fn ring(&self, peer: PeerId, vector: u16) -> Result<(), RingError> {
        match &self.doors {
            Doors::None => Err(RingError::NoDoorbells),
            Doors::Client(client) => client.ring(peer, vector),
            Doors::Pci(doors) => doors.ring(peer, vector),
        }
    }

    /// A doorbell of a peer, to be rung from anywhere; `None` if there is none such, or no descriptor left for it.
    pub fn bell(&self, peer: PeerId, vector: u16) -> Option<Doorbell> {
        match &self.doors {
            Doors::None => None,
            Doors::Client(client) => client.bell(peer, vector).ok(),
            Doors::Pci(doors) => doors.bell(peer, vector),
        }
    }

    /// The client of a server that this is, which knows the peers; `None` in a guest and for memory alone.
    pub fn as_client(&self) -> Option<&Client> {
        match &self.doors {
            Doors::Client(client) => Some(client),
            Doors::None | Doors::Pci(_) => None,
        }
    }

    /// Readable when [`Self::poll`] has something to tell; `None` where there never are news: in a guest, and for
    /// memory alone. To be asked for again after [`Event::ServerGone`].
    pub fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.as_client().map(Client::poll_fd)
    }

    /// The next news of the server. Never waits.
    pub fn poll(&mut self) -> Option<Event> {
        match &mut self.doors {
            Doors::Client(client) => client.poll(),
            Doors::None | Doors::Pci(_) => None,
        }
    }
}

/// Anybody may ring from any thread.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Device>();
};
