// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest made of smoltcp's TCP/IP stack on the other end of any back end, and what tests of back ends need around it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test needs another part of it"
)]

#[path = "../nic/mod.rs"]
mod nic;

use std::net::Ipv4Addr;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use nic::Nic;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as GuestInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::{Backend, Guest, RxSink, Target, TxFrame, VnetHeader};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// How long a test may take at most.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Memory that guest buffers lie in.
pub fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

/// What came for the guest: to whom, header, frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// The pair that the back end chose, if it did.
    pub pair: Option<u16>,
    pub header: VnetHeader,
    pub frame: Vec<u8>,
}

/// Buffers of a guest: `left` of `size` bytes each, one for each frame; with `endless` a frame may be any size.
pub struct Sink<'a> {
    room: [RamSlice<'a>; 1],
    size: usize,
    target: Option<u16>,
    /// What the last frame offered with its head began with.
    pub head: Vec<u8>,
    offered: usize,
    pub left: usize,
    pub arrived: Vec<Arrived>,
}

impl<'a> Sink<'a> {
    pub fn new(memory: &'a [AtomicU64], size: usize, left: usize) -> Self {
        Self {
            room: [RamSlice::from_atomics(memory)],
            size,
            target: None,
            head: Vec::new(),
            offered: 0,
            left,
            arrived: Vec::new(),
        }
    }
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.offer_between(to, len, len)
    }

    fn offer_between(&mut self, to: Target<'_>, least: usize, most: usize) -> Option<Pieces<'_>> {
        if self.left == 0 {
            return None;
        }
        match to {
            Target::Pair(pair) => self.target = Some(pair),
            Target::Head(head) => {
                self.target = None;
                self.head = head.to_vec();
            }
        }
        let len = most.min(self.size).max(least);
        self.offered = len;
        Some(Pieces::new(&self.room).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        assert!(len <= self.offered, "more than there was room for");
        self.left -= 1;
        let mut frame = vec![0; len];
        Pieces::new(&self.room).read(&mut frame);
        self.arrived.push(Arrived {
            pair: self.target.take(),
            header: *header,
            frame,
        });
    }
}

/// Sends one frame on pair `pair`; false if the back end is full.
pub fn send(backend: &mut dyn Backend, pair: u16, header: VnetHeader, frame: &[u8]) -> bool {
    let memory = memory(frame.len().max(8));
    let whole = RamSlice::from_atomics(&memory);
    let (one, two) = whole.split_at(frame.len() / 3);
    let pieces = [one, two];
    let all = Pieces::new(&pieces).take(frame.len());
    all.write(frame);
    let frame = TxFrame {
        header,
        payload: all,
    };
    backend.transmit(Instant::now(), pair, &[frame]) == 1
}

/// All frames that the back end has now, into buffers of `size` bytes.
pub fn receive(backend: &mut dyn Backend, size: usize) -> Vec<Arrived> {
    let memory = memory(66000);
    let mut sink = Sink::new(&memory, size, 100_000);
    let now = Instant::now();
    backend.poll(now);
    while backend.has_frames() {
        backend.receive(now, &mut sink);
    }
    sink.arrived
}

/// Sleeps until the back end or its timer wants attention, at most for `most`.
pub fn wait(backend: &dyn Backend, most: Duration) {
    let now = Instant::now();
    let mut delay = most;
    if let Some(at) = backend.next_timeout() {
        delay = delay.min(at.saturating_duration_since(now));
    }
    let timeout = Timespec {
        tv_sec: delay.as_secs().try_into().expect("short"),
        tv_nsec: delay.subsec_nanos().into(),
    };
    let fd = backend.event_fd().expect("a descriptor");
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    )
    .expect("poll");
}

/// Polls the back end until `done`, at most for [`PATIENCE`].
pub fn until<B: Backend + ?Sized>(
    backend: &mut B,
    what: &str,
    mut done: impl FnMut(&mut B) -> bool,
) {
    let start = Instant::now();
    loop {
        backend.poll(Instant::now());
        if done(backend) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{what}");
        let now = Instant::now();
        let mut delay = Duration::from_millis(20);
        if let Some(at) = backend.next_timeout() {
            delay = delay.min(at.saturating_duration_since(now));
        }
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: delay.subsec_nanos().into(),
        };
        let fd = backend.event_fd().expect("a descriptor");
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll");
    }
}

/// A guest without offloads and its back end.
pub struct World<B> {
    pub backend: B,
    pub nic: Nic,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
}

impl<B: Backend> World<B> {
    /// A guest with address `ip`/24, or none yet.
    pub fn new(mut backend: B, ip: Option<Ipv4Addr>, mtu: usize) -> Self {
        backend.set_guest(&Guest {
            running: true,
            ..Guest::NONE
        });
        let mut nic = Nic::new(mtu, true);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = u64::from(std::process::id());
        let mut iface = Interface::new(config, &mut nic, GuestInstant::ZERO);
        if let Some(ip) = ip {
            iface.update_ip_addrs(|addrs| {
                addrs
                    .push(IpCidr::Ipv4(Ipv4Cidr::new(ip, 24)))
                    .expect("room for an address");
            });
        }
        Self {
            backend,
            nic,
            iface,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
        }
    }

    pub fn guest_now(&self) -> GuestInstant {
        GuestInstant::from_micros(i64::try_from(self.start.elapsed().as_micros()).expect("soon"))
    }

    /// One round: the guest, its frames, the back end, its frames.
    pub fn step(&mut self) -> bool {
        let mut busy = false;
        self.iface
            .poll(self.guest_now(), &mut self.nic, &mut self.sockets);
        while let Some(frame) = self.nic.tx.front() {
            if !send(&mut self.backend, 0, VnetHeader::default(), frame) {
                break;
            }
            self.nic.tx.pop_front();
            busy = true;
        }
        for arrived in receive(&mut self.backend, 1514) {
            busy = true;
            self.nic.rx.push_back(arrived.frame);
        }
        busy
    }

    /// Goes on until `done`, at most for [`PATIENCE`].
    pub fn run(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        loop {
            let busy = self.step();
            if done(self) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}");
            if !busy {
                let mut delay = Duration::from_millis(2);
                if let Some(guest) = self.iface.poll_delay(self.guest_now(), &self.sockets) {
                    delay = delay.min(guest.into());
                }
                wait(&self.backend, delay);
            }
        }
    }

    /// Begins to connect from `port` of the guest.
    pub fn connect(&mut self, to: (Ipv4Addr, u16), port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let handle = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        self.sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .connect(
                self.iface.context(),
                (smoltcp::wire::IpAddress::Ipv4(to.0), to.1),
                port,
            )
            .expect("connect");
        handle
    }

    /// Sends `len` bytes to whoever is connected, who sends them back; checks them.
    pub fn echo(&mut self, handle: SocketHandle, len: usize) {
        let byte = |i: usize| (i.wrapping_mul(31) >> 3).to_le_bytes()[0];
        let (mut sent, mut received) = (0, 0);
        self.run("everything came back", |world| {
            let socket = world.sockets.get_mut::<tcp::Socket<'_>>(handle);
            while sent < len && socket.can_send() {
                let at = sent;
                sent += socket
                    .send(|room| {
                        let n = room.len().min(len - at);
                        for (i, to) in room[..n].iter_mut().enumerate() {
                            *to = byte(at + i);
                        }
                        (n, n)
                    })
                    .expect("open");
            }
            while socket.can_recv() {
                let at = received;
                received += socket
                    .recv(|bytes| {
                        for (i, got) in bytes.iter().enumerate() {
                            assert_eq!(*got, byte(at + i), "at {}", at + i);
                        }
                        (bytes.len(), bytes.len())
                    })
                    .expect("open");
            }
            received == len
        });
    }
}

/// Sends back what comes over each connection to `listener`, `connections` of them.
pub fn echo_server(
    listener: std::net::TcpListener,
    connections: usize,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (mut socket, _) = listener.accept().expect("accept");
            let mut back = socket.try_clone().expect("a descriptor");
            // The guest may go without a word.
            let _ = std::io::copy(&mut socket, &mut back);
        }
    })
}

/// Stops the test with a message if something is missing, unless VMSG_REQUIRE_TOOLS=1: then it fails.
pub fn missing(what: &str) {
    assert!(
        std::env::var_os("VMSG_REQUIRE_TOOLS").is_none_or(|value| value != "1"),
        "missing: {what}"
    );
    println!("skipped: missing: {what}");
}

/// The header of a frame without offloads.
pub const PLAIN: VnetHeader = VnetHeader {
    flags: 0,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
};

/// A driver without offloads.
pub fn running() -> Guest {
    Guest {
        running: true,
        ..Guest::NONE
    }
}

/// A frame of `len` bytes that is like no other.
pub fn frame(len: usize, number: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(number * 2 + 1) >> 2).to_le_bytes()[0])
        .collect()
}

/// The frames that have come by now.
pub fn frames_of(backend: &mut dyn Backend) -> Vec<Vec<u8>> {
    let arrived = receive(backend, 70000).into_iter();
    arrived.map(|arrived| arrived.frame).collect()
}
