// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that asks for more than any does and starts over while it is under way, with sizes that change and an operator who asks all
//! the time, and a driver beside them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_msg::DevNum;
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{BlkOptions, Request};
use vmsg_mem::BusAddr;

use super::killed::Random;
use super::stand::{Driver, PATIENCE, Stand, pool, text};

/// Of the attacked disk, in bytes; nothing of it is written.
const SIZE: u64 = 4 << 30;
/// Pieces of one request, and what each of them is: 1 GiB together, in 8 MiB of memory.
const PIECES: usize = 124;
const PIECE: u32 = 8 << 20;

/// Requests of a GiB among others, then a new start, whatever of them is done.
fn attack(stand: &Stand, number: u16, seed: u64, over: &AtomicBool) -> u32 {
    let mut random = Random(seed);
    let pool = DmaPool::new("attack", BusAddr(0x1_0000_0000), 16 << 20).expect("memory");
    let options = BlkOptions {
        unchecked: true,
        ..BlkOptions::default()
    };
    let base = pool.base().0 + (8 << 20);
    let all = [(BusAddr(base), PIECE); PIECES];
    let mut count = 0;
    while !over.load(Ordering::SeqCst) {
        let mut client = stand.try_connect().expect("it listens");
        pool.lend(&mut client, 1).expect("lent");
        let mut driver = Driver::new(client, DevNum(number), &pool, &options).expect("a disk");
        for tag in 0..60 {
            let few = [(BusAddr(base + 4096 * tag), 4096)];
            let read = Request::Read {
                sector: random.below(1 << 18) as u64 * 8,
                to: if tag < 2 { &all } else { &few },
            };
            if driver.submit(0, tag, read).is_err() {
                break;
            }
        }
        let _ = driver.commit();
        match random.below(4) {
            0 => {
                let _ = driver.set_write_back(random.below(2) == 0);
            }
            1 => {
                let _ = driver.wait(Duration::from_millis(5));
                let _ = driver.poll(|_| {});
            }
            2 => {
                let _ = driver.client().remove_window(1);
            }
            _ => {}
        }
        drop(driver);
        count += 1;
    }
    count
}

fn memory_of(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = text.lines().find(|line| line.starts_with("RssAnon"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.expect("a number").parse::<u64>().expect("a number") << 10
}

/// Writes for as long as that; what the slowest of them has taken.
fn slowest_write(driver: &mut Driver<'_>, time: Duration) -> Duration {
    let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
    let mut number = 0u64;
    while begun.elapsed() < time {
        let data = [number.to_le_bytes()[0]; 4096];
        let at = Instant::now();
        let sector = number % 200 * 8;
        driver.write(sector, &data, PATIENCE).expect("written");
        slowest = slowest.max(at.elapsed());
        number += 1;
    }
    slowest
}

fn storm(engine: &str) {
    let stand = Stand::new();
    let attacked = stand.image("attacked", SIZE);
    let honest = stand.image("honest", 1 << 20);
    let devices = [
        format!("blk,id=attacked,engine={engine},path={}", text(&attacked)),
        format!("blk,id=honest,engine={engine},path={}", text(&honest)),
    ];
    let host = stand.serve_after(":", &devices);
    let over = AtomicBool::new(false);
    let pool = pool();
    let mut driver = stand.driver(1, &pool);
    let alone = slowest_write(&mut driver, Duration::from_secs(1));
    let (rounds, slowest) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = std::fs::File::options().write(true).open(&attacked);
            let file = file.expect("there");
            while !over.load(Ordering::SeqCst) {
                for size in [SIZE / 2, 512, SIZE * 16, SIZE] {
                    file.set_len(size).expect("sized");
                    std::thread::yield_now();
                }
                stand.ctl(&["rescan", "attacked"]);
                stand.ctl(&["list"]);
            }
        });
        let attacking = scope.spawn(|| attack(&stand, 0, 0x5eed, &over));
        let slowest = slowest_write(&mut driver, Duration::from_secs(6));
        over.store(true, Ordering::SeqCst);
        (attacking.join().expect("no panic"), slowest)
    });
    let memory = memory_of(host.id());
    println!(
        "{engine}: {rounds} rounds, slowest {slowest:?}, alone {alone:?}, {} MiB",
        memory >> 20
    );
    drop(driver);
    let mut driver = stand.driver(0, &pool);
    driver.write(0, &[9; 512], PATIENCE).expect("as new");
    drop(driver);
    let log = host.kill();
    assert!(!log.contains("panicked"), "{log}");
    assert!(log.lines().count() < 300, "{log}");
    // On a machine that has other things to do, a moment is longer.
    let most = Duration::from_secs(4) + 20 * alone;
    assert!(slowest < most, "{slowest:?} of {most:?}");
    assert!(memory < 200 << 20, "{memory}");
    assert!(rounds > 0);
}

#[test]
fn storms_with_io_uring_leave_the_device_beside_alone() {
    storm("uring");
}

#[test]
fn storms_with_threads_leave_the_device_beside_alone() {
    storm("threads");
}

#[test]
fn storms_with_a_worker_that_reads_itself_leave_the_device_beside_alone() {
    storm("inline");
}
