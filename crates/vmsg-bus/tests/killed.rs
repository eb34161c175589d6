// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program that starts right after another one was killed finds the bus free.
#![cfg(all(feature = "unix", feature = "linux-user"))]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use vmsg_bus::linux_user::{Connector, Listener, QueueName};
use vmsg_bus::unix::{self, BindError, ListenerOptions};
use vmsg_bus::{ConnectError, LinuxUserSpec};

const WHAT: &str = "VMSG_TEST_WHAT";
const DIR: &str = "VMSG_TEST_DIR";

fn spec(dir: &Path) -> LinuxUserSpec {
    LinuxUserSpec {
        name: QueueName::new("t").unwrap(),
        dir: dir.to_owned(),
        ..LinuxUserSpec::default()
    }
}

fn listen(dir: &Path) -> Result<unix::Listener, BindError> {
    unix::Listener::bind(dir.join("b.sock"), ListenerOptions::default())
}

/// The process that is killed: not a test when it is run as one.
#[test]
#[ignore = "started by other tests"]
fn a_holder() {
    let (Ok(what), Some(dir)) = (std::env::var(WHAT), std::env::var_os(DIR)) else {
        return;
    };
    let dir: &Path = dir.as_ref();
    let _held: Box<dyn std::any::Any> = match what.as_str() {
        "unix" => Box::new(listen(dir).unwrap()),
        "device" => Box::new(Listener::bind(&spec(dir), "first").unwrap()),
        "driver" => {
            let connector = Connector::new(&spec(dir), "first");
            // It is the driver from now on, and nobody has to be there for that.
            let _ = connector.start();
            Box::new(connector)
        }
        _ => panic!("{what}?"),
    };
    // Unmapping this takes longer than the next one needs to start.
    let memory = vec![1_u8; 256 << 20];
    println!("\nready");
    // Until it is killed, or whoever started it is gone.
    let _ = std::io::stdin().read(&mut [0]);
    assert!(std::hint::black_box(memory)[0] == 1);
}

fn holder(what: &str, dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_holder", "--ignored", "--nocapture"])
        .envs([
            (WHAT, OsString::from(what)),
            (DIR, dir.as_os_str().to_owned()),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"), "it has ended");
    child
}

#[test]
fn a_host_follows_one_that_was_just_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = holder("unix", dir.path());
    let pid = child.id();
    let refused = listen(dir.path());
    assert!(matches!(refused, Err(BindError::InUse { pid: Some(by), .. }) if by == pid));
    child.kill().unwrap();
    let next = listen(dir.path());
    child.wait().unwrap();
    next.unwrap();
}

#[test]
fn a_linux_user_host_follows_one_that_was_just_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = holder("device", dir.path());
    let refused = Listener::bind(&spec(dir.path()), "next");
    assert!(matches!(refused, Err(BindError::Held { .. })));
    child.kill().unwrap();
    let next = Listener::bind(&spec(dir.path()), "next");
    child.wait().unwrap();
    next.unwrap();
}

#[test]
fn a_linux_user_driver_follows_one_that_was_just_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = holder("driver", dir.path());
    let start = || Connector::new(&spec(dir.path()), "next").start();
    assert!(matches!(start(), Err(ConnectError::Held { .. })));
    child.kill().unwrap();
    let next = start();
    child.wait().unwrap();
    assert!(!matches!(next, Err(ConnectError::Held { .. })), "{next:?}");
}
