// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem`: message queues in memory that two machines share, with doorbells or without. docs/bus-ivshmem.md.
//!
//! The memory is an ivshmem server's, of which this process is a client, a PCI function's in a guest, or a file. Two ends of ours find
//! each other by blocks in the memory; ends that are not ours are Linux's AMP drivers, and QEMU.

mod block;
mod common;
mod connector;
mod doors;
#[cfg(any(test, fuzzing))]
pub mod exercise;
pub mod fifo;
mod geometry;
mod listener;
mod machine;
mod open;
mod port;
mod queues;
mod spec;

pub use connector::{Connecting, Connector};
pub use listener::Listener;
pub use open::{Hold, Keep, OpenError};
pub(crate) use port::Port;
pub use spec::{IvshmemSpec, MemoryMode, PhysicalWindow, Place, QueueLayout, Ram, SpecError};

use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::link::{Framing, Parts};
use crate::trace::Trace;
use crate::{CommonRam, StaticRam};
use block::Card;
use port::Joined;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The queues of 64-byte slots: what is behind a message there is zeroed.
const SLOT: usize = 64;

impl IvshmemSpec {
    /// Serves it as a device host called `name`; `keep` starts the server at `listen=`.
    ///
    /// # Errors
    /// [`BindError`](crate::BindError).
    pub fn listen(
        &self,
        name: &str,
        keep: Option<&Keep<'_>>,
    ) -> Result<Listener, crate::BindError> {
        Listener::bind(self, name, keep)
    }

    /// Drives it as a program called `name`.
    pub fn connector(&self, name: &str) -> Connector {
        Connector::new(self, name)
    }

    fn trace(&self) -> Option<Trace> {
        let path = self.trace.as_ref()?;
        Some(Trace::new(path, "ivshmem"))
    }
}

/// What this end says of itself.
fn card(spec: &IvshmemSpec, opened: &open::Opened, name: &str, driver: bool, common: u64) -> Card {
    let vectors = opened.device.vectors();
    let offered = open::offered(spec.memory, driver, vectors, opened.message);
    Card {
        id: opened.device.id().map(|id| id.0),
        vectors,
        vector: spec.vector.unwrap_or(0),
        capabilities: offered.bits(),
        mode: spec.memory.map_or(0, MemoryMode::code),
        common,
        name: name.to_owned(),
    }
}

/// What the ends of all connections have in common.
#[derive(Clone, Debug)]
struct Site {
    spec: IvshmemSpec,
    name: String,
    ram: Option<StaticRam>,
    trace: Option<Trace>,
    /// That the ends differ in the size of the common memory was told.
    told: Arc<AtomicBool>,
}

impl Site {
    fn new(spec: &IvshmemSpec, name: &str) -> Self {
        Self {
            ram: common::static_ram(spec),
            trace: spec.trace(),
            told: Arc::default(),
            spec: spec.clone(),
            name: name.to_owned(),
        }
    }

    /// Makes ends of what has come together; also returns what both can do.
    fn parts(
        &self,
        port: &Arc<Port>,
        joined: Joined,
        driver: bool,
        common: Option<&CommonRam>,
        epoch: u64,
    ) -> std::io::Result<(Parts, Option<crate::Vectors>)> {
        let Joined {
            peer,
            queues,
            message_size,
        } = joined;
        let card = peer.as_ref().map(|(_, card)| card);
        let mut vectors = None;
        let mut capabilities = open::bare(message_size);
        if let Some(card) = card {
            let ours = open::offered(self.spec.memory, driver, u16::MAX, message_size);
            capabilities = open::agreed(ours, card.capabilities, message_size);
            if capabilities.queue_vectors {
                let spare = port.vectors(card)?;
                capabilities.queue_vectors = spare.own().len() > 0 && spare.theirs().len() > 0;
                vectors = capabilities.queue_vectors.then_some(spare);
            }
            let theirs = MemoryMode::from_code(card.mode);
            if let Some(difference) = spec::modes_differ(self.spec.memory, theirs, driver)
                && !self.told.swap(true, Ordering::Relaxed)
            {
                tracing::warn!("{difference}");
            }
            if let Some(common) = common
                && common.len != card.common
                && common.len > 0
                && card.common > 0
                && !self.told.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(
                    ours = common.len,
                    theirs = card.common,
                    "the ends differ in the size of the common memory"
                );
            }
        }
        let parts = Parts {
            queues,
            framing: match message_size {
                ..=SLOT => Framing::Padded(message_size.max(48)),
                _ => Framing::Sized,
            },
            theirs: Bell::Port(Arc::clone(port)),
            ours: Bell::Port(Arc::clone(port)),
            carrier: Carrier::Port(Arc::clone(port)),
            capabilities,
            peer: port.peer(card),
            epoch: match (driver, peer) {
                (true, Some((epoch, _))) => epoch.into(),
                _ => epoch,
            },
        };
        Ok((parts, vectors))
    }
}

/// A number that no other start has; not 0.
fn random() -> std::io::Result<u32> {
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(random).max(1))
}
