// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MSI-X: table, pending bits, and the eventfds behind the vectors (PCI Local Bus 3.0 §6.8.2).

use super::super::trigger::Trigger;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// No vector at all (virtio 1.3 §4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// The most vectors that the capability can say.
const MAX_VECTORS: usize = 2048;
/// Bytes of one entry of the table.
const ENTRY: u64 = 16;
/// Vector control: masked.
const MASKED: u32 = 1;

/// One vector.
#[derive(Debug)]
struct Vector {
    /// Message address low and high, message data, vector control.
    entry: [u32; 4],
    /// The client has written the entry.
    written: bool,
    /// The client has asked so, apart from the table.
    masked: bool,
    pending: bool,
    trigger: Option<Trigger>,
}

impl Vector {
    const RESET: [u32; 4] = [0, 0, 0, MASKED];

    fn new() -> Vector {
        Vector {
            entry: Vector::RESET,
            written: false,
            masked: false,
            pending: false,
            trigger: None,
        }
    }

    fn is_masked(&self) -> bool {
        self.masked || self.written && self.entry[3] & MASKED != 0
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Msix {
    vectors: Vec<Vector>,
    /// As the capability says.
    enabled: bool,
    function_mask: bool,
}

impl Msix {
    /// A vector for each queue and one for changes of the configuration.
    pub(super) fn new(queues: usize) -> Msix {
        let count = (queues + 1).min(MAX_VECTORS);
        Msix {
            vectors: (0..count).map(|_| Vector::new()).collect(),
            enabled: false,
            function_mask: false,
        }
    }

    /// Number of vectors.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    fn table_size(&self) -> u64 {
        self.vectors.len() as u64 * ENTRY
    }

    /// Where the pending bits begin.
    pub(super) fn pending_at(&self) -> u64 {
        self.table_size().next_power_of_two().max(0x800)
    }

    /// Bytes of the BAR.
    pub(super) fn bar_size(&self) -> u64 {
        self.pending_at() * 2
    }

    /// Whether interrupts are messages now.
    pub(super) fn is_active(&self) -> bool {
        self.enabled || self.vectors.iter().any(|vector| vector.trigger.is_some())
    }

    /// Takes over what the capability says.
    pub(super) fn set_control(&mut self, enabled: bool, function_mask: bool) {
        if (self.enabled, self.function_mask) != (enabled, function_mask) {
            self.enabled = enabled;
            self.function_mask = function_mask;
            self.flush_all();
        }
    }

    /// Everything but the eventfds.
    pub(super) fn reset(&mut self) {
        for vector in &mut self.vectors {
            vector.entry = Vector::RESET;
            vector.written = false;
            vector.masked = false;
            vector.pending = false;
        }
        self.enabled = false;
        self.function_mask = false;
    }

    /// What the device had to say before it was reset is void.
    pub(super) fn forget_pending(&mut self) {
        for vector in &mut self.vectors {
            vector.pending = false;
        }
    }

    /// False: there is no such vector.
    pub(super) fn set_trigger(&mut self, index: u16, trigger: Option<Trigger>) -> bool {
        let Some(vector) = self.vectors.get_mut(usize::from(index)) else {
            return false;
        };
        vector.trigger = trigger;
        self.flush(index.into());
        true
    }

    pub(super) fn set_masked(&mut self, index: u16, masked: bool) {
        if let Some(vector) = self.vectors.get_mut(usize::from(index)) {
            vector.masked = masked;
            self.flush(index.into());
        }
    }

    /// The eventfd of a vector that may be rung by anybody now.
    pub(super) fn open(&self, index: u16) -> Option<&Arc<OwnedFd>> {
        let vector = self.vectors.get(usize::from(index))?;
        let trigger = vector.trigger.as_ref()?;
        (!self.function_mask && !vector.is_masked()).then(|| trigger.file())
    }

    /// Sends the message, now or when it can be.
    pub(super) fn raise(&mut self, index: u16) {
        if let Some(vector) = self.vectors.get_mut(usize::from(index)) {
            vector.pending = true;
            self.flush(index.into());
        }
    }

    /// Rings a vector's eventfd, whatever the masks.
    pub(super) fn ring(&self, index: u16) {
        let vector = self.vectors.get(usize::from(index));
        if let Some(trigger) = vector.and_then(|vector| vector.trigger.as_ref()) {
            trigger.ring();
        }
    }

    fn flush(&mut self, index: usize) {
        if let Some(vector) = self.vectors.get_mut(index)
            && let Some(trigger) = &vector.trigger
            && vector.pending
            && !self.function_mask
            && !vector.is_masked()
        {
            trigger.ring();
            vector.pending = false;
        }
    }

    fn flush_all(&mut self) {
        for index in 0..self.vectors.len() {
            self.flush(index);
        }
    }

    /// The word at `offset` of the BAR, a multiple of 4.
    fn word(&self, offset: u64) -> u32 {
        let entry = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        if let Some(vector) = self.vectors.get(entry) {
            let field = usize::try_from(offset % ENTRY / 4).unwrap_or(0);
            return vector.entry.get(field).copied().unwrap_or(0);
        }
        let Some(first) = offset
            .checked_sub(self.pending_at())
            .and_then(|at| usize::try_from(at).ok()?.checked_mul(8))
        else {
            return 0;
        };
        let vectors = self.vectors.iter().skip(first).take(32);
        (0u32..).zip(vectors).fold(0, |word, (bit, vector)| {
            word | u32::from(vector.pending) << bit
        })
    }

    /// Reads the BAR.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let [b0, b1, b2, b3] = self.word(at & !3).to_le_bytes();
            *byte = match at & 3 {
                0 => b0,
                1 => b1,
                2 => b2,
                _ => b3,
            };
        }
    }

    /// Writes the BAR: whole words of the table.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(first) = offset.checked_next_multiple_of(4) else {
            return;
        };
        let skip = usize::try_from(first - offset).unwrap_or(0);
        let words = data.get(skip..).unwrap_or_default();
        for (index, bytes) in (0u64..).zip(words.chunks_exact(4)) {
            let at = first + 4 * index;
            let entry = usize::try_from(at / ENTRY).unwrap_or(usize::MAX);
            let Some(vector) = self.vectors.get_mut(entry) else {
                return;
            };
            let field = usize::try_from(at % ENTRY / 4).unwrap_or(0);
            if let (Some(word), Ok(bytes)) = (vector.entry.get_mut(field), bytes.try_into()) {
                *word = match field {
                    // An address of a whole word, and of the control only the mask.
                    0 => u32::from_le_bytes(bytes) & !3,
                    3 => u32::from_le_bytes(bytes) & MASKED,
                    _ => u32::from_le_bytes(bytes),
                };
                vector.written = true;
            }
            self.flush(entry);
        }
    }
}
