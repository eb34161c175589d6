// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The drivers of `virtio-drivers` on the device host of this workspace: the whole stack.

mod host;

use std::cell::RefCell;
use std::sync::LazyLock;

use host::{MAC, NET, PATIENCE, RNG, client, connect, over_loopback, over_unix};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_msg::DevNum;
use vmsg_block::{FileConfig, FileDisk};
use vmsg_bus::Capabilities;
use vmsg_bus::loopback::Options;
use vmsg_device::blk::{Blk, Settings};
use vmsg_driver::virtio_drivers::{MsgTransport, PoolHal, StaticPool};
use vmsg_driver::{BusClient, DmaPool};
use vmsg_mem::BusAddr;

const DISK: DevNum = DevNum(3);

struct Memory;

impl StaticPool for Memory {
    fn pool() -> &'static DmaPool {
        static POOL: LazyLock<DmaPool> =
            LazyLock::new(|| DmaPool::new("drivers", BusAddr(0x4000_0000), 8 << 20).unwrap());
        &POOL
    }
}

type Hal = PoolHal<Memory>;

fn random_bytes(client: BusClient) {
    let client = RefCell::new(client);
    Memory::pool().lend(&mut client.borrow_mut(), 1).unwrap();
    let transport = MsgTransport::new(&client, RNG).unwrap();
    assert_eq!(transport.device_type(), DeviceType::EntropySource);
    let mut rng = VirtIORng::<Hal, _>::new(transport).unwrap();
    let (mut one, mut two) = ([0; 5000], [0; 64]);
    assert_eq!(rng.request_entropy(&mut one).unwrap(), 5000);
    assert_eq!(rng.request_entropy(&mut two).unwrap(), 64);
    // 5,000 random bytes: each value is expected some 20 times.
    let kinds = (0..=255u8).filter(|value| one.contains(value)).count();
    assert!(kinds > 200, "{kinds} different bytes");
    assert_ne!(one[..64], two);
    drop(rng);
    // Reset and free again.
    assert!(client.borrow_mut().status(RNG).unwrap().is_empty());
}

fn frames_come_back(client: BusClient) {
    let client = RefCell::new(client);
    Memory::pool().lend(&mut client.borrow_mut(), 1).unwrap();
    let transport = MsgTransport::new(&client, NET).unwrap();
    let mut net = VirtIONet::<Hal, _, 16>::new(transport, 2048).unwrap();
    assert_eq!(net.mac_address(), MAC);
    for round in 0..100u8 {
        let mut frame = net.new_tx_buffer(60 + usize::from(round) * 10);
        frame.packet_mut().fill(round);
        net.send(frame).unwrap();
        let start = std::time::Instant::now();
        while !net.can_recv() {
            assert!(start.elapsed() < PATIENCE, "no frame in round {round}");
            std::thread::yield_now();
        }
        let received = net.receive().unwrap();
        assert_eq!(received.packet(), vec![round; 60 + usize::from(round) * 10]);
        net.recycle_rx_buffer(received).unwrap();
        net.ack_interrupt();
    }
}

fn smallest() -> Options {
    Options {
        capabilities: Capabilities::all(48),
        slots: 4,
        ..Options::default()
    }
}

#[test]
fn an_entropy_driver_gets_random_bytes_over_loopback() {
    let (_host, bus) = over_loopback(&Options::default());
    random_bytes(client(bus));
}

#[test]
fn an_entropy_driver_gets_random_bytes_over_the_smallest_bus() {
    let (_host, bus) = over_loopback(&smallest());
    random_bytes(client(bus));
}

#[test]
fn an_entropy_driver_gets_random_bytes_over_unix() {
    let host = over_unix();
    random_bytes(connect(&host, "one"));
    // The next driver finds the device free.
    random_bytes(connect(&host, "two"));
}

#[test]
fn a_network_driver_gets_its_frames_back_over_loopback() {
    let (_host, bus) = over_loopback(&Options::default());
    frames_come_back(client(bus));
}

#[test]
fn a_network_driver_gets_its_frames_back_over_unix() {
    let host = over_unix();
    frames_come_back(connect(&host, "driver"));
}

/// Writes a file, reads it as a disk, and changes it.
fn a_disk_is_driven(options: &Options) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let sector = |number: u8| [number; SECTOR_SIZE];
    for number in 0..64 {
        std::io::Write::write_all(&mut file, &sector(number)).unwrap();
    }
    let disk = FileDisk::open(&FileConfig::new(file.path())).unwrap();
    let device = Blk::new(&Settings::new("number 7"), Box::new(disk));
    let (_host, bus) = host::device_over_loopback(options, "disk", DISK, Box::new(device));
    let client = RefCell::new(client(bus));
    Memory::pool().lend(&mut client.borrow_mut(), 1).unwrap();
    let transport = MsgTransport::new(&client, DISK).unwrap();
    assert_eq!(transport.device_type(), DeviceType::Block);
    let mut disk = VirtIOBlk::<Hal, _>::new(transport).unwrap();
    assert_eq!((disk.capacity(), disk.readonly()), (64, false));
    let mut id = [0; 20];
    disk.device_id(&mut id).unwrap();
    assert_eq!(&id[..9], b"number 7\0");
    let mut bytes = vec![0; 64 * SECTOR_SIZE];
    disk.read_blocks(0, &mut bytes).unwrap();
    for (number, part) in (0..).zip(bytes.chunks(SECTOR_SIZE)) {
        assert_eq!(part, sector(number));
    }
    disk.write_blocks(5, &sector(99)).unwrap();
    disk.flush().unwrap();
    let written = std::fs::read(file.path()).unwrap();
    assert_eq!(written[5 * SECTOR_SIZE..6 * SECTOR_SIZE], sector(99));
    // Outside of the disk; and on it goes.
    assert!(disk.read_blocks(64, &mut sector(0)).is_err());
    disk.read_blocks(5, &mut bytes[..SECTOR_SIZE]).unwrap();
    assert_eq!(bytes[..SECTOR_SIZE], sector(99));
}

#[test]
fn a_block_driver_reads_and_writes_a_disk_over_loopback() {
    a_disk_is_driven(&Options::default());
}

#[test]
fn a_block_driver_reads_and_writes_a_disk_over_the_smallest_bus() {
    a_disk_is_driven(&smallest());
}

#[test]
fn two_devices_are_driven_over_one_connection() {
    let (_host, bus) = over_loopback(&Options::default());
    let client = RefCell::new(client(bus));
    Memory::pool().lend(&mut client.borrow_mut(), 1).unwrap();
    let mut rng = VirtIORng::<Hal, _>::new(MsgTransport::new(&client, RNG).unwrap()).unwrap();
    let net = VirtIONet::<Hal, _, 4>::new(MsgTransport::new(&client, NET).unwrap(), 2048).unwrap();
    let mut bytes = [0; 32];
    assert_eq!(rng.request_entropy(&mut bytes).unwrap(), 32);
    assert_eq!(net.mac_address(), MAC);
}

#[test]
fn a_transport_whose_host_is_gone_reads_failed_and_does_not_hang() {
    let (host, bus) = over_loopback(&Options::default());
    let client = RefCell::new(client(bus));
    let mut transport = MsgTransport::new(&client, RNG).unwrap();
    assert!(transport.max_queue_size(0) > 0);
    assert_eq!(transport.max_queue_size(1), 0);
    drop(host);
    assert_eq!(transport.get_status(), DeviceStatus::FAILED);
    assert_eq!(transport.max_queue_size(0), 0);
    transport.notify(0);
    assert!(transport.read_config_space::<u32>(0).is_err());
    assert!(transport.error().is_some());
    assert_eq!(transport.get_status(), DeviceStatus::FAILED);
}
