// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that connect to us.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_msg::DevNum;
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{BlkDriver, BlkOptions};

use crate::daemon::{ALL, Daemon, SECTORS};
use crate::station::{BASE, PATIENCE, Station, until};

const DEVICE: DevNum = DevNum(0);

fn spec(station: &Station) -> String {
    format!("{},server=on", station.disk_spec())
}

#[test]
fn a_daemon_that_connects_may_come_go_and_come_back() {
    let station = Station::new();
    let _serve = station.serve(&spec(&station));
    let pool = DmaPool::new("test", BASE, 8 << 20).expect("memory");
    let mut client = station.client(&pool);
    assert_eq!(client.devices().expect("asked"), []);
    let shared = Arc::default();
    let daemon = Daemon::calling(&station.path("disk"), ALL, Arc::clone(&shared));
    until("the device", || {
        (client.devices().expect("asked") == [DEVICE]).then_some(())
    });
    let mut driver = BlkDriver::new(client, DEVICE, &pool, &BlkOptions::default()).expect("a disk");
    assert_eq!(driver.config().capacity, SECTORS);
    let bytes: Vec<u8> = (0..=255).cycle().take(65_536).collect();
    driver.write(8, &bytes, PATIENCE).expect("written");
    // It ends, and comes back by itself; so does another one, after it.
    daemon.hang_up();
    let mut read = vec![0; bytes.len()];
    driver.read(8, &mut read, PATIENCE).expect("read");
    assert!(read == bytes);
    drop(daemon);
    let _daemon = Daemon::calling(&station.path("disk"), ALL, shared);
    driver.write(512, &bytes, PATIENCE).expect("written");
    driver.read(512, &mut read, PATIENCE).expect("read");
    assert!(read == bytes);
}

#[test]
fn who_connects_beside_the_daemon_waits_until_it_is_gone() {
    let station = Station::new();
    let _serve = station.serve(&spec(&station));
    let daemon = Daemon::calling(&station.path("disk"), ALL, Arc::default());
    let pool = DmaPool::new("test", BASE, 8 << 20).expect("memory");
    let mut client = station.client(&pool);
    until("the device", || {
        (client.devices().expect("asked") == [DEVICE]).then_some(())
    });
    let mut driver = BlkDriver::new(client, DEVICE, &pool, &BlkOptions::default()).expect("a disk");
    let beside = UnixStream::connect(station.path("disk")).expect("in line");
    let bytes = [0x5a; 4096];
    driver.write(0, &bytes, PATIENCE).expect("written");
    // The one in line is taken now, says nothing, is given up, and then it is the daemon's turn again.
    daemon.hang_up();
    let mut read = [0; 4096];
    driver.read(0, &mut read, PATIENCE).expect("read");
    assert_eq!(read, bytes);
    drop(beside);
}

#[test]
fn the_socket_of_a_daemon_that_connects_goes_with_us_and_is_nobody_elses() {
    let station = Station::new();
    let path = station.path("disk");
    let mut serve = station.serve(&spec(&station));
    assert!(path.exists());
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .args(["serve", "--bus"])
        .arg(format!("unix,path={}", station.path("other").display()))
        .args(["--device", &spec(&station)])
        .output()
        .expect("started");
    assert!(!second.status.success());
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(words.contains("another process has this socket"), "{words}");
    // What a killed one leaves is taken over.
    serve.kill();
    assert!(path.exists());
    let _serve = station.serve(&spec(&station));
}
