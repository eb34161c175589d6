// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program without operating system, allocator and virtual disk controller that reads a disk over virtio-msg: the bus is a region of memory
//! that it shares with the device host, and a doorbell register.
//!
//! For QEMU's arm64 machine `virt` with an `ivshmem-doorbell` function; docs/driver.md says how it is run. What is special about that
//! machine is in [`machine`] and [`pci`]; all else is `vmsg-driver` without `std`: [`Amp`], the bus; [`Client`]; the block driver of
//! `virtio-drivers` on [`MsgTransport`]; and [`Requests`], for several requests under way at once.
#![no_std]
#![no_main]

mod dma;
mod machine;
mod pci;
mod several;

use core::cell::RefCell;
use core::fmt::Write as _;
use core::time::Duration;

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_msg::{DevNum, Instant};
use vmsg_driver::amp::{Amp, MAX_MESSAGE};
use vmsg_driver::virtio_drivers::MsgTransport;
use vmsg_driver::{Client, Spin};
use vmsg_mem::DeviceRegion;

use dma::Identity;
use machine::{Console, now};

/// Where the layout is in the shared memory, unless the bus is told otherwise.
const LAYOUT: usize = 4096;
/// How long the device host may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Devices that are looked at.
const DEVICES: usize = 32;

/// What went wrong.
#[derive(Debug)]
#[allow(dead_code, reason = "what is in it is for people")]
pub enum Failure {
    /// There is no memory to share, or it is too small.
    NoMemory,
    /// virtio-msg.
    Message(vmsg_driver::Error),
    /// virtio-drivers.
    Driver(virtio_drivers::Error),
    /// The device host has no disk.
    NoDisk,
}

impl From<vmsg_driver::Error> for Failure {
    fn from(error: vmsg_driver::Error) -> Self {
        Self::Message(error)
    }
}

impl From<virtio_drivers::Error> for Failure {
    fn from(error: virtio_drivers::Error) -> Self {
        Self::Driver(error)
    }
}

/// The bus of this machine.
pub type Bus = Amp<DeviceRegion<'static>, fn()>;
/// Its clock.
pub type Clock = Spin<fn() -> Instant>;
/// What all devices are reached by.
pub type Machine = Client<Bus, Clock, [u8; 2 * MAX_MESSAGE]>;

/// Called by the first instructions, once, with memory and stack in order.
#[unsafe(no_mangle)]
extern "C" fn rust_main() -> ! {
    let outcome = run();
    match outcome {
        Ok(()) => writeln!(Console, "done"),
        Err(failure) => writeln!(Console, "failed: {failure:?}"),
    }
    .unwrap_or_default();
    machine::power_off()
}

fn run() -> Result<(), Failure> {
    let shared = pci::shared_memory().ok_or(Failure::NoMemory)?;
    let len = shared.len();
    say(format_args!(
        "virtio-msg without operating system: {len} bytes of shared memory"
    ));
    let memory = shared
        .get(LAYOUT, len.saturating_sub(LAYOUT))
        .ok_or(Failure::NoMemory)?;
    let bus: Bus = Amp::connect(memory, pci::ring as fn(), now, PATIENCE)?;
    let client = Client::new(bus, Spin::new(now as fn() -> Instant), [0; 2 * MAX_MESSAGE])?;
    let client = RefCell::new(client);

    let mut devices = [None; DEVICES];
    let mut slots = devices.iter_mut();
    client.borrow_mut().for_each_device(|device| {
        if let Some(slot) = slots.next() {
            *slot = Some(device);
        }
    })?;
    let mut disk = None;
    for device in devices.into_iter().flatten() {
        let Ok(transport) = MsgTransport::new(&client, device) else {
            continue;
        };
        let kind = transport.device_type();
        say(format_args!("device {device}: {kind:?}"));
        if kind == DeviceType::Block && disk.is_none() {
            first_sector(transport)?;
            disk = Some(device);
        }
    }
    let disk: DevNum = disk.ok_or(Failure::NoDisk)?;
    let (bytes, sum) = several::read(&mut client.borrow_mut(), disk)?;
    say(format_args!(
        "{bytes} bytes read, {} requests at a time; their sum is {sum}",
        several::DEPTH
    ));
    Ok(())
}

/// Reads the first sector with the block driver of `virtio-drivers`.
fn first_sector(transport: MsgTransport<&RefCell<Machine>>) -> Result<(), Failure> {
    let mut disk = VirtIOBlk::<Identity, _>::new(transport)?;
    let mut sector = [0; SECTOR_SIZE];
    disk.read_blocks(0, &mut sector)?;
    let bytes = disk.capacity() * SECTOR_SIZE as u64;
    say(format_args!(
        "  {bytes} bytes, which begin with {:02x?}",
        &sector[..16]
    ));
    Ok(())
}

/// Writes a line to the console, which takes everything.
fn say(line: core::fmt::Arguments<'_>) {
    let _ = writeln!(Console, "{line}");
}
