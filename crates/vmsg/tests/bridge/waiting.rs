// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices whose daemons are not there yet, as an operator sees them.

use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use serde_json::Value;
use virtio_msg::DevNum;
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{BlkDriver, BlkOptions};

use crate::daemon::{ALL, Daemon};
use crate::station::{BASE, PATIENCE, Process, Station, until};

fn ctl_output(station: &Station, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .arg("ctl")
        .arg(station.path("ctl"))
        .args(args)
        .output()
        .expect("started")
}

fn ctl(station: &Station, args: &[&str]) -> String {
    let output = ctl_output(station, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

fn refused(station: &Station, args: &[&str]) -> String {
    let output = ctl_output(station, args);
    assert!(!output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// The devices of `ctl list`, each as id, number and state.
fn list(station: &Station) -> Vec<(String, u64, String)> {
    let devices: Value = serde_json::from_str(&ctl(station, &["list", "--json"])).expect("JSON");
    let text = |device: &Value, key: &str| device[key].as_str().expect("a text").to_owned();
    let device = |device: &Value| {
        let number = device["number"].as_u64().expect("a number");
        (text(device, "id"), number, text(device, "state"))
    };
    let devices = devices.as_array().expect("a list");
    devices.iter().map(device).collect()
}

fn serve(station: &Station, devices: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .arg("serve")
        .arg("--bus")
        .arg(format!("unix,path={}", station.path("bus").display()))
        .arg("--control")
        .arg(station.path("ctl"))
        .stdout(Stdio::null());
    for device in devices {
        command.args(["--device", device]);
    }
    let process = Process::start(&mut command);
    until("a control socket", || {
        let output = ctl_output(station, &["list"]);
        output.status.success().then_some(())
    });
    process
}

#[test]
fn a_device_that_is_waited_for_is_listed_and_comes_with_its_number() {
    let station = Station::new();
    let _serve = serve(&station, &[&station.disk_spec(), "rng,id=dice"]);
    let [disk, dice] = &list(&station)[..] else {
        panic!("two devices");
    };
    let socket = station.path("disk").display().to_string();
    assert_eq!((disk.0.as_str(), disk.1), ("disk", 0));
    assert!(
        disk.2.starts_with("waiting: no daemon at ") && disk.2.contains(&socket),
        "{}",
        disk.2
    );
    assert_eq!(*dice, ("dice".to_owned(), 1, "idle".to_owned()));
    let table = ctl(&station, &["list"]);
    assert!(table.contains("waiting: no daemon at"), "{table}");
    let words = refused(&station, &["rescan", "disk"]);
    assert!(
        words.contains("`disk` is not there: waiting: no daemon at"),
        "{words}"
    );
    // The number that is kept for it is nobody else's.
    assert!(ctl(&station, &["add-device", "rng,id=more"]).ends_with("/more number 2\n"));
    let daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    let state = |wanted: &str| {
        until(wanted, || {
            let devices = list(&station);
            assert_eq!(devices.len(), 3, "{devices:?}");
            (devices[0] == ("disk".to_owned(), 0, wanted.to_owned())).then_some(())
        });
    };
    state("idle");
    let table = ctl(&station, &["list"]);
    assert!(
        table.contains("direct"),
        "what the daemon does is not seen here: {table}"
    );
    drop(daemon);
    state("no daemon");
}

#[test]
fn a_device_that_is_waited_for_can_be_removed() {
    let station = Station::new();
    let calling = format!("{},server=on", station.disk_spec());
    let folder = format!(
        "vhost-user,id=folder,type=fs,socket={}",
        station.path("fs").display()
    );
    let _serve = serve(&station, &[&calling, &folder]);
    assert_eq!(list(&station).len(), 2);
    assert!(station.path("disk").exists());
    assert_eq!(ctl(&station, &["remove-device", "disk"]), "");
    let left = list(&station);
    assert!(left.len() == 1 && left[0].0 == "folder", "{left:?}");
    // Nobody listens any more, and nobody waits: a daemon that comes is not called.
    assert!(!station.path("disk").exists());
    assert!(refused(&station, &["remove-device", "disk"]).contains("no device called `disk`"));
    let _daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
    // The name is free, and its number is spent.
    let added = ctl(&station, &["add-device", &station.disk_spec()]);
    assert!(added.ends_with("/disk number 2\n"), "{added}");
    assert_eq!(ctl(&station, &["remove-device", "folder"]), "");
    assert_eq!(list(&station).len(), 1);
}

#[test]
fn kicks_and_interrupts_are_counted_where_they_pass_and_said_to_be_direct_where_not() {
    for doorbells in [true, false] {
        let station = Station::new();
        let _daemon = Daemon::start(&station.path("disk"), ALL, Arc::default());
        let _serve = serve(&station, &[&station.disk_spec()]);
        let pool = DmaPool::new("test", BASE, 8 << 20).expect("memory");
        let mut options = BlkOptions::default();
        options.queue.doorbells = doorbells;
        let client = station.client(&pool);
        let mut driver = BlkDriver::new(client, DevNum(0), &pool, &options).expect("a disk");
        for _ in 0..5 {
            driver.write(0, &[7; 512], PATIENCE).expect("written");
        }
        // What was counted last is seen with the next turn of the worker.
        let counters = until("one queue", || {
            let devices: Value =
                serde_json::from_str(&ctl(&station, &["list", "--json"])).expect("JSON");
            assert_eq!(devices[0]["state"], "running");
            let counters = devices[0]["counters"].clone();
            (counters["daemon-queues"] == 1).then_some(counters)
        });
        let count = |name: &str| counters[name].as_u64().expect("a number");
        let direct = u64::from(doorbells);
        assert_eq!(count("daemon-queues-kicked-directly"), direct, "{counters}");
        assert_eq!(
            count("daemon-queues-calling-directly"),
            direct,
            "{counters}"
        );
        let (kicks, calls) = (count("daemon-kicks"), count("daemon-calls"));
        if doorbells {
            assert_eq!(calls, 0);
        } else {
            // The daemon may have found some requests without a kick.
            assert!(kicks > 0 && calls > 0, "{counters}");
        }
        let output = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(["top", "--once", "--interval", "0.1"])
            .arg(station.path("ctl"))
            .output()
            .expect("started");
        let text = String::from_utf8(output.stdout).expect("text");
        let row = text
            .lines()
            .skip_while(|line| !line.contains("KICKS/s"))
            .nth(1);
        let row = row.unwrap_or_else(|| panic!("{text}"));
        let way = if doorbells { "direct" } else { "0" };
        assert!(
            row.split_whitespace().skip(6).all(|word| word == way),
            "{text}"
        );
    }
}

#[test]
fn the_socket_of_a_daemon_that_has_not_come_goes_with_us() {
    let station = Station::new();
    let calling = format!("{},server=on", station.disk_spec());
    let mut serve = serve(&station, &[&calling]);
    assert!(station.path("disk").exists());
    serve.end();
    assert!(!station.path("disk").exists());
}
