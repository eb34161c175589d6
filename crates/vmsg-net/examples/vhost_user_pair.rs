// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two vhost-user ports of one virtual switch: what gets from one to the other through it, and how fast.
//!
//! `cargo run --release -p vmsg-net --example vhost_user_pair -- SOCKET SOCKET [SECONDS]`: the switch connects to both sockets, as
//! the `dpdkvhostuserclient` ports of Open vSwitch do.
#![allow(missing_docs, reason = "a program")]

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::vhost_user::{VhostUser, VhostUserConfig};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// A receiver whose buffers are always there again.
struct Sink<'a> {
    room: [RamSlice<'a>; 1],
    ours: bool,
    bytes: usize,
    frames: usize,
    header: VnetHeader,
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        // Switches speak among themselves, too.
        self.ours = matches!(to, Target::Head([2, 0, 0, 0, 0, 2, ..]));
        Some(Pieces::new(&self.room).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        if self.ours {
            self.header = *header;
            self.bytes += len;
            self.frames += 1;
        }
    }
}

/// TCP from one port to the other, `len` bytes with all headers.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    frame.extend(u16::try_from(len - 14).expect("short").to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
    frame[24..26].copy_from_slice(&(!sum).to_be_bytes());
    frame.extend([
        0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    frame.resize(len, 0);
    // The pseudo-header: the rest is for whoever needs it.
    let tcp = u32::try_from(len - 34).expect("short");
    let sum = [0x0a00, 1, 0x0a00, 2, 6, tcp].iter().sum::<u32>();
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn open(path: &str) -> VhostUser {
    let mut port =
        VhostUser::open(&VhostUserConfig::new(PathBuf::from(path), true)).expect("a socket");
    port.set_guest(&Guest {
        offloads: Offloads::ALL,
        running: true,
        heads: true,
        ..Guest::NONE
    });
    port
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [first, second, rest @ ..] = &args[..] else {
        panic!("two sockets");
    };
    let seconds = rest.first().and_then(|text| text.parse().ok()).unwrap_or(3);
    let (mut from, mut to) = (open(first), open(second));
    println!("waiting for the switch");
    while !from.link_is_up() || !to.link_is_up() {
        from.poll(Instant::now());
        to.poll(Instant::now());
        std::thread::yield_now();
    }
    println!("both ports are up");
    let room: Vec<AtomicU64> = (0..9000).map(|_| AtomicU64::new(0)).collect();
    for (name, len, size) in [
        ("64 B", 64, 0),
        ("1514 B", 1514, 0),
        ("64 KiB TSO", 60_054, 1448),
    ] {
        let bytes = frame(len);
        let memory: Vec<AtomicU64> = (0..9000).map(|_| AtomicU64::new(0)).collect();
        let memory = [RamSlice::from_atomics(&memory)];
        let payload = Pieces::new(&memory).take(len);
        payload.write(&bytes);
        let mut header = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..VnetHeader::default()
        };
        if size > 0 {
            header.gso_type = VnetHeader::GSO_TCPV4;
            header.gso_size = size;
            header.hdr_len = 54;
        }
        let batch = [TxFrame { header, payload }; 32];
        let mut sink = Sink {
            room: [RamSlice::from_atomics(&room)],
            ours: false,
            bytes: 0,
            frames: 0,
            header: VnetHeader::default(),
        };
        let mut sent = 0;
        // One by one: the way there.
        let mut best = Duration::MAX;
        for _ in 0..500 {
            let start = Instant::now();
            let before = sink.bytes;
            sent += from.transmit(start, 0, &batch[..1]);
            while sink.bytes < before + len && start.elapsed() < Duration::from_millis(50) {
                to.poll(start);
                to.receive(start, &mut sink);
            }
            best = best.min(start.elapsed());
        }
        let (single, begin) = (sink.frames, Instant::now());
        let bytes = sink.bytes;
        while begin.elapsed() < Duration::from_secs(seconds) {
            let now = Instant::now();
            from.poll(now);
            sent += from.transmit(now, 0, &batch);
            to.poll(now);
            to.receive(now, &mut sink);
        }
        let took = begin.elapsed().as_secs_f64();
        println!(
            "{name:<11} sent {sent:>9}  arrived {:>9}  {:>8.0} frames/s  {:>6.2} Gbit/s  one way, best {:.1} us  {:?}",
            sink.frames,
            (sink.frames - single) as f64 / took,
            (sink.bytes - bytes) as f64 * 8.0 / took / 1e9,
            best.as_secs_f64() * 1e6,
            sink.header,
        );
    }
    println!("{:?}\n{:?}", from.counters(), to.counters());
}
