// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command as processes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn vmsg(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .args(words)
        .stdin(Stdio::null())
        .env("VMSG_LOG", "error");
    command
}

/// One that runs until it is ended; killed if a test leaves it behind.
pub(crate) struct Program(Child);

impl Program {
    /// Starts it, and waits until it has said `ready` so many times.
    pub(crate) fn start(words: &[&str], ready: usize) -> Self {
        let mut child = vmsg(words).stdout(Stdio::piped()).spawn().expect("vmsg");
        let out = child.stdout.take().expect("piped");
        let program = Self(child);
        let mut lines = BufReader::new(out).lines();
        for _ in 0..ready {
            let line = lines.next().expect("a line").expect("text");
            assert!(line.starts_with("ready"), "{words:?}: {line}");
        }
        // What it says later goes nowhere.
        std::thread::spawn(move || lines.for_each(drop));
        program
    }

    /// Starts it, and waits until it has said that.
    pub(crate) fn saying(words: &[&str], what: &str) -> Self {
        let mut child = vmsg(words).stdout(Stdio::piped()).spawn().expect("vmsg");
        let out = child.stdout.take().expect("piped");
        let program = Self(child);
        let mut lines = BufReader::new(out).lines();
        let said = lines.by_ref().map_while(Result::ok);
        assert!(
            said.into_iter().any(|line| line.contains(what)),
            "{words:?}"
        );
        std::thread::spawn(move || lines.for_each(drop));
        program
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }

    /// SIGTERM, with which it must end well.
    #[track_caller]
    pub(crate) fn end(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("a child");
        let status = self.0.wait().expect("reaped");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it to its end.
pub(crate) fn output(words: &[&str]) -> Output {
    vmsg(words).output().expect("vmsg")
}

/// What it prints; it must end well.
#[track_caller]
pub(crate) fn text(words: &[&str]) -> String {
    let output = output(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}
