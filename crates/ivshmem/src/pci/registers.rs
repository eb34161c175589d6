// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers in BAR0.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmsg_mem::{DeviceMapping, DeviceSlice, Doorbell, RingError};

use crate::PeerId;

/// Bytes of the registers, of a BAR with 256.
pub(super) const SIZE: u64 = 16;
/// This end's id.
pub(super) const IV_POSITION: usize = 8;
const DOORBELL: usize = 12;

/// The registers, mapped or, where they cannot be, as a part of a file.
#[derive(Debug)]
pub(super) struct Registers {
    /// What rings; each ring brings its own value.
    bell: Doorbell,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Mapped(Arc<DeviceMapping>),
    File { offset: u64 },
}

impl Registers {
    /// Registers at the beginning of `bar`, which belongs to the device behind `file`.
    pub(super) fn mapped(file: OwnedFd, bar: Arc<DeviceMapping>) -> Self {
        let register = DeviceSlice::new(bar.clone(), DOORBELL, 4).expect("the BAR has 16 bytes");
        let bell = Doorbell::register(file, register, 0).expect("4 bytes at an offset of 12");
        let place = Place::Mapped(bar);
        Self { bell, place }
    }

    /// Registers that are read and written at `offset` of `file`.
    pub(super) fn in_file(file: OwnedFd, offset: u64) -> Self {
        Self {
            bell: Doorbell::register_file(file, offset + DOORBELL as u64, 0),
            place: Place::File { offset },
        }
    }

    /// What a register reads as.
    pub(super) fn read(&self, register: usize) -> Option<u32> {
        match &self.place {
            Place::Mapped(bar) => bar.region().read_u32(register),
            Place::File { offset } => {
                let mut word = [0; 4];
                let at = offset + register as u64;
                let read =
                    rustix::io::retry_on_intr(|| rustix::io::pread(&self.bell, &mut word, at));
                (read == Ok(4)).then(|| u32::from_le_bytes(word))
            }
        }
    }

    pub(super) fn ring(&self, peer: PeerId, vector: u16) -> Result<(), RingError> {
        self.bell.ring_with(value(peer, vector))
    }

    pub(super) fn bell(&self, peer: PeerId, vector: u16) -> io::Result<Doorbell> {
        Ok(self.bell.try_clone()?.with_value(value(peer, vector)))
    }
}

fn value(peer: PeerId, vector: u16) -> u32 {
    u32::from(peer.0) << 16 | u32::from(vector)
}

#[cfg(test)]
#[path = "registers_test.rs"]
mod tests;
