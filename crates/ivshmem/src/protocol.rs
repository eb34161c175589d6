// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes over the socket: messages of 8 bytes with at most one descriptor each.
//!
//! Only the server speaks. A message is a signed number of 64 bits, little-endian; a descriptor comes with its first
//! byte (SCM_RIGHTS). In this order:
//!
//! | number | descriptor | means |
//! |---|---|---|
//! | 0 | – | version of the protocol |
//! | 0 … 65535 | – | the client's own id |
//! | −1 | memory | what is shared |
//! | id of a peer, once per vector | eventfd | somebody is there; ring it there |
//! | own id, once per vector | eventfd | here others ring |
//! | id of a peer, once per vector | eventfd | somebody has joined |
//! | id of a peer | – | it has left |
//!
//! Nothing marks the end of a list of vectors.
//!
//! Source: QEMU's `docs/specs/ivshmem-spec.rst`, "The ivshmem Client-Server Protocol"; what QEMU's device accepts:
//! `hw/misc/ivshmem-pci.c`.

use crate::PeerId;

/// The only version there is, since QEMU 2.5.
pub const VERSION: i64 = 0;

/// Bytes of a message.
pub const MESSAGE_SIZE: usize = 8;

/// The number that comes with the memory.
pub const MEMORY: i64 = -1;

/// The most vectors that a doorbell of QEMU's device can name: it looks at 8 bits.
pub const MAX_VECTORS: u16 = 256;

/// Bytes on the wire of a number.
pub fn encode(number: i64) -> [u8; MESSAGE_SIZE] {
    number.to_le_bytes()
}

/// What is not right about a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The first message is another version.
    #[error("the server speaks version {0} of the protocol, and only {VERSION} is known")]
    Version(i64),
    /// A number that means nothing.
    #[error("the server sent the number {0}, which means nothing here")]
    Number(i64),
    /// A descriptor where there must be none.
    #[error("the server sent a descriptor with {0}")]
    UnexpectedDescriptor(&'static str),
    /// No descriptor where there must be one.
    #[error("the server sent no descriptor with {0}")]
    MissingDescriptor(&'static str),
    /// More than one descriptor with a message.
    #[error("the server sent several descriptors with one message")]
    TooManyDescriptors,
    /// A descriptor that came as a doorbell is another kind of file.
    #[error("the server sent a doorbell that is not an eventfd")]
    NotADoorbell,
    /// The memory came a second time.
    #[error("the server sent the memory twice")]
    SecondMemory,
    /// The server says that the client itself has left.
    #[error("the server says that this client, {0}, has left")]
    OwnId(PeerId),
}

/// What the server has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// The version is right.
    Version,
    /// The client's own id.
    Id(PeerId),
    /// The descriptor is the memory.
    Memory,
    /// The descriptor is the next vector of this peer, which may be the client itself.
    Vector(PeerId),
    /// The peer has left.
    Left(PeerId),
}

/// Tells what messages mean, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    buffer: [u8; MESSAGE_SIZE],
    filled: usize,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Version,
    Id,
    Memory(PeerId),
    Running(PeerId),
}

impl Decoder {
    /// Before the first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the next bytes go: what is missing of the present message. Never more may be read at once, since a
    /// descriptor belongs to the message that it comes with. Never empty.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Takes `count` bytes that were put into [`room`](Self::room); the number, if a message is whole now.
    pub fn filled(&mut self, count: usize) -> Option<i64> {
        self.filled = (self.filled + count).min(MESSAGE_SIZE);
        if self.filled < MESSAGE_SIZE {
            return None;
        }
        self.filled = 0;
        Some(i64::from_le_bytes(self.buffer))
    }

    /// Whether bytes of a message that is not whole were taken.
    pub fn is_within(&self) -> bool {
        self.filled > 0
    }

    /// What `number` means here, with a descriptor or without one.
    ///
    /// The order is that of the specification, but that peers may come before the memory, as QEMU's device allows.
    ///
    /// # Errors
    /// [`ProtocolError`]; the connection is to be closed.
    pub fn said(&mut self, number: i64, descriptor: bool) -> Result<Said, ProtocolError> {
        let peer = || {
            u16::try_from(number)
                .map(PeerId)
                .map_err(|_| ProtocolError::Number(number))
        };
        match self.stage {
            Stage::Version if descriptor => Err(ProtocolError::UnexpectedDescriptor("the version")),
            Stage::Version if number != VERSION => Err(ProtocolError::Version(number)),
            Stage::Version => {
                self.stage = Stage::Id;
                Ok(Said::Version)
            }
            Stage::Id if descriptor => Err(ProtocolError::UnexpectedDescriptor("the id")),
            Stage::Id => {
                let id = peer()?;
                self.stage = Stage::Memory(id);
                Ok(Said::Id(id))
            }
            Stage::Memory(_) if number == MEMORY && !descriptor => {
                Err(ProtocolError::MissingDescriptor("the memory"))
            }
            Stage::Memory(id) if number == MEMORY => {
                self.stage = Stage::Running(id);
                Ok(Said::Memory)
            }
            Stage::Running(_) if number == MEMORY => Err(ProtocolError::SecondMemory),
            Stage::Memory(own) | Stage::Running(own) => {
                let id = peer()?;
                match (descriptor, id == own) {
                    (true, _) => Ok(Said::Vector(id)),
                    (false, true) => Err(ProtocolError::OwnId(id)),
                    (false, false) => Ok(Said::Left(id)),
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
