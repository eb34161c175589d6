// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A copy through the guest's TCP against one through a plain socket of the loopback interface.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use super::{Guest, SEGMENT, Wire};

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Amount {
    /// Bytes of one copy.
    bytes: u64,
    /// Repetitions that must count.
    enough: usize,
    /// Repetitions after which a restless machine is given up.
    tries: usize,
}

impl Amount {
    /// What gives figures.
    pub(crate) const FULL: Self = Self {
        bytes: 192 << 20,
        enough: 15,
        tries: 60,
    };
    /// What shows that it works.
    pub(crate) const TEST: Self = Self {
        bytes: 4 << 20,
        enough: 1,
        tries: 1,
    };
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
fn plain(total: u64) -> f64 {
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

/// Seconds for `total` bytes between the guest and a plain socket of `host`, which the guest's gateway stands for.
pub(crate) fn through_guest<W: Wire>(
    guest: &mut Guest<W>,
    host: Ipv4Addr,
    total: u64,
    up: bool,
) -> f64 {
    let listener = TcpListener::bind((host, 0)).expect("listen");
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
        guest.upload(port, total);
        peer.join().expect("peer");
        let time = start.elapsed();
        guest.hang_up(port);
        return time.as_secs_f64();
    }
    guest.download(port, total);
    let time = start.elapsed();
    guest.hang_up(port);
    peer.join().expect("peer");
    time.as_secs_f64()
}

/// Begins a table of [`print_rows`]; `what` is the subject.
pub(crate) fn print_head(what: &str) {
    println!("| {what} | Gb/s | plain loopback, Gb/s | ratio | repetitions |");
    println!("|---|---|---|---|---|");
}

/// Measures both directions, floor – subject – floor, and prints a row for each: the median of the
/// repetitions whose floors differ by less than 30 %. `place` tells on which CPUs.
pub(crate) fn print_rows<W: Wire>(guest: &mut Guest<W>, place: &str, amount: Amount) {
    let total = amount.bytes;
    for (name, up) in [("guest to host", true), ("host to guest", false)] {
        let mut kept = Vec::new();
        let mut tried = 0;
        while kept.len() < amount.enough && tried < amount.tries {
            tried += 1;
            let before = plain(total);
            let time = through_guest(guest, Ipv4Addr::LOCALHOST, total, up);
            let after = plain(total);
            if before.max(after) <= before.min(after) * 1.3 || amount.tries == 1 {
                let floor = f64::midpoint(before, after);
                kept.push((floor / time, time, floor));
            }
        }
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        let gbps = |time: f64| total as f64 * 8e-9 / time;
        match kept.get(kept.len() / 2) {
            Some((ratio, time, floor)) => println!(
                "| {name}, {place} | {:.1} | {:.1} | {ratio:.2} | {} of {tried} |",
                gbps(*time),
                gbps(*floor),
                kept.len()
            ),
            None => println!(
                "| {name}, {place} | – | – | – | 0 of {tried}: the machine is too restless |"
            ),
        }
    }
}
