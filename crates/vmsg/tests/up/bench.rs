// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A running `vmsg up`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;

use crate::qemu;

/// Nothing takes so long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// A folder with a description, `lab.toml`, and a script that is taken for QEMU.
pub(crate) struct Lab {
    pub(crate) folder: TempDir,
}

/// A description that is up. It is killed when this is dropped.
pub(crate) struct Up {
    child: Child,
    lines: Receiver<String>,
    /// What it has said on stderr so far.
    pub(crate) said: Vec<String>,
    control: PathBuf,
    folder: PathBuf,
}

/// A process as `parts` has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) state: String,
    pub(crate) pid: Option<i32>,
    pub(crate) restarts: u64,
}

impl Lab {
    pub(crate) fn new(description: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        qemu::install(folder.path());
        let lab = Self { folder };
        lab.write(
            "lab.toml",
            &format!("version = 1\n[host]\nruntime = \"run\"\n{description}"),
        );
        lab
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).expect("a file");
    }

    pub(crate) fn append(&self, name: &str, bytes: &[u8]) {
        let file = fs::File::options()
            .append(true)
            .open(self.folder.path().join(name));
        file.expect("it is there").write_all(bytes).expect("a file");
    }

    pub(crate) fn len(&self, name: &str) -> u64 {
        let found = fs::metadata(self.folder.path().join(name));
        found.expect("it is there").len()
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }

    pub(crate) fn vmsg(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command.args(words).current_dir(self.folder.path());
        command
    }

    /// Runs `vmsg` to its end.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        let output = self.vmsg(words).stdin(Stdio::null()).output();
        output.expect("vmsg runs")
    }

    /// `vmsg up`, whatever comes of it.
    pub(crate) fn start(&self) -> (Up, Receiver<String>) {
        let file = self.folder.path().join("lab.toml");
        let mut child = self
            .vmsg(&["up", &file.to_string_lossy()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmsg runs");
        let err = read_lines(child.stderr.take().expect("stderr is piped"));
        let out = read_lines(child.stdout.take().expect("stdout is piped"));
        let up = Up {
            child,
            lines: err,
            said: Vec::new(),
            control: self.folder.path().join("run/control.sock"),
            folder: self.folder.path().to_owned(),
        };
        (up, out)
    }

    /// `vmsg up`, until everything is ready.
    pub(crate) fn up(&self) -> Up {
        let (mut up, out) = self.start();
        match out.recv_timeout(PATIENCE) {
            Ok(line) => {
                // Wherever `up` was started.
                let control = self.folder.path().join("run/control.sock");
                assert_eq!(line, format!("ready control={}", control.display()));
            }
            Err(error) => {
                up.listen(Duration::from_millis(500));
                panic!("{error}\n{}", up.said.join("\n"));
            }
        }
        up
    }
}

fn read_lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (lines, received) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    received
}

impl Up {
    /// Takes in what comes on stderr until nothing has come for so long.
    pub(crate) fn listen(&mut self, quiet: Duration) {
        while let Ok(line) = self.lines.recv_timeout(quiet) {
            self.said.push(line);
        }
    }

    /// Waits for a line on stderr with all these words; lines before it are remembered.
    pub(crate) fn expect(&mut self, words: &[&str]) -> String {
        let due = Instant::now() + PATIENCE;
        loop {
            let left = due.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if words.iter().all(|word| line.contains(word)) {
                        return line;
                    }
                }
                Err(error) => panic!("{words:?}: {error}\n{}", self.said.join("\n")),
            }
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let pidfd = watch(self.pid());
        assert!(has_ended(&pidfd, PATIENCE), "{}", self.said.join("\n"));
        let status = self.child.wait().expect("it is ours");
        // It ends with its last line.
        self.listen(Duration::from_secs(10));
        status
    }

    /// `vmsg ctl`.
    pub(crate) fn ctl(&self, words: &[&str]) -> Output {
        let control = self.control.to_string_lossy().into_owned();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command.args(["ctl", &control]).args(words);
        command
            .current_dir(&self.folder)
            .output()
            .expect("vmsg runs")
    }

    /// The same, which must be done.
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let output = self.ctl(words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same, which must be refused; what is said.
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        let output = self.ctl(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub(crate) fn parts(&self) -> Vec<(String, Part)> {
        let text = self.done(&["parts", "--json"]);
        let parts: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        let part = |part: Value| {
            let pid = part["pid"].as_i64();
            let found = Part {
                state: part["state"].as_str().expect("a word").to_owned(),
                pid: pid.map(|pid| i32::try_from(pid).expect("a process")),
                restarts: part["restarts"].as_u64().expect("a number"),
            };
            (part["name"].as_str().expect("a word").to_owned(), found)
        };
        parts.into_iter().map(part).collect()
    }

    pub(crate) fn part(&self, name: &str) -> Part {
        let parts = self.parts();
        let found = parts.iter().find(|(other, _)| other == name);
        found
            .unwrap_or_else(|| panic!("no {name}: {parts:?}"))
            .1
            .clone()
    }

    /// Waits until `name` is as `is` wants it.
    pub(crate) fn until(&self, name: &str, is: impl Fn(&Part) -> bool) -> Part {
        let due = Instant::now() + PATIENCE;
        loop {
            let part = self.part(name);
            if is(&part) {
                return part;
            }
            assert!(Instant::now() < due, "{name}: {part:?}");
            // Each look takes a process; there is no event to wait for from outside.
            std::thread::yield_now();
        }
    }

    /// Descriptors of all processes, by which their end is seen.
    pub(crate) fn processes(&self) -> Vec<(String, OwnedFd)> {
        let running = self.parts().into_iter().filter_map(|(name, part)| {
            let pid = part.pid.and_then(Pid::from_raw)?;
            Some((name, watch(pid)))
        });
        running.collect()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // The kernel ends all that it has started.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn watch(pid: Pid) -> OwnedFd {
    pidfd_open(pid, PidfdFlags::empty()).expect("it runs")
}

pub(crate) fn has_ended(pidfd: &OwnedFd, within: Duration) -> bool {
    let timeout = Timespec::try_from(within).expect("short");
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("it can be watched") > 0
}
