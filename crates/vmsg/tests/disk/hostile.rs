// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that keeps to no rule, and one beside it that does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmsg_driver::DmaPool;
use vmsg_driver::blk::{BlkOptions, Request};
use vmsg_mem::BusAddr;

use super::killed::Random;
use super::stand::{Driver, PATIENCE, Stand, pool, text};

const MIB: u64 = 1 << 20;

/// A buffer anywhere: mostly in the memory that was lent.
fn buffer(random: &mut Random, pool: &DmaPool) -> (BusAddr, u32) {
    let lens = [1, 15, 16, 511, 512, 513, 4096, 65536, 1 << 20, u32::MAX];
    let len = lens[random.below(lens.len())];
    let addr = match random.below(30) {
        0 => random.next(),
        1 => pool.base().0 + pool.len() as u64 - 8,
        _ => pool.base().0 + random.below(pool.len()) as u64,
    };
    (BusAddr(addr), len)
}

/// Anything at all, until the device says that it has had enough.
fn attack(driver: &mut Driver<'_>, random: &mut Random, pool: &DmaPool) {
    for _ in 0..200 {
        let list = |random: &mut Random| -> Vec<_> {
            let count = random.below(4);
            (0..count).map(|_| buffer(random, pool)).collect()
        };
        let (readable, writable) = (list(random), list(random));
        let kinds = [0, 1, 4, 8, 11, 13, 14, 10, u32::MAX];
        let added = if random.below(8) == 0 {
            let ring = driver.queue(0).ring();
            // Without a header, or without room for a status.
            ring.add(&readable, &writable).is_ok()
        } else {
            let sectors = [0, 1, 2047, 2048, 1 << 40, u64::MAX];
            let request = Request::Other {
                kind: kinds[random.below(kinds.len())],
                sector: sectors[random.below(sectors.len())],
                readable: &readable,
                writable: &writable,
            };
            driver.submit(0, 1, request).is_ok()
        };
        if !added || random.below(3) == 0 {
            let kicked = driver.commit();
            let waited = driver.wait(Duration::from_millis(1));
            let polled = driver.poll(|_| {});
            if kicked.is_err() || waited.is_err() || polled.is_err() {
                return;
            }
        }
    }
}

#[test]
fn whatever_a_driver_does_the_others_and_the_image_s_size_are_left_alone() {
    let stand = Stand::new();
    let images = ["attacked", "honest"].map(|name| stand.image(name, MIB));
    let devices = images.each_ref().map(|image| {
        let name = image.file_name().and_then(|name| name.to_str());
        let id = name.expect("UTF-8");
        format!("blk,id={id},engine=uring,path={}", text(image))
    });
    let host = stand.serve_after(":", &devices);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let honest = scope.spawn(|| {
            let pool = pool();
            let mut driver = stand.driver(1, &pool);
            let mut rounds = 0u64;
            while !over.load(Ordering::SeqCst) || rounds < 20 {
                let data = [rounds.to_le_bytes()[0]; 4096];
                let sector = rounds % 200 * 8;
                driver.write(sector, &data, PATIENCE).expect("written");
                let mut back = [0; 4096];
                driver.read(sector, &mut back, PATIENCE).expect("read");
                assert_eq!(back, data);
                rounds += 1;
            }
            rounds
        });
        let mut random = Random(0xfeed_5eed_1234_5678);
        let end = Instant::now() + Duration::from_secs(6);
        let mut rounds = 0;
        while Instant::now() < end || rounds < 4 {
            let pool = DmaPool::new("attack", BusAddr(0x1_0000_0000), 4 << 20).expect("memory");
            let options = BlkOptions {
                unchecked: true,
                ..BlkOptions::default()
            };
            let mut client = stand.try_connect().expect("it listens");
            pool.lend(&mut client, 1).expect("lent");
            let number = virtio_msg::DevNum(0);
            let mut driver = Driver::new(client, number, &pool, &options).expect("a disk");
            // Words of the rings and of headers change under the device.
            let calm = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let seed = random.next() | 1;
                let (pool, calm) = (&pool, &calm);
                let scribbles = rounds % 2 == 1;
                scope.spawn(move || {
                    let mut random = Random(seed);
                    while scribbles && !calm.load(Ordering::SeqCst) {
                        let at = random.below(pool.len() - 8);
                        pool.ram().write(at, &random.next().to_le_bytes());
                    }
                });
                attack(&mut driver, &mut random, pool);
                calm.store(true, Ordering::SeqCst);
            });
            if rounds % 3 == 0 {
                // The memory goes while requests may be under way in it.
                let _ = driver.client().remove_window(1);
            }
            drop(driver);
            rounds += 1;
        }
        over.store(true, Ordering::SeqCst);
        let honest = honest.join().expect("not disturbed");
        println!("{rounds} attacks, {honest} honest rounds");
    });
    let pool = pool();
    let mut driver = stand.driver(0, &pool);
    driver.write(0, &[9; 512], PATIENCE).expect("as new");
    assert_eq!(stand.counter("attacked", "in_flight"), 0);
    drop(driver);
    let log = host.kill();
    assert!(log.lines().count() < 400, "{log}");
    assert!(!log.contains("panicked"), "{log}");
    for image in &images {
        assert_eq!(std::fs::metadata(image).expect("there").len(), MIB);
    }
}
