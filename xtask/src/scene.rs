// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A run: a folder, the processes started in it, and what they say.
//!
//! What every process writes is read line by line; all lines arrive, with the ends of the processes, in one channel,
//! and waiting for something is waiting on that channel with a deadline. Nothing here sleeps. Standard output is also
//! kept in `NAME.log`, standard error in `NAME.err`. All processes are killed when the run is dropped, those that they
//! started too, and by the kernel if this program dies without that.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, kill_process, waitid};

use crate::kit::in_path;
use crate::namespace::Namespace;

/// How many of a process's last lines an error shows.
const TAIL: usize = 25;
/// How long the last lines of a process that has ended are waited for. Its outputs end with it, unless a process that
/// it started holds them.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Longest time from a signal to the end of the process.
const STOP: Duration = Duration::from_secs(20);

/// A process of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id(usize);

/// One run.
#[derive(Debug)]
pub(crate) struct Scene {
    dir: PathBuf,
    started: Instant,
    processes: Vec<Process>,
    namespace: Option<Namespace>,
    events: Receiver<Event>,
    sender: Sender<Event>,
}

#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// Standard output and standard error, by [`Stream`].
    streams: [Output; 2],
    /// When it ended.
    gone: Option<Instant>,
    /// The run cannot go on without it: its end is an error wherever one waits.
    needed: bool,
}

/// One of the two things a process writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

#[derive(Debug, Default)]
struct Output {
    lines: Vec<Line>,
    /// The first line that `expect` has not looked at.
    cursor: usize,
    ended: bool,
}

/// A line of output.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// The text, without its end.
    pub(crate) text: String,
    /// When it was read, since the start of the run.
    pub(crate) at: Duration,
}

#[derive(Debug)]
enum Event {
    Line(Id, Stream, String, Instant),
    End(Id, Stream),
    Gone(Id, Instant),
}

impl Process {
    /// It has ended, and what it said has been read.
    fn ended(&self) -> bool {
        self.gone
            .is_some_and(|at| self.streams.iter().all(|s| s.ended) || at.elapsed() >= LAST_WORDS)
    }

    /// When it will count as ended, should its outputs stay open.
    fn ends(&self) -> Option<Instant> {
        self.gone
            .filter(|_| !self.ended())
            .map(|at| at + LAST_WORDS)
    }
}

impl Scene {
    /// A run in `dir`.
    pub(crate) fn new(dir: PathBuf) -> Self {
        let (sender, events) = channel();
        Self {
            dir,
            started: Instant::now(),
            processes: Vec::new(),
            namespace: None,
            events,
            sender,
        }
    }

    /// The folder of the run, in which its processes are started: socket names are relative to it, since a socket's
    /// path may not be longer than 107 bytes.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The time since the run began.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// What is started from now on runs in this network namespace.
    pub(crate) fn enter(&mut self, namespace: Namespace) {
        self.namespace = Some(namespace);
    }

    /// Starts `command` in the run's folder. Its name must be new in this run.
    pub(crate) fn start(&mut self, name: &str, command: &Command) -> Result<Id> {
        if self.processes.iter().any(|p| p.name == name) {
            bail!("{name} was started already in this run");
        }
        let inside = self.namespace.as_ref().map(|n| n.enter(command));
        let command = inside.as_ref().unwrap_or(command);
        let program = command.get_program();
        let shown = std::iter::once(program)
            .chain(command.get_args())
            .map(|a| quote(&a.to_string_lossy()))
            .collect::<Vec<_>>()
            .join(" ");
        let mut commands = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("commands.sh"))?;
        writeln!(commands, "# {name}\n{shown}")?;
        let mut leashed = leash(command);
        leashed
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = leashed
            .spawn()
            .with_context(|| format!("cannot start {}", program.to_string_lossy()))?;
        let id = Id(self.processes.len());
        let out = child.stdout.take().expect("stdout is piped");
        let err = child.stderr.take().expect("stderr is piped");
        let pid = pid_of(&child)?;
        self.processes.push(Process {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            child,
            streams: Default::default(),
            gone: None,
            needed: true,
        });
        self.read(id, Stream::Out, name, out)?;
        self.read(id, Stream::Err, name, err)?;
        let sender = self.sender.clone();
        thread::spawn(move || {
            // Leaves the process to be waited for. Fails when that has happened, and then nobody listens.
            let _ = waitid(
                WaitId::Pid(pid),
                WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
            );
            let _ = sender.send(Event::Gone(id, Instant::now()));
        });
        Ok(id)
    }

    /// Starts reading one of a process's outputs.
    fn read(
        &self,
        id: Id,
        stream: Stream,
        name: &str,
        from: impl Read + Send + 'static,
    ) -> Result<()> {
        let suffix = match stream {
            Stream::Out => "log",
            Stream::Err => "err",
        };
        let log = File::create(self.dir.join(format!("{name}.{suffix}")))?;
        let sender = self.sender.clone();
        thread::spawn(move || read_lines(id, stream, BufReader::new(from), log, &sender));
        Ok(())
    }

    /// Waits for a line of `id` for which `pick` gives something; earlier lines are passed over for good.
    ///
    /// # Errors
    /// Nothing by the deadline, or the end of a process that the run needs.
    pub(crate) fn expect<T>(
        &mut self,
        (id, stream): (Id, Stream),
        what: &str,
        within: Duration,
        pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let mut cursor = self.processes[id.0].streams[stream as usize].cursor;
        let found = self.expect_from((id, stream), &mut cursor, what, within, pick);
        self.processes[id.0].streams[stream as usize].cursor = cursor;
        found
    }

    /// The same for one of several who read the same output: `cursor` is the number of the first line that this one
    /// has not looked at.
    pub(crate) fn expect_from<T>(
        &mut self,
        (id, stream): (Id, Stream),
        cursor: &mut usize,
        what: &str,
        within: Duration,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let output = &self.processes[id.0].streams[stream as usize];
            while let Some(line) = output.lines.get(*cursor) {
                *cursor += 1;
                if let Some(found) = pick(line) {
                    return Ok(found);
                }
                if line.text.contains("Kernel panic") {
                    return Err(self.trouble(
                        id,
                        &format!("the guest's kernel panicked while waiting for {what}"),
                    ));
                }
            }
            if self.processes[id.0].ended() {
                return Err(self.trouble(id, &format!("it ended before {what}")));
            }
            if let Some(other) = self.processes.iter().position(|p| p.ended() && p.needed) {
                return Err(self.trouble(Id(other), &format!("it ended while waiting for {what}")));
            }
            if !self.pump(deadline) {
                return Err(self.trouble(
                    id,
                    &format!("{} s have passed without {what}", within.as_secs()),
                ));
            }
        }
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait_end(&mut self, id: Id, within: Duration) -> Result<ExitStatus> {
        self.processes[id.0].needed = false;
        let deadline = Instant::now() + within;
        while !self.processes[id.0].ended() {
            if !self.pump(deadline) {
                return Err(
                    self.trouble(id, &format!("still running after {} s", within.as_secs()))
                );
            }
        }
        Ok(self.processes[id.0].child.wait()?)
    }

    /// Ends the process with `signal` and waits until it is gone. A process that has ended before is an error: it
    /// was not this signal that ended it.
    pub(crate) fn kill(&mut self, id: Id, signal: Signal) -> Result<()> {
        let process = &mut self.processes[id.0];
        if let Some(status) = process.child.try_wait()? {
            return Err(self.trouble(id, &format!("it ended by itself ({status})")));
        }
        process.needed = false;
        kill_process(pid_of(&process.child)?, signal)
            .with_context(|| format!("cannot signal {}", process.name))?;
        let deadline = Instant::now() + STOP;
        // Its last words may come later: what it has started can hold its outputs.
        while self.processes[id.0].gone.is_none() {
            if !self.pump(deadline) {
                return Err(self.trouble(
                    id,
                    &format!("it has not ended {} s after the signal", STOP.as_secs()),
                ));
            }
        }
        let status = self.processes[id.0].child.wait()?;
        if signal == Signal::KILL && status.signal() != Some(Signal::KILL.as_raw()) {
            bail!(
                "{} ended with {status} instead of by the signal",
                self.processes[id.0].name
            );
        }
        Ok(())
    }

    /// Sends a signal and does not wait for what comes of it.
    pub(crate) fn signal(&self, id: Id, signal: Signal) -> Result<()> {
        let process = &self.processes[id.0];
        kill_process(pid_of(&process.child)?, signal)
            .with_context(|| format!("cannot signal {}", process.name))
    }

    /// The process may end from now on without ending the run.
    pub(crate) fn may_end(&mut self, id: Id) {
        self.processes[id.0].needed = false;
    }

    /// Writes a line to the process's standard input (a guest's console).
    pub(crate) fn tell(&mut self, id: Id, line: &str) -> Result<()> {
        let process = &mut self.processes[id.0];
        let stdin = process.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| stdin.flush())
            .with_context(|| format!("cannot write to {}", process.name))
    }

    /// All lines read so far of one of a process's outputs.
    pub(crate) fn lines(&self, id: Id, stream: Stream) -> &[Line] {
        &self.processes[id.0].streams[stream as usize].lines
    }

    /// The process's id in the system.
    pub(crate) fn pid(&self, id: Id) -> u32 {
        self.processes[id.0].child.id()
    }

    /// An error about a process, with the last it said.
    fn trouble(&mut self, id: Id, what: &str) -> anyhow::Error {
        let process = &mut self.processes[id.0];
        let status = match process.child.try_wait() {
            Ok(Some(status)) => format!(" ({status})"),
            _ => String::new(),
        };
        let name = &process.name;
        let mut text = format!("{name}: {what}{status}");
        append_tail(
            &mut text,
            &format!("{name}.log"),
            &process.streams[Stream::Out as usize].lines,
        );
        for process in &self.processes {
            let lines = &process.streams[Stream::Err as usize].lines;
            append_tail(&mut text, &format!("{}.err", process.name), lines);
        }
        anyhow!(text)
    }

    /// Takes in one event, or lets a process count as ended; false if neither happened by the deadline.
    fn pump(&mut self, deadline: Instant) -> bool {
        let end = self.processes.iter().filter_map(Process::ends).min();
        let until = end.map_or(deadline, |end| end.min(deadline));
        match self
            .events
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            Ok(Event::Line(id, stream, text, at)) => {
                let at = at.saturating_duration_since(self.started);
                self.processes[id.0].streams[stream as usize]
                    .lines
                    .push(Line { text, at });
            }
            Ok(Event::End(id, stream)) => {
                self.processes[id.0].streams[stream as usize].ended = true
            }
            Ok(Event::Gone(id, at)) => self.processes[id.0].gone = Some(at),
            Err(RecvTimeoutError::Timeout) => return until < deadline,
            Err(RecvTimeoutError::Disconnected) => unreachable!("the run holds a sender"),
        }
        true
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // Fails only if it has ended already.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
        // What they have started, and left to itself, lives in the run's folder.
        for pid in processes_in(&self.dir) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The processes whose working folder is `dir`.
fn processes_in(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    pids.filter(|pid| {
        let cwd = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero()));
        *pid != getpid() && cwd.is_ok_and(|cwd| cwd == dir)
    })
    .collect()
}

fn pid_of(child: &Child) -> Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("a process without an id")
}

/// The same command under `setpriv`, which asks the kernel to kill it when the thread that starts it ends. A
/// machine without that program loses only this second net.
fn leash(command: &Command) -> Command {
    let mut leashed = match in_path("setpriv") {
        Some(setpriv) => {
            let mut leashed = Command::new(setpriv);
            leashed
                .args(["--pdeathsig", "KILL", "--"])
                .arg(command.get_program());
            leashed
        }
        None => Command::new(command.get_program()),
    };
    leashed.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => leashed.env(name, value),
            None => leashed.env_remove(name),
        };
    }
    leashed
}

fn read_lines(
    id: Id,
    stream: Stream,
    mut from: impl BufRead,
    mut log: File,
    events: &Sender<Event>,
) {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match from.read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(_) => {
                let at = Instant::now();
                // A log on a full disk must not stop the run.
                let _ = log.write_all(&bytes);
                let text = String::from_utf8_lossy(&bytes)
                    .trim_end_matches(['\r', '\n'])
                    .to_owned();
                if events.send(Event::Line(id, stream, text, at)).is_err() {
                    break;
                }
            }
        }
    }
    let _ = events.send(Event::End(id, stream));
}

fn append_tail(text: &mut String, file: &str, lines: &[Line]) {
    if !lines.is_empty() {
        text.push_str(&format!("\n  -- {file} ends with --"));
        for line in &lines[lines.len().saturating_sub(TAIL)..] {
            text.push_str("\n  ");
            text.push_str(&line.text);
        }
    }
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
#[path = "scene_test.rs"]
mod tests;
