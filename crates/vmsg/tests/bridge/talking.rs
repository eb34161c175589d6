// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that say too much by themselves, and such that are told too much.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_msg::FeatureSet;
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{BlkDriver, BlkOptions};

use crate::daemon::{ALL, Mischief};
use crate::hostile::{DISK, Driver, Party, pool, start, use_it};
use crate::station::{PATIENCE, until};

/// A driver that can turn the write cache on and off.
fn with_write_cache<'p>(party: &Party, pool: &'p DmaPool, queues: u16) -> Driver<'p> {
    let options = BlkOptions {
        features: FeatureSet::from_bits(&[9, 11, 12, 29]),
        queues,
        ..BlkOptions::default()
    };
    BlkDriver::new(party.client(pool), DISK, pool, &options).expect("a disk")
}

#[test]
fn the_daemon_tells_of_another_configuration_and_is_told_of_it() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = with_write_cache(&party, &pool, 1);
    assert!(!driver.config().write_back);
    driver.set_write_back(true).expect("written");
    until("the daemon", || {
        let seen = daemon.shared.write_back.load(Ordering::SeqCst);
        seen.then_some(())
    });
    daemon.shared.write_back.store(false, Ordering::SeqCst);
    assert_eq!(daemon.ask(2), 0);
    let config = driver.wait_config(PATIENCE).expect("alive");
    assert!(!config.expect("told").write_back);
    // Memory for itself, host notifiers: no.
    for id in [1, 3, 9, 77] {
        assert_eq!(daemon.ask(id), 1, "{id}");
    }
    use_it(&mut driver, 1).expect("used");
}

#[test]
fn a_daemon_that_says_the_same_for_ever_is_cut_off() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    // More than a hundred within a second, however slow this is; it may be cut off before the last.
    let mut heard = 0;
    until("another connection", || {
        heard += (0..150).take_while(|_| daemon.tell(2, 0)).count();
        let count = daemon.shared.connections.load(Ordering::SeqCst);
        (count > 1).then_some(())
    });
    assert!(heard > 100, "{heard} taken");
    party.others_go_on();
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn a_daemon_that_asks_on_and_reads_no_answer_is_cut_off() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    // Not so often that it is cut off for that. The socket has room for some hundred answers.
    let (begin, mut asked) = (Instant::now(), 0);
    until("another connection", || {
        let due = (begin.elapsed().as_millis() / 15).min(asked + 10);
        while asked < due {
            let _ = daemon.ask_on();
            asked += 1;
        }
        let count = daemon.shared.connections.load(Ordering::SeqCst);
        (count > 1).then_some(())
    });
    party.others_go_on();
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn a_driver_that_writes_the_configuration_faster_than_the_daemon_is_told_so() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = with_write_cache(&party, &pool, 1);
    *daemon.shared.mischief.lock().expect("sound") = Some((25, Mischief::Stuck));
    let written = |turn: u32| driver.set_write_back(turn.is_multiple_of(2)).is_ok();
    let written = (0..200).map(written).take_while(|ok| *ok).count();
    assert!((2..200).contains(&written), "{written} in line");
    daemon.shared.let_go.store(true, Ordering::SeqCst);
    until("another connection", || {
        let count = daemon.shared.connections.load(Ordering::SeqCst);
        (count > 1).then_some(())
    });
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn a_daemon_that_answers_each_of_many_questions_late_does_not_hold_up_a_reset() {
    let (dir, daemon) = start(ALL);
    let mut settings = Party::settings(&dir);
    // All answers together may take four times as long; 55 of them would take longer.
    settings.patience = Duration::from_secs(4);
    let party = Party::with(dir, &settings).expect("a device");
    let pool = pool();
    let mut driver = with_write_cache(&party, &pool, 2);
    // Nothing else is in line any more when it has its queues and has heard this.
    daemon.has_queues();
    driver.set_write_back(true).expect("in line");
    until("the daemon", || {
        (daemon.shared.config_writes.load(Ordering::SeqCst) > 0).then_some(())
    });
    daemon.shared.slow.store(1000, Ordering::SeqCst);
    for turn in 0..55 {
        let written = driver.set_write_back(turn % 2 == 1);
        written.unwrap_or_else(|error| panic!("{turn}: {error}"));
    }
    let begin = Instant::now();
    drop(driver);
    let driver = with_write_cache(&party, &pool, 2);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(50), "it took {took:?}");
    daemon.shared.slow.store(0, Ordering::SeqCst);
    drop(driver);
}
