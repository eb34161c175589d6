// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parts, descriptions and readers that behave badly.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Lab, PATIENCE, has_ended, watch};

#[test]
fn a_flood_that_nobody_reads_holds_nothing_up() {
    let lab = Lab::new(
        "[program.p]\ncommand = [\"sh\", \"-c\", \"tr '\\\\0' x < /dev/zero >&2 & yes & echo here I am; wait\"]\nready = \"here I am\"\n",
    );
    let file = lab.folder.path().join("lab.toml");
    let mut child = lab
        .vmsg(&["up", &file.to_string_lossy()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // It is full soon, and never read.
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmsg runs");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    out.read_line(&mut line).expect("a line");
    assert!(line.starts_with("ready"), "{line}");
    let control = lab.folder.path().join("run/control.sock");
    // Meanwhile it does what it is for.
    for _ in 0..5 {
        let output = lab.output(&["ctl", &control.to_string_lossy(), "parts"]);
        assert!(output.status.success());
    }
    let pid = Pid::from_child(&child);
    let end = watch(pid);
    kill_process(pid, Signal::TERM).expect("it is ours");
    let ended = has_ended(&end, PATIENCE);
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait().expect("it is ours");
    assert!(ended && status.code() == Some(0), "{status}");
    let log = lab.folder.path().join("run/logs/p.log");
    assert!(log.metadata().expect("a log").len() < 40 << 20);
}

#[test]
fn a_qemu_that_does_not_end_or_stop_talking_is_told_of() {
    let lab = Lab::new("[bus.b]\n[device.r]\ntype = \"rng\"\n[guest.g]\nqemu = \"./bad\"\n");
    let path = lab.folder.path().join("bad");
    for (script, words) in [
        ("#!/bin/sh\nyes\n", "does not tell a version"),
        ("#!/bin/sh\nsleep 1000 &\nsleep 1000\n", "timed out"),
    ] {
        lab.write("bad", script);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
        let output = lab.output(&["up", "lab.toml", "--check"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_file_without_end_is_no_description() {
    let lab = Lab::new("");
    let output = lab.output(&["up", "/dev/zero", "--check"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("longer than"), "{error}");
}

#[test]
fn wherever_it_is_killed_nothing_is_left() {
    const TAG: &str = "VMSG_TEST_KILLED";
    let lab = Lab::new(
        "[bus.b]\n[device.r]\ntype = \"rng\"\n[guest.g]\nqemu = \"./qemu\"\n[program.p]\ncommand = [\"sh\", \"-c\", \"sleep 1000 & echo started; wait\"]\nready = \"started\"\n",
    );
    let tag = format!("{TAG}={}", lab.folder.path().display());
    for lines in 0..10 {
        let mut child = lab
            .vmsg(&["-v", "up", "lab.toml"])
            .env(TAG, lab.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmsg runs");
        let mut err = BufReader::new(child.stderr.take().expect("piped"));
        for _ in 0..lines {
            err.read_line(&mut String::new()).expect("a line");
        }
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        // Also those that it was about to start.
        let due = Instant::now() + PATIENCE;
        while let Some(pid) = tagged(&tag).first() {
            if let Ok(end) = rustix::process::pidfd_open(*pid, rustix::process::PidfdFlags::empty())
            {
                assert!(
                    has_ended(&end, PATIENCE) && Instant::now() < due,
                    "killed after {lines} lines: {pid:?} is left"
                );
            }
        }
    }
}

/// Processes with this in their environment.
fn tagged(tag: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if let Some(pid) = pid.and_then(Pid::from_raw)
            && environment
                .split(|byte| *byte == 0)
                .any(|word| word == tag.as_bytes())
        {
            found.push(pid);
        }
    }
    found
}
