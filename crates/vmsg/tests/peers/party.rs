// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The processes of a test: what they say is kept, waited for, and shown if the test fails.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long anything may take; who is slower is killed. Much more than it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// The network device's address in all tests.
pub(crate) const MAC: &str = "52:54:00:12:34:56";

/// The guest's memory: 16 MiB, the second half behind a hole.
const RAM: u64 = 16 << 20;
const LOW: &str = "0x800000";
const HOLE: &str = "0x40000000";

/// Message formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Revision {
    One,
    R1,
}

impl Revision {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::One => "1",
            Self::R1 => "r1",
        }
    }
}

/// Which side of the bus makes the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listens {
    Ours,
    Theirs,
}

/// Whether the programs in Python can run here. Without Python a test is left out, unless `VMSG_REQUIRE_TOOLS=1`.
pub(crate) fn python() -> bool {
    let probe = "import sys; sys.exit(sys.version_info < (3, 10))";
    let found = Command::new("python3")
        .args(["-c", probe])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let required = std::env::var("VMSG_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(
        found || !required,
        "python3, 3.10 or later, is required and missing"
    );
    if !found {
        eprintln!("skipped: there is no python3, 3.10 or later");
    }
    found
}

/// A folder with a bus in it and the memory of a guest.
pub(crate) struct Place {
    folder: TempDir,
    pub(crate) revision: Revision,
    /// Whether the second half of the memory lies behind a hole.
    hole: bool,
}

impl Place {
    pub(crate) fn new(revision: Revision) -> Self {
        let folder = TempDir::new().expect("a folder");
        let ram = File::create(folder.path().join("ram")).expect("a file");
        ram.set_len(RAM).expect("room for it");
        Self {
            folder,
            revision,
            hole: true,
        }
    }

    /// The same, with memory in one piece, of which nobody has made the file yet.
    pub(crate) fn without_memory(revision: Revision) -> Self {
        let place = Self {
            hole: false,
            ..Self::new(revision)
        };
        std::fs::remove_file(place.file("ram")).expect("a file");
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).expect("text")
    }

    /// The bus as our programs name it.
    pub(crate) fn bus(&self, listens: Listens) -> String {
        let folder = self.path().display();
        let revision = self.revision.name();
        let server = match listens {
            Listens::Ours => "on",
            Listens::Theirs => "off",
        };
        let memory = self.memory();
        format!("linux-user,dir={folder},server={server},{memory},revision={revision}")
    }

    /// The guest's memory as our programs are told of it.
    pub(crate) fn memory(&self) -> String {
        let hole = if self.hole {
            format!(",mem-low-size={LOW},mem-hole={HOLE}")
        } else {
            String::new()
        };
        format!(
            "ram={}/ram,mem-offset=0x40000000{hole}",
            self.path().display()
        )
    }

    /// `vmsg`, in this folder.
    pub(crate) fn program(&self) -> Command {
        vmsg(self.path())
    }

    /// Starts `vmsg serve` with a network device and an entropy device, and waits until it is ready.
    pub(crate) fn serve(&self, listens: Listens, net: &str) -> Party {
        self.serve_with(listens, net, &[])
    }

    /// The same, with more arguments.
    pub(crate) fn serve_with(&self, listens: Listens, net: &str, rest: &[&str]) -> Party {
        let net = format!("net,id=net0,mac={MAC},{net}");
        let bus = self.bus(listens);
        let args = ["serve", "--bus", &bus, "--device", &net, "--device", "rng"];
        let mut serve = Party::start("serve", vmsg(self.path()).args(args).args(rest));
        serve.expect("ready ");
        serve
    }

    /// Runs `vmsg` with a bus on which a peer listens, to its end.
    pub(crate) fn vmsg(&self, command: &str, rest: &[&str]) -> Output {
        let bus = self.bus(Listens::Theirs);
        self.vmsg_on(&bus, command, rest)
    }

    /// Runs `vmsg` to its end.
    pub(crate) fn vmsg_on(&self, bus: &str, command: &str, rest: &[&str]) -> Output {
        let mut run = vmsg(self.path());
        run.args([command, "--bus", bus]).args(rest);
        Party::start("vmsg", &mut run).output()
    }

    /// Sets the link of the network device of a `serve --control ctl`.
    pub(crate) fn set_link(&self, state: &str) {
        let mut run = vmsg(self.path());
        run.args(["ctl", "ctl", "link", "net0", state]);
        Party::start("ctl", &mut run).succeed();
    }

    /// Starts one of the programs in Python.
    pub(crate) fn python(&self, program: &str, listens: Listens, rest: &[&str]) -> Party {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/peers")
            .join(program);
        let mut command = Command::new("python3");
        command
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(script)
            .arg("--dir")
            .arg(self.path())
            .args(["--revision", self.revision.name()]);
        if self.hole {
            command.args(["--low", LOW, "--hole", HOLE]);
        }
        if listens == Listens::Theirs {
            command.arg("--listen");
        }
        command.args(rest);
        Party::start(program, &mut command)
    }
}

fn vmsg(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command.current_dir(folder).env_remove("VMSG_LOG");
    command
}

/// A running process; killed if a test leaves it behind.
pub(crate) struct Party {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    /// All of stdout and stderr, in the order of arrival.
    log: Arc<Mutex<String>>,
    out: String,
    stderr: Option<std::thread::JoinHandle<()>>,
}

impl Party {
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let stdout = child.stdout.take().expect("piped");
        let stderr = child.stderr.take().expect("piped");
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let seen = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                note(&seen, &line);
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let seen = Arc::clone(&log);
        let stderr = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                note(&seen, &line);
            }
        });
        Self {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            child,
            lines,
            log,
            out: String::new(),
            stderr: Some(stderr),
        }
    }

    /// Waits for a line of stdout that begins so; gives it.
    pub(crate) fn expect(&mut self, beginning: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(rest) {
                Ok(line) if line.starts_with(beginning) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{}: no line `{beginning}…` in {LIMIT:?}", self.name)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("{} ended without a line `{beginning}…`", self.name)
                }
            }
        }
    }

    /// Writes a line to its stdin.
    pub(crate) fn tell(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("piped");
        writeln!(stdin, "{line}").expect("it reads");
    }

    /// Kills it as the OOM killer does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("a child");
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        let deadline = Instant::now() + LIMIT;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(rest) {
                Ok(line) => {
                    self.out.push_str(&line);
                    self.out.push('\n');
                }
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    panic!("{} was killed: it took longer than {LIMIT:?}", self.name);
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Some(stderr) = self.stderr.take() {
            let _ = stderr.join();
        }
        self.child.wait().expect("a child")
    }

    /// Waits for an end without an error.
    pub(crate) fn succeed(&mut self) {
        let status = self.wait();
        assert!(status.success(), "{}: {status}", self.name);
    }

    /// Ends it as ^C does, and wants it to end well.
    pub(crate) fn end(&mut self) {
        assert!(self.is_running(), "{} has ended before", self.name);
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.expect("kill runs").success());
        self.succeed();
    }

    /// All that it said so far.
    pub(crate) fn log(&self) -> String {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits for its end; what it wrote to stderr stands in `stderr` together with stdout.
    fn output(mut self) -> Output {
        let status = self.wait();
        Output {
            status,
            stdout: std::mem::take(&mut self.out).into_bytes(),
            stderr: self.log().into_bytes(),
        }
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {} said:\n{}----", self.name, self.log());
        }
    }
}

fn note(log: &Mutex<String>, line: &str) {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    log.push_str(line);
    log.push('\n');
}

/// What a program printed.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}
