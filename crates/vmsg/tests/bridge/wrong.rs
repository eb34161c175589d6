// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons of another type than is said, sockets that are none, and sockets of ours at the end.

use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use virtio_msg::DevNum;
use vmsg_driver::DmaPool;

use crate::daemon::{ALL, Daemon};
use crate::station::{BASE, Station, until};

/// What is said of a daemon of another type.
const WORDS: &str = "is the type right?";

/// Runs `vmsg serve` with a device that it refuses.
fn refused(station: &Station, device: &str) -> String {
    let mut command = Command::new("timeout");
    // It waits for ever otherwise.
    command.arg("60").arg(env!("CARGO_BIN_EXE_vmsg"));
    command.args(["serve", "--bus"]);
    command.arg(format!("unix,path={}", station.path("bus").display()));
    let output: Output = command
        .args(["--device", device])
        .stdin(Stdio::null())
        .output()
        .expect("started");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    assert!(code.is_some_and(|code| code != 0 && code != 124), "{words}");
    words
}

#[test]
fn a_daemon_that_offers_what_its_type_has_not_is_named_with_the_type_that_has() {
    let station = Station::new();
    let _daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let socket = station.path("disk");
    let socket = socket.display();
    let mut serve = station.serve(&format!("vhost-user,id=x,type=fs,tag=t,socket={socket}"));
    let log = station.log();
    assert!(log.contains("type=fs, but the daemon offers"), "{log}");
    assert!(log.contains("as devices of type blk may have"), "{log}");
    serve.end();
    let _serve = station.serve(&station.disk_spec());
    assert_eq!(station.log().matches(WORDS).count(), 1);
}

#[test]
fn nothing_is_said_of_a_storage_daemon() {
    if !crate::station::has("qemu-storage-daemon") {
        return;
    }
    let station = Station::new();
    let image = station.image(2048);
    let _daemon = station.storage(&image, "");
    let _serve = station.serve(&station.disk_spec());
    let log = station.log();
    assert!(!log.contains(WORDS), "{log}");
}

#[test]
fn a_daemon_with_fewer_queues_than_its_type_is_refused_by_the_name_of_the_type() {
    let station = Station::new();
    let _daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let socket = station.path("disk");
    let words = refused(
        &station,
        &format!("vhost-user,type=scsi,socket={}", socket.display()),
    );
    let expected = "it has 2 queues, and 3 are wanted; is it of type scsi?";
    assert!(words.contains(expected), "{words}");
}

#[test]
fn what_is_no_socket_is_not_waited_for() {
    let station = Station::new();
    std::fs::create_dir(station.path("directory")).expect("made");
    std::fs::write(station.path("file"), "").expect("written");
    let long = "x".repeat(120);
    for (name, expected) in [
        ("directory", "this is a directory and no socket"),
        ("file", "this is a regular file and no socket"),
        (&long, "the path is too long for a socket"),
    ] {
        let path = station.path(name);
        let path = path.display();
        let words = refused(&station, &format!("vhost-user,type=blk,socket={path}"));
        let expected = format!("socket={path}: {expected}");
        assert!(words.contains(&expected), "{words}");
    }
}

#[test]
fn the_socket_where_a_daemon_has_connected_goes_with_us_unless_it_is_another_ones() {
    for another in [false, true] {
        let station = Station::new();
        let path = station.path("disk");
        let mut serve = station.serve(&format!("{},server=on", station.disk_spec()));
        let _daemon = Daemon::calling(&path, ALL, Arc::default());
        let pool = DmaPool::new("test", BASE, 1 << 20).expect("memory");
        let mut client = station.client(&pool);
        until("the device", || {
            (client.devices().expect("asked") == [DevNum(0)]).then_some(())
        });
        let _other = another.then(|| {
            std::fs::remove_file(&path).expect("there");
            std::os::unix::net::UnixListener::bind(&path).expect("bound")
        });
        serve.end();
        assert_eq!(path.exists(), another);
    }
}
