// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP through the user-mode stack in large segments, as a ratio to a plain copy through a TCP
//! socket of the loopback interface in the same run: floor, subject, floor; the median of at
//! least 15 repetitions, without those whose floors differ by more than 30 %.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::wire::checksum;
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::user::{User, UserConfig};
use vmsg_net::{Backend, Offloads, RxSink, TxFrame, VnetHeader};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const HEADERS: usize = 54;
const SCALE: u8 = 8;
/// Largest multiple of 1460 in an IPv4 packet.
const SEGMENT: usize = 64240;
const BATCH: usize = 16;
const SYN: u8 = 2;
const ACK: u8 = 16;

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(1)).collect()
}

/// The guest's receive buffers, used in a circle; frames are looked at only as far as the headers.
struct Buffers<'a> {
    buffers: Vec<[RamSlice<'a>; 1]>,
    next: usize,
    left: usize,
    headers: Vec<([u8; HEADERS], usize)>,
}

impl RxSink for Buffers<'_> {
    fn offer(&mut self, len: usize) -> Option<Pieces<'_>> {
        let room = Pieces::new(&self.buffers[self.next]);
        (self.left > 0 && len <= room.len()).then_some(room)
    }

    fn commit(&mut self, _: &VnetHeader, len: usize) {
        let header = Pieces::new(&self.buffers[self.next])
            .read_array()
            .expect("a TCP frame");
        self.headers.push((header, len - HEADERS));
        self.next = (self.next + 1) % self.buffers.len();
        self.left -= 1;
    }
}

/// A TCP of a guest that does no more than needed.
struct Guest {
    user: User,
    port: u16,
    seq: u32,
    ack: u32,
    window: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Guest {
    fn new() -> Self {
        let mut user = User::new(UserConfig::default()).expect("a stack");
        user.set_guest_offloads(Offloads {
            csum: true,
            tso4: true,
            guest_csum: true,
            guest_tso4: true,
            mtu: 1500,
            ..Offloads::NONE
        });
        Self {
            user,
            port: 40000,
            seq: 1,
            ack: 0,
            window: 0,
        }
    }

    fn header(&self, dst: u16, flags: u8, seq: u32, len: usize) -> ([u8; HEADERS], VnetHeader) {
        let mut bytes = [0; HEADERS];
        bytes[..6].copy_from_slice(&[0x52, 0x55, 0x0a, 0, 2, 2]);
        bytes[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
        bytes[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        bytes[16..18].copy_from_slice(&u16::try_from(40 + len).expect("short").to_be_bytes());
        bytes[22..24].copy_from_slice(&[64, 6]);
        bytes[26..30].copy_from_slice(&GUEST.octets());
        bytes[30..34].copy_from_slice(&GATEWAY.octets());
        let sum = !checksum::data(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes[34..36].copy_from_slice(&self.port.to_be_bytes());
        bytes[36..38].copy_from_slice(&dst.to_be_bytes());
        bytes[38..42].copy_from_slice(&seq.to_be_bytes());
        bytes[42..46].copy_from_slice(&self.ack.to_be_bytes());
        bytes[46..48].copy_from_slice(&[5 << 4, flags]);
        bytes[48..50].copy_from_slice(&[0x40, 0]);
        let vnet = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            gso_type: if len > 1460 {
                VnetHeader::GSO_TCPV4
            } else {
                VnetHeader::GSO_NONE
            },
            hdr_len: 54,
            gso_size: if len > 1460 { 1460 } else { 0 },
            csum_start: 34,
            csum_offset: 16,
        };
        (bytes, vnet)
    }

    fn send(&mut self, dst: u16, flags: u8, options: &[u8]) {
        let (mut bytes, header) = self.header(dst, flags, self.seq, options.len());
        bytes[46] = u8::try_from((20 + options.len()) / 4).expect("short") << 4;
        let memory = memory(128);
        let pieces = [RamSlice::from_atomics(&memory)];
        let payload = Pieces::new(&pieces).take(HEADERS + options.len());
        payload.write(&bytes);
        payload.skip(HEADERS).write(options);
        self.user
            .transmit(Instant::now(), &[TxFrame { header, payload }]);
    }

    /// Frames as they come, waiting if there are none.
    fn receive(&mut self, buffers: &mut Buffers<'_>) {
        buffers.headers.clear();
        buffers.left = buffers.buffers.len();
        let now = Instant::now();
        self.user.poll(now);
        self.user.receive(now, buffers);
        // Those of the connection before this one are of no interest.
        let port = self.port.to_be_bytes();
        buffers.headers.retain(|(header, _)| header[36..38] == port);
        if buffers.headers.is_empty() {
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 5_000_000,
            };
            let fd = self.user.event_fd().expect("a descriptor");
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            poll(&mut fds, Some(&timeout)).expect("poll");
        }
    }

    fn connect(&mut self, dst: u16, buffers: &mut Buffers<'_>) {
        self.port += 1;
        self.seq = 0x7000_0000;
        self.ack = 0;
        self.send(dst, SYN, &[2, 4, 5, 0xb4, 3, 3, SCALE, 0]);
        loop {
            self.receive(buffers);
            if let Some((header, _)) = buffers.headers.iter().find(|(h, _)| h[47] == SYN | ACK) {
                self.seq += 1;
                self.ack = word(header, 38).wrapping_add(1);
                self.window = u32::from(u16::from_be_bytes([header[48], header[49]]));
                break;
            }
        }
        self.send(dst, ACK, &[]);
    }

    /// Sends `total` bytes in large segments until all are acknowledged.
    fn upload(&mut self, dst: u16, total: u64, buffers: &mut Buffers<'_>) {
        self.connect(dst, buffers);
        let heads = memory(BATCH * 64);
        let payload = memory(BATCH * SEGMENT);
        let heads = RamSlice::from_atomics(&heads);
        let payload = RamSlice::from_atomics(&payload);
        let (mut sent, mut acked) = (0u64, 0u64);
        while acked < total {
            let mut frames = Vec::with_capacity(BATCH);
            while frames.len() < BATCH && sent < total {
                let room = u64::from(self.window).saturating_sub(sent - acked);
                let len = room.min(total - sent).min(SEGMENT as u64);
                // No crumbs.
                if len == 0 || (len < SEGMENT as u64 && len < total - sent && sent > acked) {
                    break;
                }
                let len = usize::try_from(len).expect("short");
                let (bytes, header) = self.header(dst, ACK, self.seq, len);
                let head = heads.get(frames.len() * 64, HEADERS).expect("room");
                head.write(0, &bytes);
                let body = payload.get(frames.len() * SEGMENT, len).expect("room");
                frames.push(([head, body], header));
                sent += len as u64;
                self.seq = self.seq.wrapping_add(u32::try_from(len).expect("short"));
            }
            let frames: Vec<_> = frames
                .iter()
                .map(|(pieces, header)| TxFrame {
                    header: *header,
                    payload: Pieces::new(pieces),
                })
                .collect();
            self.user.transmit(Instant::now(), &frames);
            self.receive(buffers);
            for (header, _) in &buffers.headers {
                assert_eq!(header[47] & 4, 0, "reset");
                let behind = self.seq.wrapping_sub(word(header, 42));
                acked = sent - u64::from(behind);
                self.window = u32::from(u16::from_be_bytes([header[48], header[49]])) << 8;
            }
        }
    }

    /// Takes `total` bytes and acknowledges them after each batch.
    fn download(&mut self, dst: u16, total: u64, buffers: &mut Buffers<'_>) {
        self.connect(dst, buffers);
        let mut received = 0;
        while received < total {
            self.receive(buffers);
            let mut news = false;
            for (header, len) in &buffers.headers {
                assert_eq!(header[47] & 4, 0, "reset");
                if *len > 0 {
                    assert_eq!(word(header, 38), self.ack, "in order");
                    self.ack = self.ack.wrapping_add(u32::try_from(*len).expect("short"));
                    received += *len as u64;
                    news = true;
                }
            }
            if news {
                self.send(dst, ACK, &[]);
            }
        }
    }
}

fn read_all(mut socket: TcpStream, total: u64) {
    let mut buffer = vec![0; 256 << 10];
    let mut left = total;
    while left > 0 {
        let n = socket.read(&mut buffer).expect("read");
        assert!(n > 0, "closed with {left} left");
        left -= n as u64;
    }
}

fn write_all(mut socket: TcpStream, total: u64) {
    let buffer = vec![1; SEGMENT];
    let mut left = total;
    while left > 0 {
        let n = left.min(buffer.len() as u64);
        socket
            .write_all(&buffer[..usize::try_from(n).expect("short")])
            .expect("write");
        left -= n;
    }
    // Stays open until the other end has everything.
    let _ = socket.read(&mut [0]);
}

/// Seconds for `total` bytes through a plain socket.
fn floor(total: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let socket = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (other, _) = listener.accept().expect("accept");
    let start = Instant::now();
    let writer = thread::spawn(move || write_all(socket, total));
    read_all(other, total);
    let time = start.elapsed();
    writer.join().expect("writer");
    time.as_secs_f64()
}

/// Seconds for `total` bytes through the stack.
fn subject(guest: &mut Guest, buffers: &mut Buffers<'_>, total: u64, up: bool) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let start = Instant::now();
    let peer = thread::spawn(move || {
        let (socket, _) = listener.accept().expect("accept");
        if up {
            read_all(socket, total);
        } else {
            write_all(socket, total);
        }
    });
    if up {
        guest.upload(port, total, buffers);
        peer.join().expect("peer");
        let time = start.elapsed().as_secs_f64();
        guest.send(port, 4 | ACK, &[]);
        return time;
    }
    guest.download(port, total, buffers);
    let time = start.elapsed();
    guest.send(port, 4 | ACK, &[]);
    peer.join().expect("peer");
    time.as_secs_f64()
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--test");
    let (total, least, most) = if quick {
        (4 << 20, 1, 1)
    } else {
        (192u64 << 20, 15, 40)
    };
    let mut guest = Guest::new();
    let store = memory(32 * 65600);
    let all = RamSlice::from_atomics(&store);
    let mut buffers = Buffers {
        buffers: (0..32)
            .map(|i| [all.get(i * 65600, 65600).expect("room")])
            .collect(),
        next: 0,
        left: 0,
        headers: Vec::new(),
    };
    println!(
        "| TCP through `user`, large segments | Gb/s | plain loopback, Gb/s | ratio | repetitions |"
    );
    println!("|---|---|---|---|---|");
    for (name, up) in [("guest to host", true), ("host to guest", false)] {
        let mut kept = Vec::new();
        for _ in 0..most {
            let before = floor(total);
            let time = subject(&mut guest, &mut buffers, total, up);
            let after = floor(total);
            if quick || before.max(after) <= before.min(after) * 1.3 {
                let floor = f64::midpoint(before, after);
                kept.push((floor / time, time, floor));
            }
            if kept.len() >= least {
                break;
            }
        }
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        let gbps = |time: f64| total as f64 * 8e-9 / time;
        match kept.get(kept.len() / 2) {
            Some((ratio, time, floor)) => println!(
                "| {name} | {:.1} | {:.1} | {ratio:.2} | {} |",
                gbps(*time),
                gbps(*floor),
                kept.len()
            ),
            None => println!("| {name} | – | – | the machine was never quiet | 0 |"),
        }
    }
}
