// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a specification to memory and doorbells.

use super::doors::{self, Doors, FifoEnd};
use super::fifo::{self, Fifo, FifoError, Registers};
use super::geometry::Geometry;
use super::spec::{IvshmemSpec, MemoryMode, Place, QueueLayout, Ram, SpecError};
use crate::{Capabilities, CommonRamError};
use ivshmem::client::{self, Client};
use ivshmem::pci::{self, Tree};
use ivshmem::{Device, Plain, PlainError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a server may take to let a client in.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the memory of a bus cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// What was said contradicts itself.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The server.
    #[error(transparent)]
    Client(#[from] client::ConnectError),
    /// Memory without doorbells.
    #[error(transparent)]
    Plain(#[from] PlainError),
    /// The PCI function.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// No address of a PCI function.
    #[error(transparent)]
    Address(#[from] pci::BadAddress),
    /// The PCI function is no AMP FIFO that is known.
    #[error(transparent)]
    Fifo(#[from] FifoError),
    /// It cannot be mapped.
    #[error("cannot map the memory of {place}: {source}")]
    Map {
        /// Where it is.
        place: String,
        /// Why.
        source: vmsg_mem::Error,
    },
    /// The layout does not fit.
    #[error(
        "the memory of {place} has {have:#x} bytes: too little for layout={layout} at offset={offset:#x}"
    )]
    TooSmall {
        /// Where it is.
        place: String,
        /// How the queues were to lie.
        layout: &'static str,
        /// Where they were to begin.
        offset: u64,
        /// Bytes that there are for messages.
        have: usize,
    },
    /// Another device host is there.
    #[error(
        "{place} has a device host at offset={offset:#x} already, `{holder}`; end that process first, or use another offset="
    )]
    Held {
        /// Where it is.
        place: String,
        /// Where the queues were to begin.
        offset: u64,
        /// As it calls itself.
        holder: String,
    },
    /// The bus's vector is none of this end's.
    #[error("vector={vector}: this end has {have} doorbell vectors")]
    NoVector {
        /// What was said.
        vector: u16,
        /// How many there are.
        have: u16,
    },
    /// The common memory.
    #[error(transparent)]
    Common(#[from] CommonRamError),
    /// Nobody is there to be the server at `listen=`.
    #[error(
        "listen= is for `vmsg serve`, which has a server to start; use socket= with a server of your own"
    )]
    NoServer,
    /// The server at `listen=` cannot be started.
    #[error("cannot start the ivshmem server: {0}")]
    Server(String),
    /// The system said no.
    #[error("cannot watch the memory of {place}: {source}")]
    Os {
        /// Where it is.
        place: String,
        /// What was said.
        source: std::io::Error,
    },
}

/// Memory and doorbells, and what lies where.
pub(super) struct Opened {
    pub(super) device: Doors,
    pub(super) geometry: Geometry,
    /// The other end's number and vector, if that was said.
    pub(super) said: Option<(u16, u16)>,
    /// The longest message of a device host.
    pub(super) message: usize,
}

/// What is wanted of the server at `listen=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Where others come to.
    pub path: PathBuf,
    /// Bytes of memory, if that was said.
    pub size: Option<u64>,
    /// Doorbell vectors of each peer, if that was said.
    pub vectors: Option<u16>,
    /// POSIX shared memory that it is to be in.
    pub shm: Option<String>,
    /// A file that it is to be in.
    pub file: Option<PathBuf>,
}

/// Makes sure that a server runs as wanted, and tells the socket at which the device host is its client; that should be one
/// with an id of its own, as guests whose drivers have that id built in expect 0.
pub type Keep<'a> = dyn Fn(&Hold) -> Result<PathBuf, String> + 'a;

/// Opens the memory; may wait for a server up to some seconds.
pub(super) fn open(spec: &IvshmemSpec, keep: Option<&Keep<'_>>) -> Result<Opened, OpenError> {
    spec.check()?;
    let place = spec.place()?;
    let device = match &place {
        Place::Socket(path) => client(path)?,
        Place::Listen(path) => {
            let hold = Hold {
                path: path.clone(),
                size: spec.size,
                vectors: spec.vectors,
                shm: spec.shm.clone(),
                file: spec.file.clone(),
            };
            let own = keep.ok_or(OpenError::NoServer)?(&hold).map_err(OpenError::Server)?;
            client(&own)?
        }
        Place::Pci(address) => {
            let device = pci(spec, &Tree::default(), address)?;
            return arrange(spec, device);
        }
        Place::Shm(name) => Device::plain(&Plain::Shm(name.clone()), spec.size)?,
        Place::File(path) => Device::plain(&Plain::File(path.clone()), spec.size)?,
    };
    arrange(spec, Doors::Own(Box::new(device)))
}

fn client(path: &Path) -> Result<Device, OpenError> {
    of_client(Client::connect(path, PATIENCE)?)
}

fn of_client(client: Client) -> Result<Device, OpenError> {
    let place = format!("the server at `{}`", client.path().display());
    Device::client(client).map_err(|source| OpenError::Map { place, source })
}

/// A PCI function: one of ivshmem, which buses of this process share, or an AMP FIFO.
fn pci(spec: &IvshmemSpec, tree: &Tree, address: &str) -> Result<Doors, OpenError> {
    let parsed = match address {
        "auto" => None,
        address => Some(address.parse::<pci::Address>()?),
    };
    if let (QueueLayout::AmpPci, Some(address)) = (spec.layout, parsed) {
        // The layout also is what somebody may try in the memory of ivshmem.
        if tree.function(address).is_err() {
            return pci_fifo(spec, tree, address);
        }
    }
    let function = match parsed {
        None => tree.only_function()?,
        Some(address) => tree.function(address)?,
    };
    let open = || Device::pci(&function, pci::Access::Auto);
    let shared = doors::share(&function.address().to_string(), open)?;
    Ok(Doors::shared(shared, spec.vector.unwrap_or(0)))
}

/// The FIFO whose part of BAR1 the bus is in.
fn pci_fifo(spec: &IvshmemSpec, tree: &Tree, address: pci::Address) -> Result<Doors, OpenError> {
    if !spec.layout_offset().is_multiple_of(fifo::BYTES as u64) {
        let offset = spec.layout_offset();
        let text = format!("offset={offset:#x}: an AMP FIFO has a multiple of 0x4000 each");
        return Err(SpecError(text).into());
    }
    let taken = pci::Taken::new(tree, address, fifo::PCI_ID)?;
    let number = u16::try_from(spec.layout_offset() / fifo::BYTES as u64).unwrap_or(u16::MAX);
    let registers = Arc::new(taken.bar(0)?);
    let all = registers.slice(0, registers.len());
    let all: Box<dyn Registers> = Box::new(all.ok_or(FifoError::NoRegister(0))?);
    let fifo = Fifo::new(all, number)?;
    let memory = Arc::new(taken.bar(1)?);
    let mut interrupts = taken.interrupts()?;
    let vector = spec.vector.unwrap_or(number);
    if usize::from(vector) >= interrupts.len() {
        return Err(OpenError::NoVector {
            vector,
            have: u16::try_from(interrupts.len()).unwrap_or(u16::MAX),
        });
    }
    let interrupt = interrupts.swap_remove(vector.into());
    Ok(Doors::Fifo(FifoEnd::new(memory, fifo, interrupt)))
}

/// The same with a client that is connected already.
pub(super) fn with_client(spec: &IvshmemSpec, client: Client) -> Result<Opened, OpenError> {
    arrange(spec, Doors::Own(Box::new(of_client(client)?)))
}

/// Finds out what lies where.
pub(super) fn arrange(spec: &IvshmemSpec, device: Doors) -> Result<Opened, OpenError> {
    let offset = spec.layout_offset();
    let len = device.memory().len();
    // What is behind the messages is not theirs.
    let end = match (&spec.ram, spec.common_offset()) {
        (Some(Ram::Bar), ram) if ram > offset => {
            usize::try_from(ram).unwrap_or(usize::MAX).min(len)
        }
        _ => len,
    };
    let message = spec.message_size.map_or(64, |size| size.get() as usize);
    let geometry = Geometry::new(spec.layout, offset, end);
    let geometry =
        geometry.filter(|geometry| !geometry.is_amp() || geometry.own_layout(message).is_some());
    let geometry = geometry.ok_or_else(|| OpenError::TooSmall {
        place: describe(spec),
        layout: spec.layout.name(),
        offset,
        have: end,
    })?;
    let vector = spec.vector.unwrap_or(0);
    if vector > 0 && vector >= device.vectors() && !device.is_fifo() {
        return Err(OpenError::NoVector {
            vector,
            have: device.vectors(),
        });
    }
    Ok(Opened {
        device,
        geometry,
        said: spec.peer.map(|peer| (peer, vector)),
        message,
    })
}

/// Where the memory is, for people.
pub(super) fn describe(spec: &IvshmemSpec) -> String {
    match spec.place() {
        Ok(Place::Socket(path) | Place::Listen(path)) => {
            format!("the server at `{}`", path.display())
        }
        Ok(Place::Pci(address)) => format!("the PCI function {address}"),
        Ok(Place::Shm(name)) => format!("the shared memory `{name}`"),
        Ok(Place::File(path)) => format!("`{}`", path.display()),
        Err(_) => "nowhere".to_owned(),
    }
}

/// What an end of ours offers that is told `mode`: as driver without a mode, whatever the device host has.
pub(super) fn offered(
    mode: Option<MemoryMode>,
    driver: bool,
    vectors: u16,
    message: usize,
) -> Capabilities {
    let views = match mode {
        Some(MemoryMode::Known) => false,
        Some(_) => true,
        None => driver,
    };
    let all = Capabilities::common(message);
    Capabilities {
        runtime_windows: views,
        views,
        queue_vectors: vectors > 1,
        ..all
    }
}

/// What both offer.
pub(super) fn agreed(ours: Capabilities, theirs: u32, message: usize) -> Capabilities {
    Capabilities::from_bits(ours.bits() & theirs, message)
}

/// With an end that is not ours: nothing but messages.
pub(super) fn bare(message: usize) -> Capabilities {
    Capabilities {
        runtime_windows: false,
        views: false,
        queue_vectors: false,
        ..Capabilities::common(message)
    }
}
