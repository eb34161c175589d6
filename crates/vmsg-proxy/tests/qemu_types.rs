// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stock QEMU takes the arguments that are printed for each type of device, and finds the device behind the front. With QEMU in PATH, or
//! the programs of `VMSG_TEST_QEMU` (their folder; any versions); types that a QEMU does not have are left out.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use stage::{Setting, Stage};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vmsg_proxy::front::qemu::{Arch, Machine, has_vhost_user, machine_args};
use vmsg_proxy::session::DeviceFacts;
use vmsg_proxy::{FrontSpec, print_qemu};

/// Type, queues, bytes of configuration.
const TYPES: [(u32, usize, usize); 14] = [
    (1, 5, 24),
    (2, 4, 60),
    (3, 6, 12),
    (4, 1, 0),
    (8, 6, 36),
    (17, 2, 0),
    (18, 2, 136),
    (19, 3, 8),
    (25, 4, 16),
    (26, 3, 40),
    (32, 2, 0),
    (34, 1, 0),
    (41, 2, 8),
    (45, 1, 24),
];

fn facts(host: &Host) -> DeviceFacts {
    DeviceFacts {
        number: host.number,
        info: host.info,
        offered: host.offered,
        queue_sizes: host.queue_sizes.clone(),
    }
}

fn host_of(device_id: u32, queues: usize, config: usize) -> Host {
    let mut config = vec![0; config];
    match device_id {
        // Of 1 MiB.
        2 => config[..8].copy_from_slice(&2048_u64.to_le_bytes()),
        // The first one that is not taken.
        19 => config[0] = 3,
        26 => {
            config[..5].copy_from_slice(b"share");
            config[36] = 2;
        }
        _ => {}
    }
    let mut host = Host::new(1, "dev0", device_id, queues, &config);
    if device_id == 41 {
        // QEMU asks for it.
        host.offered.insert(0);
    }
    host
}

/// QEMU's program for a machine, and its version.
fn qemu(arch: Arch) -> Option<(PathBuf, (u32, u32))> {
    let name = match arch {
        Arch::X86 => "qemu-system-x86_64",
        Arch::Arm64 => "qemu-system-aarch64",
    };
    let path = match std::env::var_os("VMSG_TEST_QEMU") {
        Some(folder) => Path::new(&folder).join(name),
        None => name.into(),
    };
    let said = Command::new(&path).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let mut numbers = said.split("version ").nth(1)?.split(['.', ' ', '\n']);
    let mut number = || numbers.next()?.parse().ok();
    Some((path, (number()?, number()?)))
}

/// What QEMU says when it has come up with these arguments, and was told to end: its answers, or why it has not come up.
fn come_up(program: &Path, args: &[String]) -> Result<(), String> {
    let mut qemu = Command::new(program)
        .args(["-accel", "tcg", "-S", "-nodefaults", "-display", "none"])
        .args(["-qmp", "stdio"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = qemu.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    // The greeting comes when all devices are there.
    let greeted = lines
        .next()
        .is_some_and(|line| line.unwrap().contains("\"QMP\""));
    for command in ["qmp_capabilities", "system_reset", "query-status", "quit"] {
        // It may have ended.
        let _ = writeln!(stdin, "{{\"execute\":\"{command}\"}}");
    }
    let answers: Vec<String> = lines.map_while(Result::ok).collect();
    let output = qemu.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = answers.iter().any(|line| line.contains("\"error\""));
    // It says nothing that somebody would have to look into.
    if greeted && !refused && output.status.success() && error.is_empty() {
        return Ok(());
    }
    Err(format!("{}\n{answers:#?}\n{error}", output.status))
}

fn every_type(arch: Arch) {
    let Some((program, version)) = qemu(arch) else {
        eprintln!("no QEMU for {arch:?}");
        return;
    };
    let machine = Machine {
        arch,
        version,
        memory: "128M".into(),
        ..Machine::default()
    };
    let more = std::env::var_os("VMSG_TEST_CHARDEV").unwrap_or_default();
    let more = more.to_string_lossy();
    let mut failed = Vec::new();
    for (device_id, queues, config) in TYPES {
        // Before version 8 it wants KVM, whatever the machine.
        let wants_kvm = device_id == 18 && version < (8, 0);
        if wants_kvm || !has_vhost_user(device_id, arch, version) {
            continue;
        }
        let host = host_of(device_id, queues, config);
        let (facts, bytes) = (facts(&host), host.config.clone());
        let stage = Stage::with(host, Setting::default());
        let spec = format!("vhost-user,socket={},dev=1", stage.socket().display());
        let spec: FrontSpec = vmsg_bus::keyval::from_str(&spec).unwrap();
        let mut args = machine_args(&machine);
        let mut device = print_qemu(&spec, &facts, &bytes, &machine);
        device[1].push_str(&more);
        args.extend(device);
        // More processors than the device has queues.
        args.extend(["-smp".into(), "8".into()]);
        if arch == Arch::Arm64 {
            args.extend(["-cpu".into(), "max".into()]);
        }
        if let Err(why) = come_up(&program, &args) {
            failed.push(format!("type {device_id}: {}\n{why}", args.join(" ")));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn qemu_for_x86_takes_every_type_that_it_has() {
    every_type(Arch::X86);
}

#[test]
fn qemu_for_arm64_takes_every_type_that_it_has() {
    every_type(Arch::Arm64);
}
