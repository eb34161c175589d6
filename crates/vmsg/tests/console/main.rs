// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Consoles as their users have them: `vmsg serve`, a driver of another project as the guest, and `vmsg console`.

mod guest;
mod terminal;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use guest::Guest;
use serde_json::Value;
use tempfile::TempDir;
use terminal::Terminal;

/// Nothing takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that is killed if a test leaves it behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn vmsg(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .current_dir(folder)
        .args(args)
        .env("VMSG_LOG", "error");
    command
}

/// A device host with a console `con0` that has a port `agent`, and a console `con1`.
fn serve(folder: &Path) -> Running {
    let args = [
        "serve",
        "--bus",
        "unix,path=b0.sock",
        "--control",
        "c.sock",
        "--device",
        "console,id=con0,log=con0.log",
        "--device",
        "console,id=con1,port=agent",
    ];
    let mut child = vmsg(folder, &args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("vmsg starts");
    let mut ready = [0; 5];
    let out = child.stdout.as_mut().expect("piped");
    out.read_exact(&mut ready).expect("it is ready");
    assert_eq!(&ready, b"ready");
    Running(child)
}

fn output(folder: &Path, args: &[&str]) -> Output {
    let mut command = vmsg(folder, args);
    command.stdin(Stdio::null()).output().expect("vmsg runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `vmsg console list` tells of a console.
fn console(folder: &Path, name: &str) -> Value {
    let listed = output(folder, &["console", "c.sock", "list", "--json"]);
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let consoles = listed.as_array().expect("a list");
    let found = consoles.iter().find(|console| console["name"] == name);
    found.expect("a console of that name").clone()
}

/// Waits for what nothing tells of.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let due = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < due, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_script_talks_to_a_guest() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let _serve = serve(folder);
    let _guest = Guest::start(folder, 0);
    until("the guest's start", || {
        console(folder, "con0")["open"] == true
    });
    let mut attached = vmsg(
        folder,
        &["console", "c.sock", "attach", "con0", "--idle", "4"],
    )
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .spawn()
    .expect("vmsg starts");
    let mut stdin = attached.stdin.take().expect("piped");
    stdin.write_all(b"hello\nguest\n").expect("written");
    drop(stdin);
    let said = attached.wait_with_output().expect("it ends by itself");
    assert!(said.status.success());
    assert_eq!(text(&said.stdout), "HELLO\nGUEST\n");
    let con0 = console(folder, "con0");
    assert_eq!((&con0["input"], &con0["output"]), (&12.into(), &12.into()));
    let log = std::fs::read_to_string(folder.join("con0.log"));
    assert_eq!(log.expect("a log"), "HELLO\nGUEST\n");
}

#[test]
fn consoles_are_listed_and_logged() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let _serve = serve(folder);
    let listed = output(folder, &["console", "c.sock", "list"]);
    let listed = text(&listed.stdout);
    assert_eq!(listed.lines().count(), 4, "{listed}");
    for name in ["con0 ", "con1 ", "con1:agent", "c.sock.con1.agent.console"] {
        assert!(listed.contains(name), "{name}: {listed}");
    }
    let guest = Guest::start(folder, 0);
    let logged = output(folder, &["console", "c.sock", "log", "con0", "other.log"]);
    assert!(logged.status.success(), "{}", text(&logged.stderr));
    guest.say("one\n");
    guest.emergency(b'!');
    let file = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    until("its words in the log", || file("other.log") == "one\n!");
    assert_eq!(file("con0.log"), "");
    let off = output(folder, &["console", "c.sock", "log", "con0", "off"]);
    assert!(off.status.success());
    guest.say("two\n");
    until("its words", || console(folder, "con0")["output"] == 9);
    assert_eq!(file("other.log"), "one\n!");
    let nobody = output(folder, &["console", "c.sock", "log", "con7", "x.log"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("known: con0, con1, con1:agent"));
    let nowhere = output(folder, &["console", "c.sock", "attach", "con7"]);
    assert_eq!(nowhere.status.code(), Some(1));
}

#[test]
fn two_devices_cannot_be_one_console() {
    let folder = TempDir::new().expect("a folder");
    for (device, words) in [
        ("console,id=a,path=same", "same"),
        ("console,port=x/y", "port=x/y"),
        ("console,multiport=off,port=x", "multiport=off"),
    ] {
        let bus = "unix,path=b0.sock";
        let args = [
            "serve",
            "--bus",
            bus,
            "--device",
            "console,id=b,path=same",
            "--device",
            device,
        ];
        let refused = output(folder.path(), &args);
        assert!(!refused.status.success());
        assert!(
            text(&refused.stderr).contains(words),
            "{}",
            text(&refused.stderr)
        );
    }
}

#[test]
fn a_terminal_has_all_consoles_and_is_as_before_afterwards() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let _serve = serve(folder);
    let guest = Guest::start(folder, 0);
    guest.say("before\r\n");
    until("its words", || console(folder, "con0")["output"] == 8);
    let mut terminal = Terminal::new(100, 30);
    let modes = terminal.modes();
    terminal.run(&mut vmsg(folder, &["console", "c.sock"]));
    terminal.see("console 0 of 3");
    terminal.see("before");
    until("the window's size", || guest.size() == (100, 30));
    terminal.press(b"abc\n");
    terminal.see("ABC");
    terminal.resize(120, 40);
    until("the window's new size", || guest.size() == (120, 40));
    // Commands are not for the guest; the escape key twice is.
    terminal.press(b"\x1d?");
    terminal.see("n next");
    terminal.press(b"\x1dn");
    terminal.see("console 1 of 3");
    guest.say("meanwhile\r\n");
    // Until the mark is there.
    let due = Instant::now() + PATIENCE;
    loop {
        terminal.press(b"\x1dl");
        let list = terminal.see("2 con1:agent");
        if list.contains("* 0 con0") {
            break;
        }
        assert!(Instant::now() < due, "{list}");
    }
    terminal.press(b"\x1dp");
    terminal.see("console 0 of 3");
    terminal.see("meanwhile");
    terminal.press(b"\x1d7\x1d2");
    terminal.see("there is no console 7");
    terminal.see("console 2 of 3");
    terminal.press(b"\x1d0x\x1d\x1dy\n\x1dd");
    assert!(terminal.end().success());
    assert_eq!(terminal.modes(), modes);
    until("the last that was typed", || {
        guest.heard().ends_with("x\u{1d}y\n")
    });
}

#[test]
fn a_terminal_waits_for_a_host_that_was_killed() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let first = serve(folder);
    let mut terminal = Terminal::new(80, 25);
    let modes = terminal.modes();
    terminal.run(&mut vmsg(
        folder,
        &["console", "c.sock", "attach", "con0", "--read-only"],
    ));
    terminal.see("console 0 of 3 read-only");
    drop(first);
    terminal.see("gone; waiting for it");
    let _second = serve(folder);
    terminal.see("here again");
    let guest = Guest::start(folder, 0);
    guest.say("another guest\r\n");
    terminal.see("another guest");
    terminal.press(b"typed");
    // Ended from outside.
    terminal.terminate();
    assert!(terminal.end().success());
    assert_eq!(terminal.modes(), modes);
    assert_eq!(guest.heard(), "");
    assert_eq!(guest.size(), (0, 0));
}
