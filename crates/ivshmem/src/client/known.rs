// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the server has told so far.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vmsg_mem::Doorbell;

use super::Broken;
use crate::protocol::{Decoder, MAX_VECTORS, ProtocolError, Said};
use crate::{Event, PeerId, RingError};

/// What the server has told so far. Bounded: a peer has at least one doorbell, and these are counted.
#[derive(Debug)]
pub(super) struct Known {
    id: Option<PeerId>,
    memory: Option<OwnedFd>,
    bells: BTreeMap<PeerId, Vec<Doorbell>>,
    /// Doorbells of all peers.
    count: usize,
    max_bells: usize,
    ignored: u64,
}

impl Known {
    pub(super) fn new(max_bells: usize) -> Self {
        Self {
            id: None,
            memory: None,
            bells: BTreeMap::new(),
            count: 0,
            max_bells,
            ignored: 0,
        }
    }

    /// Takes a message; an event if something has changed that others want to know.
    pub(super) fn take(
        &mut self,
        decoder: &mut Decoder,
        number: i64,
        fd: Option<OwnedFd>,
        lost: bool,
    ) -> Result<Option<Event>, Broken> {
        match (decoder.said(number, fd.is_some() || lost)?, fd) {
            (Said::Version, _) => Ok(None),
            (Said::Id(id), _) => {
                self.id = Some(id);
                Ok(None)
            }
            (Said::Memory, Some(fd)) => {
                self.memory = Some(fd);
                Ok(None)
            }
            (Said::Vector(peer), Some(fd)) => self.add(peer, fd),
            (Said::Memory, None) => {
                Err(io::Error::other("this process has no descriptor left for the memory").into())
            }
            (Said::Vector(peer), None) => {
                self.ignore(peer, "this process has no descriptor left");
                Ok(None)
            }
            (Said::Left(peer), _) => match self.bells.remove(&peer) {
                Some(bells) => {
                    self.count -= bells.len();
                    Ok(Some(Event::Left(peer)))
                }
                None => {
                    self.ignore(peer, "nobody has this id");
                    Ok(None)
                }
            },
        }
    }

    fn add(&mut self, peer: PeerId, fd: OwnedFd) -> Result<Option<Event>, Broken> {
        let vectors = self.bells.get(&peer).map_or(0, Vec::len);
        // The client's own come last, and are always taken.
        if vectors >= usize::from(MAX_VECTORS)
            || (self.count >= self.max_bells && self.id != Some(peer))
        {
            self.ignore(peer, "there are too many doorbells");
            return Ok(None);
        }
        let bell = Doorbell::from_fd(fd).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => ProtocolError::NotADoorbell.into(),
            _ => Broken::Os(error),
        })?;
        self.bells.entry(peer).or_default().push(bell);
        self.count += 1;
        Ok(Some(Event::Joined(peer)))
    }

    fn ignore(&mut self, peer: PeerId, why: &str) {
        if self.ignored == 0 {
            tracing::warn!(%peer, why, "what the ivshmem server says of a peer is ignored");
        }
        self.ignored += 1;
    }

    pub(super) fn bell(&self, peer: PeerId, vector: u16) -> Result<&Doorbell, RingError> {
        let bells = self.bells.get(&peer).ok_or(RingError::NoSuchPeer(peer))?;
        bells
            .get(usize::from(vector))
            .ok_or(RingError::NoSuchVector {
                peer,
                vector,
                vectors: count(bells),
            })
    }

    pub(super) fn vectors_of(&self, peer: PeerId) -> u16 {
        self.bells.get(&peer).map_or(0, |bells| count(bells))
    }

    pub(super) fn list(&self) -> impl Iterator<Item = (PeerId, u16)> {
        self.bells.iter().map(|(peer, bells)| (*peer, count(bells)))
    }

    pub(super) fn id(&self) -> Option<PeerId> {
        self.id
    }

    pub(super) fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The memory, once.
    pub(super) fn take_memory(&mut self) -> Option<OwnedFd> {
        self.memory.take()
    }

    pub(super) fn has_memory(&self) -> bool {
        self.memory.is_some()
    }
}

fn count(bells: &[Doorbell]) -> u16 {
    u16::try_from(bells.len()).expect("at most MAX_VECTORS")
}

/// Size of a memory that a server has sent, in bytes.
pub(super) fn memory_size(fd: &OwnedFd) -> Result<u64, String> {
    vmsg_mem::check_backing(fd.as_fd()).map_err(|error| error.to_string())?;
    let stat = rustix::fs::fstat(fd).map_err(|error| error.to_string())?;
    match u64::try_from(stat.st_size) {
        Ok(size) if size > 0 && isize::try_from(size).is_ok() => Ok(size),
        _ => Err(format!("it has {} bytes", stat.st_size)),
    }
}
