// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program that is taken for QEMU: it says its version, comes to the sockets of QMP and the serial line, and does what it is told
//! without being a machine.
//!
//! It is this test program, called by a script. In its folder `NAME.qmp` has the commands that it got, `NAME.obey` how it takes them:
//! `stubborn`: all that would end it is ignored; `fails`: devices are refused; `refuses`: its guest keeps its devices; `broken`: it ends at once.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

/// What the script hands on the arguments with.
const ARGS: &str = "VMSG_TEST_QEMU_ARGS";

/// Writes the script, `qemu` in `folder`.
pub(crate) fn install(folder: &Path) {
    let program = std::env::current_exe().expect("this program");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo QEMU emulator version 7.2.0; exit; fi\n\
         {ARGS}=\"$*\" exec {} --exact qemu::plays_qemu --nocapture --test-threads=1\n",
        program.display()
    );
    let path = folder.join("qemu");
    fs::write(&path, script).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
}

/// The path of the `-chardev` called `id`.
fn chardev<'a>(args: &'a str, id: &str) -> Option<&'a str> {
    let (_, rest) = args.split_once(&format!("socket,id={id},path="))?;
    rest.split([' ', ',']).next()
}

/// Not a test: what the script runs.
#[test]
fn plays_qemu() {
    let Ok(args) = std::env::var(ARGS) else {
        return;
    };
    let name = args
        .split(' ')
        .nth(1)
        .expect("-name comes first")
        .to_owned();
    let obeys = |how: &str| {
        let said = fs::read_to_string(format!("{name}.obey"));
        !said.is_ok_and(|said| said.contains(how))
    };
    if !obeys("stubborn") {
        let ignore = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGTERM, ignore).expect("a handler");
    }
    let mut log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(format!("{name}.qmp"))
        .expect("a log");
    writeln!(log, "start {args}").expect("a log");
    // As if the machine was powered off from inside.
    let (mut off, pressed) = UnixStream::pair().expect("a pair");
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGUSR1, pressed)
        .expect("a handler");
    std::thread::spawn(move || {
        off.read_exact(&mut [0]).expect("it is open");
        std::process::exit(0);
    });
    if !obeys("broken") {
        std::process::exit(7);
    }
    if let Some(path) = chardev(&args, "serial") {
        let mut line = UnixStream::connect(path).expect("up listens");
        std::thread::spawn(move || {
            writeln!(line, "serial line of a guest").expect("it is read");
            let reader = line.try_clone().expect("a descriptor");
            for text in BufReader::new(reader).lines().map_while(Result::ok) {
                writeln!(line, "echo {text}").expect("it is read");
            }
        });
    }
    let mut qmp = UnixStream::connect(chardev(&args, "qmp").expect("QMP")).expect("up listens");
    let reader = qmp.try_clone().expect("a descriptor");
    let mut say = |value: Value| writeln!(qmp, "{value}").expect("it is read");
    say(json!({ "QMP": { "version": {}, "capabilities": [] } }));
    for line in BufReader::new(reader).lines().map_while(Result::ok) {
        let asked: Value = serde_json::from_str(&line).expect("JSON");
        let command = asked["execute"].as_str().expect("a command");
        if command != "qmp_capabilities" {
            writeln!(log, "{command} {}", asked["arguments"]).expect("a log");
        }
        if matches!(command, "system_powerdown" | "quit") && obeys("stubborn") {
            say(json!({ "event": "SHUTDOWN" }));
            std::process::exit(0);
        }
        if command == "device_add" && !obeys("fails") {
            say(
                json!({ "error": { "class": "GenericError", "desc": "no room" }, "id": asked["id"] }),
            );
            continue;
        }
        if command == "device_del" && !obeys("refuses") {
            let device = &asked["arguments"]["id"];
            say(json!({ "return": {}, "id": asked["id"] }));
            say(json!({ "event": "DEVICE_UNPLUG_GUEST_ERROR", "data": { "device": device } }));
            continue;
        }
        say(json!({ "return": {}, "id": asked["id"] }));
        if command == "device_del" {
            let device = &asked["arguments"]["id"];
            // That of the virtio device in it comes first, without a name.
            say(json!({ "event": "DEVICE_DELETED", "data": { "path": "/machine/x" } }));
            say(json!({ "event": "DEVICE_DELETED", "data": { "device": device } }));
        }
    }
    // Whoever told it what to do is gone; it stays, as QEMU does.
    loop {
        std::thread::park();
    }
}
