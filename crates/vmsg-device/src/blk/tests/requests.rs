// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request at a time.

use std::io;

use vmsg_block::Failure;
use vmsg_mem::BusAddr;

use super::bench::{ALL, BASE, BUFFERS, Bench, DISK, HALF, READ_ONLY, header};
use super::disk::{Op, facts};
use crate::blk::{Settings, bits};
use crate::worker::Notice;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn write(sector: u64, data: &[u8]) -> Vec<u8> {
    [header(OUT, sector), data.to_vec()].concat()
}

/// Sector, sectors, flags of each.
fn segments(kind: u32, of: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = header(kind, 0);
    for (sector, sectors, flags) in of {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

#[test]
fn what_is_written_is_read_again() {
    let mut bench = Bench::new();
    let data: Vec<u8> = (0..1024u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(bench.ask(&write(5, &data), 1), [OK]);
    let read = bench.ask(&header(IN, 5), 4097);
    assert_eq!(read[..4096], data);
    assert_eq!(read[4096], OK);
    assert_eq!(bench.ask(&header(FLUSH, 0), 1), [OK]);
    let counts = [
        "reads",
        "read_bytes",
        "writes",
        "write_bytes",
        "flushes",
        "errors",
    ];
    assert_eq!(
        counts.map(|name| bench.counter(name)),
        [1, 4096, 1, 4096, 1, 0]
    );
    assert_eq!(bench.counter("scripted"), 7, "those of the disk");
}

#[test]
fn the_serial_number_is_padded_and_cut_to_what_there_is_room_for() {
    let mut bench = Bench::new();
    let id = bench.ask(&header(GET_ID, 0), 21);
    assert_eq!(&id[..20], b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(id[20], OK);
    assert_eq!(bench.ask(&header(GET_ID, 0), 4), *b"dis\0");
    let long = bench.ask(&header(GET_ID, 0), 26);
    assert_eq!(&long[20..], [0xee, 0xee, 0xee, 0xee, 0xee, OK]);
}

#[test]
fn what_cannot_be_gets_an_error_and_the_disk_never_sees_it() {
    let mut bench = Bench::new();
    let end = DISK / 512;
    let read_of = |len: usize| len + 1;
    for (request, room, status, why) in [
        (header(IN, end), read_of(512), IOERR, "behind the end"),
        (header(IN, end - 1), read_of(1024), IOERR, "across the end"),
        (
            header(IN, u64::MAX),
            read_of(512),
            IOERR,
            "an offset that wraps",
        ),
        (
            header(IN, u64::MAX / 512),
            read_of(512),
            IOERR,
            "an end that wraps",
        ),
        (header(IN, 0), read_of(511), IOERR, "a part of a sector"),
        (write(0, &[0; 513]), 1, IOERR, "a part of a sector"),
        (write(end, &[0; 512]), 1, IOERR, "behind the end"),
        (header(IN, 0)[..15].to_vec(), 513, IOERR, "a header cut off"),
        (header(2, 0), 1, UNSUPP, "SCSI"),
        (header(10, 0), 21, UNSUPP, "lifetime"),
        (header(14, 0), 1, UNSUPP, "secure erase"),
        (header(u32::MAX, 0), 1, UNSUPP, "anything"),
        (segments(DISCARD, &[]), 1, IOERR, "no segment"),
        (
            segments(DISCARD, &[(0, 8, 0)])[..31].to_vec(),
            1,
            IOERR,
            "a part of one",
        ),
        (segments(DISCARD, &[(0, 8, 0); 33]), 1, IOERR, "too many"),
        (
            segments(DISCARD, &[(0, 8, 1)]),
            1,
            UNSUPP,
            "unmap of a discard",
        ),
        (
            segments(WRITE_ZEROES, &[(0, 8, 2)]),
            1,
            UNSUPP,
            "an unknown flag",
        ),
        (
            segments(WRITE_ZEROES, &[(0, u32::MAX, 0)]),
            1,
            IOERR,
            "too long",
        ),
        (
            segments(DISCARD, &[(0, 8, 0), (end, 1, 0)]),
            1,
            IOERR,
            "the second behind the end",
        ),
        (
            segments(DISCARD, &[(u64::MAX, 1, 0)]),
            1,
            IOERR,
            "an offset that wraps",
        ),
    ] {
        let answer = bench.ask(&request, room);
        assert_eq!(answer.last(), Some(&status), "{why}");
        assert!(answer[..room - 1].iter().all(|byte| *byte == 0xee), "{why}");
    }
    assert_eq!(bench.disk.state().seen, []);
    assert_eq!(bench.counter("unsupported"), 6);
    assert_eq!(bench.counter("refused"), 14);
    // And it goes on.
    assert_eq!(bench.ask(&write(0, &[1; 512]), 1), [OK]);
    assert_eq!(bench.ask(&header(IN, end), 1), [OK], "nothing at the end");
}

#[test]
fn requests_of_parts_of_larger_blocks_are_refused() {
    let large = vmsg_block::Facts {
        block_size: 4096,
        ..facts(DISK)
    };
    let mut bench = Bench::with(&Settings::new("disk0"), large, ALL);
    assert_eq!(bench.ask(&write(1, &[1; 4096]), 1), [IOERR]);
    assert_eq!(bench.ask(&write(8, &[1; 512]), 1), [IOERR]);
    assert_eq!(bench.ask(&write(8, &[1; 4096]), 1), [OK]);
    assert_eq!(bench.ask(&segments(DISCARD, &[(8, 1, 0)]), 1), [IOERR]);
}

#[test]
fn a_disk_that_is_read_only_says_so_and_is_not_written() {
    let read_only = vmsg_block::Facts {
        read_only: true,
        ..facts(DISK)
    };
    let settings = Settings::new("disk0");
    let mut bench = Bench::with(&settings, read_only, &[bits::RO, bits::FLUSH]);
    assert_eq!(bench.ask(&write(0, &[1; 512]), 1), [IOERR]);
    assert_eq!(bench.ask(&header(IN, 0), 513)[512], OK);
    assert_eq!(bench.ask(&segments(DISCARD, &[(0, 1, 0)]), 1), [UNSUPP]);
    assert_eq!(bench.ask(&header(FLUSH, 0), 1), [OK]);
    assert_eq!(bench.disk.state().seen, [Op::Read(0, 512), Op::Flush]);
}

#[test]
fn segments_are_discarded_and_zeroed_one_after_another() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask(&write(0, &[7; 4096]), 1), [OK]);
    let zeroes = segments(WRITE_ZEROES, &[(1, 2, 0), (5, 1, 1), (6, 0, 0)]);
    assert_eq!(bench.ask(&zeroes, 1), [OK]);
    let discard = segments(DISCARD, &[(7, 1, 0), (0, 1, 0)]);
    assert_eq!(bench.ask(&discard, 1), [OK]);
    let sectors: Vec<u8> = bench.disk.state().bytes[..4096]
        .chunks(512)
        .map(|sector| sector[0])
        .collect();
    assert_eq!(sectors, [0xdd, 0, 0, 7, 7, 0, 7, 0xdd]);
    assert_eq!(
        bench.disk.state().seen[1..],
        [
            Op::WriteZeroes(512, 1024, false),
            Op::WriteZeroes(2560, 512, true),
            Op::Discard(3584, 512),
            Op::Discard(0, 512),
        ]
    );
    // While they wait, too, and with a failure in the middle.
    bench.disk.state().hold = true;
    let token = bench.add(
        0,
        0,
        &segments(DISCARD, &[(0, 1, 0), (1, 1, 0), (2, 1, 0)]),
        1,
    );
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.guest.used(0), None);
    bench.disk.state().fail = Some(|| Failure::Io(io::Error::from_raw_os_error(28)));
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.guest.used(0), Some((token, 1)));
    assert_eq!(bench.guest.read(BUFFERS + 0x2000, 1), [IOERR]);
    assert_eq!(bench.disk.state().seen.len(), 7, "the third is not begun");
}

#[test]
fn space_is_kept_where_the_operator_wants_that() {
    let settings = Settings {
        discard: false,
        ..Settings::new("disk0")
    };
    let mut bench = Bench::with(&settings, facts(DISK), &[bits::WRITE_ZEROES]);
    assert_eq!(bench.ask(&segments(WRITE_ZEROES, &[(0, 1, 1)]), 1), [OK]);
    assert_eq!(bench.disk.state().seen, [Op::WriteZeroes(0, 512, false)]);
}

#[test]
fn features_that_were_not_agreed_on_cannot_be_used() {
    let mut bench = Bench::with(&Settings::new("disk0"), facts(DISK), &[bits::FLUSH]);
    assert_eq!(bench.ask(&segments(DISCARD, &[(0, 1, 0)]), 1), [UNSUPP]);
    assert_eq!(
        bench.ask(&segments(WRITE_ZEROES, &[(0, 1, 0)]), 1),
        [UNSUPP]
    );
}

#[test]
fn descriptors_may_begin_and_end_anywhere() {
    let mut bench = Bench::new();
    let data: Vec<u8> = (0..=255).cycle().take(1536).collect();
    // The upper half of the data lies in the other window.
    let at = BASE + HALF as u64 - 600;
    let request = write(3, &data);
    for cuts in [
        vec![1, 14, 2, 1535],
        vec![16, 1536],
        vec![15, 2, 700, 835],
        vec![1552],
        vec![1; 40].into_iter().chain([1512]).collect(),
    ] {
        bench.disk.state().bytes.fill(0);
        bench.guest.write(at, &request);
        bench.guest.write(at + 3000, &[0xee; 2]);
        let mut next = at;
        let readable: Vec<_> = cuts
            .iter()
            .map(|len| {
                let here = next;
                next += u64::from(*len);
                (BusAddr(here), *len)
            })
            .collect();
        let ring = &mut bench.guest.rings[0];
        // Something writable before the status, which a write has no use for.
        let writable = [(BusAddr(at + 3000), 1), (BusAddr(at + 3001), 1)];
        ring.add(&readable, &writable).expect("room");
        ring.publish().expect("published");
        bench.kick(0);
        assert_eq!(bench.guest.used(0).expect("done").1, 2);
        assert_eq!(bench.guest.read(at + 3000, 2), [0xee, OK], "{cuts:?}");
        assert_eq!(bench.disk.state().bytes[1536..3072], data, "{cuts:?}");
    }
    // And what is read, with the status in the same buffer or one of its own.
    for cuts in [
        vec![1537],
        vec![1536, 1],
        vec![1, 1000, 536],
        vec![1, 1, 1534, 1],
    ] {
        bench.guest.write(at, &[0xee; 1537]);
        bench.guest.write(BUFFERS, &header(IN, 3));
        let mut next = at;
        let writable: Vec<_> = cuts
            .iter()
            .map(|len| {
                let here = next;
                next += u64::from(*len);
                (BusAddr(here), *len)
            })
            .collect();
        let ring = &mut bench.guest.rings[0];
        let readable = [(BusAddr(BUFFERS), 7), (BusAddr(BUFFERS + 7), 9)];
        ring.add(&readable, &writable).expect("room");
        ring.publish().expect("published");
        bench.kick(0);
        assert_eq!(bench.guest.used(0).expect("done").1, 1537);
        let answer = bench.guest.read(at, 1537);
        assert_eq!(answer[..1536], data, "{cuts:?}");
        assert_eq!(answer[1536], OK);
    }
}

#[test]
fn a_request_without_room_for_its_status_breaks_the_device() {
    for writable in [0, 1] {
        let mut bench = Bench::new();
        bench.guest.write(BUFFERS, &write(0, &[1; 512]));
        let ring = &mut bench.guest.rings[0];
        let readable = [(BusAddr(BUFFERS), 528)];
        // Memory that can only be read is no room either.
        let status = [(BusAddr(READ_ONLY), 1)];
        ring.add(&readable, &status[..writable]).expect("room");
        ring.publish().expect("published");
        bench.kick(0);
        let why = bench.broken().expect("broken");
        assert!(why.contains("status") || writable == 1, "{why}");
        assert_eq!(bench.guest.used(0), None);
        assert_eq!(bench.disk.state().seen, []);
    }
}

#[test]
fn an_error_of_the_disk_is_one_for_the_driver() {
    let mut bench = Bench::new();
    for (fail, status) in [
        (
            (|| Failure::Io(io::Error::from_raw_os_error(5))) as fn() -> Failure,
            IOERR,
        ),
        (|| Failure::ReadOnly, IOERR),
        (|| Failure::Gone("the server is away".to_owned()), IOERR),
        (|| Failure::Unsupported, UNSUPP),
    ] {
        bench.disk.state().fail = Some(fail);
        assert_eq!(bench.ask(&header(IN, 0), 513)[512], status);
        assert_eq!(bench.ask(&header(FLUSH, 0), 1), [status]);
    }
    assert_eq!(bench.counter("errors"), 6);
    assert_eq!(bench.counter("reads"), 0);
    bench.disk.state().fail = None;
    assert_eq!(bench.ask(&header(IN, 0), 513)[512], OK);
}

#[test]
fn a_driver_that_is_awake_is_shown_what_is_done_before_its_batch_is_and_one_that_sleeps_is_woken_once()
 {
    const COUNT: u16 = 32;
    let mut bench = Bench::new();
    let used_index = BusAddr(bench.guest.rings[0].config().device.0 + 2);
    bench.disk.state().watched = Some(used_index);
    let mut round = |sleeps: bool| {
        for slot in 0..u64::from(COUNT) {
            let at = BUFFERS + slot * 0x4000;
            bench.guest.write(at, &header(IN, slot));
            let readable = [(BusAddr(at), 16)];
            let writable = [(BusAddr(at + 0x2000), 513)];
            let ring = &mut bench.guest.rings[0];
            ring.add(&readable, &writable).expect("room");
        }
        let ring = &mut bench.guest.rings[0];
        if sleeps {
            assert!(!ring.enable_notifications().expect("a sane device"));
        } else {
            ring.disable_notifications().expect("a sane device");
        }
        let before = ring.used_index();
        ring.publish().expect("published");
        bench.notices.clear();
        bench.kick(0);
        let interrupts = bench.notices.iter().filter(|notice| {
            let used = Notice::Used { queue: 0 };
            **notice == used
        });
        let interrupts = interrupts.count();
        for _ in 0..COUNT {
            bench.guest.used(0).expect("done");
        }
        let stood = std::mem::take(&mut bench.disk.state().stood);
        let shown: Vec<u16> = stood.iter().map(|at| at.wrapping_sub(before)).collect();
        (shown, interrupts)
    };
    assert_eq!(round(true), (vec![0; usize::from(COUNT)], 1));
    let by_eights: Vec<u16> = (0..COUNT).map(|at| at / 8 * 8).collect();
    assert_eq!(round(false), (by_eights, 0));
}
