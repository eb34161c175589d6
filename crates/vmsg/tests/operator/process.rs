// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve`, and the ways to its control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// Nothing takes so long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A running `vmsg serve` with the buses `b0` and `b1`.
pub(crate) struct Serve {
    child: Child,
    dir: tempfile::TempDir,
}

pub(crate) fn vmsg(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .args(args)
        .output()
        .expect("started")
}

impl Serve {
    /// With these arguments more.
    pub(crate) fn start(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command.arg("serve").current_dir(dir.path());
        for bus in ["b0", "b1"] {
            let path = dir.path().join(format!("{bus}.sock"));
            command
                .arg("--bus")
                .arg(format!("unix,path={}", path.display()));
        }
        let mut child = command
            .arg("--control")
            .arg(dir.path().join("ctl"))
            .args(more)
            .env("VMSG_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        for _ in 0..2 {
            let line = lines.next().expect("a line").expect("text");
            assert!(line.starts_with("ready"), "{line}");
        }
        Self { child, dir }
    }

    /// A file in its folder.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.file("ctl")
    }

    fn ctl_output(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .arg("ctl")
            .arg(self.control())
            .args(args)
            .output()
            .expect("started")
    }

    /// What `vmsg ctl` prints; it must succeed.
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let output = self.ctl_output(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// What `vmsg ctl` says when it is refused.
    pub(crate) fn refused(&self, args: &[&str]) -> String {
        let output = self.ctl_output(args);
        assert!(!output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.ctl(&args)).expect("JSON")
    }

    /// The port `id` of the only switch.
    pub(crate) fn port(&self, id: &str) -> Value {
        let switches = self.json(&["switches"]);
        let ports = switches[0]["ports"].as_array().expect("ports").clone();
        let mut ports = ports.into_iter();
        ports
            .find(|port| port["id"] == id)
            .unwrap_or_else(|| panic!("no port {id}"))
    }

    pub(crate) fn ask(&self) -> Client {
        Client::connect(&self.control())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the control socket.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("somebody is there");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(BufReader::new(stream))
    }

    /// The same connection, to send by while answers are read.
    pub(crate) fn sender(&self) -> Self {
        let stream = self.0.get_ref().try_clone();
        Self(BufReader::new(stream.expect("a descriptor")))
    }

    /// Sends a request without waiting for the answer.
    pub(crate) fn send(&mut self, request: &Value) {
        let line = format!("{request}\n");
        let stream = self.0.get_mut();
        stream.write_all(line.as_bytes()).expect("taken");
    }

    pub(crate) fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    }

    pub(crate) fn ask(&mut self, request: &Value) -> Value {
        self.send(request);
        self.answer()
    }
}
