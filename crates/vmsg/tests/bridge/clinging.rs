// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that hang with the driver's memory in their hands; kicks and writes to the configuration that are not passed on.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use virtio_msg::{FeatureSet, QueueIndex};
use vmsg_driver::blk::{BlkDriver, BlkOptions};

use crate::daemon::Mischief;
use crate::hostile::{DISK, Party, in_flight, pool, start, use_it};
use crate::station::{PATIENCE, until};

/// GET_VRING_BASE; SET_VRING_ENABLE, before it.
const STOP: [u32; 2] = [11, 18];

#[test]
fn a_reset_is_not_answered_while_a_daemon_that_hangs_may_write() {
    for (id, busy) in [(STOP[0], false), (STOP[1], true)] {
        let (dir, daemon) = start(crate::daemon::ALL);
        let settings = Party::settings_for(&dir, Mischief::Stuck);
        let party = Party::with(dir, &settings).expect("a device");
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        if busy {
            in_flight(&mut driver, &daemon, &pool, 3);
        }
        daemon.has_queues();
        let connections = || daemon.shared.connections.load(Ordering::SeqCst);
        let before = connections();
        *daemon.shared.mischief.lock().expect("sound") = Some((id, Mischief::Stuck));
        std::thread::scope(|scope| {
            let (done, ended) = channel();
            scope.spawn(move || {
                // With a reset.
                drop(driver);
                let _ = done.send(());
            });
            // Longer than it is waited for answers, and for what is in flight.
            let early = ended.recv_timeout(Duration::from_secs(4));
            assert_eq!(early, Err(RecvTimeoutError::Timeout), "{id}");
            until("the mischief", || {
                let done = daemon.shared.done_wrong.load(Ordering::SeqCst);
                done.then_some(())
            });
            party.others_go_on();
            assert_eq!(connections(), before, "nobody else works on the queues");
            daemon.shared.let_go.store(true, Ordering::SeqCst);
            ended.recv_timeout(PATIENCE).expect("reset");
        });
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 2).expect("used");
    }
}

#[test]
fn a_queue_that_was_never_used_is_not_kicked() {
    for doorbells in [true, false] {
        let (dir, daemon) = start(crate::daemon::ALL);
        let party = Party::new(dir).expect("a device");
        let pool = pool();
        let mut options = BlkOptions {
            queues: 2,
            ..BlkOptions::default()
        };
        options.queue.doorbells = doorbells;
        let client = party.client(&pool);
        let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
        // Blocking requests go to the first.
        if doorbells {
            // As who speaks for a driver does when it starts.
            let kick = driver.client().notify_available(DISK, QueueIndex(1), 0);
            kick.expect("sent");
        }
        use_it(&mut driver, 1).expect("used");
        let kicks = |queue: usize| daemon.shared.kicks[queue].load(Ordering::SeqCst);
        assert!(kicks(0) > 0);
        assert_eq!(kicks(1), 0, "doorbells: {doorbells}");
        // The next daemon cannot know what the last one had seen of it.
        daemon.hang_up();
        until("a kick", || (kicks(1) == 1).then_some(()));
        use_it(&mut driver, 2).expect("used");
        assert_eq!(kicks(1), 1, "doorbells: {doorbells}");
    }
}

#[test]
fn what_changes_nothing_in_the_configuration_is_not_passed_on() {
    let (dir, daemon) = start(crate::daemon::ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let options = BlkOptions {
        features: FeatureSet::from_bits(&[9, 11, 12, 29]),
        ..BlkOptions::default()
    };
    let mut driver = BlkDriver::new(party.client(&pool), DISK, &pool, &options).expect("a disk");
    // The configuration has been read again by then.
    use_it(&mut driver, 1).expect("used");
    for on in [false, true, true, false, false, true] {
        driver.set_write_back(on).expect("written");
    }
    drop(driver);
    assert_eq!(daemon.shared.config_writes.load(Ordering::SeqCst), 3);
    assert!(daemon.shared.write_back.load(Ordering::SeqCst));
}

#[test]
fn a_daemon_for_scsi_is_told_nothing_of_what_is_written_to_its_configuration() {
    let (dir, daemon) = start(crate::daemon::ALL);
    let mut settings = Party::settings(&dir);
    settings.device_id = 8;
    settings.config_size = Some(60);
    settings.queues = Some(2);
    let party = Party::with(dir, &settings).expect("a device");
    let pool = pool();
    let mut client = party.client(&pool);
    // sense_size and cdb_size: as they are, and others.
    let mut now = [0; 8];
    client.read_config(DISK, 20, &mut now).expect("read");
    client.write_config(DISK, 20, &now).expect("as it is");
    client.write_config(DISK, 20, &[7; 8]).expect_err("others");
    let mut after = [0; 8];
    client.read_config(DISK, 20, &mut after).expect("read");
    assert_eq!(after, now);
    assert_eq!(daemon.shared.config_writes.load(Ordering::SeqCst), 0);
}
