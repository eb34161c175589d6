// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that do something wrong at every step, and such that are ended in the middle of requests.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::bridge::{Bridge, ConnectError, Settings};
use vmsg_device::host::{Host, Stop};
use vmsg_device::rng::Rng;
use vmsg_driver::blk::{BlkDriver, BlkOptions, Request};
use vmsg_driver::rng::RngDriver;
use vmsg_driver::{BusClient, DmaPool, Error, QueueOptions, Sleep};
use vmsg_mem::BusAddr;

use crate::daemon::{ALL, ALL_MISCHIEF, Daemon, Mischief, SECTORS};
use crate::station::{BASE, PATIENCE, Station, until};

pub(crate) const DISK: DevNum = DevNum(0);
const RNG: DevNum = DevNum(1);
/// A daemon that hangs is given so long. One that does not must answer within it, too, but may be called anew a few times.
const SHORT: Duration = Duration::from_secs(1);
/// Whatever a daemon does, what is waited for ends within this, which is far from what it takes.
pub(crate) const LONGEST: Duration = Duration::from_secs(60);
pub(crate) type Driver<'p> = BlkDriver<'p, DriverBus, Sleep, Vec<u8>>;

/// A device host in threads of this process: the daemon's disk and an entropy device, looked after by one worker.
pub(crate) struct Party {
    pub(crate) dir: tempfile::TempDir,
    stop: Stop,
    host: Option<JoinHandle<()>>,
}

impl Party {
    fn socket(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("disk")
    }

    /// The daemon may take its time: it is a thread of this process, and the machine may have other things to do.
    pub(crate) fn settings(dir: &tempfile::TempDir) -> Settings {
        let mut settings = Settings::new(Self::socket(dir), 2);
        settings.patience = PATIENCE;
        settings.reconnect = Duration::from_millis(50);
        settings
    }

    /// Those of a test in which the daemon does `what`: it is not waited for long if it hangs, or says that it does what it does not.
    pub(crate) fn settings_for(dir: &tempfile::TempDir, what: Mischief) -> Settings {
        let mut settings = Self::settings(dir);
        if matches!(what, Mischief::Hang | Mischief::Stuck | Mischief::Ones) {
            settings.patience = SHORT;
        }
        settings
    }

    pub(crate) fn new(dir: tempfile::TempDir) -> Result<Self, ConnectError> {
        let settings = Self::settings(&dir);
        Self::with(dir, &settings)
    }

    pub(crate) fn with(dir: tempfile::TempDir, settings: &Settings) -> Result<Self, ConnectError> {
        let bridge = Bridge::connect(settings, PATIENCE)?;
        let listener = Listener::bind(dir.path().join("bus"), ListenerOptions::default());
        let mut host = Host::new(1).expect("a host");
        let bus = host
            .add_bus(
                vmsg_bus::DEFAULT_MESSAGE_SIZE,
                Some(listener.expect("a bus").into()),
            )
            .expect("a bus");
        host.add_device(bus, "disk", None, None, Box::new(bridge))
            .expect("added");
        host.add_device(bus, "rng", None, None, Box::new(Rng::new()))
            .expect("added");
        let stop = host.stop_handle();
        let host = std::thread::spawn(move || host.run().expect("served"));
        Ok(Self {
            dir,
            stop,
            host: Some(host),
        })
    }

    pub(crate) fn client(&self, pool: &DmaPool) -> BusClient {
        let connector = Connector::new(self.dir.path().join("bus"), "test");
        let mut client = BusClient::on_bus(connector.connect().expect("a bus"));
        client.set_timeout(PATIENCE);
        pool.lend(&mut client, 1).expect("lent");
        client
    }

    pub(crate) fn drive<'p>(&self, pool: &'p DmaPool, record: bool) -> Result<Driver<'p>, Error> {
        let options = BlkOptions {
            record,
            queues: 2,
            ..BlkOptions::default()
        };
        BlkDriver::new(self.client(pool), DISK, pool, &options)
    }

    /// The other device of the worker answers, whatever the daemon does.
    pub(crate) fn others_go_on(&self) {
        let pool = pool();
        let options = QueueOptions::default();
        let mut rng = RngDriver::new(self.client(&pool), RNG, &pool, &options).expect("there");
        rng.fill(&mut [0; 64], PATIENCE).expect("filled");
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(host) = self.host.take() {
            let _ = host.join();
        }
    }
}

pub(crate) fn pool() -> DmaPool {
    DmaPool::new("test", BASE, 4 << 20).expect("memory")
}

pub(crate) fn start(protocol: u64) -> (tempfile::TempDir, Daemon) {
    let dir = tempfile::tempdir().expect("a directory");
    let daemon = Daemon::start(&Party::socket(&dir), protocol, Arc::default());
    (dir, daemon)
}

fn bytes(seed: u8) -> Vec<u8> {
    (0..=252u8)
        .cycle()
        .map(|byte| byte ^ seed)
        .take(8192)
        .collect()
}

pub(crate) fn use_it(driver: &mut Driver<'_>, seed: u8) -> Result<(), Error> {
    assert_eq!(driver.config().capacity, SECTORS);
    driver.write(8, &bytes(seed), PATIENCE)?;
    let mut read = vec![0; 8192];
    driver.read(8, &mut read, PATIENCE)?;
    assert!(read == bytes(seed));
    driver.flush(PATIENCE)
}

#[test]
fn the_daemon_of_these_tests_is_a_good_one_with_many_features_or_few() {
    for protocol in [ALL, ALL & !(1 << 15), ALL & !(1 << 3), 1 << 9] {
        let (dir, daemon) = start(protocol);
        let party = Party::new(dir).expect("a device");
        for seed in 0..3 {
            let pool = pool();
            let mut driver = party.drive(&pool, seed == 2).expect("a disk");
            use_it(&mut driver, seed).expect("used");
        }
        assert!(daemon.shared.executed.load(Ordering::SeqCst) >= 9);
    }
}

/// First questions.
const GREETING: &[u32] = &[1, 15, 16, 17, 36, 21, 3, 24];

#[test]
fn whatever_goes_wrong_with_the_first_questions_ends_in_words_and_in_time() {
    for protocol in [ALL, ALL & !(1 << 3)] {
        for (&id, &what) in GREETING
            .iter()
            .flat_map(|id| ALL_MISCHIEF.iter().map(move |what| (id, what)))
        {
            let (dir, daemon) = start(protocol);
            *daemon.shared.mischief.lock().expect("sound") = Some((id, what));
            let begin = Instant::now();
            let settings = Party::settings_for(&dir, what);
            let first = Bridge::connect(&settings, 2 * PATIENCE);
            let took = begin.elapsed();
            assert!(took < LONGEST, "{id} {what:?}: {took:?}");
            if let Err(error) = &first {
                assert!(error.is_temporary(), "{id} {what:?}: {error}");
                assert!(matches!(error, ConnectError::Fault { .. }), "{error}");
            }
            drop(first);
            // The next time it behaves.
            let party = Party::new(dir).unwrap_or_else(|error| panic!("{id} {what:?}: {error}"));
            let pool = pool();
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 1).expect("used");
        }
    }
}

/// What is asked when the driver is ready.
const START: &[u32] = &[2, 37, 31, 32, 8, 10, 9, 14, 13, 12, 18];

#[test]
fn whatever_goes_wrong_when_the_queues_are_given_stops_nobody_else() {
    for (protocol, ids) in [(ALL, START), (ALL & !(1 << 15), &[2, 5])] {
        for (&id, &what) in ids
            .iter()
            .flat_map(|id| ALL_MISCHIEF.iter().map(move |what| (id, what)))
        {
            let (dir, daemon) = start(protocol);
            let settings = Party::settings_for(&dir, what);
            let party = Party::with(dir, &settings).expect("a device");
            *daemon.shared.mischief.lock().expect("sound") = Some((id, what));
            let pool = pool();
            let mut driver = party.drive(&pool, false).expect("a disk");
            party.others_go_on();
            let result = use_it(&mut driver, 1);
            assert!(daemon.shared.done_wrong.load(Ordering::SeqCst));
            match result {
                Ok(()) => {}
                // Refused once is refused again.
                Err(Error::NeedsReset) if what == Mischief::Ones => {}
                Err(error) => panic!("{id} {what:?}: {error}"),
            }
            drop(driver);
            let mut driver = party.drive(&pool, false).expect("a disk");
            use_it(&mut driver, 2).unwrap_or_else(|error| panic!("{id} {what:?}: {error}"));
        }
    }
}

#[test]
fn others_go_on_while_an_answer_of_the_daemon_is_waited_for() {
    let stuck = |id: u32| {
        let (dir, daemon) = start(ALL);
        let mut settings = Party::settings(&dir);
        // Longer than others wait.
        settings.patience = 2 * PATIENCE;
        let party = Party::with(dir, &settings).expect("a device");
        let plan = move |daemon: &Daemon| {
            *daemon.shared.mischief.lock().expect("sound") = Some((id, Mischief::Stuck));
        };
        let look = |party: &Party, daemon: &Daemon| {
            until("somebody to wait for", || {
                let stuck = daemon.shared.done_wrong.load(Ordering::SeqCst);
                stuck.then_some(())
            });
            party.others_go_on();
            daemon.shared.let_go.store(true, Ordering::SeqCst);
        };
        (party, daemon, plan, look)
    };
    for id in START {
        let (party, daemon, plan, look) = stuck(*id);
        plan(&daemon);
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        look(&party, &daemon);
        use_it(&mut driver, 1).unwrap_or_else(|error| panic!("{id}: {error}"));
    }
    for id in [18, 11] {
        let (party, daemon, plan, look) = stuck(id);
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        daemon.has_queues();
        plan(&daemon);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(driver));
            look(&party, &daemon);
        });
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 2).unwrap_or_else(|error| panic!("{id}: {error}"));
    }
}

#[test]
fn whatever_goes_wrong_when_the_queues_are_taken_back_holds_nobody_up() {
    for (&id, &what) in [18, 11]
        .iter()
        .flat_map(|id| ALL_MISCHIEF.iter().map(move |what| (id, what)))
    {
        let (dir, daemon) = start(ALL);
        let settings = Party::settings_for(&dir, what);
        let party = Party::with(dir, &settings).expect("a device");
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        daemon.has_queues();
        *daemon.shared.mischief.lock().expect("sound") = Some((id, what));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| party.others_go_on());
            drop(driver);
        });
        assert!(begin.elapsed() < LONGEST, "{id} {what:?}");
        assert!(daemon.shared.done_wrong.load(Ordering::SeqCst));
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 2).unwrap_or_else(|error| panic!("{id} {what:?}: {error}"));
    }
}

/// Has the daemon take `count` requests and not finish them.
pub(crate) fn in_flight(driver: &mut Driver<'_>, daemon: &Daemon, pool: &DmaPool, count: usize) {
    daemon.shared.hold.store(true, Ordering::SeqCst);
    let before = daemon.shared.taken.load(Ordering::SeqCst);
    for tag in 0..u8::try_from(count).expect("few") {
        let buffer = pool.alloc(512).expect("room");
        buffer.ram().write(0, &[tag + 1; 512]);
        let request = Request::Write {
            sector: 100 + u64::from(tag),
            from: &[(buffer.addr(), 512)],
        };
        // The buffer is lent until the end of the test.
        std::mem::forget(buffer);
        let taken = driver.submit(usize::from(tag) % 2, tag.into(), request);
        assert!(taken.expect("a sound queue"));
    }
    driver.commit().expect("kicked");
    until("the requests", || {
        (daemon.shared.taken.load(Ordering::SeqCst) == before + count).then_some(())
    });
    daemon.shared.hold.store(false, Ordering::SeqCst);
}

/// Each of `count` requests comes back once.
pub(crate) fn all_come_back(driver: &mut Driver<'_>, count: usize) {
    let mut tags = Vec::new();
    let end = Instant::now() + PATIENCE;
    while tags.len() < count {
        assert!(Instant::now() < end, "{tags:?}");
        let more = driver.poll(|completion| {
            completion.result.expect("done");
            tags.push(completion.tag);
        });
        if more.expect("sound") == 0 {
            driver.wait(Duration::from_secs(1)).expect("alive");
        }
    }
    tags.sort_unstable();
    assert_eq!(tags, (0..count as u64).collect::<Vec<_>>());
}

#[test]
fn what_was_in_flight_in_a_daemon_that_ended_is_done_by_the_next_one() {
    // A record that the driver has lent, or memory of the daemon's that is kept here.
    for record in [true, false] {
        let (dir, daemon) = start(ALL);
        let party = Party::new(dir).expect("a device");
        let pool = pool();
        let mut driver = party.drive(&pool, record).expect("a disk");
        for round in 0..5 {
            use_it(&mut driver, round).expect("used");
            let before = daemon.shared.executed.load(Ordering::SeqCst);
            in_flight(&mut driver, &daemon, &pool, 20);
            daemon.hang_up();
            all_come_back(&mut driver, 20);
            let executed = daemon.shared.executed.load(Ordering::SeqCst) - before;
            assert_eq!(executed, 20, "each once");
            let disk = daemon.shared.disk.lock().expect("sound");
            for tag in 0..20u8 {
                let at = (100 + usize::from(tag)) * 512;
                assert!(disk[at..at + 512].iter().all(|byte| *byte == tag + 1));
            }
        }
        assert!(daemon.shared.connections.load(Ordering::SeqCst) >= 6);
    }
}

#[test]
fn without_a_record_requests_in_flight_need_a_reset_of_the_driver() {
    let (dir, daemon) = start(ALL & !(1 << 12));
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 1).expect("used");
    in_flight(&mut driver, &daemon, &pool, 2);
    daemon.hang_up();
    match driver.wait(PATIENCE) {
        Err(Error::NeedsReset) => {}
        other => panic!("{other:?}"),
    }
    drop(driver);
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn a_reset_waits_for_what_is_in_flight_a_while_and_then_the_daemon_is_cut_off() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    in_flight(&mut driver, &daemon, &pool, 3);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| party.others_go_on());
        drop(driver);
    });
    let took = begin.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert!(took < LONGEST, "{took:?}");
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn random_bytes_in_place_of_answers_are_named() {
    // A daemon that says anything.
    let dir = tempfile::tempdir().expect("a directory");
    let listener = std::os::unix::net::UnixListener::bind(Party::socket(&dir)).expect("a socket");
    let seed = Arc::new(Mutex::new(1u64));
    let of_thread = Arc::clone(&seed);
    let thread = std::thread::spawn(move || {
        use std::io::Write;
        for _ in 0..200 {
            let (mut socket, _) = listener.accept().expect("somebody");
            let mut seed = of_thread.lock().expect("sound");
            let mut bytes = [0; 4096];
            for byte in &mut bytes {
                *seed ^= *seed << 13;
                *seed ^= *seed >> 7;
                *seed ^= *seed << 17;
                *byte = seed.to_ne_bytes()[3];
            }
            if seed.is_multiple_of(2) {
                // The header at least is right.
                for (at, word) in [(0, 1), (4, 5), (8, 8)] {
                    bytes[at..at + 4].copy_from_slice(&u32::to_ne_bytes(word));
                }
            }
            let _ = socket.write_all(&bytes);
        }
    });
    for _ in 0..200 {
        let error = Bridge::connect(&Party::settings(&dir), Duration::from_secs(2));
        assert!(
            matches!(error, Err(ConnectError::Fault { .. })),
            "{error:?}"
        );
    }
    thread.join().expect("written");
}

#[test]
fn what_was_in_flight_when_serve_was_killed_is_done_once() {
    let station = Station::new();
    let daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let mut serve = station.serve(&station.disk_spec());
    let pool = pool();
    let options = BlkOptions {
        record: true,
        queues: 2,
        ..BlkOptions::default()
    };
    let client = station.client(&pool);
    let mut driver = BlkDriver::new(client, DISK, &pool, &options).expect("a disk");
    for round in 0..3 {
        use_it(&mut driver, round).expect("used");
        let before = daemon.shared.executed.load(Ordering::SeqCst);
        in_flight(&mut driver, &daemon, &pool, 20);
        serve.kill();
        serve = station.serve(&station.disk_spec());
        driver.resume(station.client(&pool)).expect("resumed");
        all_come_back(&mut driver, 20);
        let executed = daemon.shared.executed.load(Ordering::SeqCst) - before;
        assert_eq!(executed, 20, "each once: {}", station.log());
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let (dir, daemon) = start(ALL);
    let party = Party::new(dir).expect("a device");
    {
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        use_it(&mut driver, 1).expect("used");
        daemon.complain();
        match driver.wait(PATIENCE) {
            Err(Error::NeedsReset) => {}
            other => panic!("{other:?}"),
        }
    }
    let pool = pool();
    let mut driver = party.drive(&pool, false).expect("a disk");
    use_it(&mut driver, 2).expect("used");
}

#[test]
fn memory_comes_and_goes_while_queues_work() {
    for protocol in [ALL, ALL & !(1 << 15)] {
        let (dir, daemon) = start(protocol);
        let party = Party::new(dir).expect("a device");
        let pool = pool();
        let mut driver = party.drive(&pool, false).expect("a disk");
        let regions = || daemon.shared.regions.load(Ordering::SeqCst);
        for round in 0..3u8 {
            use_it(&mut driver, round).expect("used");
            assert_eq!(regions(), 1);
            let more = DmaPool::new("more", BusAddr(0x8_0000_0000), 1 << 20).expect("memory");
            more.lend(driver.client(), 2).expect("lent");
            assert_eq!(regions(), 2);
            let buffer = more.alloc(512).expect("room");
            buffer.ram().write(0, &[round + 70; 512]);
            let request = Request::Write {
                sector: 50,
                from: &[(buffer.addr(), 512)],
            };
            let done = driver.run(request, PATIENCE).expect("answered");
            done.result.expect("written");
            assert!(daemon.shared.disk.lock().expect("sound")[50 * 512] == round + 70);
            // Answered when the daemon has let go of it.
            driver.client().remove_window(2).expect("removed");
            assert_eq!(regions(), 1);
        }
    }
}

#[test]
fn more_windows_than_the_daemon_takes_are_refused_by_name() {
    let station = Station::new();
    let protocol = ALL & !(1 << 15);
    let _daemon = Daemon::start(&station.path("disk"), protocol, Arc::default());
    let _serve = station.serve(&station.disk_spec());
    let pool = pool();
    let mut client = station.client(&pool);
    for id in 2..10u32 {
        let base = BusAddr(0x8_0000_0000 + (u64::from(id) << 24));
        let more = DmaPool::new("more", base, 1 << 20).expect("memory");
        more.lend(&mut client, id).expect("lent");
    }
    match BlkDriver::new(client, DISK, &pool, &BlkOptions::default()) {
        Err(Error::FeaturesRefused(_)) => {}
        other => panic!("{other:?}"),
    }
    let log = station.log();
    assert!(log.contains("more windows than the 8 regions"), "{log}");
}
