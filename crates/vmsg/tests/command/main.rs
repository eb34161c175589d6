// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command as a user runs it.

#[path = "../program/mod.rs"]
mod program;
mod qemu_arguments;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use program::{output, vmsg};
use tempfile::TempDir;

/// A running `vmsg`, which is killed if a test leaves it behind.
struct Running {
    child: Child,
    stderr: ChildStderr,
}

impl Running {
    /// Starts `vmsg` in `folder` and waits for `lines` lines that say it is ready.
    fn start(folder: &Path, args: &[&str], lines: usize) -> Self {
        let mut child = vmsg(folder, args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmsg starts");
        let stderr = child.stderr.take().expect("piped");
        let stdout = child.stdout.take().expect("piped");
        let mut running = Self { child, stderr };
        for line in BufReader::new(stdout).lines().take(lines) {
            let line = line.expect("text");
            assert!(line.starts_with("ready "), "{line}");
        }
        if running.child.try_wait().expect("a child").is_some() {
            panic!("ended early: {}", running.log());
        }
        running
    }

    /// Ends it as ^C does; gives its log.
    fn end(mut self) -> String {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .expect("kill runs");
        assert!(killed.success());
        let log = self.log();
        assert!(self.child.wait().expect("a child").success(), "{log}");
        log
    }

    fn log(&mut self) -> String {
        let mut log = String::new();
        self.stderr.read_to_string(&mut log).expect("text");
        log
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

const BUS: &str = "unix,path=b0.sock";
const R1: &str = "linux-user,revision=r1";

/// A bus of which a x86 machine's memory could be the file `ram`.
fn linux_user(more: &str) -> String {
    format!("linux-user,ram=ram,mem-offset=0{more}")
}

fn serve(folder: &TempDir) -> Running {
    let args = [
        "serve",
        "--bus",
        BUS,
        "--device",
        "net,id=net0",
        "--device",
        "rng",
    ];
    Running::start(folder.path(), &args, 1)
}

#[test]
fn devices_are_listed_for_people_and_for_programs() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let listed = output(folder.path(), &["ls", "--bus", BUS]);
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    let listed = text(&listed.stdout);
    for part in [
        "net0",
        "rng0",
        "vmsg",
        "VERSION_1",
        "MAC",
        "queues",
        "config",
    ] {
        assert!(listed.contains(part), "{part} is missing: {listed}");
    }
    let json = output(folder.path(), &["ls", "--bus", BUS, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json[0]["id"], "net0");
    assert_eq!(json[0]["type"], "net");
    assert_eq!(json[1]["device_id"], 4);
    assert_eq!(json[1]["number"], 1);
    host.end();
}

#[test]
fn ping_prints_what_ping_prints() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let ping = output(folder.path(), &["ping", "--bus", BUS, "-c", "3", "-i", "0"]);
    let out = text(&ping.stdout);
    assert!(ping.status.success(), "{}", text(&ping.stderr));
    assert!(out.contains("seq=3 time="), "{out}");
    assert!(
        out.contains("3 messages sent, 3 received, 0% loss"),
        "{out}"
    );
    assert!(out.contains("min/avg/p99/max"), "{out}");
    host.end();
}

#[test]
fn mistakes_exit_with_2_and_name_what_was_meant() {
    let folder = TempDir::new().expect("a folder");
    let cases: [(&[&str], &str); 21] = [
        (
            &["serve", "--bus", "unixx,path=x", "--device", "rng"],
            "unix",
        ),
        (&["serve", "--bus", "unix,pth=x", "--device", "rng"], "path"),
        (&["serve", "--bus", BUS, "--device", "rgn"], "rng"),
        (
            &["serve", "--bus", BUS, "--device", "net,backend=tab"],
            "user",
        ),
        (
            &["serve", "--bus", BUS, "--device", "net,mac=1:2"],
            "52:54:00",
        ),
        (
            &["serve", "--bus", BUS, "--device", "rng,bus=b7"],
            "known: b0",
        ),
        (
            &["serve", "--bus", BUS, "--device", "rng,id=7"],
            "not be a number",
        ),
        (
            &["proxy", "--bus", BUS, "--front", "vhost-usr,socket=x,dev=1"],
            "vhost-user",
        ),
        (&["ls", "--buss", BUS], "--bus"),
        (&["serve", "--bus", BUS, "--device", "net,mtu=5"], "576"),
        (
            &["serve", "--bus", BUS, "--device", "net,host=1.2.3.4"],
            "10.0.2.0/24",
        ),
        (
            &["serve", "--bus", BUS, "--device", "rng,worker=1"],
            "--workers 1",
        ),
        (
            &["serve", "--bus", BUS, "--device", "rng", "--workers", "0"],
            "256",
        ),
        (
            &["serve", "--bus", BUS, "--device", "net,mtu=70000"],
            "65520",
        ),
        (
            &["proxy", "--bus", R1, "--front", "vhost-user,socket=x,dev=a"],
            "dev=0",
        ),
        (&["ls", "--bus", "linux-user,mem-low-size=2G"], "mem-hole="),
        (
            &[
                "proxy",
                "--bus",
                BUS,
                "--front",
                "vhost-user,socket=x,dev=a",
                "--front",
                "vhost-user,socket=y,dev=a",
            ],
            "has this device",
        ),
        (
            &[
                "proxy",
                "--bus",
                "linux-user,ram=ram",
                "--front",
                "vhost-user,socket=x,dev=0,isolate=on",
            ],
            "use a unix bus",
        ),
        (
            &[
                "proxy",
                "--bus",
                BUS,
                "--front",
                "vfio-user,socket=x,dev=a",
                "--front",
                "vfio-user,socket=x,dev=b",
            ],
            "two fronts have the socket `x`",
        ),
        (
            &[
                "proxy",
                "--bus",
                "linux-user,ram=ram",
                "--front",
                "vfio-user,socket=x,dev=0,isolate=on",
            ],
            "use a unix bus",
        ),
        (
            &[
                "proxy",
                "--bus",
                BUS,
                "--front",
                "vhost-user,socket=x,dev=a",
                "--memory",
                "1G",
            ],
            "--print-qemu",
        ),
    ];
    for (args, meant) in cases {
        let output = output(folder.path(), args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(
            error.contains(meant),
            "{args:?} does not name `{meant}`: {error}"
        );
        assert!(output.stdout.is_empty(), "errors go to stderr");
    }
}

#[test]
fn help_names_every_key_of_a_device() {
    let folder = TempDir::new().expect("a folder");
    let help = text(&output(folder.path(), &["serve", "--help"]).stdout);
    // The error for an unknown key names them all.
    for kind in ["net", "rng", "console"] {
        let device = format!("{kind},no-such-key=1");
        let error = output(folder.path(), &["serve", "--bus", BUS, "--device", &device]);
        let error = text(&error.stderr);
        let (_, known) = error.split_once("known: ").expect("the known keys");
        for key in known.trim().split(", ").map(|key| key.trim_matches('`')) {
            assert!(help.contains(&format!("{key}=")), "{key}: {help}");
        }
    }
}

#[test]
fn nobody_at_the_bus_is_an_error_with_a_reason() {
    let folder = TempDir::new().expect("a folder");
    for command in ["ls", "ping"] {
        let output = output(folder.path(), &[command, "--bus", BUS]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("b0.sock"));
    }
}

#[test]
fn one_socket_has_one_device_host() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let second = output(folder.path(), &["serve", "--bus", BUS, "--device", "rng"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        text(&second.stderr).contains("b0.sock"),
        "{}",
        text(&second.stderr)
    );
    let listed = output(folder.path(), &["ls", "--bus", BUS]);
    assert!(listed.status.success(), "the first one goes on");
    host.end();
}

/// A pipe whose reader has left.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let front = "vhost-user,socket=net.sock,dev=net0";
    let commands: [&[&str]; 4] = [
        &["ping", "--bus", BUS, "-i", "0"],
        &["ls", "--bus", BUS],
        &["ls", "--bus", BUS, "--json"],
        &["proxy", "--print-qemu", "--bus", BUS, "--front", front],
    ];
    for args in commands {
        let output = vmsg(folder.path(), args)
            .env("VMSG_LOG", "error")
            .stdout(closed())
            .output()
            .expect("vmsg runs");
        assert!(output.status.success(), "{args:?}");
        assert_eq!(text(&output.stderr), "", "{args:?}");
    }
    host.end();
}

/// Calls `done` until it is true, at most a minute.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed().as_secs() < 60, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_device_host_goes_on_when_nobody_reads_what_it_says() {
    let folder = TempDir::new().expect("a folder");
    let other = "unix,path=b1.sock";
    let args = [
        "-vv", "serve", "--bus", BUS, "--bus", other, "--device", "net",
    ];
    let mut host = vmsg(folder.path(), &args)
        .stdout(closed())
        .stderr(closed())
        .spawn()
        .expect("vmsg starts");
    let listed = |bus| {
        output(folder.path(), &["ls", "--bus", bus])
            .status
            .success()
    };
    until("the host listens", || listed(BUS) && listed(other));
    assert!(host.try_wait().expect("a child").is_none(), "it goes on");
    let pid = host.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status();
    assert!(killed.expect("kill runs").success());
    assert!(host.wait().expect("a child").success());
    let keeper = folder.path().join("b0.sock.keep");
    until("the keeper was dismissed", || !keeper.exists());
}

#[test]
fn the_keeper_of_a_host_that_just_ended_is_no_obstacle() {
    let folder = TempDir::new().expect("a folder");
    for _ in 0..10 {
        let log = serve(&folder).end();
        assert!(!log.contains("WARN"), "{log}");
    }
}

#[test]
fn a_host_goes_on_without_its_keeper() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("b0.sock.keep");
    // Somebody else has the name.
    let squatter = std::os::unix::net::UnixListener::bind(&path).expect("bound");
    let log = serve(&folder).end();
    assert!(log.contains("connections will not survive"), "{log}");
    drop(squatter);
}

#[test]
fn an_orderly_end_leaves_nothing_behind() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    assert!(
        folder.path().join("b0.sock.keep").exists(),
        "the keeper listens"
    );
    host.end();
    // The keeper ends by itself as soon as it has read its dismissal.
    let keeper = folder.path().join("b0.sock.keep");
    let gone = (0..500).any(|_| {
        let gone = !keeper.exists();
        if !gone {
            std::thread::yield_now();
            let _ = output(folder.path(), &["--version"]);
        }
        gone
    });
    assert!(gone, "the keeper is still there");
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_killed_host_makes_room_for_the_next() {
    let folder = TempDir::new().expect("a folder");
    let mut host = serve(&folder);
    host.child.kill().expect("killed");
    host.child.wait().expect("a child");
    let next = serve(&folder);
    let listed = output(folder.path(), &["ls", "--bus", BUS]);
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    next.end();
}

#[test]
fn silence_may_be_another_revision() {
    let folder = TempDir::new().expect("a folder");
    let revisions = ["linux-user,revision=1", R1];
    for (host, other) in [(0, 1), (1, 0)] {
        let args = ["serve", "--bus", revisions[host], "--device", "rng"];
        let running = Running::start(folder.path(), &args, 1);
        let hint = revisions[host].split_once(',').expect("a key").1;
        for command in [&["ls"][..], &["ping", "-c", "1"]] {
            let bus = ["--bus", revisions[other]];
            let asked = output(folder.path(), &[command, &bus].concat());
            let error = text(&asked.stderr);
            assert_eq!(asked.status.code(), Some(1), "{command:?}: {error}");
            assert!(error.contains(hint), "{command:?}: {error}");
        }
        running.end();
    }
}

#[test]
fn a_running_host_is_looked_at_and_changed_over_its_control_socket() {
    let folder = TempDir::new().expect("a folder");
    let args = [
        "serve",
        "--bus",
        BUS,
        "--control",
        "ctl",
        "--device",
        "net,id=net0,backend=none,queues=2,link=down,speed=10000",
        "--device",
        "rng",
    ];
    let host = Running::start(folder.path(), &args, 1);
    let ctl = |args: &[&str]| output(folder.path(), &[&["ctl", "ctl"], args].concat());
    let listed = || -> serde_json::Value {
        let json = ctl(&["list", "--json"]);
        serde_json::from_slice(&json.stdout).expect("JSON")
    };
    let json = listed();
    assert_eq!(json[0]["id"], "net0");
    assert_eq!(json[0]["bus"], "b0");
    assert_eq!(json[0]["link"]["up"], false);
    assert_eq!(json[0]["pairs"].as_array().map(Vec::len), Some(2));
    assert_eq!(json[0]["pairs"][1]["tx_frames"], 0);
    assert_eq!(json[1]["type"], "rng");
    let table = text(&ctl(&["list"]).stdout);
    assert!(
        table.contains("down") && table.contains("TO GUEST"),
        "{table}"
    );
    let done = ctl(&["link", "b0/net0", "up"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(listed()[0]["link"]["up"], true);
    for (args, words) in [
        (&["link", "net7", "up"][..], "net7"),
        (&["link", "rng0", "down"], "the device has no link"),
        (&["announce", "net0"], "no driver"),
    ] {
        let refused = ctl(args);
        let error = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(ctl(&["link", "net0", "sideways"]).status.code(), Some(2));
    // Nobody else may talk to it while it lives, and it goes with the host.
    let second = output(
        folder.path(),
        &[
            "serve",
            "--bus",
            "unix,path=b1.sock",
            "--control",
            "ctl",
            "--device",
            "rng",
        ],
    );
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("is in use by"));
    host.end();
    assert!(!folder.path().join("ctl").exists());
    assert!(text(&ctl(&["list"]).stderr).contains("nobody answers"));
}
