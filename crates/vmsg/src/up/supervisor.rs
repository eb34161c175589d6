// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the parts of a plan: starts each when those that it waits for are ready, starts again what has failed, ends all in
//! reverse order.
//!
//! One thread, which sleeps until something happens: a process says something or ends, a guest comes to its sockets, a moment has come,
//! somebody asks for something. It is the thread that starts all processes, since the kernel ends them with it.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::plan::{Kind, Part, Plan};
use super::status::{Ask, Inbox, Note, Reply, Shared};
use crate::signals::Interrupt;

mod guest;
mod supervised;

use supervised::Supervised;

/// How everything has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was told to, or all guests have ended by themselves.
    Done,
    /// A part has failed for good.
    Failed,
}

/// All parts.
#[derive(Debug)]
pub(super) struct Supervisor {
    folder: PathBuf,
    runtime: PathBuf,
    quiet: bool,
    parts: Vec<Supervised>,
    interrupt: Interrupt,
    /// Readable when there is something in `asks` or `notes`.
    wake: UnixStream,
    asks: mpsc::Receiver<(Ask, mpsc::Sender<Reply>)>,
    notes: mpsc::Receiver<Note>,
    shared: Shared,
    /// Everything is to end.
    stopping: bool,
    failed: bool,
    told_ready: bool,
}

/// What a poll was about.
#[derive(Clone, Copy, Debug)]
enum Source {
    Interrupt,
    Wake,
    Part(usize),
}

impl Supervisor {
    /// Nothing is started yet.
    pub(super) fn new(
        plan: &Plan,
        shared: Shared,
        inbox: Inbox,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        let interrupt = Interrupt::new()?;
        let Inbox { wake, asks, notes } = inbox;
        wake.set_nonblocking(true)?;
        let mut supervisor = Self {
            folder: plan.folder.clone(),
            runtime: plan.runtime.clone(),
            quiet,
            parts: Vec::new(),
            interrupt,
            wake,
            asks,
            notes,
            shared,
            stopping: false,
            failed: false,
            told_ready: false,
        };
        for part in &plan.parts {
            supervisor.add(part.clone())?;
        }
        Ok(supervisor)
    }

    fn add(&mut self, part: Part) -> anyhow::Result<()> {
        let logs = self.runtime.join("logs");
        let part = Supervised::new(part, &logs, self.quiet, &self.shared)?;
        self.parts.push(part);
        Ok(())
    }

    /// Runs everything to its end. `ready` is called once, when all parts are ready.
    pub(super) fn run(mut self, ready: impl FnOnce()) -> anyhow::Result<Outcome> {
        let mut ready = Some(ready);
        let result = loop {
            let now = Instant::now();
            self.advance(now);
            self.publish();
            if !self.told_ready && !self.stopping && self.parts.iter().all(Supervised::is_settled) {
                self.told_ready = true;
                if let Some(ready) = ready.take() {
                    ready();
                }
            }
            if self.stopping && self.parts.iter().all(Supervised::is_gone) {
                break Ok(());
            }
            if let Err(error) = self.wait(now) {
                break Err(error);
            }
        };
        for part in &mut self.parts {
            part.kill();
        }
        self.publish();
        result?;
        Ok(if self.failed {
            Outcome::Failed
        } else {
            Outcome::Done
        })
    }

    /// Does what can be done now.
    fn advance(&mut self, now: Instant) {
        // A part may be ready as soon as it is started, and others have waited for just that.
        while !self.stopping && self.start_those_that_can(now) {}
        for part in &mut self.parts {
            part.tick(now);
        }
        self.look_for_the_end();
        if self.stopping {
            self.stop_in_order(now);
        }
    }

    /// Starts each part whose others are ready; true if there was one.
    fn start_those_that_can(&mut self, now: Instant) -> bool {
        let waiting = |part: &Supervised| !part.has_been_ready();
        let waiting = self.parts.iter().filter(|part| waiting(part));
        let waiting: Vec<String> = waiting.map(|part| part.name().to_owned()).collect();
        let mut started = false;
        for part in &mut self.parts {
            if part.may_start(now) && !part.after().iter().any(|name| waiting.contains(name)) {
                part.start(&self.folder, &self.shared);
                started = true;
            }
        }
        started
    }

    /// Whether everything is to end: a part that others need has failed for good, or no guest is left.
    fn look_for_the_end(&mut self) {
        for part in &mut self.parts {
            if part.take_failure() {
                self.failed = true;
                if !self.stopping && (!part.is_guest() || !part.has_been_ready()) {
                    tracing::error!(
                        part = part.name(),
                        "everything ends, as it has failed for good"
                    );
                    self.stopping = true;
                }
            }
        }
        let mut guests = self.parts.iter().filter(|part| part.is_guest()).peekable();
        if guests.peek().is_some() && guests.all(Supervised::has_ended) && !self.stopping {
            tracing::info!("all guests have ended");
            self.stopping = true;
        }
    }

    /// Ends each part when those are gone that need it.
    fn stop_in_order(&mut self, now: Instant) {
        let needed: Vec<String> = self
            .parts
            .iter()
            .filter(|part| !part.is_gone())
            .flat_map(|part| part.after().iter().cloned())
            .collect();
        for part in &mut self.parts {
            if !needed.iter().any(|name| name == part.name()) {
                part.stop(now, false);
            } else {
                part.forget_restart();
            }
        }
    }

    fn publish(&self) {
        let parts = self.parts.iter().map(Supervised::status).collect();
        self.shared.publish(parts, self.stopping);
    }

    /// Sleeps until something happens, and takes it in.
    fn wait(&mut self, now: Instant) -> anyhow::Result<()> {
        let due = self.parts.iter().filter_map(Supervised::due).min();
        let left = due.map(|due| due.saturating_duration_since(now));
        let timeout =
            left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        let ready: Vec<Source> = {
            let mut fds: Vec<(Source, BorrowedFd<'_>)> = vec![
                (Source::Interrupt, self.interrupt.as_fd()),
                (Source::Wake, self.wake.as_fd()),
            ];
            for (at, part) in self.parts.iter().enumerate() {
                fds.extend(part.fds().into_iter().map(|fd| (Source::Part(at), fd)));
            }
            let mut polled: Vec<PollFd<'_>> = fds
                .iter()
                .map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
                .collect();
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            let happened = polled.iter().map(|fd| !fd.revents().is_empty());
            let sources = fds.iter().zip(happened);
            sources
                .filter(|(_, happened)| *happened)
                .map(|((source, _), _)| *source)
                .collect()
        };
        let mut last = None;
        for source in ready {
            match source {
                Source::Interrupt => self.interrupted()?,
                Source::Wake => self.woken(),
                // Once, whichever of its descriptors it was.
                Source::Part(at) if last == Some(at) => {}
                Source::Part(at) => {
                    last = Some(at);
                    self.parts[at].take_in(&self.shared);
                }
            }
        }
        Ok(())
    }

    fn interrupted(&mut self) -> anyhow::Result<()> {
        self.interrupt.take()?;
        if self.stopping {
            tracing::warn!("everything is killed");
            for part in &mut self.parts {
                part.kill();
            }
        } else {
            tracing::info!("everything ends");
            self.stopping = true;
        }
        Ok(())
    }

    fn woken(&mut self) {
        use std::io::Read;
        let mut bytes = [0; 64];
        // What matters is in the queues.
        while (&self.wake).read(&mut bytes).is_ok_and(|count| count > 0) {}
        while let Ok(note) = self.notes.try_recv() {
            if let Some(part) = self.parts.iter_mut().find(|part| part.name() == note.part) {
                part.qmp_said(&note);
            }
        }
        while let Ok((ask, answer)) = self.asks.try_recv() {
            let reply = self.asked(ask);
            // Published first, so that who asked sees what came of it.
            self.publish();
            // Who asked may be gone.
            let _ = answer.send(reply);
        }
    }

    fn asked(&mut self, ask: Ask) -> Reply {
        if self.stopping {
            return Err("everything is ending".to_owned());
        }
        let now = Instant::now();
        match ask {
            Ask::Add(part) => {
                if self.parts.iter().any(|other| other.name() == part.name) {
                    return Err(format!("there is a part `{}` already", part.name));
                }
                self.add(*part).map_err(|error| format!("{error:#}"))
            }
            Ask::Start(name) => self.part(&name)?.start_again(),
            Ask::Stop(name) => {
                self.part(&name)?.stop(now, true);
                Ok(())
            }
            Ask::Restart(name) => {
                self.part(&name)?.restart(now);
                Ok(())
            }
            Ask::Kill(name) => {
                self.part(&name)?.kill();
                Ok(())
            }
            Ask::Remove(name) => {
                if !self.part(&name)?.is_gone() {
                    return Err(format!("`{name}` has not ended"));
                }
                self.parts.retain(|part| part.name() != name);
                Ok(())
            }
            Ask::SetArgv(name, argv) => {
                self.part(&name)?.set_argv(argv);
                Ok(())
            }
        }
    }

    fn part(&mut self, name: &str) -> Result<&mut Supervised, String> {
        let known: Vec<String> = self
            .parts
            .iter()
            .map(|part| part.name().to_owned())
            .collect();
        let found = self.parts.iter_mut().find(|part| part.name() == name);
        found.ok_or_else(|| format!("there is no part `{name}`; known: `{}`", known.join("`, `")))
    }
}

/// The signal that a part gets when this process is killed: the device host has something to put in order then.
fn death_signal(kind: &Kind) -> rustix::process::Signal {
    match kind {
        Kind::Serve => rustix::process::Signal::TERM,
        _ => rustix::process::Signal::KILL,
    }
}

/// The log folder of a runtime folder.
fn log_of(logs: &Path, name: &str) -> super::log::Log {
    super::log::Log::open(logs, name)
}
