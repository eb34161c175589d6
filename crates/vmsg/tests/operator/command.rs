// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg top` where there is no terminal.

use serde_json::Value;

use crate::process::{Serve, vmsg};
use crate::station::Station;

#[test]
fn top_tells_rates_of_ports_and_devices() {
    let serve = Serve::start(&[
        "--switch",
        "id=s0,allow=net0 > net1",
        "--device",
        "net,id=net0,bus=b0,switch=s0",
        "--device",
        "net,id=net1,bus=b1,switch=s0",
        "--device",
        "rng",
    ]);
    let mut one = Station::new(&serve, "b0", 0);
    let mut two = Station::new(&serve, "b1", 0);
    let control = serve.control();
    let control = control.to_str().expect("text");
    let (text, json) = std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let text = vmsg(&["top", control, "--once", "--queues", "--interval", "2"]);
            let json = vmsg(&["top", control, "--once", "--json", "--interval", "2"]);
            (text, json)
        });
        while !looks.is_finished() {
            let number = one.send(two.mac, 1000);
            two.wait_for(one.mac, number);
            two.send(one.mac, 60);
        }
        looks.join().expect("no panic")
    });
    let text = String::from_utf8(text.stdout).expect("text");
    for words in [
        "SWITCH",
        "s0",
        "net1",
        "station (",
        "rng0",
        "acl",
        "QUEUE",
        "transmit",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let port = json["ports"]
        .as_array()
        .expect("ports")
        .iter()
        .find(|port| port["port"] == "net1")
        .expect("a port");
    let rate = |value: &Value| value.as_f64().expect("a number");
    assert!(rate(&port["out"]["frames"]) > 1.0, "{port}");
    assert!(
        rate(&port["out"]["bits"]) > 8000.0 * rate(&port["out"]["frames"]) * 0.9,
        "{port}"
    );
    assert!(rate(&port["drops"]) > 0.0, "{port}");
    assert_eq!(port["reason"], "acl");
    let device = &json["devices"][0];
    assert_eq!(
        (&device["id"], &device["type"]),
        (&"net0".into(), &"net".into())
    );
    assert!(rate(&device["from-guest"]["frames"]) > 1.0, "{device}");
    let queue = &device["queues"][1];
    assert_eq!(queue["kind"], "transmit");
    assert_eq!(queue["frames"], device["from-guest"]["frames"]);
    // Its end is the end, where nobody can be told to wait.
    let gone = vmsg(&["top", "/nowhere/ctl", "--once"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("nobody answers"));
    let usage = vmsg(&["top", control, "--interval", "0"]);
    assert_eq!(usage.status.code(), Some(2));
}

/// Reads what the terminal shows until it has `words`.
fn read_until(terminal: &std::os::fd::OwnedFd, words: &str) -> String {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut text = Vec::new();
    let patience = Timespec::try_from(crate::process::PATIENCE).expect("short");
    loop {
        let so_far = String::from_utf8_lossy(&text);
        if so_far.contains(words) {
            return so_far.into_owned();
        }
        let mut fds = [PollFd::new(terminal, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&patience)).expect("it can be waited for");
        assert!(ready > 0, "no {words:?}: {so_far}");
        let mut bytes = [0; 4096];
        let count = rustix::io::read(terminal, &mut bytes).expect("somebody has it");
        text.extend_from_slice(&bytes[..count]);
    }
}

#[test]
fn a_terminal_is_as_it_was_when_top_has_ended() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
    let serve = Serve::start(&["--switch", "id=s0", "--device", "net,id=net0,switch=s0"]);
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags).expect("a terminal");
    grantpt(&terminal).expect("ours");
    unlockpt(&terminal).expect("ours");
    let side = ioctl_tiocgptpeer(&terminal, flags).expect("its other side");
    let size = Winsize {
        ws_row: 24,
        ws_col: 90,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal, size).expect("a size");
    let before = tcgetattr(&side).expect("it says");
    let copy = || side.try_clone().expect("a descriptor");
    let mut top = std::process::Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .arg("top")
        .arg(serve.control())
        .args(["--interval", "0.1"])
        .stdin(copy())
        .stdout(copy())
        .stderr(copy())
        .spawn()
        .expect("started");
    let text = read_until(&terminal, " s: 1 ports, 1 devices");
    assert!(text.starts_with("\x1b[?1049h"), "{text:?}");
    rustix::io::write(&terminal, b"\x1b[C").expect("typed");
    read_until(&terminal, "sorts by: name");
    // Nobody is there for a while.
    drop(serve);
    read_until(&terminal, "trying again");
    rustix::io::write(&terminal, b"q").expect("typed");
    let text = read_until(&terminal, "\x1b[?25h");
    assert!(
        text.contains("\x1b[?1049l") && text.contains("\x1b[?7h"),
        "{text:?}"
    );
    assert!(top.wait().expect("it ends").success());
    let after = tcgetattr(&side).expect("it says");
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
}
