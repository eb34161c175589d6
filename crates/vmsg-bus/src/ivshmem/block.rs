// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end blocks, by which ends of ours find each other: docs/bus-ivshmem.md §3.

use crate::capabilities::printable;
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::Side;

/// "VMiv", stored last.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"VMiv");

/// Stands in its place while a block is written.
const UNFINISHED: u32 = u32::from_le_bytes(*b"vmiv");

const VERSION: u32 = 1;

/// Words of a block without the name.
const FIXED: usize = 10;

pub(super) const PRESENT: u8 = 1;
pub(super) const LEAVING: u8 = 2;

/// In place of an id where there are no doorbells.
const NO_ID: u16 = u16::MAX;

/// Offsets of words in a block.
const HEADER: usize = 0x04;
const EPOCH: usize = 0x08;
const ATTACHED: usize = 0x0c;
const DOORS: usize = 0x10;
const CAPABILITIES: usize = 0x14;
const BEAT: usize = 0x18;
const VECTOR: usize = 0x1c;
const SIZE: usize = 0x20;
const NAME: usize = FIXED * 4;

/// What an end says of itself that stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Card {
    /// Its number, if it has doorbells.
    pub(super) id: Option<u16>,
    /// How many vectors it can be rung by.
    pub(super) vectors: u16,
    /// Which of them is the bus's.
    pub(super) vector: u16,
    /// Bits of [`Capabilities`](crate::Capabilities).
    pub(super) capabilities: u32,
    /// How the device comes by the driver's memory, [`MemoryMode::code`](super::MemoryMode::code); 0: not said.
    pub(super) mode: u16,
    /// Bytes of the common memory; 0: none.
    pub(super) common: u64,
    pub(super) name: String,
}

/// A block as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) state: u8,
    /// Not 0.
    pub(super) epoch: u32,
    /// Epoch of the other end that it names; 0: none.
    pub(super) attached: u32,
    pub(super) beat: u32,
    pub(super) card: Card,
}

/// The words of a block that change while its owner is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pulse {
    pub(super) state: u8,
    pub(super) epoch: u32,
    pub(super) attached: u32,
    pub(super) beat: u32,
}

/// Where a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: usize,
    /// 56 or 64.
    pub(super) bytes: usize,
    pub(super) side: Side,
}

impl Place {
    fn role(self) -> u8 {
        match self.side {
            Side::Device => 1,
            Side::Driver => 2,
        }
    }

    fn load<M: QueueMemory>(self, memory: &M, word: usize) -> u32 {
        memory.load_acquire(self.offset + word)
    }

    fn store<M: QueueMemory>(self, memory: &M, word: usize, value: u32) {
        memory.store_release(self.offset + word, value);
    }

    fn header(self, state: u8) -> u32 {
        VERSION | u32::from(state) << 16 | u32::from(self.role()) << 24
    }

    /// The block there; `None` if there is none, or it is just being written.
    pub(super) fn read<M: QueueMemory>(self, memory: &M) -> Option<Block> {
        let Pulse {
            state,
            epoch,
            attached,
            beat,
        } = self.pulse(memory)?;
        let [id_low, id_high, v_low, v_high] = self.load(memory, DOORS).to_le_bytes();
        let id = u16::from_le_bytes([id_low, id_high]);
        let [low, high, m_low, m_high] = self.load(memory, VECTOR).to_le_bytes();
        let common =
            u64::from(self.load(memory, SIZE + 4)) << 32 | u64::from(self.load(memory, SIZE));
        let mut name = Vec::with_capacity(24);
        for word in (NAME..self.bytes).step_by(4) {
            name.extend(self.load(memory, word).to_le_bytes());
        }
        let len = name.iter().position(|byte| *byte == 0);
        let block = Block {
            state,
            epoch,
            attached,
            beat,
            card: Card {
                id: (id != NO_ID).then_some(id),
                vectors: u16::from_le_bytes([v_low, v_high]),
                vector: u16::from_le_bytes([low, high]),
                mode: u16::from_le_bytes([m_low, m_high]),
                capabilities: self.load(memory, CAPABILITIES),
                common,
                name: printable(&name[..len.unwrap_or(name.len())]),
            },
        };
        // Another end may have begun meanwhile.
        self.is_ours(memory, epoch).then_some(block)
    }

    /// What changes of the block there; `None` where [`Self::read`] gives none. Each end looks at it whenever it is about to sleep.
    pub(super) fn pulse<M: QueueMemory>(self, memory: &M) -> Option<Pulse> {
        if self.load(memory, 0) != MAGIC {
            return None;
        }
        let header = self.load(memory, HEADER);
        let [_, _, state, role] = header.to_le_bytes();
        let epoch = self.load(memory, EPOCH);
        if header & 0xffff != VERSION || role != self.role() || epoch == 0 {
            return None;
        }
        let pulse = Pulse {
            state,
            epoch,
            attached: self.load(memory, ATTACHED),
            beat: self.load(memory, BEAT),
        };
        // Another end may have begun meanwhile.
        self.is_ours(memory, epoch).then_some(pulse)
    }

    /// Writes a block that names nobody, its magic number last.
    pub(super) fn write<M: QueueMemory>(self, memory: &M, epoch: u32, card: &Card) {
        self.withdraw(memory);
        memory.fence();
        self.store(memory, EPOCH, epoch);
        self.store(memory, ATTACHED, 0);
        self.store(memory, BEAT, 0);
        self.words(card, |at, word| self.store(memory, at, word));
        self.store(memory, 0, MAGIC);
    }

    /// The words that stay as they are.
    fn words(self, card: &Card, mut word: impl FnMut(usize, u32)) {
        word(HEADER, self.header(PRESENT));
        let id = u32::from(card.id.unwrap_or(NO_ID));
        word(DOORS, id | u32::from(card.vectors) << 16);
        word(CAPABILITIES, card.capabilities);
        word(VECTOR, u32::from(card.vector) | u32::from(card.mode) << 16);
        let [a, b, c, d, e, f, g, h] = card.common.to_le_bytes();
        word(SIZE, u32::from_le_bytes([a, b, c, d]));
        word(SIZE + 4, u32::from_le_bytes([e, f, g, h]));
        let mut name = card.name.bytes();
        for at in (NAME..self.bytes).step_by(4) {
            let bytes = [(); 4].map(|()| name.next().unwrap_or(0));
            word(at, u32::from_le_bytes(bytes));
        }
    }

    /// Writes again what somebody else has written over, but for magic number and epoch, by which this end knows its block.
    pub(super) fn mend<M: QueueMemory>(self, memory: &M, attached: u32, card: &Card) {
        let mend = |at, word| {
            if self.load(memory, at) != word {
                self.store(memory, at, word);
            }
        };
        mend(ATTACHED, attached);
        self.words(card, mend);
    }

    /// Makes the block one that is not finished.
    pub(super) fn withdraw<M: QueueMemory>(self, memory: &M) {
        self.store(memory, 0, UNFINISHED);
    }

    /// Whether an end of ours was killed while it wrote its block, or writes it just now.
    pub(super) fn is_unfinished<M: QueueMemory>(self, memory: &M) -> bool {
        self.load(memory, 0) == UNFINISHED
    }

    /// Whether it is still the one that was written with `epoch`.
    pub(super) fn is_ours<M: QueueMemory>(self, memory: &M, epoch: u32) -> bool {
        self.load(memory, 0) == MAGIC && self.load(memory, EPOCH) == epoch
    }

    /// Names the other end, or nobody.
    pub(super) fn attach<M: QueueMemory>(self, memory: &M, epoch: u32) {
        self.store(memory, ATTACHED, epoch);
        memory.fence();
    }

    pub(super) fn beat<M: QueueMemory>(self, memory: &M, beat: u32) {
        self.store(memory, BEAT, beat);
    }

    /// Says that this end goes.
    pub(super) fn leave<M: QueueMemory>(self, memory: &M) {
        self.store(memory, ATTACHED, 0);
        self.store(memory, HEADER, self.header(LEAVING));
    }
}
