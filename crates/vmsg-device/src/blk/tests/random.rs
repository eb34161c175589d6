// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chains of any kind.

use std::collections::HashMap;

use proptest::prelude::*;
use vmsg_mem::BusAddr;

use super::bench::{ALL, BASE, BUFFERS, Bench, DISK, HALF, READ_ONLY, header};
use super::disk::{Scripted, facts};
use crate::blk::Settings;

/// One buffer of a chain: where it is, how long, and whether it is to be written.
#[derive(Clone, Copy, Debug)]
struct Piece {
    addr: u64,
    len: u32,
}

fn addr() -> impl Strategy<Value = u64> {
    prop_oneof![
        10 => BUFFERS..BASE + 2 * HALF as u64 - 8192,
        2 => BASE + HALF as u64 - 2048..BASE + HALF as u64,
        1 => READ_ONLY..READ_ONLY + 0x1000,
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 1..40u32,
        4 => (1..9u32).prop_map(|sectors| sectors * 512),
        2 => (1..9u32).prop_map(|sectors| sectors * 512 + 1),
        1 => 1..8192u32,
    ]
}

fn piece() -> impl Strategy<Value = Piece> {
    (addr(), len()).prop_map(|(addr, len)| Piece { addr, len })
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => prop::sample::select(vec![0, 1, 4, 8, 11, 13]),
        1 => any::<u32>(),
    ]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![5 => 0..DISK / 512 + 8, 1 => any::<u64>()]
}

#[derive(Clone, Debug)]
struct Asked {
    kind: u32,
    sector: u64,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    /// Ends of waiting requests before the next.
    finish: Vec<prop::sample::Index>,
}

fn asked() -> impl Strategy<Value = Asked> {
    (
        kind(),
        sector(),
        prop::collection::vec(piece(), 0..4),
        prop::collection::vec(piece(), 0..4),
        prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    )
        .prop_map(|(kind, sector, readable, writable, finish)| Asked {
            kind,
            sector,
            readable,
            writable,
            finish,
        })
}

/// The pieces without those that overlap what the rings are in.
fn buffers(pieces: &[Piece]) -> Vec<(BusAddr, u32)> {
    let ends = pieces.iter().filter(|piece| {
        let end = piece.addr.saturating_add(u64::from(piece.len));
        end <= BASE || piece.addr >= BUFFERS
    });
    ends.map(|piece| (BusAddr(piece.addr), piece.len)).collect()
}

fn is_mapped(buffers: &[(BusAddr, u32)]) -> bool {
    buffers.iter().all(|(addr, len)| {
        addr.0 >= BASE && addr.0.saturating_add(u64::from(*len)) <= BASE + 2 * HALF as u64
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever chains say, each is used once, with its status written, or the device is broken; and nothing panics.
    #[test]
    fn every_chain_is_used_once_or_the_device_is_broken(
        all in prop::collection::vec(asked(), 1..24),
        hold in any::<bool>(),
        room in 1..20usize,
    ) {
        let mut bench = Bench::new();
        {
            let mut state = bench.disk.state();
            state.hold = hold;
            state.room = room;
        }
        let mut out = HashMap::new();
        for asked in &all {
            let readable = buffers(&asked.readable);
            let writable = buffers(&asked.writable);
            if readable.is_empty() && writable.is_empty() {
                continue;
            }
            if is_mapped(&readable) {
                let bytes = header(asked.kind, asked.sector);
                let mut rest = &bytes[..];
                for (addr, len) in &readable {
                    let (now, later) = rest.split_at(rest.len().min(*len as usize));
                    bench.guest.write(addr.0, now);
                    rest = later;
                }
            }
            let Ok(token) = bench.guest.rings[0].add(&readable, &writable) else {
                continue;
            };
            out.insert(token, writable);
            bench.guest.rings[0].publish().expect("published");
            bench.kick(0);
            for index in &asked.finish {
                let waiting = bench.disk.state().pending.len();
                if waiting > 0 {
                    bench.disk.finish(index.index(waiting));
                    bench.poll();
                }
            }
        }
        for _ in 0..2000 {
            if bench.disk.state().pending.is_empty() {
                break;
            }
            bench.disk.finish(0);
            bench.poll();
        }
        prop_assert!(bench.disk.state().pending.is_empty());
        let mut statuses = HashMap::new();
        while let Some((token, written)) = bench.guest.used(0) {
            let writable = out.remove(&token);
            prop_assert!(writable.is_some(), "used twice");
            let writable = writable.expect("looked at");
            let whole: u32 = writable.iter().map(|(_, len)| *len).sum();
            prop_assert_eq!(written, whole);
            let (addr, len) = writable.last().expect("room for a status");
            let status = bench.guest.read(addr.0 + u64::from(*len) - 1, 1)[0];
            *statuses.entry(status).or_insert(0) += 1;
        }
        prop_assert!(out.is_empty() || bench.broken().is_some(), "{} lost", out.len());
    }

    /// What any mixture of requests reads is what a disk in a vector has.
    #[test]
    fn it_is_the_same_as_a_vector(
        all in prop::collection::vec((0..6u32, 0..60u64, 1..5u64, any::<u8>(), any::<bool>()), 1..80),
    ) {
        const SECTORS: u64 = 64;
        let disk = Scripted::new(facts(SECTORS * 512));
        let guest = super::bench::Guest::new(1);
        let mut bench = Bench::over(&Settings::new("disk0"), disk, guest, ALL, false);
        let mut model = vec![0u8; 64 * 512];
        for (what, sector, count, byte, hold) in all {
            let len = usize::try_from(count * 512).expect("small");
            let at = usize::try_from(sector * 512).expect("small");
            let fits = sector + count <= SECTORS;
            bench.disk.state().hold = hold;
            let (request, room) = match what {
                0 | 1 => (header(0, sector), len + 1),
                2 | 3 => ([header(1, sector), vec![byte; len]].concat(), 1),
                4 => (header(4, 0), 1),
                _ => {
                    let mut bytes = header(13, 0);
                    bytes.extend(sector.to_le_bytes());
                    bytes.extend(u32::try_from(count).expect("small").to_le_bytes());
                    bytes.extend([byte % 2, 0, 0, 0]);
                    (bytes, 1)
                }
            };
            bench.add(0, 0, &request, room);
            bench.disk.finish_all();
            bench.poll();
            prop_assert!(bench.guest.used(0).is_some());
            let answer = bench.guest.read(BUFFERS + 0x2000, room);
            prop_assert_eq!(answer[room - 1], u8::from(!fits && what != 4));
            match what {
                0 | 1 if fits => prop_assert_eq!(&answer[..len], &model[at..at + len]),
                2 | 3 if fits => model[at..at + len].fill(byte),
                5 if fits => model[at..at + len].fill(0),
                _ => {}
            }
        }
        prop_assert_eq!(&bench.disk.state().bytes, &model);
    }
}
