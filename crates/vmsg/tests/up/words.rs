// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is said and printed before anything is started.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::bench::{Lab, PATIENCE};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_wrong_description_is_wrong_usage_and_nothing_is_started() {
    let lab = Lab::new("[bus.b0]\nslot = 1\n[guest.vm1]\nqemu = \"./qemu\"\nkernel = \"gone\"\n");
    for words in [
        &["up", "lab.toml"][..],
        &["up", "lab.toml", "--check"],
        &["up", "lab.toml", "--print"],
    ] {
        let output = lab.output(words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("lab.toml:5:1: error: unknown key `slot`"),
            "{said}"
        );
        assert!(
            said.contains("lab.toml:8:10: error: there is no file gone"),
            "{said}"
        );
        assert!(output.stdout.is_empty() && !lab.folder.path().join("run").exists());
    }
    let output = lab.output(&["up", "none.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cannot read none.toml"));
    let output = lab.output(&["up", "lab.toml", "--set", "x"]);
    assert_eq!(output.status.code(), Some(2));
    let output = lab.output(&["up", "lab.toml", "--set", "X=1"]);
    assert!(text(&output.stderr).contains("there is no ${X} in it"));
}

#[test]
fn a_right_description_is_checked_without_a_word() {
    let lab = Lab::new("[bus.b0]\n[device.rng0]\ntype = \"rng\"\n[guest.vm1]\nqemu = \"${Q}\"\n");
    let output = lab.output(&["up", "lab.toml", "--check", "--set", "Q=./qemu"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
    let output = lab
        .vmsg(&["up", "lab.toml", "--check"])
        .env("Q", "./qemu")
        .output();
    assert!(output.expect("vmsg runs").status.success());
}

#[test]
fn what_is_printed_runs_in_a_shell() {
    let lab = Lab::new(
        "[bus.b0]\n[device.rng0]\ntype = \"rng\"\n[guest.vm1]\nqemu = \"./qemu\"\n\
         [program.first]\ncommand = [\"sh\", \"-c\", \"echo it\\\\'s up; exec sleep 1000\"]\nready = \"it's up\"\n",
    );
    let printed = lab.output(&["up", "lab.toml", "--print"]);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    // Here QEMU would listen for whoever wants to; the one that plays it comes to sockets instead.
    let script = text(&printed.stdout);
    assert!(script.contains("server=on,wait=off"), "{script}");
    let script = script
        .split("\n# vm1: ")
        .next()
        .expect("the first part")
        .to_owned();
    let script = format!("{script}\nread line\n");
    let mut shell = Command::new("sh")
        .args(["-c", &script])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("a shell");
    let all = AllOf(Pid::from_child(&shell));
    let due = Instant::now() + PATIENCE;
    let front = lab.folder.path().join("run/vm1.rng0.sock");
    while !front.exists() {
        assert!(Instant::now() < due, "the proxy listens");
        assert!(
            shell.try_wait().expect("it is ours").is_none(),
            "the shell waits"
        );
        std::thread::yield_now();
    }
    let listed = lab.output(&["ls", "--bus", "unix,path=run/b0.sock"]);
    assert!(
        text(&listed.stdout).contains("rng0"),
        "{}",
        text(&listed.stderr)
    );
    drop(all);
    shell.wait().expect("it ends");
}

/// A shell and all that it has started, which ends with this.
struct AllOf(Pid);

impl Drop for AllOf {
    fn drop(&mut self) {
        // Its number is its own until it was waited for.
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}
