// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A running process of a part.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::Context;
use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use super::log::Lines;

/// Bytes of output taken at once.
const CHUNK: usize = 16 << 10;

/// Chunks of one output taken in a turn, so that a part that never stops talking does not keep the others waiting.
const TURN: usize = 16;

/// A process and what it says.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pid: Pid,
    pidfd: OwnedFd,
    out: Option<Output<ChildStdout>>,
    err: Option<Output<ChildStderr>>,
    pub(super) began: Instant,
}

#[derive(Debug)]
struct Output<T> {
    stream: T,
    lines: Lines,
}

/// Which of its two outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Out,
    Err,
}

impl Process {
    /// Starts `argv` in `folder`, in a process group of its own, and so that the kernel sends it `death` when this thread
    /// ends: whoever starts parts must live as long as they do.
    pub(super) fn start(argv: &[String], folder: &Path, death: Signal) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("up-part")
            .args(["--parent", &std::process::id().to_string()])
            .args(["--signal", &death.as_raw().to_string(), "--"])
            .args(argv)
            .current_dir(folder)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start a process")?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("a process without an id")?;
        let out = child.stdout.take().expect("stdout is piped");
        let err = child.stderr.take().expect("stderr is piped");
        ioctl_fionbio(&out, true)?;
        ioctl_fionbio(&err, true)?;
        Ok(Self {
            child,
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).context("cannot watch a process")?,
            out: Some(Output::new(out)),
            err: Some(Output::new(err)),
            began: Instant::now(),
        })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Readable when the process has ended.
    pub(super) fn end(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Readable when it has said something.
    pub(super) fn outputs(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let out = self.out.as_ref().map(|out| out.stream.as_fd());
        let err = self.err.as_ref().map(|err| err.stream.as_fd());
        out.into_iter().chain(err)
    }

    /// Takes what it has said.
    pub(super) fn read(&mut self, mut take: impl FnMut(Stream, &[u8])) {
        if self
            .out
            .as_mut()
            .is_some_and(|out| !out.read(|line| take(Stream::Out, line)))
        {
            self.out = None;
        }
        if self
            .err
            .as_mut()
            .is_some_and(|err| !err.read(|line| take(Stream::Err, line)))
        {
            self.err = None;
        }
    }

    /// Takes its last words, which a line's end may be missing from. What it has started may hold its outputs for ever, so
    /// they are not waited for.
    pub(super) fn last_words(&mut self, mut take: impl FnMut(Stream, &[u8])) {
        self.read(&mut take);
        if let Some(mut out) = self.out.take() {
            out.lines.end(|line| take(Stream::Out, line));
        }
        if let Some(mut err) = self.err.take() {
            err.lines.end(|line| take(Stream::Err, line));
        }
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends a signal to the process alone.
    pub(super) fn signal(&self, signal: Signal) {
        // It may have ended.
        let _ = kill_process(self.pid, signal);
    }

    /// Sends a signal to all processes of its group: those that it has started, too. Only before its end was taken notice of,
    /// as its number is somebody else's afterwards.
    pub(super) fn signal_all(&self, signal: Signal) {
        let _ = kill_process_group(self.pid, signal);
    }
}

impl<T: Read> Output<T> {
    fn new(stream: T) -> Self {
        Self {
            stream,
            lines: Lines::default(),
        }
    }

    /// False when nothing more will come.
    fn read(&mut self, mut take: impl FnMut(&[u8])) -> bool {
        let mut chunk = [0; CHUNK];
        for _ in 0..TURN {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.lines.end(&mut take);
                    return false;
                }
                Ok(count) => self.lines.feed(&chunk[..count], &mut take),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}

/// How a process has ended, in words.
pub(super) fn how(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    let signal = match (status.code(), status.signal()) {
        (Some(code), _) => return format!("exit status {code}"),
        (None, Some(signal)) => signal,
        (None, None) => return status.to_string(),
    };
    let names = [
        (Signal::HUP, "SIGHUP"),
        (Signal::INT, "SIGINT"),
        (Signal::QUIT, "SIGQUIT"),
        (Signal::ILL, "SIGILL"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::BUS, "SIGBUS"),
        (Signal::FPE, "SIGFPE"),
        (Signal::KILL, "SIGKILL"),
        (Signal::SEGV, "SIGSEGV"),
        (Signal::PIPE, "SIGPIPE"),
        (Signal::TERM, "SIGTERM"),
        (Signal::SYS, "SIGSYS"),
    ];
    match names.iter().find(|(known, _)| known.as_raw() == signal) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("signal {signal}"),
    }
}
