// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What lies where: two blocks of 128 bytes, then a ring of bytes.
//!
//! Each side writes its own block only, in words of 32 bits: 0 magic, 4 version, 8 a number of this run that is never 0
//! and is written last, 12 the number of the other side once it has been seen, 16 the own id, 20 state, 24 position:
//! how many bytes the sender has put into the ring, or the receiver has taken out, counted in 32 bits that wrap. The
//! sender also has 32 and 36 the size of the file, low word first, and 64 to 95 the SHA-256 of it, written before the
//! state says so.
//!
//! The two are together when each block names the other's number. What is left in the memory of those who were there
//! before never does.

use vmsg_mem::{DeviceSlice, QueueMemory};

use super::super::ping::{NOBODY, peer};
use ivshmem::PeerId;

/// Bytes of a block.
const BLOCK: usize = 128;
/// Where the ring begins.
const RING: usize = 2 * BLOCK;
/// The least that is of any use.
pub(crate) const LEAST: usize = RING + 64;

const MAGIC: usize = 0;
const VERSION: usize = 4;
const NUMBER: usize = 8;
const OTHER: usize = 12;
const ID: usize = 16;
const STATE: usize = 20;
const POSITION: usize = 24;
const FILE_SIZE: usize = 32;
const DIGEST: usize = 64;

/// The version of all this.
const THIS_VERSION: u32 = 1;

/// Which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Sender,
    Receiver,
}

impl Side {
    fn magic(self) -> u32 {
        match self {
            Self::Sender => u32::from_le_bytes(*b"cpTX"),
            Self::Receiver => u32::from_le_bytes(*b"cpRX"),
        }
    }
}

/// What a side says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It is at it.
    Busy,
    /// The sender has put all into the ring, and the digest into its block. The receiver has the file, and its digest
    /// is right.
    Done,
    /// The digest is wrong.
    Wrong,
    /// It has given up.
    GivenUp,
}

impl State {
    fn word(self) -> u32 {
        match self {
            Self::Busy => 1,
            Self::Done => 2,
            Self::Wrong => 3,
            Self::GivenUp => 4,
        }
    }

    fn of(word: u32) -> Option<Self> {
        [Self::Busy, Self::Done, Self::Wrong, Self::GivenUp]
            .into_iter()
            .find(|state| state.word() == word)
    }
}

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("the other side has another version of `vmsg ivshmem copy`: {0}")]
    Version(u32),
    #[error("the other side ended and began anew, or somebody else writes to the same place")]
    Replaced,
    #[error("the other side gave up")]
    GivenUp,
    #[error("what the other side says cannot be: {0}")]
    Nonsense(&'static str),
    #[error("a file of {size} bytes is offered, and --limit is {limit}")]
    TooLarge { size: u64, limit: u64 },
    #[error("the checksum is wrong: what was received is not what was sent")]
    Wrong,
    #[error("the file changed its size while it was sent")]
    Changed,
    #[error("{0}: {1}")]
    File(&'static str, std::io::Error),
}

/// The memory, seen from one side.
pub(crate) struct Area {
    own: DeviceSlice,
    others: DeviceSlice,
    ring: DeviceSlice,
    other_side: Side,
    number: u32,
    /// The number of the other side once it was seen.
    seen: u32,
    together: bool,
}

impl Area {
    /// Takes one side of `memory`, which has at least [`LEAST`] bytes. `size` is that of the sender's file.
    pub(crate) fn new(
        memory: &DeviceSlice,
        side: Side,
        number: u32,
        id: Option<PeerId>,
        size: u64,
    ) -> Option<Self> {
        let block = |side| {
            let at = match side {
                Side::Sender => 0,
                Side::Receiver => BLOCK,
            };
            memory.get(at, BLOCK)
        };
        let other_side = match side {
            Side::Sender => Side::Receiver,
            Side::Receiver => Side::Sender,
        };
        // Half of what a position can count, so that no position is taken for another.
        let room = memory.region().len().checked_sub(RING)?.min(1 << 30) / 64 * 64;
        if room == 0 {
            return None;
        }
        let own = block(side)?;
        own.store_relaxed(NUMBER, 0);
        own.fence();
        own.store_relaxed(MAGIC, side.magic());
        own.store_relaxed(VERSION, THIS_VERSION);
        own.store_relaxed(OTHER, 0);
        own.store_relaxed(ID, id.map_or(NOBODY, |id| id.0.into()));
        own.store_relaxed(STATE, State::Busy.word());
        own.store_relaxed(POSITION, 0);
        let size = size.to_le_bytes();
        own.write(FILE_SIZE, &size);
        own.store_release(NUMBER, number);
        own.fence();
        Some(Self {
            own,
            others: block(other_side)?,
            ring: memory.get(RING, room)?,
            other_side,
            number,
            seen: 0,
            together: false,
        })
    }

    /// Bytes of the ring.
    pub(crate) fn room(&self) -> u32 {
        u32::try_from(self.ring.region().len()).expect("at most 1 GiB")
    }

    /// Looks for the other side; true if it is something new. Once the two are together, an error if the other
    /// side is not the same any more.
    pub(crate) fn look(&mut self) -> Result<bool, CopyError> {
        let number = self.others.load_acquire(NUMBER);
        if self.together {
            return if number == self.seen {
                Ok(false)
            } else {
                Err(CopyError::Replaced)
            };
        }
        if number == 0 || self.others.load_relaxed(MAGIC) != self.other_side.magic() {
            return Ok(false);
        }
        let changed = number != self.seen;
        if changed {
            self.seen = number;
            self.own.store_release(OTHER, number);
            self.own.fence();
        }
        if self.others.load_acquire(OTHER) == self.number {
            let version = self.others.load_relaxed(VERSION);
            if version != THIS_VERSION {
                return Err(CopyError::Version(version));
            }
            self.together = true;
            return Ok(true);
        }
        Ok(changed)
    }

    /// Whether both sides know of each other.
    pub(crate) fn is_together(&self) -> bool {
        self.together
    }

    /// Whom to ring, as the other side has it, once there is one.
    pub(crate) fn other(&self) -> Option<PeerId> {
        (self.seen != 0)
            .then(|| peer(self.others.load_relaxed(ID)))
            .flatten()
    }

    pub(crate) fn state(&self) -> Result<State, CopyError> {
        State::of(self.others.load_acquire(STATE)).ok_or(CopyError::Nonsense("its state"))
    }

    pub(crate) fn set_state(&self, state: State) {
        self.own.store_release(STATE, state.word());
        self.own.fence();
    }

    pub(crate) fn position(&self) -> u32 {
        self.others.load_acquire(POSITION)
    }

    pub(crate) fn set_position(&self, position: u32) {
        self.own.store_release(POSITION, position);
        self.own.fence();
    }

    /// Size of the sender's file.
    pub(crate) fn file_size(&self) -> u64 {
        let mut size = [0; 8];
        self.others.read(FILE_SIZE, &mut size);
        u64::from_le_bytes(size)
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut digest = [0; 32];
        self.others.read(DIGEST, &mut digest);
        digest
    }

    pub(crate) fn set_digest(&self, digest: &[u8; 32]) {
        self.own.write(DIGEST, digest);
    }

    /// How far it is from `place` bytes into the ring to its end.
    pub(crate) fn until_end(&self, place: u32) -> u32 {
        self.room() - place
    }

    /// Copies bytes out of the ring, from `place` bytes into it.
    pub(crate) fn read(&self, place: u32, into: &mut [u8]) {
        self.ring.read(offset(place), into);
    }

    /// Copies bytes into the ring.
    pub(crate) fn write(&self, place: u32, from: &[u8]) {
        self.ring.write(offset(place), from);
    }
}

fn offset(place: u32) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

/// Where in the ring this side is, and how far it has come. The ring need not be a power of two, so positions that
/// wrap do not tell.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    pub(crate) position: u32,
    pub(crate) place: u32,
}

impl Cursor {
    pub(crate) fn advance(&mut self, bytes: u32, room: u32) {
        self.position = self.position.wrapping_add(bytes);
        self.place = (self.place + bytes) % room;
    }
}
