// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a description comes up, lives through the death of its parts, and ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::bench::{Lab, PATIENCE, has_ended, watch};

/// A switch with two guests, and a program that the device host waits for.
const LAB: &str = "
[switch.s0]
allow = [\"* <> *\"]
[bus.b1]
[bus.b2]
[device.net1]
type = \"net\"
bus = \"b1\"
switch = \"s0\"
[device.net2]
type = \"net\"
bus = \"b2\"
switch = \"s0\"
[guest.vm1]
qemu = \"./qemu\"
bus = \"b1\"
restart = \"always\"
[guest.vm2]
qemu = \"./qemu\"
bus = \"b2\"
restart = \"always\"
[program.first]
command = [\"sh\", \"-c\", \"sleep 1000 & echo here I am with $!; wait\"]
ready = \"here I am\"
restart = \"always\"
";

fn kill(pid: Option<i32>) {
    let pid = pid.and_then(Pid::from_raw).expect("it runs");
    kill_process(pid, Signal::KILL).expect("it is ours");
}

#[test]
fn everything_comes_up_is_told_of_and_ends_in_reverse_order() {
    let lab = Lab::new(LAB);
    let mut up = lab.up();
    let names: Vec<String> = up.parts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        ["first", "serve", "vm1.proxy", "vm1", "vm2.proxy", "vm2"]
    );
    assert!(up.parts().iter().all(|(_, part)| part.state == "ready"));
    let listed = up.done(&["list"]);
    assert!(
        listed.contains("net1") && listed.contains("net2"),
        "{listed}"
    );
    let processes = up.processes();
    up.signal(Signal::INT);
    let status = up.wait();
    assert_eq!(status.code(), Some(0), "{}", up.said.join("\n"));
    for (name, process) in &processes {
        assert!(has_ended(process, Duration::ZERO), "{name} is left");
    }
    let stopped: Vec<&str> = up
        .said
        .iter()
        .filter(|line| line.contains("stopped"))
        .filter_map(|line| line.split("part=\"").nth(1)?.split('"').next())
        .collect();
    let at = |name: &str| {
        let at = stopped.iter().position(|other| *other == name);
        at.unwrap_or_else(|| panic!("{name} was not stopped: {stopped:?}"))
    };
    for (one, other) in [
        ("vm1", "vm1.proxy"),
        ("vm2.proxy", "serve"),
        ("serve", "first"),
    ] {
        assert!(at(one) < at(other), "{stopped:?}");
    }
    assert!(
        up.said
            .iter()
            .any(|line| line.starts_with("first | here I am"))
    );
    assert!(lab.read("run/logs/first.log").contains("here I am with "));
    assert!(lab.read("run/logs/serve.log").contains("ready bus="));
    // The guests' power buttons were pressed.
    assert!(lab.read("vm1.qmp").contains("system_powerdown"));
    // Of what was there while it ran, logs and the lock are left.
    let left = std::fs::read_dir(lab.folder.path().join("run")).expect("a folder");
    let left = left.map(|entry| entry.expect("an entry").path());
    let sockets = left.filter(|path| {
        let kind = path.symlink_metadata().expect("it is there").file_type();
        std::os::unix::fs::FileTypeExt::is_socket(&kind)
    });
    assert_eq!(sockets.collect::<Vec<_>>(), [] as [std::path::PathBuf; 0]);
}

#[test]
fn each_part_that_is_killed_comes_back() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    for name in ["vm1.proxy", "serve", "vm2", "first"] {
        let before = up.part(name);
        kill(before.pid);
        let after = up.until(name, |part| part.state == "ready" && part.pid != before.pid);
        assert_eq!(after.restarts, before.restarts + 1, "{name}");
    }
    // The others have not noticed.
    assert_eq!(up.part("vm1").restarts, 0);
    assert!(up.done(&["list"]).contains("net2"));
}

#[test]
fn nothing_is_left_when_up_itself_is_killed() {
    let lab = Lab::new(LAB);
    let mut up = lab.up();
    let mut processes = up.processes();
    assert_eq!(processes.len(), 6);
    // What a part has started is no process of `up`'s, and goes all the same.
    let said = up.expect(&["first | here I am with "]);
    let pid = said.rsplit(' ').next().and_then(|pid| pid.parse().ok());
    let pid = pid.and_then(Pid::from_raw).expect("a process");
    processes.push(("what first has started".to_owned(), watch(pid)));
    up.signal(Signal::KILL);
    up.wait();
    for (name, process) in &processes {
        assert!(has_ended(process, PATIENCE), "{name} is left");
    }
    // And it can be up again.
    let again = lab.up();
    assert_eq!(again.parts().len(), 6);
}

#[test]
fn a_description_is_up_once() {
    let lab = Lab::new("[program.p]\ncommand = [\"sleep\", \"1000\"]\n");
    let up = lab.up();
    let output = lab.output(&["up", "lab.toml"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    let pid = up.pid().as_raw_pid();
    assert!(
        said.contains(&format!("`lab` is up already: process {pid}")),
        "{said}"
    );
    assert_eq!(up.part("p").state, "ready");
}

#[test]
fn parts_are_stopped_started_and_started_anew_by_hand() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    up.done(&["stop-part", "vm1"]);
    assert_eq!(up.part("vm1").state, "stopped");
    assert!(
        up.refused(&["start-part", "vm2"])
            .contains("`vm2` is ready")
    );
    assert!(
        up.refused(&["stop-part", "vm3"])
            .contains("there is no part `vm3`; known: `first`")
    );
    up.done(&["start-part", "vm1"]);
    let before = up.part("vm1");
    assert_eq!(before.state, "ready");
    up.done(&["restart-part", "vm1"]);
    let after = up.part("vm1");
    assert!(after.state == "ready" && after.pid != before.pid);
}

#[test]
fn a_guest_that_ends_is_the_end_and_one_that_fails_a_failure() {
    let guest = "[guest.vm1]\nqemu = \"./qemu\"\n[program.p]\ncommand = [\"sleep\", \"1000\"]\n";
    for fails in [false, true] {
        let lab = Lab::new(guest);
        let mut up = lab.up();
        let part = up.part("vm1");
        if fails {
            kill(part.pid);
        } else {
            // The one that plays QEMU takes it for a machine that powers itself off.
            let pid = part.pid.and_then(Pid::from_raw).expect("it runs");
            kill_process(pid, Signal::USR1).expect("it is ours");
        }
        let code = up.wait().code();
        assert_eq!(code, Some(i32::from(fails)), "{}", up.said.join("\n"));
    }
}

#[test]
fn a_part_that_fails_before_it_was_ready_ends_everything() {
    for (part, words) in [
        (
            "[program.p]\ncommand = [\"sh\", \"-c\", \"exit 3\"]\nready = \"x\"\n",
            "exit status 3",
        ),
        ("[guest.vm1]\nqemu = \"./qemu\"\n", "exit status 7"),
    ] {
        let lab = Lab::new(&format!(
            "[program.q]\ncommand = [\"sleep\", \"1000\"]\n{part}"
        ));
        lab.write("vm1.obey", "broken");
        let (mut up, _out) = lab.start();
        let said = up.expect(&["has ended before it was ready"]);
        assert!(said.contains(words), "{said}");
        assert_eq!(up.wait().code(), Some(1));
        assert!(
            up.said
                .iter()
                .any(|line| line.contains("a part has failed for good"))
        );
    }
}

#[test]
fn pauses_between_attempts_grow() {
    let lab =
        Lab::new("[program.p]\ncommand = [\"sh\", \"-c\", \"exit 3\"]\nrestart = \"always\"\n");
    let mut up = lab.up();
    let pauses: Vec<String> = (0..4)
        .map(|_| {
            let line = up.expect(&["will be started again"]);
            line.split("pause=").nth(1).expect("a pause").to_owned()
        })
        .collect();
    assert_eq!(pauses, ["100ms", "200ms", "400ms", "800ms"]);
}

#[test]
fn a_second_interrupt_kills_what_does_not_want_to_end() {
    let lab = Lab::new(
        "[program.p]\ncommand = [\"sh\", \"-c\", \"trap '' TERM INT; sleep 1000 & echo here; wait; wait; sleep 1000\"]\nready = \"here\"\n",
    );
    let mut up = lab.up();
    let part = watch(up.part("p").pid.and_then(Pid::from_raw).expect("it runs"));
    up.signal(Signal::INT);
    up.expect(&["everything ends"]);
    assert!(!has_ended(&part, Duration::from_millis(300)));
    up.signal(Signal::INT);
    assert_eq!(up.wait().code(), Some(0));
    let waited = |line: &String| line.contains("does not end and is killed");
    assert!(!up.said.iter().any(waited), "{}", up.said.join("\n"));
    assert!(has_ended(&part, Duration::ZERO));
}

#[test]
fn a_guest_that_does_not_want_to_end_is_killed() {
    let lab = Lab::new("[guest.vm1]\nqemu = \"./qemu\"\nstop-timeout = 0\n");
    lab.write("vm1.obey", "stubborn");
    let mut up = lab.up();
    let part = watch(up.part("vm1").pid.and_then(Pid::from_raw).expect("it runs"));
    up.signal(Signal::TERM);
    assert_eq!(up.wait().code(), Some(0), "{}", up.said.join("\n"));
    assert!(has_ended(&part, Duration::ZERO));
    let commands = lab.read("vm1.qmp");
    let commands: Vec<&str> = commands.lines().skip(1).collect();
    assert_eq!(commands, ["system_powerdown null", "quit null"]);
    assert!(
        up.said
            .iter()
            .any(|line| line.contains("does not end and is killed"))
    );
}

/// Processor time that a process has used.
fn ticks(pid: Pid) -> u64 {
    let text =
        std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).expect("it runs");
    let (_, fields) = text.rsplit_once(") ").expect("its name is in brackets");
    let fields: Vec<&str> = fields.split(' ').collect();
    let number = |at: usize| fields[at].parse::<u64>().expect("a number");
    number(11) + number(12)
}

#[test]
fn somebody_who_cannot_be_let_in_waits_and_keeps_nobody_busy() {
    let lab = Lab::new("[guest.vm1]\nqemu = \"./qemu\"\n");
    let mut up = lab.up();
    let folder = lab.folder.path();
    let mut console = UnixStream::connect(folder.join("run/vm1.console")).expect("it listens");
    console.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut lines = BufReader::new(console.try_clone().expect("a descriptor")).lines();
    lines.next().expect("a line").expect("text");
    console.write_all(b"hello\n").expect("it is read");
    lines.next().expect("a line").expect("text");

    // No number is left for another descriptor.
    let pid = up.pid();
    let open = |number: &u64| {
        folder
            .join(format!("/proc/{}/fd/{number}", pid.as_raw_pid()))
            .is_symlink()
    };
    let free = (0..).find(|number| !open(number));
    let limit = |current| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum }).expect("it is ours")
    };
    let before = limit(free);
    let mut line = UnixStream::connect(folder.join("run/vm1.serial")).expect("it listens");
    up.expect(&["cannot let QEMU in"]);
    let (used, begun) = (ticks(pid), Instant::now());
    for _ in 0..2 {
        up.expect(&["cannot let QEMU in"]);
    }
    let (used, elapsed) = (ticks(pid) - used, begun.elapsed());
    assert!(
        elapsed > Duration::from_secs(1) && used < 40,
        "{used} in {elapsed:?}"
    );

    limit(before.current);
    line.write_all(b"here I am\n").expect("it is read");
    assert_eq!(
        lines.next().expect("a line").expect("text").trim(),
        "here I am"
    );
}

#[test]
fn a_serial_line_is_a_console() {
    let lab = Lab::new("[guest.vm1]\nqemu = \"./qemu\"\n");
    let up = lab.up();
    let mut console =
        UnixStream::connect(lab.folder.path().join("run/vm1.console")).expect("it listens");
    console.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut lines = BufReader::new(console.try_clone().expect("a descriptor")).lines();
    // What was said before anybody came, too.
    assert_eq!(
        lines.next().expect("a line").expect("text").trim(),
        "serial line of a guest"
    );
    console.write_all(b"hello\n").expect("it is read");
    assert_eq!(
        lines.next().expect("a line").expect("text").trim(),
        "echo hello"
    );
    assert!(
        lab.read("run/logs/vm1.serial.log")
            .contains("serial line of a guest")
    );
    let listed = lab.output(&["console", "run/control.sock", "list"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("vm1"));
    drop(up);
}
