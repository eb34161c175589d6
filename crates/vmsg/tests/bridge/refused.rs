// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that refuse the same each time.

use std::sync::atomic::Ordering;

use vmsg_driver::Error;
use vmsg_driver::blk::{BlkDriver, BlkOptions};

use crate::daemon::{ALL, Daemon};
use crate::hostile::{DISK, Party, all_come_back, in_flight, pool, start, use_it};
use crate::station::{PATIENCE, Station, until};

const NO_RECORD: u64 = ALL & !(1 << 12);

#[test]
fn what_is_refused_each_time_before_a_queue_works_needs_a_reset_in_the_end() {
    // Features, memory, a table of memory, the first question; by an answer, or as libvhost-user does.
    for (protocol, id) in [(ALL, 2), (NO_RECORD, 37), (ALL & !(1 << 15), 5), (ALL, 3)] {
        for closing in [false, true] {
            if id == 3 && closing {
                // A daemon that is ended as soon as it is there may be another one next time.
                continue;
            }
            let (dir, daemon) = start(protocol);
            let party = Party::new(dir).expect("a device");
            let shared = &daemon.shared;
            shared.refuses_by_closing.store(closing, Ordering::SeqCst);
            let pool = pool();
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 1).expect("used");
            drop(driver);
            shared.refused.lock().expect("sound").push(id);
            daemon.hang_up();
            let mut driver = party.drive(&pool, false).expect("a disk");
            match driver.wait(PATIENCE) {
                Err(Error::NeedsReset) => {}
                other => panic!("{id}: {other:?}"),
            }
            party.others_go_on();
            drop(driver);
            // It is called on, and the next driver begins anew.
            shared.refused.lock().expect("sound").clear();
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 2).expect("used");
        }
    }
}

#[test]
fn a_daemon_that_refuses_a_few_times_is_called_on() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let shared = &daemon.shared;
    shared.refused.lock().expect("sound").push(2);
    let before = shared.connections.load(Ordering::SeqCst);
    let mut driver = party.drive(&pool, false).expect("a disk");
    until("three of them", || {
        let count = shared.connections.load(Ordering::SeqCst);
        (count >= before + 3).then_some(())
    });
    shared.refused.lock().expect("sound").clear();
    use_it(&mut driver, 1).expect("used");
}

#[test]
fn without_memory_for_what_is_in_flight_it_goes_on_and_says_so_once() {
    // GET_INFLIGHT_FD with memory of the daemon's, SET_INFLIGHT_FD with the driver's.
    for (id, record) in [(31, false), (32, false), (32, true)] {
        for closing in [false, true] {
            let station = Station::new();
            let daemon = Daemon::start(&station.path("disk"), ALL, Default::default());
            let shared = &daemon.shared;
            shared.refused.lock().expect("sound").push(id);
            shared.refuses_by_closing.store(closing, Ordering::SeqCst);
            let mut serve = station.serve(&station.disk_spec());
            let options = BlkOptions {
                record,
                queues: 2,
                ..BlkOptions::default()
            };
            let pool = pool();
            for round in 0..2 {
                let client = station.client(&pool);
                let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
                use_it(&mut driver, round).expect("used");
                // Nothing is in flight: the next one goes on.
                let connections = || shared.connections.load(Ordering::SeqCst);
                let before = connections();
                daemon.hang_up();
                until("the next one", || (connections() > before).then_some(()));
                use_it(&mut driver, round + 10).expect("used");
                in_flight(&mut driver, &daemon, &pool, 4);
                daemon.hang_up();
                match driver.wait(PATIENCE) {
                    Err(Error::NeedsReset) => {}
                    other => panic!("{id}: {other:?}"),
                }
            }
            let log = station.log();
            let said = log.matches("keeps no record of requests").count();
            assert_eq!(said, 1, "{log}");
            if !record {
                continue;
            }
            // What the driver has lent is not believed by the next one, whose daemon would take it.
            let client = station.client(&pool);
            let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
            use_it(&mut driver, 5).expect("used");
            in_flight(&mut driver, &daemon, &pool, 4);
            shared.refused.lock().expect("sound").clear();
            serve.kill();
            let _serve = station.serve(&station.disk_spec());
            let resumed = driver.resume(station.client(&pool));
            assert!(resumed.is_err(), "{}", station.log());
        }
    }
}

#[test]
fn a_daemon_that_takes_the_record_later_on_has_one() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let shared = &daemon.shared;
    shared.refused.lock().expect("sound").push(31);
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    drop(driver);
    shared.refused.lock().expect("sound").clear();
    // With the next driver it is asked again.
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
    in_flight(&mut driver, &daemon, &pool, 4);
    daemon.hang_up();
    all_come_back(&mut driver, 4);
}
