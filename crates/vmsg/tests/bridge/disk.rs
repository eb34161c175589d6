// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk of qemu-storage-daemon.

use virtio_msg::DevNum;
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::blk::{BlkDriver, BlkOptions, Request};
use vmsg_driver::{BusClient, DmaPool, QueueOptions, Sleep};
use vmsg_mem::BusAddr;

use crate::station::{BASE, PATIENCE, Process, Station, has, until};

const SECTORS: u64 = 65536;
pub(crate) type Driver<'p> = BlkDriver<'p, DriverBus, Sleep, Vec<u8>>;

fn pool() -> DmaPool {
    DmaPool::new("test", BASE, 8 << 20).expect("memory")
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..=250u8)
        .cycle()
        .map(|byte| byte ^ seed)
        .take(len)
        .collect()
}

pub(crate) fn drive<'p>(client: BusClient, pool: &'p DmaPool, options: &BlkOptions) -> Driver<'p> {
    BlkDriver::new(client, DevNum(0), pool, options).expect("a disk")
}

/// Writes and reads all over the disk.
pub(crate) fn use_it(driver: &mut Driver<'_>) {
    assert_eq!(driver.config().capacity, SECTORS);
    for (round, sector) in [(1, 0), (2, 1000), (3, SECTORS - 64)] {
        let written = bytes(round, 32768);
        driver.write(sector, &written, PATIENCE).expect("written");
        let mut read = vec![0; 32768];
        driver.read(sector, &mut read, PATIENCE).expect("read");
        assert!(read == written, "{round}");
    }
    driver.flush(PATIENCE).expect("flushed");
}

pub(crate) fn set_up() -> Option<(Station, Process)> {
    if !has("qemu-storage-daemon") {
        return None;
    }
    let station = Station::new();
    let image = station.image(SECTORS);
    let daemon = station.storage(&image, "");
    Some((station, daemon))
}

#[test]
fn a_disk_is_read_and_written_with_eventfds_straight_through() {
    let Some((station, _daemon)) = set_up() else {
        return;
    };
    let _serve = station.serve(&station.disk_spec());
    let pool = pool();
    let mut driver = drive(station.client(&pool), &pool, &BlkOptions::default());
    use_it(&mut driver);
    let image = std::fs::read(station.path("image")).expect("readable");
    assert_eq!(image[512_000..512_100], bytes(2, 100)[..]);
}

#[test]
fn a_disk_is_read_and_written_with_notifications_as_messages() {
    let Some((station, _daemon)) = set_up() else {
        return;
    };
    let _serve = station.serve(&station.disk_spec());
    let pool = pool();
    let options = BlkOptions {
        queue: QueueOptions {
            doorbells: false,
            ..QueueOptions::default()
        },
        ..BlkOptions::default()
    };
    use_it(&mut drive(station.client(&pool), &pool, &options));
}

#[test]
fn a_second_driver_finds_the_disk_as_the_first_did() {
    let Some((station, _daemon)) = set_up() else {
        return;
    };
    let _serve = station.serve(&station.disk_spec());
    for _ in 0..3 {
        let pool = pool();
        let mut driver = drive(station.client(&pool), &pool, &BlkOptions::default());
        use_it(&mut driver);
    }
}

#[test]
fn the_disk_comes_when_its_daemon_does() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let station = Station::new();
    let _serve = station.serve(&station.disk_spec());
    let pool = pool();
    let mut client = station.client(&pool);
    assert_eq!(client.devices().expect("asked"), []);
    let image = station.image(SECTORS);
    let _daemon = station.storage(&image, "");
    until("the device", || {
        (client.devices().expect("asked") == [DevNum(0)]).then_some(())
    });
    use_it(&mut drive(client, &pool, &BlkOptions::default()));
}

#[test]
fn a_daemon_that_was_started_anew_goes_on_where_the_last_one_was() {
    let Some((station, mut daemon)) = set_up() else {
        return;
    };
    let _serve = station.serve(&station.disk_spec());
    let pool = pool();
    let mut driver = drive(station.client(&pool), &pool, &BlkOptions::default());
    for round in 0..5 {
        use_it(&mut driver);
        daemon.kill();
        let gone = |log: &str| log.matches("the daemon is gone").count() > usize::from(round);
        until("the end of the daemon", || {
            gone(&station.log()).then_some(())
        });
        let written = bytes(round, 4096);
        // The driver sees no more than a pause: what it asks for meanwhile is done by the next one.
        let buffer = pool.alloc(4096).expect("room");
        buffer.ram().write(0, &written);
        let request = Request::Write {
            sector: 64 + 8 * u64::from(round),
            from: &[(buffer.addr(), 4096)],
        };
        assert!(driver.submit(0, 7, request).expect("a sound queue"));
        driver.commit().expect("kicked");
        daemon = station.storage(&station.path("image"), "");
        let mut done = 0;
        while done == 0 {
            driver
                .poll(|completion| {
                    assert_eq!((completion.tag, completion.result), (7, Ok(())));
                    done += 1;
                })
                .expect("sound");
            if done == 0 {
                assert!(driver.wait(PATIENCE).expect("alive"), "{}", station.log());
            }
        }
        let mut read = vec![0; 4096];
        driver
            .read(64 + 8 * u64::from(round), &mut read, PATIENCE)
            .expect("read");
        assert!(read == written);
    }
}

#[test]
fn a_serve_that_was_killed_is_followed_by_one_that_goes_on() {
    let Some((station, _daemon)) = set_up() else {
        return;
    };
    let mut serve = station.serve(&station.disk_spec());
    let pool = pool();
    let mut driver = drive(station.client(&pool), &pool, &BlkOptions::default());
    for _ in 0..5 {
        use_it(&mut driver);
        serve.kill();
        serve = station.serve(&station.disk_spec());
        driver.resume(station.client(&pool)).expect("resumed");
    }
    use_it(&mut driver);
}

#[test]
fn a_bus_with_memory_known_from_the_start_lends_it_too() {
    let Some((station, _daemon)) = set_up() else {
        return;
    };
    let pool = DmaPool::new("vmsg-bridge-test", BusAddr(0x4000_0000), 8 << 20).expect("memory");
    // The file of the pool, as others can open it.
    let fds = std::fs::read_dir("/proc/self/fd").expect("listed");
    let of_pool = |path: &std::path::PathBuf| {
        let link = std::fs::read_link(path).unwrap_or_default();
        link.to_string_lossy().contains("vmsg-bridge-test")
    };
    let mut fds = fds.map(|fd| fd.expect("read").path());
    let fd = fds.find(of_pool).expect("a memfd");
    let fd = fd
        .file_name()
        .expect("a number")
        .to_string_lossy()
        .into_owned();
    let ram = format!("/proc/{}/fd/{fd}", std::process::id());
    let bus = format!(
        "linux-user,dir={},ram={ram},mem-offset=0x40000000",
        station.dir.path().display()
    );
    let _serve = station.serve_on(&bus, &station.disk_spec());
    let spec: BusSpec = bus.parse().expect("a bus");
    let connected = spec.connector("test").timeout(PATIENCE).connect();
    let mut client = BusClient::on_bus(connected.expect("a bus"));
    client.set_timeout(PATIENCE);
    use_it(&mut drive(client, &pool, &BlkOptions::default()));
}
