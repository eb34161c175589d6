// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command over the bus `ivshmem`: a device host in one process, who looks at it in another, and what is killed.

mod program;

use std::path::Path;
use std::process::{Output, Stdio};

use program::{Running, output, vmsg};

fn start(arguments: &[&str]) -> Running {
    Running::start(vmsg(Path::new("."), arguments).stderr(Stdio::null()))
}

fn serve(bus: &str) -> Running {
    start(&["serve", "--bus", bus, "--device", "rng"])
}

fn ls(bus: &str) -> Output {
    output(Path::new("."), &["ls", "--bus", bus])
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
    let _server = start(&[
        "ivshmem",
        "server",
        "--socket",
        &format!("path={}", socket.display()),
    ]);
    for layout in ["amp", "spsc"] {
        let bus = format!("ivshmem,socket={},layout={layout}", socket.display());
        let host = serve(&bus);
        sees_the_device(&bus);
        drop(host);
        assert!(!ls(&bus).status.success(), "nobody is there");
        let _host = serve(&bus);
        sees_the_device(&bus);
        sees_the_device(&bus);
    }
}

#[test]
fn memory_without_doorbells_does() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    let bus = format!("ivshmem,file={},size=64K", memory.display());
    let host = serve(&bus);
    sees_the_device(&bus);
    drop(host);
    let _host = serve(&bus);
    sees_the_device(&bus);
}

#[test]
fn what_contradicts_ends_with_its_name() {
    let output = ls("ivshmem,socket=a,pci=auto");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("socket=") && text.contains("pci="), "{text}");
}
