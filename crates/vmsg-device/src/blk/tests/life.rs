// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens around requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bench::{ALL, BASE, BUFFERS, Bench, DISK, HALF, header};
use super::disk::{Op, Scripted, facts};
use crate::blk::{Blk, Settings, bits};
use crate::device::{Device, Operation};
use crate::worker::Command;
use vmsg_mem::BusAddr;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

fn write(sector: u64, byte: u8) -> Vec<u8> {
    [header(OUT, sector), vec![byte; 512]].concat()
}

fn field(config: &[u8], at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&config[at..at + len]);
    u64::from_le_bytes(bytes)
}

#[test]
fn the_configuration_says_what_the_disk_is_like() {
    let facts = vmsg_block::Facts {
        size: 10 << 20,
        block_size: 1024,
        physical_block_size: 8192,
        alignment_offset: 2048,
        optimal_io_size: 1 << 20,
        discard_granularity: 16384,
        ..facts(10 << 20)
    };
    let settings = Settings {
        queues: 4,
        ..Settings::new("disk0")
    };
    let blk = Blk::new(&settings, Box::new(Scripted::new(facts)));
    let config = blk.config();
    assert_eq!(config.len(), 60);
    for (at, len, value, what) in [
        (0, 8, 20480, "capacity"),
        (8, 4, 1 << 20, "size_max"),
        (12, 4, 126, "seg_max"),
        (16, 4, 0, "geometry"),
        (20, 4, 1024, "blk_size"),
        (24, 1, 3, "physical_block_exp"),
        (25, 1, 2, "alignment_offset"),
        (26, 2, 8, "min_io_size"),
        (28, 4, 1024, "opt_io_size"),
        (32, 1, 1, "writeback"),
        (34, 2, 4, "num_queues"),
        (36, 4, 1 << 22, "max_discard_sectors"),
        (40, 4, 32, "max_discard_seg"),
        (44, 4, 32, "discard_sector_alignment"),
        (48, 4, 1 << 22, "max_write_zeroes_sectors"),
        (52, 4, 32, "max_write_zeroes_seg"),
        (56, 1, 1, "write_zeroes_may_unmap"),
    ] {
        assert_eq!(field(&config, at, len), value, "{what}");
    }
    assert!(blk.features().contains(bits::MQ));
    let plain = Blk::new(
        &Settings {
            discard: false,
            ..Settings::new("disk0")
        },
        Box::new(Scripted::new(vmsg_block::Facts {
            write_zeroes: false,
            ..facts
        })),
    );
    for bit in [bits::MQ, bits::DISCARD, bits::WRITE_ZEROES, bits::RO] {
        assert!(!plain.features().contains(bit), "{bit}");
    }
    assert!(plain.config()[36..].iter().all(|byte| *byte == 0));
}

#[test]
fn requests_overtake_each_other_and_are_begun_and_told_together() {
    let mut bench = Bench::new();
    bench.disk.state().hold = true;
    let ring = &mut bench.guest.rings[0];
    let mut tokens = Vec::new();
    for slot in 0..8u64 {
        let at = BUFFERS + slot * 0x4000;
        let token = ring.add(&[(BusAddr(at), 528)], &[(BusAddr(at + 0x2000), 1)]);
        tokens.push(token.expect("room"));
    }
    for slot in 0..8u64 {
        let at = BUFFERS + slot * 0x4000;
        bench
            .guest
            .write(at, &write(slot, 0x40 + u8::try_from(slot).expect("small")));
    }
    bench.guest.rings[0].publish().expect("published");
    bench.kick(0);
    assert_eq!(bench.disk.state().pending.len(), 8);
    assert_eq!(bench.disk.state().commits, 1, "one call for all");
    assert_eq!(bench.counter("in_flight"), 8);
    assert_eq!(bench.guest.used(0), None);
    for _ in 0..4 {
        bench.disk.finish(3);
    }
    bench.poll();
    let used: Vec<_> = std::iter::from_fn(|| bench.guest.used(0)).collect();
    let order = [3, 4, 5, 6].map(|slot: usize| (tokens[slot], 1));
    assert_eq!(used, order);
    bench.disk.finish_all();
    bench.poll();
    assert_eq!(std::iter::from_fn(|| bench.guest.used(0)).count(), 4);
    assert_eq!(bench.counter("in_flight"), 0);
    for (sector, byte) in (0x40..0x48).enumerate() {
        assert_eq!(bench.disk.state().bytes[sector * 512], byte);
    }
}

#[test]
fn what_the_disk_has_no_room_for_waits_in_the_queue() {
    let settings = Settings {
        queues: 2,
        ..Settings::new("disk0")
    };
    let mut bench = Bench::with(&settings, facts(DISK), ALL);
    {
        let mut state = bench.disk.state();
        state.hold = true;
        state.room = 3;
    }
    for slot in 0..6 {
        bench.add(usize::from(slot % 2 == 1), slot, &write(slot, 1), 1);
    }
    let mut done = 0;
    for _ in 0..6 {
        assert!(bench.disk.state().pending.len() <= 3);
        bench.disk.finish(0);
        bench.poll();
        for queue in 0..2 {
            done += std::iter::from_fn(|| bench.guest.used(queue)).count();
        }
    }
    assert_eq!(done, 6);
    assert_eq!(bench.disk.state().seen.len(), 6, "each once");

    // A disk that has no room and nothing to do is asked again by the clock.
    bench.disk.state().room = 0;
    bench.add(0, 0, &write(0, 1), 1);
    let due = bench.core.next_timeout().expect("a time");
    bench.disk.state().room = 1;
    bench.poll_at(due);
    assert_eq!(bench.disk.state().pending.len(), 1);
}

#[test]
fn the_driver_chooses_how_writes_are_cached() {
    let mut bench = Bench::new();
    assert!(bench.disk.state().write_back);
    let set = |bench: &mut Bench, offset, data: &[u8]| {
        let data = data.to_vec();
        bench.tell(Command::WriteConfig { offset, data })
    };
    set(&mut bench, 32, &[0]).expect("a choice");
    assert!(!bench.disk.state().write_back);
    assert!(set(&mut bench, 32, &[2]).is_err());
    assert!(set(&mut bench, 0, &[9]).is_err(), "the capacity");
    assert!(set(&mut bench, 59, &[0, 0]).is_err(), "beyond the end");
    assert!(set(&mut bench, usize::MAX, &[0, 0]).is_err());
    set(&mut bench, 32, &[1, 0]).expect("the byte behind it as it is");
    assert!(bench.disk.state().write_back);
    set(&mut bench, 32, &[0]).expect("a choice");
    // A reset forgets what was chosen; who goes on for a driver chooses before it is there.
    bench.tell(Command::Reset).expect("reset");
    assert!(bench.disk.state().write_back);
    set(&mut bench, 32, &[0]).expect("a choice");
    bench.start(0, false);
    bench.negotiate(ALL).expect("fine");
    bench.driver_ok();
    assert!(!bench.disk.state().write_back);

    // Without the feature there is no choice, and without flushes no cache.
    let settings = Settings::new("disk0");
    let mut bench = Bench::with(&settings, facts(DISK), &[bits::FLUSH]);
    assert!(set(&mut bench, 32, &[0]).is_err());
    assert!(bench.disk.state().write_back);
    let bench = Bench::with(&settings, facts(DISK), &[bits::CONFIG_WCE]);
    assert!(!bench.disk.state().write_back);
    assert_eq!(bench.config_notices(), [(32, vec![0])]);
    let bench = Bench::with(&settings, facts(DISK), &[]);
    assert!(!bench.disk.state().write_back);
    // What the operator wants is where it begins.
    let through = Settings {
        write_back: false,
        ..settings
    };
    let mut bench = Bench::with(&through, facts(DISK), ALL);
    assert!(!bench.disk.state().write_back);
    set(&mut bench, 32, &[1]).expect("a choice");
    assert!(bench.disk.state().write_back);
}

#[test]
fn a_disk_that_is_resized_says_so_and_nothing_is_read_behind_its_end() {
    let mut bench = Bench::new();
    bench.disk.resize(2 * DISK);
    bench.operate(Operation::Rescan).expect("looked at");
    assert_eq!(
        bench.config_notices(),
        [(0, (2 * DISK / 512).to_le_bytes().to_vec())]
    );
    assert_eq!(bench.ask(&header(IN, DISK / 512), 513)[512], 0);
    bench.disk.resize(DISK / 2);
    bench.poll();
    assert_eq!(bench.config_notices().len(), 2);
    assert_eq!(bench.ask(&header(IN, DISK / 512 / 2), 513)[512], 1);
    assert_eq!(
        (bench.counter("size"), bench.counter("resized")),
        (DISK / 2, 2)
    );
    let without = Bench::new().operate(Operation::SetLink(true));
    assert!(without.is_err());
}

#[test]
fn a_reset_waits_for_what_is_under_way_and_tells_nothing_of_it() {
    let mut bench = Bench::new();
    {
        let mut state = bench.disk.state();
        state.hold = true;
        state.obedient = false;
    }
    bench.add(0, 0, &write(0, 1), 1);
    bench.add(0, 1, &header(IN, 0), 513);
    let reset = bench.begin(Command::Reset);
    assert_eq!(bench.answer(reset), None);
    assert_eq!(bench.disk.state().cancels, 1);
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.answer(reset), None, "one is left");
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.answer(reset), Some(Ok(())));
    assert_eq!(bench.disk.state().cancels, 1);
    assert_eq!(bench.guest.used(0), None);
    assert_eq!(bench.guest.read(BUFFERS + 0x2000, 1), [0xee]);
    assert_eq!(bench.counter("in_flight"), 0);

    // One that does what it is told is ready at once.
    let mut bench = Bench::new();
    bench.disk.state().hold = true;
    bench.add(0, 0, &write(0, 1), 1);
    bench.tell(Command::Reset).expect("at once");
    assert_eq!(bench.guest.used(0), None);
}

#[test]
fn a_queue_goes_when_its_requests_are_answered() {
    let settings = Settings {
        queues: 2,
        ..Settings::new("disk0")
    };
    let mut bench = Bench::with(&settings, facts(DISK), ALL);
    bench.disk.state().hold = true;
    let token = bench.add(1, 0, &write(0, 1), 1);
    bench.add(0, 1, &write(1, 1), 1);
    let reset = bench.begin(Command::ResetQueue(1));
    assert_eq!(bench.answer(reset), None);
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.answer(reset), Some(Ok(())));
    assert_eq!(bench.guest.used(1), Some((token, 1)), "told before");
    assert_eq!(bench.disk.state().cancels, 0);
    bench.disk.finish(0);
    bench.poll();
    assert!(bench.guest.used(0).is_some(), "the other one goes on");
}

#[test]
fn memory_goes_when_nothing_is_under_way_in_it() {
    let mut bench = Bench::new();
    bench.disk.state().hold = true;
    // In the half that stays nothing stands in the way, in the other one something does.
    let low = bench.add(0, 2, &header(IN, 0), 513);
    let half = bench.guest.lower_half();
    bench.tell(Command::SetMemory(half)).expect("at once");
    let whole = Arc::clone(&bench.guest.table);
    bench.tell(Command::SetMemory(whole)).expect("at once");
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.guest.used(0), Some((low, 513)));
    let token = bench.add(0, 40, &header(IN, 0), 513);
    let half = bench.guest.lower_half();
    let change = bench.begin(Command::SetMemory(half));
    assert_eq!(bench.answer(change), None);
    // What comes meanwhile waits, too.
    bench.add(0, 1, &header(IN, 1), 513);
    assert_eq!(bench.disk.state().pending.len(), 1);
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.answer(change), Some(Ok(())));
    assert_eq!(bench.guest.used(0), Some((token, 513)));
    assert_eq!(bench.disk.state().pending.len(), 1, "the second one");
    // More memory disturbs nobody.
    let whole = Arc::clone(&bench.guest.table);
    bench.tell(Command::SetMemory(whole)).expect("at once");
}

#[test]
fn the_next_process_begins_what_was_under_way_again() {
    let settings = Settings::new("disk0");
    let mut bench = Bench::new();
    bench.disk.state().hold = true;
    let tokens: Vec<_> = (0..6)
        .map(|slot| bench.add(0, slot, &write(slot, 0x50), 1))
        .collect();
    // Two are told, one is done and not told; then the process is gone.
    bench.disk.finish(1);
    bench.disk.finish(3);
    bench.poll();
    bench.disk.finish(0);
    let Bench { guest, disk, .. } = bench;
    let bytes = disk.state().bytes.clone();
    let next = Scripted::new(facts(DISK));
    next.state().bytes = bytes;
    next.state().hold = true;
    let mut bench = Bench::over(&settings, next, guest, ALL, true);
    let used: Vec<_> = std::iter::from_fn(|| bench.guest.used(0)).collect();
    assert_eq!(used, [(tokens[1], 1), (tokens[4], 1)]);
    let again = [0, 2, 3, 5].map(|sector: u64| Op::Write(sector * 512, 512));
    assert_eq!(bench.disk.state().seen, again);
    assert_eq!(bench.counter("repeated"), 4);
    bench.add(0, 7, &write(7, 0x50), 1);
    bench.disk.finish_all();
    bench.poll();
    let mut used: Vec<_> = std::iter::from_fn(|| bench.guest.used(0)).collect();
    assert_eq!(used.len(), 5);
    used.retain(|(token, _)| [0, 2, 3, 5].iter().any(|at| tokens[*at] == *token));
    assert!(used.len() >= 4);
    for sector in [0, 1, 2, 3, 4, 5, 7] {
        assert_eq!(bench.disk.state().bytes[sector * 512], 0x50, "{sector}");
    }
    // After a reset in the middle nothing comes twice.
    bench.add(0, 8, &header(FLUSH, 0), 1);
    bench.tell(Command::Reset).expect("reset");
    assert_eq!(bench.guest.used(0), None);
}

#[test]
fn a_reset_in_between_leaves_the_record_to_the_next_process() {
    let settings = Settings::new("disk0");
    let mut bench = Bench::new();
    bench.disk.state().hold = true;
    let token = bench.add(0, 0, &write(3, 0x61), 1);
    // As when the connection is lost.
    bench.tell(Command::Reset).expect("reset");
    let Bench { guest, .. } = bench;
    let mut bench = Bench::over(&settings, Scripted::new(facts(DISK)), guest, ALL, true);
    assert_eq!(bench.guest.used(0), Some((token, 1)));
    assert_eq!(bench.disk.state().bytes[3 * 512], 0x61);
}

#[test]
fn a_turn_is_bounded_by_bytes() {
    // Everything is done, in more than one turn: the disk in memory would keep others waiting.
    let mut bench = Bench::with(&Settings::new("disk0"), facts(8 << 20), ALL);
    let len = 1 << 19;
    bench.guest.write(BUFFERS, &header(IN, 0));
    let at = BASE + HALF as u64;
    for _ in 0..16 {
        let writable = [(BusAddr(at), len), (BusAddr(at + u64::from(len)), 1)];
        let ring = &mut bench.guest.rings[0];
        ring.add(&[(BusAddr(BUFFERS), 16)], &writable)
            .expect("room");
    }
    bench.guest.rings[0].publish().expect("published");
    bench.kick(0);
    assert_eq!(std::iter::from_fn(|| bench.guest.used(0)).count(), 16);
    assert_eq!(bench.counter("read_bytes"), 8 << 20);
}

#[test]
fn a_disk_that_does_not_end_leaves_a_reset_waiting_without_a_busy_worker() {
    let mut bench = Bench::new();
    {
        let mut state = bench.disk.state();
        state.hold = true;
        state.obedient = false;
    }
    bench.add(0, 0, &write(0, 1), 1);
    let reset = bench.begin(Command::Reset);
    let due = bench.core.next_timeout().expect("asked again");
    let later = due + Duration::from_secs(10);
    bench.poll_at(later);
    assert_eq!(bench.answer(reset), None);
    assert!(
        bench
            .core
            .next_timeout()
            .is_none_or(|next| next > Instant::now())
    );
    bench.disk.finish(0);
    bench.poll();
    assert_eq!(bench.answer(reset), Some(Ok(())));
}

/// A disk whose end takes until a channel is closed.
#[derive(Debug)]
struct SlowToEnd(std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>);

impl Drop for SlowToEnd {
    fn drop(&mut self) {
        let _ = self.0.recv();
        let _ = self.1.send(());
    }
}

impl vmsg_block::Disk for SlowToEnd {
    fn facts(&self) -> vmsg_block::Facts {
        facts(DISK)
    }

    fn submit(
        &mut self,
        _: u32,
        _: vmsg_block::Request<'_>,
        _: &Arc<vmsg_mem::WindowTable>,
    ) -> vmsg_block::Submitted {
        vmsg_block::Submitted::Full
    }

    fn completed(&mut self, _: &mut Vec<vmsg_block::Completion>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn ends_at_once(&self) -> bool {
        false
    }

    fn set_write_back(&mut self, _: bool) {}
}

#[test]
fn a_disk_that_is_slow_to_end_does_not_hold_up_who_takes_it_away() {
    let (go, waits) = std::sync::mpsc::channel();
    let (ended, end) = std::sync::mpsc::channel();
    let disk = Box::new(SlowToEnd(waits, ended));
    let mut blk = Blk::new(&Settings::new("disk0"), disk);
    let told = blk.end();
    blk.reset();
    // Would not come back otherwise.
    blk.removed();
    drop(blk);
    assert!(!told.wait(Duration::from_millis(50)), "it has not ended");
    drop(go);
    assert!(told.wait(Duration::from_secs(60)));
    end.recv_timeout(Duration::from_secs(60)).expect("it ends");
}
