// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that end over the same request each time, and such that ring for nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmsg_driver::blk::{BlkDriver, BlkOptions, Request};
use vmsg_driver::{DmaPool, Event};

use crate::daemon::{ALL, Daemon};
use crate::hostile::{DISK, Driver, Party, all_come_back, pool, start, use_it};
use crate::station::{PATIENCE, Station, until};

/// What is said of such a daemon.
const WORDS: &str = "times in a row over the same requests";

fn write(driver: &mut Driver<'_>, pool: &DmaPool) {
    let buffer = pool.alloc(512).expect("room");
    buffer.ram().write(0, &[0x5a; 512]);
    let request = Request::Write {
        sector: 100,
        from: &[(buffer.addr(), 512)],
    };
    // The buffer is lent until the end of the test.
    std::mem::forget(buffer);
    assert!(driver.submit(0, 0, request).expect("a sound queue"));
    driver.commit().expect("kicked");
}

#[test]
fn a_daemon_that_ends_over_a_request_is_called_less_and_less_and_the_next_one_does_it() {
    let station = Station::new();
    let daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let shared = &daemon.shared;
    let _serve = station.serve(&format!("{},reconnect=0", station.disk_spec()));
    let pool = pool();
    let options = BlkOptions {
        record: true,
        queues: 2,
        ..BlkOptions::default()
    };
    let client = station.client(&pool);
    let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    for said in 1..=2 {
        shared.hold.store(true, Ordering::SeqCst);
        shared.dies.store(true, Ordering::SeqCst);
        let executed = shared.executed.load(Ordering::SeqCst);
        let before = shared.connections.load(Ordering::SeqCst);
        let begin = Instant::now();
        write(&mut driver, &pool);
        until("seven connections", || {
            let count = shared.connections.load(Ordering::SeqCst);
            (count >= before + 7).then_some(())
        });
        // 50 ms after a daemon that had done something; then 50, 100, 200, … ms.
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(3_200), "{took:?}");
        let log = station.log();
        assert_eq!(log.matches(WORDS).count(), said, "{log}");
        assert!(log.contains("disk"), "{log}");
        // Somebody mends it.
        shared.hold.store(false, Ordering::SeqCst);
        shared.dies.store(false, Ordering::SeqCst);
        all_come_back(&mut driver, 1);
        assert_eq!(shared.executed.load(Ordering::SeqCst), executed + 1);
        assert_eq!(shared.disk.lock().expect("sound")[100 * 512], 0x5a);
        use_it(&mut driver, 2).expect("used");
    }
}

#[test]
fn nothing_is_said_of_daemons_that_end_without_anything_to_do() {
    let station = Station::new();
    let daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let _serve = station.serve(&format!("{},reconnect=0", station.disk_spec()));
    let pool = pool();
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let client = station.client(&pool);
    let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    for _ in 0..8 {
        let connections = || daemon.shared.connections.load(Ordering::SeqCst);
        let before = connections();
        daemon.has_queues();
        daemon.hang_up();
        until("the next", || (connections() > before).then_some(()));
    }
    use_it(&mut driver, 2).expect("used");
    let log = station.log();
    assert!(!log.contains(WORDS), "{log}");
}

#[test]
fn a_daemon_that_rings_for_ever_costs_so_many_messages_and_hides_no_interrupt() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    options.queue.doorbells = false;
    let client = party.client(&pool);
    let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    let call = daemon.shared.call.lock().expect("sound").take();
    let call = call.expect("given");
    let executed = || daemon.shared.executed.load(Ordering::SeqCst) as u64;
    let (before, done) = (driver.client().counters().events, executed());
    let ends = AtomicBool::new(false);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                let _ = call.ring();
            }
        });
        // Each request's end is heard, whatever is rung beside it.
        for seed in 0..50 {
            use_it(&mut driver, seed).expect("used");
        }
        while begin.elapsed() < Duration::from_secs(1) {
            let _ = driver.client().wait_event(Duration::from_millis(20));
        }
        ends.store(true, Ordering::Relaxed);
    });
    // What was rung last has been passed on by now, too.
    party.others_go_on();
    let _ = driver.client().wait_event(Duration::from_millis(50));
    let took = u64::try_from(begin.elapsed().as_millis()).expect("short");
    let heard = driver.client().counters().events - before;
    // One for each request at most, and a hundred in a second.
    let most = executed() - done + took / 10 + 16;
    assert!(
        heard <= most,
        "{heard} messages in {took} ms, {most} at most"
    );
    // All has been said. A ring for nothing after a while is passed on, too.
    until("quiet", || {
        let event = driver.client().wait_event(Duration::from_millis(100));
        event.expect("alive").is_none().then_some(())
    });
    call.ring().expect("rung");
    let event = driver.client().wait_event(PATIENCE).expect("alive");
    assert!(matches!(event, Some(Event::Used { .. })), "{event:?}");
    use_it(&mut driver, 1).expect("used");
}
