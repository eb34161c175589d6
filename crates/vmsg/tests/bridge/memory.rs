// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that goes with a queue in it, as virtual machine monitors have it go for a moment, and comes back, or does not.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmsg_device::bridge::{Resume, Settings};
use vmsg_driver::blk::{BlkDriver, BlkOptions, Request};
use vmsg_driver::{DmaPool, Error, QueueOptions};

use crate::daemon::{ALL, ALL_MISCHIEF, Daemon, Mischief};
use crate::hostile::{DISK, Driver, LONGEST, Party, all_come_back, in_flight, pool, start, use_it};
use crate::station::{PATIENCE, until};

/// Without CONFIGURE_MEM_SLOTS; without INFLIGHT_SHMFD.
const TABLES: u64 = ALL & !(1 << 15);
const NO_RECORD: u64 = ALL & !(1 << 12);
/// Longer than a kicked queue is waited for.
const LONG: Duration = Duration::from_millis(1500);

/// Memory may stay away as long as this machine makes it.
fn party(protocol: u64, resume: Resume) -> (Party, Daemon) {
    let (dir, daemon) = start(protocol);
    let mut settings = Party::settings(&dir);
    settings.away = PATIENCE;
    party_with(dir, daemon, settings, resume)
}

/// Memory may stay away as long as by default.
fn usual_party(protocol: u64, resume: Resume) -> (Party, Daemon) {
    let (dir, daemon) = start(protocol);
    let settings = Party::settings(&dir);
    party_with(dir, daemon, settings, resume)
}

fn party_with(
    dir: tempfile::TempDir,
    daemon: Daemon,
    mut settings: Settings,
    resume: Resume,
) -> (Party, Daemon) {
    daemon.shared.keeps_addresses.store(true, Ordering::SeqCst);
    settings.resume = Some(resume);
    (Party::with(dir, &settings).expect("a device"), daemon)
}

/// Lends a part of `pool`: the pages from `from` to `to`.
fn lend_part(driver: &mut Driver<'_>, pool: &DmaPool, id: u32, from: u64, to: u64) {
    let mut window = pool.window(id);
    window.base.0 += from << 12;
    window.file_offset += from << 12;
    window.len = (to - from) << 12;
    let fd = pool.fd().expect("a file");
    driver.client().add_window(window, fd).expect("lent");
}

fn pages(pool: &DmaPool) -> u64 {
    pool.len() as u64 >> 12
}

fn take(driver: &mut Driver<'_>, id: u32) {
    driver.client().remove_window(id).expect("removed");
}

fn submit(driver: &mut Driver<'_>, pool: &DmaPool, tag: u64) {
    let buffer = pool.alloc(512).expect("room");
    buffer.ram().write(0, &[7; 512]);
    let request = Request::Write {
        sector: 100,
        from: &[(buffer.addr(), 512)],
    };
    std::mem::forget(buffer);
    assert!(driver.submit(0, tag, request).expect("a sound queue"));
    driver.commit().expect("kicked");
}

fn needs_reset(driver: &mut Driver<'_>) {
    match driver.wait(PATIENCE) {
        Err(Error::NeedsReset) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_queue_whose_memory_goes_and_comes_back_goes_on() {
    for protocol in [ALL, TABLES, NO_RECORD, ALL & !(1 << 3), 1 << 9] {
        for resume in [Resume::Record, Resume::InOrder, Resume::Never] {
            let (party, daemon) = usual_party(protocol, resume);
            let pool = pool();
            let all = pages(&pool);
            let mut driver = party.drive(&pool, false).expect("a disk");
            let has = || daemon.shared.memory.lock().expect("sound").clone();
            for round in 0..4 {
                use_it(&mut driver, round).expect("used");
                take(&mut driver, 1);
                let can_let_go = protocol & 1 << 15 != 0 && resume != Resume::Record;
                assert!(!can_let_go || has().is_empty(), "{:?}", has());
                // It stays away for longer than a queue that is kicked may.
                if round == 0 {
                    assert!(!driver.wait(LONG).expect("no reset"));
                }
                // In pieces that are not what went; elsewhere in them; in one piece again.
                match round {
                    0 => {
                        lend_part(&mut driver, &pool, 2, all / 2, all);
                        lend_part(&mut driver, &pool, 1, 0, all / 2);
                        use_it(&mut driver, round + 10).expect("used in pieces");
                        take(&mut driver, 2);
                        use_it(&mut driver, round + 20).expect("used in one piece of two");
                        take(&mut driver, 1);
                        lend_part(&mut driver, &pool, 1, 0, all);
                    }
                    1 => {
                        lend_part(&mut driver, &pool, 3, 0, all - 16);
                        use_it(&mut driver, round + 10).expect("used");
                        take(&mut driver, 3);
                        lend_part(&mut driver, &pool, 1, 0, all);
                    }
                    _ => lend_part(&mut driver, &pool, 1, 0, all),
                }
            }
            use_it(&mut driver, 9).expect("used");
            let lost = daemon.shared.lost_addresses.load(Ordering::SeqCst);
            assert_eq!(lost, 0, "{protocol:#x} {resume:?}");
            if resume != Resume::Record {
                assert_eq!(daemon.shared.connections.load(Ordering::SeqCst), 1);
            }
        }
    }
}

#[test]
fn what_is_asked_of_a_queue_that_is_away_is_done_when_it_is_back() {
    for doorbells in [true, false] {
        let (party, daemon) = party(ALL, Resume::Record);
        let pool = pool();
        let options = BlkOptions {
            queue: QueueOptions {
                doorbells,
                ..QueueOptions::default()
            },
            ..BlkOptions::default()
        };
        let client = party.client(&pool);
        let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
        for round in 0..5 {
            use_it(&mut driver, round).expect("used");
            take(&mut driver, 1);
            let before = daemon.shared.executed.load(Ordering::SeqCst);
            submit(&mut driver, &pool, 0);
            pool.lend(driver.client(), 1).expect("lent");
            all_come_back(&mut driver, 1);
            let executed = daemon.shared.executed.load(Ordering::SeqCst) - before;
            assert_eq!(executed, 1);
        }
        use_it(&mut driver, 9).expect("used");
    }
}

#[test]
fn a_queue_that_is_kicked_and_does_not_come_back_needs_a_reset() {
    for doorbells in [true, false] {
        for resume in [Resume::Record, Resume::InOrder, Resume::Never] {
            let (party, _daemon) = usual_party(ALL, resume);
            let options = BlkOptions {
                queue: QueueOptions {
                    doorbells,
                    ..QueueOptions::default()
                },
                ..BlkOptions::default()
            };
            {
                let pool = pool();
                let all = pages(&pool);
                let client = party.client(&pool);
                let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
                use_it(&mut driver, 1).expect("used");
                take(&mut driver, 1);
                // What comes back is too small.
                lend_part(&mut driver, &pool, 1, all / 2, all);
                assert!(!driver.wait(LONG).expect("nothing was asked for"));
                let begin = Instant::now();
                submit(&mut driver, &pool, 0);
                needs_reset(&mut driver);
                let took = begin.elapsed();
                assert!(took >= Duration::from_millis(900), "{took:?}");
                party.others_go_on();
            }
            let pool = pool();
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 2).expect("used");
        }
    }
}

#[test]
fn requests_that_do_not_end_when_their_memory_goes_are_done_again_if_there_is_a_record() {
    for record in [true, false] {
        let (party, daemon) = party(ALL, Resume::Record);
        let pool = pool();
        let mut driver = party.drive(&pool, record).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        let before = daemon.shared.executed.load(Ordering::SeqCst);
        in_flight(&mut driver, &daemon, &pool, 6);
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| party.others_go_on());
            take(&mut driver, 1);
        });
        // They were waited for.
        let took = begin.elapsed();
        assert!(took >= Duration::from_secs(2), "{took:?}");
        assert!(took < LONGEST, "{took:?}");
        pool.lend(driver.client(), 1).expect("lent");
        all_come_back(&mut driver, 6);
        let executed = daemon.shared.executed.load(Ordering::SeqCst) - before;
        assert_eq!(executed, 6, "each once");
        use_it(&mut driver, 2).expect("used");
    }
    // Without one nobody knows.
    let (party, daemon) = party(NO_RECORD, Resume::Record);
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    in_flight(&mut driver, &daemon, &pool, 6);
    take(&mut driver, 1);
    pool.lend(driver.client(), 1).expect("lent");
    needs_reset(&mut driver);
    drop(driver);
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn a_daemon_that_ends_while_the_queue_is_away_is_followed_by_another() {
    for (protocol, resume) in [
        (ALL, Resume::Record),
        (NO_RECORD, Resume::Record),
        (ALL, Resume::InOrder),
        (ALL, Resume::Never),
    ] {
        let (party, daemon) = party(protocol, resume);
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        take(&mut driver, 1);
        let connections = || daemon.shared.connections.load(Ordering::SeqCst);
        if resume == Resume::Record {
            until("it is called anew", || (connections() == 2).then_some(()));
        }
        let before = connections();
        daemon.hang_up();
        if resume == Resume::Never {
            // What it knew is lost.
            needs_reset(&mut driver);
            continue;
        }
        until("the next one", || (connections() > before).then_some(()));
        pool.lend(driver.client(), 1).expect("lent");
        use_it(&mut driver, 2).expect("used");
    }
}

#[test]
fn whatever_goes_wrong_when_a_queue_is_stopped_for_its_memory_holds_nobody_up() {
    for resume in [Resume::Record, Resume::InOrder] {
        for (&id, &what) in [18, 11]
            .iter()
            .flat_map(|id| ALL_MISCHIEF.iter().map(move |what| (id, what)))
        {
            let (dir, daemon) = start(ALL);
            let mut settings = Party::settings_for(&dir, what);
            settings.away = PATIENCE;
            let (party, daemon) = party_with(dir, daemon, settings, resume);
            let pool = pool();
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 1).expect("used");
            daemon.has_queues();
            *daemon.shared.mischief.lock().expect("sound") = Some((id, what));
            let begin = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| party.others_go_on());
                take(&mut driver, 1);
            });
            assert!(begin.elapsed() < LONGEST, "{id} {what:?}");
            assert!(daemon.shared.done_wrong.load(Ordering::SeqCst));
            pool.lend(driver.client(), 1).expect("lent");
            use_it(&mut driver, 2).unwrap_or_else(|error| panic!("{id} {what:?}: {error}"));
        }
    }
}

#[test]
fn a_daemon_that_has_stopped_where_it_cannot_have_been_needs_a_reset() {
    let (party, daemon) = party(ALL, Resume::Never);
    let pool = pool();
    {
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        *daemon.shared.mischief.lock().expect("sound") = Some((11, Mischief::Ones));
        take(&mut driver, 1);
        needs_reset(&mut driver);
    }
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
}
