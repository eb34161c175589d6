// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest made of smoltcp's own TCP/IP stack, on the other end of a back end.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test needs another part of it"
)]

#[path = "../nic/mod.rs"]
mod nic;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use nic::Nic;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as GuestInstant;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, IpCidr, IpProtocol, Ipv4Cidr, Ipv6Cidr, checksum,
};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::user::{User, UserConfig};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 0x15);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 2);
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 3);
/// What the gateway and the guest are on the wire.
pub const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5055, 0x0aff, 0xfe00, 0x0202);
pub const GUEST_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0x00ff, 0xfe12, 0x3456);
pub const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// How long a test may take at most.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A small generator of random numbers (xorshift), seeded for repeatable tests.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// Byte `i` of the stream `seed`.
pub fn pattern(seed: u64, i: usize) -> u8 {
    let x = (i as u64 ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x2545_f491_4f6c_dd1d);
    (x >> 56) as u8
}

pub fn stream(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| pattern(seed, i)).collect()
}

/// Memory that guest buffers lie in.
pub fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

/// Cuts memory into uneven pieces.
fn pieces(memory: &[AtomicU64]) -> Vec<RamSlice<'_>> {
    let mut rest = RamSlice::from_atomics(memory);
    let mut pieces = Vec::new();
    let mut len = 61;
    while !rest.is_empty() {
        let (piece, tail) = rest.split_at(len);
        pieces.push(piece);
        rest = tail;
        len = 4096 - len % 3000;
    }
    pieces
}

/// Buffers of a guest: room for `left` frames.
pub struct Sink<'a> {
    pieces: Vec<RamSlice<'a>>,
    offered: usize,
    pub left: usize,
    pub frames: Vec<(VnetHeader, Vec<u8>)>,
}

impl<'a> Sink<'a> {
    pub fn new(memory: &'a [AtomicU64], left: usize) -> Self {
        Self {
            pieces: pieces(memory),
            offered: 0,
            left,
            frames: Vec::new(),
        }
    }
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        let all = Pieces::new(&self.pieces);
        if self.left == 0 || len > all.len() {
            return None;
        }
        self.offered = len;
        Some(all)
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        assert!(len <= self.offered, "more than was asked for");
        self.offered = 0;
        self.left -= 1;
        let mut frame = vec![0; len];
        Pieces::new(&self.pieces).read(&mut frame);
        self.frames.push((*header, frame));
    }
}

/// A guest with these offloads and one queue pair.
pub fn guest(offloads: Offloads) -> Guest {
    Guest {
        offloads,
        ..Guest::NONE
    }
}

/// Sends one frame without offloads.
pub fn transmit(backend: &mut impl Backend, header: VnetHeader, frame: &[u8]) {
    let memory = memory(frame.len());
    let pieces = pieces(&memory);
    let all = Pieces::new(&pieces);
    all.write(frame);
    let frame = TxFrame {
        header,
        payload: all.take(frame.len()),
    };
    assert_eq!(backend.transmit(Instant::now(), 0, &[frame]), 1);
}

/// All frames that the back end has now.
pub fn receive(backend: &mut impl Backend) -> Vec<(VnetHeader, Vec<u8>)> {
    let memory = memory(66000);
    let mut sink = Sink::new(&memory, 10000);
    while backend.has_frames() {
        backend.receive(Instant::now(), &mut sink);
    }
    sink.frames
}

/// An Ethernet frame of the guest to the gateway with an IPv6 packet.
pub fn frame6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&GATEWAY_MAC);
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend_from_slice(&u16::try_from(payload.len()).expect("short").to_be_bytes());
    frame.extend_from_slice(&[next, hops]);
    frame.extend_from_slice(&src.octets());
    frame.extend_from_slice(&dst.octets());
    frame.extend_from_slice(payload);
    frame
}

/// Puts the checksum of `protocol` in at `at`.
pub fn sum6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, at: usize, message: &mut [u8]) {
    message[at..at + 2].fill(0);
    let len = u32::try_from(message.len()).expect("short");
    let pseudo = checksum::pseudo_header_v6(&src, &dst, IpProtocol::from(protocol), len);
    let sum = !checksum::combine(&[pseudo, checksum::data(message)]);
    message[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// True if the checksum in `message` is right.
pub fn is_summed6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, message: &[u8]) -> bool {
    let len = u32::try_from(message.len()).expect("short");
    let pseudo = checksum::pseudo_header_v6(&src, &dst, IpProtocol::from(protocol), len);
    checksum::combine(&[pseudo, checksum::data(message)]) == 0xffff
}

/// A UDP datagram with its checksum.
pub fn udp6(src: (Ipv6Addr, u16), dst: (Ipv6Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    message.extend_from_slice(&src.1.to_be_bytes());
    message.extend_from_slice(&dst.1.to_be_bytes());
    let len = u16::try_from(8 + payload.len()).expect("short");
    message.extend_from_slice(&len.to_be_bytes());
    message.extend_from_slice(&[0, 0]);
    message.extend_from_slice(payload);
    sum6(src.0, dst.0, 17, 6, &mut message);
    message
}

/// A guest and its back end.
pub struct World {
    pub user: User,
    pub nic: Nic,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    pub random: Random,
    /// Frames lost on either way, of 1000.
    pub loss: u64,
    /// Receive buffers of the guest at each step.
    pub buffers: usize,
    start: Instant,
    memory: Vec<AtomicU64>,
}

impl World {
    pub fn new(config: UserConfig) -> Self {
        Self::with(config, Offloads::NONE)
    }

    pub fn with(config: UserConfig, offloads: Offloads) -> Self {
        let mut user = User::new(config).expect("a stack");
        user.set_guest(&guest(offloads));
        let mtu = offloads.mtu;
        let mut nic = Nic::new(mtu.into(), !offloads.guest_csum);
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut iface = Interface::new(config, &mut nic, GuestInstant::ZERO);
        iface.update_ip_addrs(|addrs| {
            addrs
                .push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST, 24)))
                .expect("room for an address");
            addrs
                .push(IpCidr::Ipv6(Ipv6Cidr::new(GUEST6, 64)))
                .expect("room for an address");
        });
        iface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY)
            .expect("room for a route");
        iface
            .routes_mut()
            .add_default_ipv6_route(GATEWAY6)
            .expect("room for a route");
        Self {
            user,
            nic,
            iface,
            sockets: SocketSet::new(Vec::new()),
            random: Random(0x1234_5678_9abc_def1),
            loss: 0,
            buffers: 256,
            start: Instant::now(),
            memory: memory(66000),
        }
    }

    pub fn offloads() -> Offloads {
        Offloads {
            csum: true,
            tso4: true,
            tso6: true,
            guest_csum: true,
            guest_tso4: true,
            guest_tso6: true,
            mtu: 1500,
            ..Offloads::NONE
        }
    }

    pub fn guest_now(&self) -> GuestInstant {
        GuestInstant::from_micros(i64::try_from(self.start.elapsed().as_micros()).expect("soon"))
    }

    /// One round: the guest, its frames, the stack, its frames.
    pub fn step(&mut self) -> bool {
        let mut busy = false;
        self.iface
            .poll(self.guest_now(), &mut self.nic, &mut self.sockets);
        while let Some(frame) = self.nic.tx.pop_front() {
            busy = true;
            if self.random.below(1000) >= self.loss {
                transmit(&mut self.user, VnetHeader::default(), &frame);
            }
        }
        let now = Instant::now();
        self.user.poll(now);
        let mut sink = Sink::new(&self.memory, self.buffers);
        self.user.receive(now, &mut sink);
        for (_, frame) in sink.frames {
            busy = true;
            if self.random.below(1000) >= self.loss {
                self.nic.rx.push_back(frame);
            }
        }
        busy
    }

    /// Goes on until `done`, at most for [`PATIENCE`]; longer where frames are lost: what is lost five times in a row, or its
    /// acknowledgement, is sent again after a minute.
    pub fn run(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        let patience = PATIENCE * if self.loss > 0 { 5 } else { 1 };
        loop {
            let busy = self.step();
            if done(self) {
                return;
            }
            assert!(
                start.elapsed() < patience,
                "{what}: {:?}",
                self.user.counters()
            );
            if !busy {
                self.wait();
            }
        }
    }

    /// Until something happens.
    fn wait(&mut self) {
        let now = Instant::now();
        let mut delay = Duration::from_millis(2);
        if let Some(at) = self.user.next_timeout() {
            delay = delay.min(at.saturating_duration_since(now));
        }
        if let Some(guest) = self.iface.poll_delay(self.guest_now(), &self.sockets) {
            delay = delay.min(guest.into());
        }
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: delay.as_nanos().try_into().expect("milliseconds"),
        };
        let fd = self.user.event_fd().expect("a descriptor");
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll");
    }

    pub fn tcp_socket(&mut self, buffer: usize) -> SocketHandle {
        self.sockets.add(tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; buffer]),
            tcp::SocketBuffer::new(vec![0; buffer]),
        ))
    }

    /// Begins to connect from `port` of the guest.
    pub fn connect(
        &mut self,
        to: (impl Into<IpAddr>, u16),
        port: u16,
        buffer: usize,
    ) -> SocketHandle {
        let addr: IpAddr = to.0.into();
        let handle = self.tcp_socket(buffer);
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket
            .connect(
                self.iface.context(),
                (smoltcp::wire::IpAddress::from(addr), to.1),
                port,
            )
            .expect("connect");
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

/// A stream in both directions over a guest's socket: sends `sent` of stream `seed`, closes, and
/// checks that what comes is stream `seed + 1`.
pub struct Exchange {
    pub handle: SocketHandle,
    pub seed: u64,
    pub to_send: usize,
    pub sent: usize,
    pub received: usize,
    pub closed: bool,
    /// What the guest reads at a time.
    pub gulp: usize,
}

impl Exchange {
    pub fn new(handle: SocketHandle, seed: u64, to_send: usize) -> Self {
        Self {
            handle,
            seed,
            to_send,
            sent: 0,
            received: 0,
            closed: false,
            gulp: usize::MAX,
        }
    }

    /// True once everything was sent and the peer has closed.
    pub fn step(&mut self, world: &mut World) -> bool {
        let (seed, to_send) = (self.seed, self.to_send);
        let socket = world.tcp(self.handle);
        while self.sent < to_send && socket.can_send() {
            let sent = self.sent;
            self.sent += socket
                .send(|room| {
                    let n = room.len().min(to_send - sent);
                    for (i, byte) in room[..n].iter_mut().enumerate() {
                        *byte = pattern(seed, sent + i);
                    }
                    (n, n)
                })
                .expect("open");
        }
        if self.sent == to_send && !self.closed && socket.may_send() {
            socket.close();
            self.closed = true;
        }
        if socket.can_recv() {
            let (received, gulp) = (self.received, self.gulp);
            self.received += socket
                .recv(|bytes| {
                    let n = bytes.len().min(gulp);
                    for (i, byte) in bytes[..n].iter().enumerate() {
                        assert_eq!(
                            *byte,
                            pattern(seed + 1, received + i),
                            "at {}",
                            received + i
                        );
                    }
                    (n, n)
                })
                .expect("open");
        }
        self.closed && !socket.may_recv() && !socket.can_recv()
    }
}

/// Reads stream `seed` to its end while it sends `len` bytes of stream `seed + 1`; returns how
/// much it read.
pub fn peer(mut socket: TcpStream, seed: u64, len: usize) -> usize {
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut out = socket.try_clone().expect("clone");
    let writer = thread::spawn(move || {
        out.write_all(&stream(seed + 1, len)).expect("write");
        out.shutdown(Shutdown::Write).expect("shutdown");
    });
    let mut buffer = vec![0; 65536];
    let mut at = 0;
    loop {
        let n = socket.read(&mut buffer).expect("read");
        if n == 0 {
            break;
        }
        for byte in &buffer[..n] {
            assert_eq!(*byte, pattern(seed, at), "at {at}");
            at += 1;
        }
    }
    writer.join().expect("writer");
    at
}
