// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The drivers of the `virtio-drivers` crate on devices of a bus, without any virtual machine: reads each disk, pings through each network. With
//! `--fill NUMBER`, each disk that can be written is filled with a pattern before.
//!
//! ```text
//! vmsg serve --bus unix,path=b0.sock --device blk,path=disk.img --device net,backend=user &
//! cargo run -p vmsg --example virtio_drivers -- --bus unix,path=b0.sock
//! ```
//!
//! Any bus that `vmsg ls` knows will do, if it says where memory is: `unix` lends it, `linux-user` has `ram=`, `ivshmem` `memory=` and `ram=`.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr,
};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::transport::DeviceType;
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::virtio_drivers::{MsgTransport, PoolHal, StaticPool};
use vmsg_driver::{BusClient, DmaPool};
use vmsg_mem::BusAddr;

/// Bytes of memory for queues and buffers.
const MEMORY: usize = 4 << 20;
/// Where it is on the bus, where that is ours to say.
const BASE: BusAddr = BusAddr(0x1_0000_0000);

/// Bytes that are read of a disk at most, and at once.
const READ: u64 = 16 << 20;
const CHUNK: usize = 128 << 10;

/// How often is pinged, and how long an answer may take.
const PINGS: u16 = 5;
const PATIENCE: Duration = Duration::from_secs(5);

/// This side and the other of a network with `backend=user`.
const OWN: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);

std::thread_local! {
    static POOL: Cell<Option<&'static DmaPool>> = const { Cell::new(None) };
}

/// The memory of this thread's drivers: `virtio-drivers` finds it by this type.
struct Memory;

impl StaticPool for Memory {
    fn pool() -> &'static DmaPool {
        POOL.get().expect("set before there are drivers")
    }
}

type Hal = PoolHal<Memory>;
type Transport<'c> = MsgTransport<&'c RefCell<BusClient>>;

/// Looks at all devices on `bus` and gives what there is to say, one line each.
///
/// # Errors
/// If the bus cannot be reached, or a disk or a network does not do what it is there for.
pub fn run(bus: &BusSpec) -> Result<String> {
    drive(bus, None)
}

/// The same; where `fill` is a number, the disks are filled with its pattern before they are read.
///
/// # Errors
/// As for [`run`]; if a disk does not have what was written.
pub fn drive(bus: &BusSpec, fill: Option<u64>) -> Result<String> {
    let connector = bus.connector("virtio-drivers").timeout(PATIENCE);
    let bus = connector.connect().context("cannot reach a device host")?;
    let mut text = format!("device host: {}\n", bus.peer());
    let pool: &'static DmaPool = Box::leak(Box::new(memory(&bus)?));
    POOL.set(Some(pool));
    let mut client = BusClient::on_bus(bus);
    let devices = client.devices()?;
    pool.lend_to(&mut client, &devices)?;
    let client = RefCell::new(client);
    for device in devices {
        let Ok(transport) = MsgTransport::new(&client, device) else {
            continue;
        };
        let kind = virtio_drivers::transport::Transport::device_type(&transport);
        let name = client.borrow_mut().device_name(device);
        let name = name.map_or(String::new(), |name| format!(" {name}"));
        write!(text, "{device}{name}: ")?;
        match kind {
            DeviceType::Block => disk(transport, fill, &mut text)?,
            DeviceType::Network => network(transport, &mut text)?,
            other => writeln!(text, "{other:?}, left alone")?,
        }
    }
    Ok(text)
}

/// Memory that devices on this bus can reach.
fn memory(bus: &DriverBus) -> Result<DmaPool> {
    if let Some(common) = bus.common() {
        return Ok(DmaPool::in_common(common, 0, BASE, MEMORY)?);
    }
    if bus.capabilities().passes_fds {
        return Ok(DmaPool::new("virtio-drivers", BASE, MEMORY)?);
    }
    let Some(ram) = bus.static_ram() else {
        bail!("the bus passes no memory on, and it was not said where there is some: ram=PATH");
    };
    let windows = ram.windows()?;
    // Bus address 0 stands for "none" in some drivers, and the host's own file may begin there.
    let window = windows.first().context("no memory")?;
    let skip = if window.base == 0 { 4096 } else { 0 };
    let base = BusAddr(window.base + skip);
    let offset = window.file_offset + skip;
    Ok(DmaPool::in_known(
        window.file.as_fd(),
        offset,
        base,
        MEMORY,
    )?)
}

fn disk(transport: Transport<'_>, fill: Option<u64>, text: &mut String) -> Result<()> {
    let mut disk = VirtIOBlk::<Hal, _>::new(transport)?;
    let bytes = disk.capacity() * SECTOR_SIZE as u64;
    let mut id = [0; 20];
    let id = match disk.device_id(&mut id) {
        Ok(len) => String::from_utf8_lossy(&id[..len.min(20)]).into_owned(),
        Err(_) => String::new(),
    };
    let access = if disk.readonly() { ", read-only" } else { "" };
    writeln!(text, "disk of {bytes} bytes{access}, id {id:?}")?;

    let written = match fill {
        Some(seed) if !disk.readonly() => {
            let sum = write(&mut disk, bytes.min(READ), seed)?;
            writeln!(text, "  filled with pattern {seed}, flushed")?;
            Some(sum)
        }
        _ => None,
    };
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let (mut read, mut sum, start) = (0, 0_u64, Instant::now());
    let mut first = [0; 16];
    while read < bytes.min(READ) {
        let left = usize::try_from(bytes - read).unwrap_or(CHUNK).min(CHUNK);
        let sector = usize::try_from(read / SECTOR_SIZE as u64)?;
        disk.read_blocks(sector, &mut buffer[..left])?;
        if read == 0 {
            first.copy_from_slice(&buffer[..16]);
        }
        digest.update(&buffer[..left]);
        sum = buffer[..left]
            .iter()
            .fold(sum, |sum, &byte| sum.wrapping_add(u64::from(byte)));
        read += left as u64;
    }
    let took = start.elapsed();
    let first: String = first.iter().map(|byte| format!(" {byte:02x}")).collect();
    writeln!(text, "  begins with{first}")?;
    let rate = read as f64 / took.as_secs_f64() / 1e6;
    writeln!(
        text,
        "  {read} bytes read in {:.1} ms ({rate:.0} MB/s), their sum is {sum}",
        took.as_secs_f64() * 1e3
    )?;
    let digest = hex(digest);
    writeln!(text, "  their SHA-256 is {digest}")?;
    if let Some(written) = written {
        ensure!(digest == written, "{written} was written");
    }
    Ok(())
}

/// Fills the first `bytes` of a disk with the pattern of `seed`, and gives their SHA-256. Requests have all lengths from a sector
/// to [`CHUNK`].
fn write(disk: &mut VirtIOBlk<Hal, Transport<'_>>, bytes: u64, seed: u64) -> Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let (mut written, mut state) = (0, seed.wrapping_mul(2) | 1);
    let sectors = CHUNK / SECTOR_SIZE;
    for turn in 0.. {
        if written == bytes {
            break;
        }
        let len = (turn % sectors + 1) * SECTOR_SIZE;
        let len = usize::try_from(bytes - written).unwrap_or(len).min(len);
        for word in buffer[..len].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        disk.write_blocks(
            usize::try_from(written / SECTOR_SIZE as u64)?,
            &buffer[..len],
        )?;
        digest.update(&buffer[..len]);
        written += len as u64;
    }
    disk.flush()?;
    Ok(hex(digest))
}

fn hex(digest: Sha256) -> String {
    let bytes = digest.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn network(transport: Transport<'_>, text: &mut String) -> Result<()> {
    let mut net = VirtIONet::<Hal, _, 16>::new(transport, 2048)?;
    let own = EthernetAddress(net.mac_address());
    writeln!(text, "network, {own}")?;
    let request = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: own,
        source_protocol_addr: OWN,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: GATEWAY,
    };
    let broadcast = EthernetAddress::BROADCAST;
    let len = request.buffer_len();
    let sent = frame(own, broadcast, EthernetProtocol::Arp, len, &mut |payload| {
        request.emit(&mut ArpPacket::new_unchecked(payload));
    });
    let gateway = exchange(&mut net, &sent, |frame| {
        let packet = ArpPacket::new_checked(frame.payload()).ok()?;
        match ArpRepr::parse(&packet).ok()? {
            ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr,
                source_protocol_addr: GATEWAY,
                ..
            } => Some(source_hardware_addr),
            _ => None,
        }
    })?;
    let gateway = gateway.with_context(|| format!("nobody answers for {GATEWAY}"))?;
    writeln!(text, "  {GATEWAY} is at {gateway}")?;

    let mut times = Vec::new();
    for number in 0..PINGS {
        let start = Instant::now();
        if exchange(&mut net, &ping(own, gateway, number), |frame| {
            answers(frame, number)
        })?
        .is_some()
        {
            times.push(start.elapsed());
        }
    }
    let best = times.iter().min().copied().unwrap_or_default();
    writeln!(
        text,
        "  {} of {PINGS} pings answered, the fastest after {:.0} µs",
        times.len(),
        best.as_secs_f64() * 1e6
    )?;
    ensure!(times.len() == usize::from(PINGS), "{GATEWAY} is silent");
    Ok(())
}

const IDENT: u16 = 0x766d;
const PAYLOAD: &[u8] = b"virtio-msg without a machine";

/// An echo request to the gateway, in a frame.
fn ping(own: EthernetAddress, gateway: EthernetAddress, seq_no: u16) -> Vec<u8> {
    let checksums = ChecksumCapabilities::default();
    let icmp = Icmpv4Repr::EchoRequest {
        ident: IDENT,
        seq_no,
        data: PAYLOAD,
    };
    let ip = Ipv4Repr {
        src_addr: OWN,
        dst_addr: GATEWAY,
        next_header: IpProtocol::Icmp,
        payload_len: icmp.buffer_len(),
        hop_limit: 64,
    };
    let len = ip.buffer_len() + icmp.buffer_len();
    frame(own, gateway, EthernetProtocol::Ipv4, len, &mut |payload| {
        let mut packet = Ipv4Packet::new_unchecked(payload);
        ip.emit(&mut packet, &checksums);
        let mut inner = Icmpv4Packet::new_unchecked(packet.payload_mut());
        icmp.emit(&mut inner, &checksums);
    })
}

/// Whether a frame answers that ping.
fn answers(frame: &EthernetFrame<&[u8]>, number: u16) -> Option<()> {
    let checksums = ChecksumCapabilities::default();
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    let ip = Ipv4Repr::parse(&packet, &checksums).ok()?;
    let inner = Icmpv4Packet::new_checked(packet.payload()).ok()?;
    match Icmpv4Repr::parse(&inner, &checksums).ok()? {
        Icmpv4Repr::EchoReply {
            ident: IDENT,
            seq_no,
            data: PAYLOAD,
        } if seq_no == number && ip.src_addr == GATEWAY => Some(()),
        _ => None,
    }
}

/// A frame whose payload of `len` bytes is written by `fill`.
fn frame(
    src_addr: EthernetAddress,
    dst_addr: EthernetAddress,
    ethertype: EthernetProtocol,
    len: usize,
    fill: &mut dyn FnMut(&mut [u8]),
) -> Vec<u8> {
    let header = EthernetRepr {
        src_addr,
        dst_addr,
        ethertype,
    };
    let mut bytes = vec![0; header.buffer_len() + len];
    let mut frame = EthernetFrame::new_unchecked(bytes.as_mut_slice());
    header.emit(&mut frame);
    fill(frame.payload_mut());
    bytes
}

/// Sends a frame and looks at what comes until `wanted` finds an answer; `None` if none comes in time.
fn exchange<T>(
    net: &mut VirtIONet<Hal, Transport<'_>, 16>,
    sent: &[u8],
    mut wanted: impl FnMut(&EthernetFrame<&[u8]>) -> Option<T>,
) -> Result<Option<T>> {
    let mut buffer = net.new_tx_buffer(sent.len());
    buffer.packet_mut().copy_from_slice(sent);
    net.send(buffer)?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if !net.can_recv() {
            std::thread::yield_now();
            continue;
        }
        let received = net.receive()?;
        let found = EthernetFrame::new_checked(received.packet())
            .ok()
            .and_then(|frame| wanted(&frame));
        net.recycle_rx_buffer(received)?;
        net.ack_interrupt();
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

#[allow(dead_code, reason = "not where this file is part of a test")]
fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (spec, fill) = match words.as_slice() {
        ["--bus", spec] => (spec, None),
        ["--bus", spec, "--fill", number] => (spec, Some(number.parse()?)),
        _ => bail!("usage: virtio_drivers --bus SPEC [--fill NUMBER]"),
    };
    print!("{}", drive(&spec.parse()?, fill)?);
    Ok(())
}
