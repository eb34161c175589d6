// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command `vmsg` as processes.
#![allow(dead_code, unreachable_pub, reason = "not everybody needs all of it")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// `vmsg` in a folder, with what it logs by default.
pub fn vmsg(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .current_dir(folder)
        .args(args)
        .stdin(Stdio::null())
        .env_remove("VMSG_LOG");
    command
}

/// Runs it to its end.
pub fn output(folder: &Path, args: &[&str]) -> Output {
    vmsg(folder, args).output().expect("vmsg runs")
}

/// A process that is killed when nobody needs it any more.
pub struct Running(pub Child);

impl Running {
    /// Starts one, and waits until it says that it is ready.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("started");
        let out = child.stdout.take().expect("piped");
        let running = Self(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("ready"), "{command:?}: {line:?}");
        running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
