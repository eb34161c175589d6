// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The unmodified drivers of `virtio-drivers` on register banks of this process, with real devices behind a bus.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod bank;
mod devices;
#[path = "../../vmsg-driver/tests/host/mod.rs"]
mod host;

use bank::{Bank, Registers};
use devices::{Memory, Seat};
use host::{MAC, NET, PATIENCE, RNG};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use virtio_msg::{DevNum, DeviceStatus, QueueIndex};
use vmsg_driver::virtio_drivers::PoolHal;
use vmsg_proxy::session::Event;
use vmsg_proxy::transport::mmio::Mmio;
use vmsg_proxy::transport::pci::{Function, Region};
use vmsg_proxy::transport::{Direct, Options};

struct MmioBank(Mmio<Direct>);

impl Registers for MmioBank {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

struct PciBank(Function<Direct>);

/// BAR 4 is all that drivers access themselves.
impl Registers for PciBank {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(Region::Bar(4), offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(Region::Bar(4), offset, data);
    }
}

/// The pool, and register banks where they are.
struct BankHal;

type Pool = PoolHal<Memory>;

// SAFETY: memory is the pool's business, which keeps these promises. Registers are at the addresses that the BAR was given, which are those of
// the bank that answers there.
unsafe impl Hal for BankHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Pool::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: as the caller promises.
        unsafe { Pool::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        let address = usize::try_from(paddr).unwrap();
        NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap()
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        // SAFETY: as the caller promises.
        unsafe { Pool::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        // SAFETY: as the caller promises.
        unsafe { Pool::unshare(paddr, buffer, direction) }
    }
}

/// The configuration space of one function, alone on its bus.
struct OneFunction(Arc<Mutex<PciBank>>);

impl ConfigurationAccess for OneFunction {
    fn read_word(&self, _: DeviceFunction, offset: u8) -> u32 {
        let mut data = [0; 4];
        let mut bank = self.0.lock().unwrap();
        bank.0.read(Region::Config, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write_word(&mut self, _: DeviceFunction, offset: u8, data: u32) {
        let mut bank = self.0.lock().unwrap();
        bank.0
            .write(Region::Config, offset.into(), &data.to_le_bytes());
    }

    unsafe fn unsafe_clone(&self) -> Self {
        OneFunction(self.0.clone())
    }
}

fn random_bytes(rng: &mut VirtIORng<BankHal, impl Transport>) {
    let (mut one, mut two) = ([0; 5000], [0; 64]);
    assert_eq!(rng.request_entropy(&mut one).unwrap(), 5000);
    assert_eq!(rng.request_entropy(&mut two).unwrap(), 64);
    // 5,000 random bytes: each value is expected some 20 times.
    let kinds = (0..=255u8).filter(|value| one.contains(value)).count();
    assert!(kinds > 200, "{kinds} different bytes");
    for round in 0..200 {
        assert_eq!(rng.request_entropy(&mut two).unwrap(), 64, "{round}");
    }
}

fn frames_come_back(mut net: VirtIONet<BankHal, impl Transport, 16>) {
    assert_eq!(net.mac_address(), MAC);
    for round in 0..100u8 {
        let len = 60 + usize::from(round) * 10;
        let mut frame = net.new_tx_buffer(len);
        frame.packet_mut().fill(round);
        net.send(frame).unwrap();
        let start = std::time::Instant::now();
        while !net.can_recv() {
            assert!(start.elapsed() < PATIENCE, "no frame in round {round}");
            std::thread::yield_now();
        }
        let received = net.receive().unwrap();
        assert_eq!(received.packet(), vec![round; len]);
        net.recycle_rx_buffer(received).unwrap();
        net.ack_interrupt();
    }
}

/// A bank of virtio-mmio with a device of the host.
fn mmio(device: DevNum) -> (Seat, Arc<Mutex<MmioBank>>, Bank) {
    let seat = Seat::new(device);
    let bank = Arc::new(Mutex::new(MmioBank(Mmio::new(
        seat.direct(),
        Options::default(),
        Vec::new(),
    ))));
    let registers = Bank::new(0x1000, bank.clone());
    (seat, bank, registers)
}

fn mmio_transport(registers: &Bank) -> MmioTransport<'_> {
    // SAFETY: a page of registers, which is there for as long as the transport.
    unsafe { MmioTransport::new(registers.start().cast(), 0x1000) }.unwrap()
}

/// A function, with its BARs where banks are.
fn pci(device: DevNum) -> (Seat, Arc<Mutex<PciBank>>, Bank) {
    let seat = Seat::new(device);
    let function = Function::new(seat.direct(), Options::default(), Vec::new());
    let bank = Arc::new(Mutex::new(PciBank(function)));
    let registers = Bank::new(0x4000, bank.clone());
    (seat, bank, registers)
}

fn pci_transport(bank: &Arc<Mutex<PciBank>>, registers: &Bank) -> PciTransport {
    let mut root = PciRoot::new(OneFunction(bank.clone()));
    let (place, found) = root.enumerate_bus(0).next().unwrap();
    assert_eq!((found.vendor_id, found.revision), (0x1af4, 1));
    let bars = root.bars(place).unwrap();
    let sizes = bars.map(|bar| Some(bar?.memory_address_size()?.1));
    assert_eq!((sizes[1], sizes[4]), (Some(0x1000), Some(0x4000)));
    root.set_bar_64(place, 4, registers.address());
    PciTransport::new::<BankHal, _>(&mut root, place).unwrap()
}

#[test]
fn an_entropy_driver_gets_random_bytes_over_mmio() {
    let (_seat, bank, registers) = mmio(RNG);
    let transport = mmio_transport(&registers);
    assert_eq!(transport.device_type(), DeviceType::EntropySource);
    let mut rng = VirtIORng::new(transport).unwrap();
    random_bytes(&mut rng);
    drop(rng);
    assert_eq!(bank.lock().unwrap().0.core().status(), DeviceStatus::RESET);
    // And the next driver, too.
    random_bytes(&mut VirtIORng::new(mmio_transport(&registers)).unwrap());
}

#[test]
fn a_network_driver_gets_its_frames_back_over_mmio() {
    let (_seat, _bank, registers) = mmio(NET);
    frames_come_back(VirtIONet::new(mmio_transport(&registers), 2048).unwrap());
}

#[test]
fn an_entropy_driver_gets_random_bytes_over_pci() {
    let (_seat, bank, registers) = pci(RNG);
    let transport = pci_transport(&bank, &registers);
    assert_eq!(transport.device_type(), DeviceType::EntropySource);
    let mut rng = VirtIORng::new(transport).unwrap();
    random_bytes(&mut rng);
    drop(rng);
    assert_eq!(bank.lock().unwrap().0.core().status(), DeviceStatus::RESET);
    random_bytes(&mut VirtIORng::new(pci_transport(&bank, &registers)).unwrap());
}

#[test]
fn a_network_driver_gets_its_frames_back_over_pci() {
    let (_seat, bank, registers) = pci(NET);
    frames_come_back(VirtIONet::new(pci_transport(&bank, &registers), 2048).unwrap());
}

#[test]
fn a_used_buffer_raises_the_line_of_the_bank_until_the_driver_acknowledges_it() {
    let (seat, bank, registers) = mmio(RNG);
    let mut rng = VirtIORng::<BankHal, _>::new(mmio_transport(&registers)).unwrap();
    rng.enable_interrupts();
    let mut bytes = [0; 16];
    rng.request_entropy(&mut bytes).unwrap();
    assert_eq!(seat.used(), QueueIndex(0));
    {
        let mut bank = bank.lock().unwrap();
        bank.0.queue_used(QueueIndex(0));
        assert!(bank.0.line());
    }
    assert!(!rng.ack_interrupt().is_empty());
    assert!(!bank.lock().unwrap().0.line());
}

#[test]
fn a_host_that_goes_away_leaves_a_device_that_needs_a_reset_and_the_next_one_heals_it() {
    let (mut seat, bank, registers) = mmio(NET);
    let net = VirtIONet::<BankHal, _, 16>::new(mmio_transport(&registers), 2048).unwrap();
    seat.stop_host();
    // Writing the configuration needs a host.
    {
        let mut bank = bank.lock().unwrap();
        bank.0.write(0x100, &[0]);
        let mut status = [0; 4];
        bank.0.read(0x70, &mut status);
        assert_eq!(status, [0x4f, 0, 0, 0]);
        assert!(bank.0.line(), "told by an interrupt");
    }
    // Its driver resets it, with or without a host.
    drop(net);
    assert_eq!(bank.lock().unwrap().0.core().status(), DeviceStatus::RESET);
    seat.start_host();
    seat.until(|event| matches!(event, Event::Ready { .. }));
    frames_come_back(VirtIONet::new(mmio_transport(&registers), 2048).unwrap());
}
