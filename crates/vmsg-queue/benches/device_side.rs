// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a chain costs on the device side: take it, look its buffers up,
//! complete it, in batches of 32 with EVENT_IDX and one decision about a
//! notification for each batch.
//!
//! The floor is the least that can be done with the same rings: a loop that
//! checks the bounds of each index, the length of each chain and each buffer,
//! and knows one window. Every
//! repetition runs floor, subject, floor; it is thrown away if the floor moved
//! by more than 30 %. Printed is the median over the others, as Markdown.

use core::hint::black_box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window};
use vmsg_queue::{ChainStorage, DeviceQueue, Layout, QueueConfig, QueueFeatures};

const BASE: u64 = 0x4000_0000;
const LEN: usize = 0x10_0000;
const SIZE: u16 = 256;
const BATCH: u16 = 32;
/// Short, so that few repetitions are interrupted; those are the median's to ignore.
const BATCHES: u32 = 250;
const REPETITIONS: usize = 501;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const FEATURES: QueueFeatures = QueueFeatures {
    event_idx: true,
    indirect: true,
};

/// What the chains of a run look like.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    /// Flags of the buffers of a chain, but for NEXT.
    buffers: &'static [u16],
    indirect: bool,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "1 buffer",
        buffers: &[WRITE],
        indirect: false,
    },
    Shape {
        name: "2 buffers",
        buffers: &[0, WRITE],
        indirect: false,
    },
    Shape {
        name: "3 buffers, indirect",
        buffers: &[0, WRITE, WRITE],
        indirect: true,
    },
];

/// A driver that has filled all rings beforehand and only moves its index.
struct Guest {
    memory: GuestMemoryMmap,
    config: QueueConfig,
    avail: u16,
}

impl Guest {
    fn new(shape: Shape) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), LEN)]).unwrap();
        let layout = Layout::new(SIZE, 0).unwrap();
        let at = |offset: usize| BusAddr(BASE + offset as u64);
        let guest = Self {
            memory,
            config: QueueConfig {
                size: SIZE,
                desc: at(0),
                driver: at(layout.driver_offset()),
                device: at(layout.device_offset()),
            },
            avail: 0,
        };
        let ram = guest.ram();
        let describe = |offset: usize, addr: u64, len: u32, flags: u16, next: u16| {
            ram.write(offset, &addr.to_le_bytes());
            ram.write(offset + 8, &len.to_le_bytes());
            ram.write(offset + 12, &flags.to_le_bytes());
            ram.write(offset + 14, &next.to_le_bytes());
        };
        let count = u16::try_from(shape.buffers.len()).unwrap();
        let step = if shape.indirect { 1 } else { count };
        for chain in 0..SIZE / step {
            let head = chain * step;
            // Tables from 64 KiB on, buffers from 128 KiB on.
            let table = 0x1_0000 + usize::from(chain) * 64;
            let (start, first) = if shape.indirect {
                let len = u32::from(count) * 16;
                describe(
                    usize::from(head) * 16,
                    BASE + table as u64,
                    len,
                    INDIRECT,
                    0,
                );
                (table, 0)
            } else {
                (usize::from(head) * 16, head)
            };
            for (n, flags) in (0..count).zip(shape.buffers) {
                let more = if n + 1 < count { NEXT } else { 0 };
                let buffer = BASE + 0x2_0000 + u64::from(head + n) * 0x600;
                let offset = start + usize::from(n) * 16;
                describe(offset, buffer, 0x600, flags | more, first + n + 1);
            }
        }
        for slot in 0..SIZE {
            let head = slot % (SIZE / step) * step;
            let offset = layout.driver_offset() + 4 + 2 * usize::from(slot);
            ram.write(offset, &head.to_le_bytes());
        }
        guest
    }

    fn ram(&self) -> RamSlice<'_> {
        let ptr = self.memory.get_host_address(GuestAddress(BASE)).unwrap();
        // SAFETY: the region is LEN bytes and mapped while `self` is borrowed.
        unsafe { RamSlice::from_raw_parts(NonNull::new(ptr).unwrap(), LEN) }
    }

    /// Nanoseconds for each chain while `device` serves one batch after another.
    fn run(&mut self, mut device: impl FnMut()) -> f64 {
        let layout = Layout::new(SIZE, 0).unwrap();
        let index = self.ram().atomic_u16(layout.driver_offset() + 2).unwrap();
        let mut avail = self.avail;
        let start = Instant::now();
        for _ in 0..BATCHES {
            avail = avail.wrapping_add(BATCH);
            index.store(avail.to_le(), Ordering::Release);
            device();
        }
        let time = start.elapsed();
        self.avail = avail;
        let used = self.ram().atomic_u16(layout.device_offset() + 2).unwrap();
        assert_eq!(u16::from_le(used.load(Ordering::Relaxed)), avail);
        let chains = f64::from(BATCHES) * f64::from(BATCH);
        time.as_secs_f64() * 1e9 / chains
    }
}

/// The floor: a split queue in one window, nothing else.
struct Raw<'m> {
    ram: RamSlice<'m>,
    table: &'m [[AtomicU64; 2]],
    heads: &'m [AtomicU16],
    avail: &'m AtomicU16,
    used_event: &'m AtomicU16,
    elements: &'m [[AtomicU32; 2]],
    used: &'m AtomicU16,
    next: u16,
}

/// `count` ring words at `offset`.
fn words<T>(ram: RamSlice<'_>, offset: usize, count: usize) -> &[T] {
    let part = ram.get(offset, count * size_of::<T>()).unwrap();
    let ptr = part.as_ptr().cast::<T>();
    assert!(ptr.is_aligned());
    // SAFETY: in bounds and aligned; T is one of the atomics above.
    unsafe { core::slice::from_raw_parts(ptr, count) }
}

impl<'m> Raw<'m> {
    fn new(ram: RamSlice<'m>, next: u16) -> Self {
        let layout = Layout::new(SIZE, 0).unwrap();
        let (driver, device) = (layout.driver_offset(), layout.device_offset());
        let size = usize::from(SIZE);
        Self {
            ram,
            table: words(ram, 0, size),
            heads: words(ram, driver + 4, size),
            avail: ram.atomic_u16(driver + 2).unwrap(),
            used_event: ram.atomic_u16(driver + 4 + 2 * size).unwrap(),
            elements: words(ram, device + 4, size),
            used: ram.atomic_u16(device + 2).unwrap(),
            next,
        }
    }

    #[inline]
    fn buffer(&self, addr: u64, rest: u64) {
        let offset = usize::try_from(addr.wrapping_sub(BASE)).unwrap();
        let len = (rest & 0xffff_ffff) as usize;
        black_box(self.ram.get(offset, len).unwrap());
    }

    #[inline(never)]
    fn batch(&mut self) {
        let mask = usize::from(SIZE) - 1;
        let avail = u16::from_le(self.avail.load(Ordering::Acquire));
        assert!(avail.wrapping_sub(self.next) <= SIZE);
        let old = self.next;
        while self.next != avail {
            let slot = usize::from(self.next) & mask;
            let head = u16::from_le(self.heads[slot].load(Ordering::Relaxed));
            let mut index = head;
            // Without a limit a chain could go round and round.
            let mut left = self.table.len();
            loop {
                assert!(left > 0);
                left -= 1;
                let [addr, rest] = &self.table[usize::from(index)];
                let addr = u64::from_le(addr.load(Ordering::Relaxed));
                let rest = u64::from_le(rest.load(Ordering::Relaxed));
                let flags = (rest >> 32 & 0xffff) as u16;
                if flags & INDIRECT != 0 {
                    let offset = usize::try_from(addr.wrapping_sub(BASE)).unwrap();
                    let count = (rest & 0xffff_ffff) as usize / 16;
                    let table: &[[AtomicU64; 2]] = words(self.ram, offset, count);
                    let mut index = 0;
                    let mut left = count;
                    loop {
                        assert!(left > 0);
                        left -= 1;
                        let [addr, rest] = &table[index];
                        let addr = u64::from_le(addr.load(Ordering::Relaxed));
                        let rest = u64::from_le(rest.load(Ordering::Relaxed));
                        self.buffer(addr, rest);
                        if rest >> 32 & u64::from(NEXT) == 0 {
                            break;
                        }
                        index = (rest >> 48) as usize;
                    }
                    break;
                }
                self.buffer(addr, rest);
                if flags & NEXT == 0 {
                    break;
                }
                index = (rest >> 48) as u16;
            }
            let [id, len] = &self.elements[slot];
            id.store(u32::from(head).to_le(), Ordering::Relaxed);
            len.store(64u32.to_le(), Ordering::Relaxed);
            self.next = self.next.wrapping_add(1);
        }
        self.used.store(self.next.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        let event = u16::from_le(self.used_event.load(Ordering::Relaxed));
        let passed = self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old);
        black_box(passed);
    }
}

fn floor(guest: &mut Guest) -> f64 {
    // The guest only moves its index: the rings may be borrowed beside it.
    let ptr = NonNull::new(guest.ram().as_ptr()).unwrap();
    // SAFETY: the region is LEN bytes and mapped as long as the guest lives, hence during this call.
    let ram = unsafe { RamSlice::from_raw_parts(ptr, LEN) };
    let mut raw = Raw::new(ram, guest.avail);
    guest.run(|| raw.batch())
}

fn ours(guest: &mut Guest) -> f64 {
    let ptr = NonNull::new(guest.ram().as_ptr()).unwrap();
    // SAFETY: as in `floor`.
    let ram = unsafe { RamSlice::from_raw_parts(ptr, LEN) };
    let windows = [Window::new(BusAddr(BASE), ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let at = guest.avail;
    let mut queue = DeviceQueue::resume(guest.config, FEATURES, space, at, at).unwrap();
    let mut storage = ChainStorage::with_capacity(256);
    guest.run(|| ours_batch(&mut queue, space, &mut storage))
}

#[inline(never)]
fn ours_batch(queue: &mut DeviceQueue, space: AddressSpace<'_>, storage: &mut ChainStorage) {
    let batch = queue.pop(space, storage, usize::from(BATCH)).unwrap();
    let mut completer = queue.completer(space).unwrap();
    for chain in batch.iter() {
        for piece in chain.readable_slices() {
            black_box(piece);
        }
        for piece in chain.writable_slices() {
            black_box(piece);
        }
        completer.complete(chain.head(), 64);
    }
    black_box(queue.publish(space).unwrap());
}

fn rust_vmm(guest: &mut Guest) -> f64 {
    let memory = guest.memory.clone();
    let mut queue = Queue::new(SIZE).unwrap();
    let QueueConfig {
        desc,
        driver,
        device,
        ..
    } = guest.config;
    queue
        .try_set_desc_table_address(GuestAddress(desc.0))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(driver.0))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(device.0))
        .unwrap();
    queue.set_event_idx(true);
    queue.set_next_avail(guest.avail);
    queue.set_next_used(guest.avail);
    queue.set_ready(true);
    guest.run(|| rust_vmm_batch(&mut queue, &memory))
}

#[inline(never)]
fn rust_vmm_batch(queue: &mut Queue, memory: &GuestMemoryMmap) {
    for _ in 0..BATCH {
        let chain = queue.iter(memory).unwrap().next().unwrap();
        let head = chain.head_index();
        for part in chain {
            let len = part.len() as usize;
            black_box(
                memory
                    .get_slice(part.addr(), len)
                    .unwrap()
                    .ptr_guard_mut()
                    .as_ptr(),
            );
        }
        queue.add_used(memory, head, 64).unwrap();
    }
    black_box(queue.needs_notification(memory).unwrap());
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(shape: Shape, name: &str, subject: fn(&mut Guest) -> f64) {
    let mut guest = Guest::new(shape);
    floor(&mut guest);
    subject(&mut guest);
    let mut kept = Vec::new();
    for _ in 0..REPETITIONS {
        let before = floor(&mut guest);
        let time = subject(&mut guest);
        let after = floor(&mut guest);
        if (before / after).max(after / before) <= 1.3 {
            let floor = (before + after) / 2.0;
            kept.push((floor, time, time / floor));
        }
    }
    let column = |get: fn(&(f64, f64, f64)) -> f64| median(kept.iter().map(get).collect());
    if kept.len() < 15 {
        println!(
            "| {} | {name} | too noisy: {} repetitions | | |",
            shape.name,
            kept.len()
        );
        return;
    }
    println!(
        "| {} | {name} | {:.2} | {:.2} | **{:.2}** ({}) |",
        shape.name,
        column(|row| row.0),
        column(|row| row.1),
        column(|row| row.2),
        kept.len(),
    );
}

fn main() {
    println!("| chain | device side | floor, ns | subject, ns | ratio (repetitions) |");
    println!("|---|---|---|---|---|");
    for shape in SHAPES {
        compare(shape, "vmsg-queue", ours);
        compare(shape, "rust-vmm virtio-queue 0.18", rust_vmm);
    }
}
