// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What it costs to get one frame from a sender's memory into a receiver's buffers, beside the bare copy of its bytes.
//!
//! `cargo bench -p vmsg-net --bench switch_copy`
#![allow(missing_docs, reason = "a program")]

#[path = "../tests/copying/mod.rs"]
mod copying;

use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use copying::{Choices, build};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{TagChange, deliver};
use vmsg_net::{Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Memory that frames go around in, so that neither side is in the nearest cache only.
const RING: usize = 8 << 20;

/// Buffers one after the other, as of a driver who refills at once.
struct Ring<'a> {
    all: RamSlice<'a>,
    room: [RamSlice<'a>; 1],
    at: usize,
}

impl RxSink for Ring<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        if self.at + len > self.all.len() {
            self.at = 0;
        }
        self.room = [self.all.get(self.at, len)?];
        Some(Pieces::new(&self.room))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        black_box(header);
        self.at += len.next_multiple_of(64);
    }
}

/// Best time for one call of `what`, of many runs that each go around the memory.
fn best(mut what: impl FnMut()) -> Duration {
    let mut run = |calls: u32| {
        let start = Instant::now();
        for _ in 0..calls {
            what();
        }
        start.elapsed()
    };
    let mut calls = 256;
    while run(calls) < Duration::from_millis(10) {
        calls *= 2;
    }
    let runs = (0..30).map(|_| run(calls)).min();
    runs.unwrap_or_default() / calls
}

fn memory() -> Vec<AtomicU64> {
    (0..RING / 8).map(|_| AtomicU64::new(0)).collect()
}

fn main() {
    let (source, target) = (memory(), memory());
    let (source, target) = (
        RamSlice::from_atomics(&source),
        RamSlice::from_atomics(&target),
    );
    let whole = Offloads::ALL;
    let partial = Offloads {
        guest_csum: true,
        ..Offloads::NONE
    };
    println!(
        "{:<44} {:>9} {:>9} {:>9}",
        "one frame", "ns", "memcpy", "GB/s"
    );
    for (name, len, size, tag, to) in [
        ("64 B", 64, 0, TagChange::Keep, whole),
        (
            "64 B, checksum completed",
            64,
            0,
            TagChange::Keep,
            Offloads::NONE,
        ),
        ("1514 B", 1514, 0, TagChange::Keep, whole),
        ("256 B", 256, 0, TagChange::Keep, whole),
        ("1024 B", 1024, 0, TagChange::Keep, whole),
        ("1514 B, tag pushed", 1514, 0, TagChange::Push(5), whole),
        (
            "1514 B, checksum completed",
            1514,
            0,
            TagChange::Keep,
            Offloads::NONE,
        ),
        ("64 KiB TSO, whole", 65549, 1448, TagChange::Keep, whole),
        (
            "64 KiB TSO, cut, checksums partial",
            65549,
            1448,
            TagChange::Keep,
            partial,
        ),
        (
            "64 KiB TSO, cut, checksums completed",
            65549,
            1448,
            TagChange::Keep,
            Offloads::NONE,
        ),
    ] {
        let mut built = build(&mut Choices::new(&[]), len - 54);
        built.finish(true);
        let frame = built.bytes;
        assert_eq!(frame.len(), len);
        let header = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            gso_type: if size > 0 {
                VnetHeader::GSO_TCPV4
            } else {
                VnetHeader::GSO_NONE
            },
            hdr_len: 54,
            gso_size: size,
            csum_start: 34,
            csum_offset: 16,
        };
        let step = len.next_multiple_of(64);
        let places: Vec<[RamSlice<'_>; 1]> = (0..RING / step)
            .map(|i| [source.get(i * step, len).expect("inside")])
            .collect();
        for place in &places {
            Pieces::new(place).write(&frame);
        }
        let mut sink = Ring {
            all: target,
            room: [RamSlice::EMPTY],
            at: 0,
        };
        let mut at = 0;
        let ours = best(|| {
            at = (at + 1) % places.len();
            let payload = Pieces::new(&places[at]);
            let mut head = [0; Target::HEAD];
            let len = payload.read(&mut head);
            let frame = TxFrame { header, payload };
            black_box(deliver(&frame, &head[..len], tag, &to, &mut sink));
        });
        let (mut at, mut to) = (0, 0);
        let bare = best(|| {
            at = (at + 1) % places.len();
            to = if to + 2 * step > RING { 0 } else { to + step };
            let target = target.get(to, len).expect("inside");
            black_box(places[at][0].copy_to(target));
        });
        let rate = len as f64 / ours.as_secs_f64() / 1e9;
        println!(
            "{name:<44} {:>9} {:>9} {rate:>9.2}",
            ours.as_nanos(),
            bare.as_nanos(),
        );
    }
}
