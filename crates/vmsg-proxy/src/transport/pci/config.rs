// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space: header type 0 and the list of capabilities.

use super::bars::{
    MSIX_BAR, NOTIFY_MULTIPLIER, Part, SHARED_BAR, SharedAt, VIRTIO_BAR, VIRTIO_BAR_SIZE,
    shared_size,
};
use super::msix::Msix;
use super::{common, ids};

/// Bytes.
pub(super) const SIZE: usize = 256;

/// Command: memory, bus master, parity error response, SERR#, INTx disable.
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 8 | INTX_DISABLE;
const INTX_DISABLE: u16 = 1 << 10;
/// Status: the line is raised.
const INTX_STATUS: u8 = 1 << 3;
/// Status: there is a list of capabilities.
const CAPABILITIES: u16 = 1 << 4;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const FIRST_CAPABILITY: usize = 0x40;

const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// Types of capabilities of virtio (virtio 1.3 §4.1.4).
mod kind {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
    pub(super) const SHARED_MEMORY: u8 = 8;
}

/// How many shared-memory capabilities have room.
pub(super) const MAX_SHARED: usize = 3;

/// The access window of VIRTIO_PCI_CAP_PCI_CFG, as the driver has set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) bar: u8,
    pub(super) offset: u64,
    /// 1, 2 or 4.
    pub(super) len: usize,
}

/// What the capabilities are made of.
pub(super) struct Facts<'a> {
    pub(super) device_id: u32,
    pub(super) queues: usize,
    pub(super) config_size: u32,
    pub(super) msix: &'a Msix,
    pub(super) shared: &'a [SharedAt],
}

/// The bytes, and which bits of them can be written.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    reset: [u8; SIZE],
    writable: [u8; SIZE],
    msix: usize,
    /// Where the capability of the access window is.
    window: usize,
}

impl ConfigSpace {
    pub(super) fn new(facts: &Facts<'_>) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            reset: [0; SIZE],
            writable: [0; SIZE],
            msix: 0,
            window: 0,
        };
        space.put(0x00, &ids::VENDOR.to_le_bytes());
        space.put(0x02, &ids::device(facts.device_id).to_le_bytes());
        space.allow(COMMAND, &COMMAND_BITS.to_le_bytes());
        space.put(STATUS, &CAPABILITIES.to_le_bytes());
        let [base, sub, interface] = ids::class(facts.device_id);
        space.put(0x08, &[ids::REVISION, interface, sub, base]);
        // Cache line size and latency timer are kept and mean nothing.
        space.allow(0x0c, &[0xff, 0xff]);
        space.bar(MSIX_BAR, facts.msix.bar_size(), false, 0x0);
        space.bar(SHARED_BAR, shared_size(facts.shared), true, 0xc);
        space.bar(VIRTIO_BAR, VIRTIO_BAR_SIZE, true, 0x4);
        space.put(0x2c, &ids::VENDOR.to_le_bytes());
        space.put(0x2e, &ids::SUBSYSTEM.to_le_bytes());
        space.allow(0x3c, &[0xff]);
        // INTA#.
        space.put(0x3d, &[1]);
        space.capabilities(facts);
        space.reset = space.bytes;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(out) = self.bytes.get_mut(at..at + bytes.len()) {
            out.copy_from_slice(bytes);
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        if let Some(out) = self.writable.get_mut(at..at + bits.len()) {
            out.copy_from_slice(bits);
        }
    }

    fn bar(&mut self, bar: u8, size: u64, wide: bool, flags: u8) {
        if size == 0 {
            return;
        }
        let at = BAR0 + 4 * usize::from(bar);
        let mut mask = (!(size - 1)).to_le_bytes();
        mask[0] &= 0xf0;
        self.put(at, &[flags]);
        self.allow(at, mask.get(..if wide { 8 } else { 4 }).unwrap_or_default());
    }

    fn capabilities(&mut self, facts: &Facts<'_>) {
        let mut list = List {
            space: self,
            link: 0x34,
            next: FIRST_CAPABILITY,
        };
        let count = facts.msix.count().saturating_sub(1);
        let pending_at = word(facts.msix.pending_at());
        let mut msix = count.to_le_bytes().to_vec();
        msix.extend_from_slice(&u32::from(MSIX_BAR).to_le_bytes());
        msix.extend_from_slice(&(pending_at | u32::from(MSIX_BAR)).to_le_bytes());
        let at = list.add(0x11, &msix);
        list.space
            .allow(at + 2, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
        list.space.msix = at;

        let queues = u32::try_from(facts.queues).unwrap_or(0).max(1);
        list.part(kind::COMMON, Part::Common, common::SIZE, &[]);
        list.part(
            kind::NOTIFY,
            Part::Notify,
            queues * NOTIFY_MULTIPLIER,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        );
        list.part(kind::ISR, Part::Isr, 1, &[]);
        if facts.config_size != 0 {
            let room = Part::Notify.start() - Part::Device.start();
            list.part(kind::DEVICE, Part::Device, facts.config_size.min(room), &[]);
        }
        let window = list.virtio(kind::PCI, 0, 0, (0, 0), &[0; 4]);
        // BAR, offset, length and data.
        list.space.allow(window + 4, &[0xff]);
        list.space.allow(window + 8, &[0xff; 12]);
        list.space.window = window;
        for shared in facts.shared {
            let high = [shared.offset >> 32, shared.memory.len >> 32].map(word);
            let high: Vec<u8> = high.iter().flat_map(|word| word.to_le_bytes()).collect();
            list.virtio(
                kind::SHARED_MEMORY,
                SHARED_BAR,
                shared.memory.id,
                (word(shared.offset), word(shared.memory.len)),
                &high,
            );
        }
    }

    /// Back to what it was first.
    pub(super) fn reset(&mut self) {
        self.bytes = self.reset;
    }

    /// Reads; `line`: whether the interrupt line is raised. Past the end is nobody.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], line: bool) {
        for (at, out) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let byte = self.bytes.get(at).copied().unwrap_or(0xff);
            let status = if at == STATUS && line { INTX_STATUS } else { 0 };
            *out = byte | status;
        }
    }

    /// Writes what can be written.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    fn u16_at(&self, at: usize) -> u16 {
        let bytes = self.bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u16::from_le_bytes)
    }

    fn u32_at(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// Whether the driver wants no interrupts by the line.
    pub(super) fn intx_disabled(&self) -> bool {
        self.u16_at(COMMAND) & INTX_DISABLE != 0
    }

    /// What the MSI-X capability says: enabled, function mask.
    pub(super) fn msix(&self) -> (bool, bool) {
        let control = self.u16_at(self.msix + 2);
        (
            control & MSIX_ENABLE != 0,
            control & MSIX_FUNCTION_MASK != 0,
        )
    }

    /// Where the data of the access window are.
    pub(super) fn window_data(&self) -> u64 {
        self.window as u64 + 16
    }

    /// The access window, if it is set to what can be (virtio 1.3 §4.1.4.9).
    pub(super) fn window(&self) -> Option<Window> {
        let bar = self.bytes.get(self.window + 4).copied()?;
        let offset = u64::from(self.u32_at(self.window + 8));
        let len = self.u32_at(self.window + 12);
        let fits = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len.into());
        let len = usize::try_from(len).ok()?;
        fits.then_some(Window { bar, offset, len })
    }

    /// The data of the access window.
    pub(super) fn data(&self) -> [u8; 4] {
        self.u32_at(self.window + 16).to_le_bytes()
    }

    /// What was read through the access window.
    pub(super) fn set_data(&mut self, data: &[u8]) {
        let at = self.window + 16;
        self.put(at, data);
    }
}

/// The list while it is made.
struct List<'a> {
    space: &'a mut ConfigSpace,
    /// Where the offset of the next one goes.
    link: usize,
    next: usize,
}

impl List<'_> {
    /// Appends a capability; gives its offset.
    fn add(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.space.put(self.link, &[u8::try_from(at).unwrap_or(0)]);
        self.space.put(at, &[id, 0]);
        self.space.put(at + 2, body);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Appends a capability of virtio: `virtio_pci_cap` with what follows it.
    fn virtio(&mut self, kind: u8, bar: u8, id: u8, place: (u32, u32), rest: &[u8]) -> usize {
        let len = u8::try_from(16 + rest.len()).unwrap_or(0);
        let mut body = vec![len, kind, bar, id, 0, 0];
        body.extend_from_slice(&place.0.to_le_bytes());
        body.extend_from_slice(&place.1.to_le_bytes());
        body.extend_from_slice(rest);
        self.add(0x09, &body)
    }

    fn part(&mut self, kind: u8, part: Part, len: u32, rest: &[u8]) {
        self.virtio(kind, VIRTIO_BAR, 0, (part.start(), len), rest);
    }
}

/// The low word.
#[expect(clippy::cast_possible_truncation, reason = "the low word is meant")]
fn word(value: u64) -> u32 {
    value as u32
}
