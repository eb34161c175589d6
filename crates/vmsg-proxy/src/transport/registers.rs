// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers by their place: what an access of any width at any offset means.

/// A register of 1, 2 or 4 bytes at a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot<R> {
    pub(super) at: u16,
    pub(super) len: u8,
    pub(super) register: R,
}

/// One register, for tables.
pub(super) const fn slot<R>(at: u16, len: u8, register: R) -> Slot<R> {
    Slot { at, len, register }
}

impl<R: Copy> Slot<R> {
    fn start(&self) -> u64 {
        u64::from(self.at)
    }

    fn end(&self) -> u64 {
        self.start() + u64::from(self.len)
    }
}

/// Reads `data.len()` bytes at `offset`. Bytes that no register has become 0.
pub(super) fn read<R: Copy>(
    slots: &[Slot<R>],
    offset: u64,
    data: &mut [u8],
    mut value: impl FnMut(R) -> u32,
) {
    data.fill(0);
    let end = offset.saturating_add(data.len() as u64);
    for slot in slots {
        if slot.end() <= offset || slot.start() >= end {
            continue;
        }
        let bytes = value(slot.register).to_le_bytes();
        let bytes = bytes.iter().take(slot.len.into());
        for (at, byte) in (slot.start()..).zip(bytes) {
            let place = at
                .checked_sub(offset)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(out) = place.and_then(|place| data.get_mut(place)) {
                *out = *byte;
            }
        }
    }
}

/// Writes `data` at `offset`: each register that is covered as a whole, in ascending order.
pub(super) fn write<R: Copy>(
    slots: &[Slot<R>],
    offset: u64,
    data: &[u8],
    mut set: impl FnMut(R, u32),
) {
    for slot in slots {
        let covered = slot
            .start()
            .checked_sub(offset)
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| data.get(at..at.checked_add(slot.len.into())?));
        if let Some(covered) = covered {
            let mut bytes = [0; 4];
            for (out, byte) in bytes.iter_mut().zip(covered) {
                *out = *byte;
            }
            set(slot.register, u32::from_le_bytes(bytes));
        }
    }
}
