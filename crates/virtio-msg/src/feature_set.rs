// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Feature bits, in blocks of 32 as the messages carry them.

use core::fmt;

/// How many blocks of 32 feature bits a [`FeatureSet`] holds. Virtio 1.4 uses two, and reserves up to bit 127.
pub const MAX_BLOCKS: usize = 8;

/// A set of feature bits: 0 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FeatureSet {
    blocks: [u32; MAX_BLOCKS],
}

impl FeatureSet {
    /// How many bits there can be.
    pub const BITS: u32 = 256;

    /// The set without any bit.
    pub const EMPTY: FeatureSet = FeatureSet {
        blocks: [0; MAX_BLOCKS],
    };

    /// The set without any bit.
    pub const fn new() -> FeatureSet {
        Self::EMPTY
    }

    /// The set of the bits 0 to 63 that are set in `bits`.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low and the high half are meant"
    )]
    pub const fn from_u64(bits: u64) -> FeatureSet {
        let mut set = Self::EMPTY;
        set.blocks[0] = bits as u32;
        set.blocks[1] = (bits >> 32) as u32;
        set
    }

    /// The set of the given bits. Numbers past the last bit are left out.
    pub fn from_bits(bits: &[u32]) -> FeatureSet {
        let mut set = Self::EMPTY;
        for &bit in bits {
            set.insert(bit);
        }
        set
    }

    /// The bits 0 to 63. Higher ones are left out.
    pub const fn low_u64(&self) -> u64 {
        self.blocks[0] as u64 | (self.blocks[1] as u64) << 32
    }

    /// Whether bit number `bit` is set.
    pub fn bit(&self, bit: u32) -> bool {
        self.block(bit / 32) & (1 << (bit % 32)) != 0
    }

    /// Whether bit number `bit` is set.
    pub fn contains(&self, bit: u32) -> bool {
        self.bit(bit)
    }

    /// Sets or clears bit number `bit`. A number past the last bit changes nothing.
    pub fn set(&mut self, bit: u32, on: bool) {
        let mask = 1 << (bit % 32);
        if let Some(block) = self.blocks.get_mut(bit as usize / 32) {
            if on {
                *block |= mask;
            } else {
                *block &= !mask;
            }
        }
    }

    /// Sets bit number `bit`.
    pub fn insert(&mut self, bit: u32) {
        self.set(bit, true);
    }

    /// Clears bit number `bit`.
    pub fn remove(&mut self, bit: u32) {
        self.set(bit, false);
    }

    /// The set with bit number `bit` added.
    #[must_use]
    pub fn with(mut self, bit: u32) -> FeatureSet {
        self.insert(bit);
        self
    }

    /// The set with bit number `bit` left out.
    #[must_use]
    pub fn without(mut self, bit: u32) -> FeatureSet {
        self.remove(bit);
        self
    }

    /// What both sets have.
    #[must_use]
    pub fn intersection(&self, other: &FeatureSet) -> FeatureSet {
        self.zip(other, |a, b| a & b)
    }

    /// What at least one of the sets has.
    #[must_use]
    pub fn union(&self, other: &FeatureSet) -> FeatureSet {
        self.zip(other, |a, b| a | b)
    }

    /// What this set has and `other` has not.
    #[must_use]
    pub fn difference(&self, other: &FeatureSet) -> FeatureSet {
        self.zip(other, |a, b| a & !b)
    }

    /// Whether `other` has everything that this set has.
    pub fn is_subset(&self, other: &FeatureSet) -> bool {
        self.difference(other).is_empty()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(|&b| b == 0)
    }

    /// Bits `32 × i` to `32 × i + 31`; 0 past the last block.
    pub fn block(&self, i: u32) -> u32 {
        self.blocks.get(i as usize).copied().unwrap_or(0)
    }

    /// Sets bits `32 × i` to `32 × i + 31`, and says whether there is such a block.
    pub fn set_block(&mut self, i: u32, value: u32) -> bool {
        match self.blocks.get_mut(i as usize) {
            Some(block) => {
                *block = value;
                true
            }
            None => false,
        }
    }

    /// How many blocks there are up to the last one with a bit in it.
    pub fn used_blocks(&self) -> u32 {
        let empty = self.blocks.iter().rev().take_while(|&&b| b == 0).count();
        u32::try_from(MAX_BLOCKS - empty).unwrap_or(0)
    }

    /// The numbers of the bits that are set, from the lowest up.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..Self::BITS).filter(|&bit| self.bit(bit))
    }

    fn zip(&self, other: &FeatureSet, f: impl Fn(u32, u32) -> u32) -> FeatureSet {
        let mut out = FeatureSet::EMPTY;
        for (o, (a, b)) in out
            .blocks
            .iter_mut()
            .zip(self.blocks.iter().zip(other.blocks.iter()))
        {
            *o = f(*a, *b);
        }
        out
    }
}

const _: () = assert!(FeatureSet::BITS as usize == 32 * MAX_BLOCKS);

impl From<u64> for FeatureSet {
    fn from(bits: u64) -> FeatureSet {
        FeatureSet::from_u64(bits)
    }
}

/// The bits by number, runs joined: `0,5,28-29,32`. `none` for the empty set.
impl fmt::Display for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut first = true;
        let mut bit = 0;
        while bit < Self::BITS {
            if !self.bit(bit) {
                bit += 1;
                continue;
            }
            let start = bit;
            while bit < Self::BITS && self.bit(bit) {
                bit += 1;
            }
            if !first {
                f.write_str(",")?;
            }
            first = false;
            match bit - 1 - start {
                0 => write!(f, "{start}")?,
                _ => write!(f, "{start}-{}", bit - 1)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "feature_set_test.rs"]
mod tests;
