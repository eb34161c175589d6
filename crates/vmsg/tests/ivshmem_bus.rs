// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command over the bus `ivshmem`: a device host in one process, who looks at it in another, and what is killed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

const VMSG: &str = env!("CARGO_BIN_EXE_vmsg");

/// A process that has said that it is ready; killed when it is dropped.
struct Ready(Child);

impl Ready {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(VMSG)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert!(line.starts_with("ready"), "{line}");
        Self(child)
    }

    fn serve(bus: &str) -> Self {
        Self::start(&["serve", "--bus", bus, "--device", "rng"])
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ls(bus: &str) -> Output {
    Command::new(VMSG)
        .args(["ls", "--bus", bus])
        .output()
        .unwrap()
}

#[track_caller]
fn sees_the_device(bus: &str) {
    let output = ls(bus);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("rng"),
        "{text}{errors}"
    );
}

#[test]
fn a_killed_device_host_is_served_again_in_either_layout() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _server = Ready::start(&[
        "ivshmem",
        "server",
        "--socket",
        &format!("path={}", socket.display()),
    ]);
    for layout in ["amp", "spsc"] {
        let bus = format!("ivshmem,socket={},layout={layout}", socket.display());
        let host = Ready::serve(&bus);
        sees_the_device(&bus);
        drop(host);
        assert!(!ls(&bus).status.success(), "nobody is there");
        let _host = Ready::serve(&bus);
        sees_the_device(&bus);
        sees_the_device(&bus);
    }
}

#[test]
fn memory_without_doorbells_does() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    let bus = format!("ivshmem,file={},size=64K", memory.display());
    let host = Ready::serve(&bus);
    sees_the_device(&bus);
    drop(host);
    let _host = Ready::serve(&bus);
    sees_the_device(&bus);
}

#[test]
fn what_contradicts_ends_with_its_name() {
    let output = ls("ivshmem,socket=a,pci=auto");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("socket=") && text.contains("pci="), "{text}");
}
