// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver side against `virtio-drivers`, and the device side under it: two
//! drivers do the same things, each is served by a device of ours, and the
//! devices see the same chains, rings and bytes.

use core::alloc::Layout as Allocation;
use core::cell::RefCell;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window};
use vmsg_queue::{
    Buffer, ChainHead, ChainStorage, DeviceQueue, DriverQueue, DriverSlot, Layout, QueueConfig,
    QueueFeatures,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const BASE: u64 = 0x2000_0000;
const POOL: usize = 0x8_0000;
const SIZE: u16 = 8;

/// The memory that the guest of virtio-drivers shares with devices. Buffers are
/// copied in and out, for virtio-drivers allocates some itself.
struct Pool {
    start: NonNull<u8>,
    next: usize,
    free: Vec<(PhysAddr, usize)>,
}

impl Pool {
    fn new() -> Self {
        let layout = Allocation::from_size_align(POOL, PAGE_SIZE).unwrap();
        // SAFETY: the layout is not empty. The memory is kept for good.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        Self {
            start: NonNull::new(start).unwrap(),
            next: 0,
            free: Vec::new(),
        }
    }

    fn allocate(&mut self, len: usize, align: usize) -> (PhysAddr, NonNull<u8>) {
        let len = len.next_multiple_of(align);
        let reuse = self.free.iter().position(|&(_, free)| free == len);
        let addr = match reuse {
            Some(index) => self.free.swap_remove(index).0,
            None => {
                let at = self.next.next_multiple_of(align);
                self.next = at + len;
                assert!(self.next <= POOL, "the pool is used up");
                BASE + at as u64
            }
        };
        (addr, self.at(addr))
    }

    fn release(&mut self, addr: PhysAddr, len: usize, align: usize) {
        self.free.push((addr, len.next_multiple_of(align)));
    }

    fn at(&self, addr: PhysAddr) -> NonNull<u8> {
        let offset = usize::try_from(addr - BASE).unwrap();
        assert!(offset < POOL);
        // SAFETY: the offset is inside the allocation.
        unsafe { self.start.add(offset) }
    }

    fn ram(&self) -> RamSlice<'static> {
        // SAFETY: the memory is never freed, and virtio-drivers accesses it through raw pointers.
        unsafe { RamSlice::from_raw_parts(self.start, POOL) }
    }
}

thread_local! {
    static SHARED: RefCell<Pool> = RefCell::new(Pool::new());
}

struct Bounce;

// SAFETY: pages come zeroed, aligned and unaliased from the pool of the thread, and the test stays
// on one thread; shared buffers are copies.
unsafe impl Hal for Bounce {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        SHARED.with_borrow_mut(|pool| {
            let (addr, ptr) = pool.allocate(pages * PAGE_SIZE, PAGE_SIZE);
            // SAFETY: the pages were just allocated.
            unsafe { ptr.write_bytes(0, pages * PAGE_SIZE) };
            (addr, ptr)
        })
    }

    unsafe fn dma_dealloc(addr: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        SHARED.with_borrow_mut(|pool| pool.release(addr, pages * PAGE_SIZE, PAGE_SIZE));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("there are no registers")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        SHARED.with_borrow_mut(|pool| {
            let (addr, ptr) = pool.allocate(buffer.len(), 16);
            // SAFETY: both are `buffer.len()` bytes, and the copy is new.
            unsafe { ptr.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
            addr
        })
    }

    unsafe fn unshare(addr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        SHARED.with_borrow_mut(|pool| {
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: `share` made the copy as long as the buffer.
                unsafe {
                    pool.at(addr)
                        .copy_to_nonoverlapping(buffer.cast(), buffer.len())
                };
            }
            pool.release(addr, buffer.len(), 16);
        });
    }
}

/// Only learns where the queue is.
#[derive(Default)]
struct Registers(Option<QueueConfig>);

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        0
    }
    fn write_driver_features(&mut self, _: u64) {}
    fn max_queue_size(&mut self, _: u16) -> u32 {
        u32::from(SIZE)
    }
    fn notify(&mut self, _: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, _: u16, size: u32, desc: u64, driver: u64, device: u64) {
        self.0 = Some(QueueConfig {
            size: u16::try_from(size).unwrap(),
            desc: BusAddr(desc),
            driver: BusAddr(driver),
            device: BusAddr(device),
        });
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::Unsupported)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::Unsupported)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: Vec<Vec<u8>>,
        writable: Vec<usize>,
    },
    Pop(usize),
    Complete(Vec<(u16, u16)>),
    DriverPop,
    DeviceNotifications(bool),
    DriverNotifications(bool),
}

fn step(event_idx: bool) -> impl Strategy<Value = Step> {
    let bytes = prop::collection::vec(any::<u8>(), 1..40);
    let adding = (
        prop::collection::vec(bytes, 0..4),
        prop::collection::vec(1usize..100, 0..4),
    )
        .prop_map(|(readable, writable)| Step::Add { readable, writable });
    prop_oneof![
        4 => adding,
        3 => (0usize..10).prop_map(Step::Pop),
        3 => prop::collection::vec(any::<(u16, u16)>(), 0..4).prop_map(Step::Complete),
        4 => Just(Step::DriverPop),
        1 => any::<bool>().prop_map(Step::DeviceNotifications),
        // With EVENT_IDX virtio-drivers cannot ask for peace.
        1 => any::<bool>().prop_map(move |on| Step::DriverNotifications(on || event_idx)),
    ]
}

/// A device with what it has taken and not used.
struct Device<'m> {
    space: AddressSpace<'m>,
    queue: DeviceQueue,
    storage: ChainStorage,
    taken: Vec<(ChainHead, usize)>,
}

impl<'m> Device<'m> {
    fn new(config: QueueConfig, features: QueueFeatures, space: AddressSpace<'m>) -> Self {
        Self {
            space,
            queue: DeviceQueue::new(config, features, space).unwrap(),
            storage: ChainStorage::with_capacity(64),
            taken: Vec::new(),
        }
    }

    /// What it sees of each chain: number, readable bytes, room. Answers at once.
    fn pop(&mut self, max: usize) -> Vec<(u16, Vec<u8>, usize)> {
        let batch = self.queue.pop(self.space, &mut self.storage, max).unwrap();
        let mut seen = Vec::new();
        for chain in batch.iter() {
            let mut bytes = vec![0; chain.readable().len()];
            chain.readable().read(&mut bytes);
            let room = chain.writable().len();
            let answer: Vec<u8> = (0..room).map(|n| answer(bytes.len(), n)).collect();
            chain.writable().write(&answer);
            self.taken.push((chain.head(), room));
            seen.push((chain.head().id(), bytes, room));
        }
        seen
    }

    fn complete(&mut self, picks: &[(u16, u16)]) -> bool {
        for &(pick, len) in picks.iter().take(self.taken.len()) {
            let (head, room) = self.taken.remove(usize::from(pick) % self.taken.len());
            let written = u32::try_from(usize::from(len).min(room)).unwrap();
            self.queue.complete(self.space, head, written).unwrap();
        }
        self.queue.publish(self.space).unwrap()
    }

    /// Index and elements of the used ring.
    fn used_ring(&self) -> Vec<u8> {
        let config = self.queue.config();
        let len = 2 + 8 * usize::from(config.size);
        let mut bytes = vec![0; len];
        let at = BusAddr(config.device.0 + 2);
        let ring = self.space.slice(at, len, Access::Read).unwrap();
        ring.read(0, &mut bytes);
        bytes
    }
}

/// Byte `n` of the answer to a request of `len` bytes.
fn answer(len: usize, n: usize) -> u8 {
    u8::try_from((len * 7 + n * 13) % 256).unwrap()
}

/// A chain of virtio-drivers while the device has it.
struct Sent {
    token: u16,
    readable: Vec<Vec<u8>>,
    writable: Vec<Vec<u8>>,
}

impl Sent {
    /// Lends the buffers out as virtio-drivers wants them.
    fn lend<R>(
        &mut self,
        f: impl for<'a> FnOnce(&'a [&'a [u8]], &'a mut [&'a mut [u8]]) -> R,
    ) -> R {
        let readable: Vec<&[u8]> = self.readable.iter().map(Vec::as_slice).collect();
        let mut writable: Vec<&mut [u8]> =
            self.writable.iter_mut().map(Vec::as_mut_slice).collect();
        f(&readable, &mut writable)
    }
}

fn check(features: QueueFeatures, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let QueueFeatures {
        event_idx,
        indirect,
    } = features;
    let shared = SHARED.with_borrow_mut(|pool| {
        (pool.next, pool.free) = (0, Vec::new());
        pool.ram()
    });
    let windows = [Window::new(BusAddr(BASE), shared, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let mut registers = Registers::default();
    let mut theirs =
        VirtQueue::<Bounce, { SIZE as usize }>::new(&mut registers, 0, indirect, event_idx)
            .unwrap();
    let mut their_device = Device::new(registers.0.unwrap(), features, space);

    let words: Vec<AtomicU64> = (0..POOL / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let ram = ram.split_at(ram.as_ptr().align_offset(16)).1;
    let windows = [Window::new(BusAddr(BASE), ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let layout = Layout::new(SIZE, SIZE).unwrap();
    let slots = [DriverSlot::default(); SIZE as usize];
    let mut ours = DriverQueue::new(layout, features, ram, BusAddr(BASE), slots).unwrap();
    let mut our_device = Device::new(ours.config(), features, space);
    // Our buffers go around in the memory behind the queue, far more than are out at a time.
    let mut place = layout.total_len();

    let mut out: VecDeque<Sent> = VecDeque::new();
    for step in steps {
        match step {
            Step::Add { readable, writable } => {
                let mut lists: [Vec<Buffer>; 2] = [Vec::new(), Vec::new()];
                let reads = readable.iter().map(|bytes| (0, bytes.len()));
                let writes = writable.iter().map(|&len| (1, len));
                for (list, len) in reads.chain(writes) {
                    if place + len > ram.len() {
                        place = layout.total_len();
                    }
                    if let Some(bytes) = readable.get(lists[list].len()).filter(|_| list == 0) {
                        ram.write(place, bytes);
                    }
                    let buffer = (BusAddr(BASE + place as u64), u32::try_from(len).unwrap());
                    lists[list].push(buffer);
                    place += len;
                }
                let token = ours.add(&lists[0], &lists[1]);
                let mut sent = Sent {
                    token: 0,
                    readable,
                    writable: writable.iter().map(|&len| vec![0; len]).collect(),
                };
                // SAFETY: the buffers are copied when they are shared, and handed in again below.
                let other = sent.lend(|reads, writes| unsafe { theirs.add(reads, writes) });
                prop_assert_eq!(
                    token.as_ref().ok().map(|token| token.index()),
                    other.as_ref().ok().map(|&token| usize::from(token))
                );
                if let Ok(token) = other {
                    sent.token = token;
                    out.push_back(sent);
                    let kick = ours.publish().unwrap();
                    // virtio-drivers may kick for nothing, but never the other way round.
                    prop_assert!(!kick || theirs.should_notify());
                    prop_assert!(event_idx || kick == theirs.should_notify());
                }
                if !indirect {
                    let free = usize::from(ours.free_descriptors());
                    prop_assert_eq!(free, theirs.available_desc());
                }
            }
            Step::Pop(max) => prop_assert_eq!(our_device.pop(max), their_device.pop(max)),
            Step::Complete(picks) => {
                let call = our_device.complete(&picks);
                let other = their_device.complete(&picks);
                prop_assert_eq!(call, other);
            }
            Step::DriverPop => {
                let used = ours.pop_used().unwrap();
                let next = theirs.peek_used();
                prop_assert_eq!(used.map(|used| used.token.index()), next.map(usize::from));
                if let (Some(used), Some(token)) = (used, next) {
                    let index = out.iter().position(|sent| sent.token == token).unwrap();
                    let mut sent = out.remove(index).unwrap();
                    // SAFETY: these are the buffers that were added under the token.
                    let written =
                        sent.lend(|reads, writes| unsafe { theirs.pop_used(token, reads, writes) });
                    prop_assert_eq!(written.unwrap(), used.written);
                    let request: usize = sent.readable.iter().map(Vec::len).sum();
                    let bytes = sent.writable.concat();
                    for (n, byte) in bytes.iter().enumerate() {
                        prop_assert_eq!(*byte, answer(request, n));
                    }
                }
                if event_idx && used.is_some() {
                    // virtio-drivers does so with each chain that it takes.
                    ours.enable_notifications().unwrap();
                }
            }
            Step::DeviceNotifications(on) => {
                for device in [&mut our_device, &mut their_device] {
                    if on {
                        device.queue.enable_notifications(device.space).unwrap();
                    } else {
                        device.queue.disable_notifications(device.space).unwrap();
                    }
                }
            }
            Step::DriverNotifications(on) => {
                theirs.set_dev_notify(on);
                if !event_idx {
                    if on {
                        ours.enable_notifications().unwrap();
                    } else {
                        ours.disable_notifications().unwrap();
                    }
                }
            }
        }
        prop_assert_eq!(our_device.used_ring(), their_device.used_ring());
    }
    // Nothing may be left with the device when the queue of virtio-drivers goes.
    their_device.pop(usize::from(SIZE));
    their_device.complete(&[(0, 0); SIZE as usize]);
    while let Some(token) = theirs.peek_used() {
        let index = out.iter().position(|sent| sent.token == token).unwrap();
        let mut sent = out.remove(index).unwrap();
        // SAFETY: these are the buffers that were added under the token.
        let popped = sent.lend(|reads, writes| unsafe { theirs.pop_used(token, reads, writes) });
        popped.unwrap();
    }
    prop_assert!(out.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn the_device_sees_no_difference(
        (features, steps) in (any::<bool>(), any::<bool>()).prop_flat_map(|(event_idx, indirect)| {
            let features = QueueFeatures { event_idx, indirect };
            (Just(features), prop::collection::vec(step(event_idx), 1..150))
        })
    ) {
        check(features, steps)?;
    }
}
