// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One part: its process, when that is started again, and how it is ended.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::super::description::{Restart, StopBy};
use super::super::log::{self, Log};
use super::super::plan::{Kind, Part, Ready};
use super::super::process::{Process, Stream, how};
use super::super::status::{Note, PartStatus, Shared, State};
use super::guest::Guest;
use super::{death_signal, log_of};

/// The first pause before a part is started again; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A part that was ready for so long is well: pauses begin anew.
const HEALTHY: Duration = Duration::from_secs(60);

/// How long a part may take to be ready.
const READY: Duration = Duration::from_secs(60);

/// How long a part may take to end after a polite word.
const POLITE: Duration = Duration::from_secs(5);

/// How a part is being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its power button was pressed.
    PowerDown,
    /// QEMU was told to end.
    Quit,
    Terminate,
    Kill,
}

/// A part of a running description.
#[derive(Debug)]
pub(super) struct Supervised {
    part: Part,
    log: Log,
    quiet: bool,
    state: State,
    process: Option<Process>,
    /// Lines that the process has printed of those that make it ready.
    seen: usize,
    ready_since: Option<Instant>,
    has_been_ready: bool,
    starts: u64,
    pause: Duration,
    /// While pausing: when it is over.
    resume: Option<Instant>,
    /// While ending: how, and until when.
    stage: Option<(Stage, Instant)>,
    /// Somebody has ended it on purpose: `true` to start it again then.
    stopped: Option<bool>,
    note: Option<String>,
    /// It has just failed for good.
    failure: bool,
    guest: Option<Guest>,
}

impl Supervised {
    pub(super) fn new(
        part: Part,
        logs: &Path,
        quiet: bool,
        shared: &Shared,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            log: log_of(logs, &part.name),
            guest: Guest::new(&part, logs, shared)?,
            part,
            quiet,
            state: State::Waiting,
            process: None,
            seen: 0,
            ready_since: None,
            has_been_ready: false,
            starts: 0,
            pause: FIRST_PAUSE,
            resume: None,
            stage: None,
            stopped: None,
            note: None,
            failure: false,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.part.name
    }

    pub(super) fn after(&self) -> &[String] {
        &self.part.after
    }

    pub(super) fn is_guest(&self) -> bool {
        matches!(self.part.kind, Kind::Guest(_))
    }

    pub(super) fn has_been_ready(&self) -> bool {
        self.has_been_ready
    }

    /// It is ready, or over in a way that nobody has to wait for.
    pub(super) fn is_settled(&self) -> bool {
        self.state == State::Ready || self.state.is_over()
    }

    /// No process, and none to come unless somebody asks for it.
    pub(super) fn is_gone(&self) -> bool {
        self.process.is_none() && !matches!(self.state, State::Pausing)
    }

    /// It has ended by itself, for good.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended | State::Failed)
    }

    pub(super) fn take_failure(&mut self) -> bool {
        std::mem::take(&mut self.failure)
    }

    pub(super) fn status(&self) -> PartStatus {
        let qmp = self.guest.as_ref().and_then(|guest| guest.qmp.as_ref());
        PartStatus {
            name: self.part.name.clone(),
            kind: self.part.kind.name(),
            state: self.state,
            pid: self.process.as_ref().map(Process::pid),
            restarts: self.starts.saturating_sub(1),
            since: self.process.as_ref().map(|process| process.began),
            log: self.log.path().to_owned(),
            note: self.note.clone(),
            qmp: qmp
                .filter(|_| self.state == State::Ready)
                .map(|(_, qmp)| qmp.clone()),
        }
    }

    /// Descriptors to be watched.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = self.guest.as_ref().map(Guest::fds).unwrap_or_default();
        if let Some(process) = &self.process {
            fds.push(process.end());
            fds.extend(process.outputs());
        }
        fds
    }

    /// When something is to be done even if nothing happens.
    pub(super) fn due(&self) -> Option<Instant> {
        let ready = match (self.state, &self.process) {
            (State::Starting, Some(process)) => Some(process.began + READY),
            _ => None,
        };
        let stage = self.stage.map(|(_, until)| until);
        let guest = self.guest.as_ref().and_then(Guest::due);
        [ready, stage, self.resume, guest]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether it should run and does not.
    pub(super) fn may_start(&self, now: Instant) -> bool {
        match self.state {
            State::Waiting => true,
            State::Pausing => self.resume.is_none_or(|resume| resume <= now),
            _ => false,
        }
    }

    pub(super) fn start(&mut self, folder: &Path, shared: &Shared) {
        self.resume = None;
        self.seen = 0;
        self.ready_since = None;
        self.starts += 1;
        if let Some(guest) = &mut self.guest {
            guest.qmp = None;
            // Connections of a QEMU that is gone.
            guest.take_in(&self.part.name, shared);
            guest.qmp = None;
        }
        let line = format!("--- {}\n", self.part.argv.join(" "));
        self.log.write(line.as_bytes());
        match Process::start(&self.part.argv, folder, death_signal(&self.part.kind)) {
            Ok(process) => {
                tracing::debug!(part = self.part.name, pid = process.pid(), "started");
                let polite = matches!(self.part.kind, Kind::Serve);
                shared.guard.add(process.pid(), polite);
                self.process = Some(process);
                self.state = State::Starting;
                if self.part.ready == Ready::Started {
                    self.is_ready();
                }
            }
            Err(error) => {
                self.say(format!("cannot be started: {error:#}"));
                self.end_of(false);
            }
        }
    }

    fn is_ready(&mut self) {
        if self.state == State::Starting {
            self.state = State::Ready;
            self.ready_since = Some(Instant::now());
            self.has_been_ready = true;
            tracing::debug!(part = self.part.name, "ready");
        }
    }

    /// Something about it that is worth knowing.
    fn say(&mut self, what: String) {
        tracing::warn!(part = self.part.name, "{what}");
        self.note = Some(what);
    }

    /// Takes in what its descriptors have.
    pub(super) fn take_in(&mut self, shared: &Shared) {
        if let Some(guest) = &mut self.guest {
            guest.take_in(&self.part.name, shared);
        }
        self.read(false);
        self.look_for_end(shared);
    }

    /// Reads what the process says.
    fn read(&mut self, last: bool) {
        let Self {
            process: Some(process),
            part,
            log,
            seen,
            quiet,
            ..
        } = self
        else {
            return;
        };
        let take = |stream: Stream, line: &[u8]| {
            let matches = match &part.ready {
                Ready::Lines(text, _) => stream == Stream::Out && line.starts_with(text.as_bytes()),
                Ready::Text(text) => String::from_utf8_lossy(line).contains(text.as_str()),
                Ready::Started | Ready::Qmp => false,
            };
            *seen += usize::from(matches);
            log.write(line);
            log.write(b"\n");
            if !*quiet {
                log::show(&part.name, line);
            }
        };
        if last {
            process.last_words(take);
        } else {
            process.read(take);
        }
        let wanted = match &self.part.ready {
            Ready::Lines(_, count) => *count,
            Ready::Text(_) => 1,
            Ready::Started | Ready::Qmp => return,
        };
        if self.seen >= wanted {
            self.is_ready();
        }
    }

    /// Its QEMU has said something.
    pub(super) fn qmp_said(&mut self, note: &Note) {
        let Some(guest) = &mut self.guest else { return };
        if guest
            .qmp
            .as_ref()
            .is_none_or(|(connection, _)| *connection != note.connection)
        {
            return;
        }
        match note.event.as_str() {
            "READY" => self.is_ready(),
            "GONE" => guest.qmp = None,
            _ => {}
        }
    }

    fn look_for_end(&mut self, shared: &Shared) {
        let Some(process) = &mut self.process else {
            return;
        };
        // Until its end is taken notice of its number is its own.
        let end =
            rustix::event::PollFd::from_borrowed_fd(process.end(), rustix::event::PollFlags::IN);
        let ended = rustix::event::poll(&mut [end], Some(&rustix::event::Timespec::default()));
        if !ended.is_ok_and(|count| count > 0) {
            return;
        }
        // What a device host leaves behind holds its connections for the next one.
        let keeps = matches!(self.part.kind, Kind::Serve) && self.stopped.is_none();
        if !keeps {
            process.signal_all(Signal::KILL);
        }
        let status = match process.ended() {
            Ok(Some(status)) => status,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(part = self.part.name, %error, "its end is not known");
                ExitStatus::default()
            }
        };
        shared.guard.remove(process.pid());
        self.read(true);
        self.process = None;
        self.stage = None;
        if let Some(guest) = &mut self.guest {
            guest.qmp = None;
        }
        self.ended(status);
    }

    fn ended(&mut self, status: ExitStatus) {
        let text = how(status);
        if let Some(again) = self.stopped.take() {
            tracing::info!(part = self.part.name, status = text, "stopped");
            self.note = Some(text);
            self.state = if again {
                State::Waiting
            } else {
                State::Stopped
            };
            self.pause = FIRST_PAUSE;
            return;
        }
        let was_ready = self.state == State::Ready;
        let (part, log) = (&self.part.name, self.log.path().display());
        match (status.success(), was_ready) {
            (true, true) => tracing::info!(part, "has ended"),
            (false, true) => tracing::warn!(part, status = text, %log, "has ended"),
            (_, false) => {
                tracing::warn!(part, status = text, %log, "has ended before it was ready")
            }
        }
        self.note = Some(text);
        self.end_of(status.success() && was_ready);
    }

    /// What comes after an end that nobody asked for. For a device host and a proxy any such end is a failure.
    fn end_of(&mut self, success: bool) {
        let lasting = matches!(self.part.kind, Kind::Serve | Kind::Proxy);
        let again = match self.part.restart {
            Restart::Always => true,
            // One that never was ready most likely never will be.
            Restart::OnFailure => (!success || lasting) && self.has_been_ready,
            Restart::Never => false,
        };
        if !again {
            let fine = success && !lasting;
            self.state = if fine { State::Ended } else { State::Failed };
            self.failure = !fine;
            return;
        }
        let well = self.ready_since.take();
        if well.is_some_and(|since| since.elapsed() >= HEALTHY) {
            self.pause = FIRST_PAUSE;
        }
        tracing::info!(part = self.part.name, pause = ?self.pause, "will be started again");
        self.state = State::Pausing;
        self.resume = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(guest) = &mut self.guest {
            guest.tick(now);
        }
        if let (State::Starting, Some(process)) = (self.state, &self.process)
            && process.began + READY <= now
        {
            process.signal_all(Signal::KILL);
            self.say(format!("is not ready after {} s", READY.as_secs()));
            // Its end tells the rest.
            self.state = State::Stopping;
        }
        if let Some((stage, until)) = self.stage
            && until <= now
        {
            self.go_on_stopping(stage, now);
        }
    }

    /// Has it ended; `by_hand`: it stays ended until somebody starts it.
    pub(super) fn stop(&mut self, now: Instant, by_hand: bool) {
        if self.process.is_none() {
            self.resume = None;
            if by_hand || !self.state.is_over() {
                self.state = State::Stopped;
            }
            return;
        }
        self.stopped = Some(false);
        if self.stage.is_some() {
            return;
        }
        self.state = State::Stopping;
        let qmp = self.guest.as_ref().and_then(|guest| guest.qmp.as_ref());
        self.stage = Some(match (&self.part.kind, qmp) {
            (Kind::Guest(machine), Some((_, qmp))) => match machine.stop() {
                (StopBy::PowerDown, patience) => {
                    qmp.tell("system_powerdown");
                    (Stage::PowerDown, now + patience)
                }
                (StopBy::Quit, _) => {
                    qmp.tell("quit");
                    (Stage::Quit, now + POLITE)
                }
            },
            _ => {
                self.signal(Signal::TERM);
                (Stage::Terminate, now + POLITE)
            }
        });
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            match self.part.kind {
                // All that it has started.
                Kind::Program => process.signal_all(signal),
                _ => process.signal(signal),
            }
        }
    }

    fn go_on_stopping(&mut self, stage: Stage, now: Instant) {
        let qmp = self.guest.as_ref().and_then(|guest| guest.qmp.as_ref());
        self.stage = Some(match (stage, qmp) {
            (Stage::PowerDown, Some((_, qmp))) => {
                qmp.tell("quit");
                (Stage::Quit, now + POLITE)
            }
            (Stage::PowerDown | Stage::Quit, _) => {
                self.signal(Signal::TERM);
                (Stage::Terminate, now + POLITE)
            }
            (Stage::Terminate | Stage::Kill, _) => {
                tracing::warn!(part = self.part.name, "does not end and is killed");
                if let Some(process) = &self.process {
                    process.signal_all(Signal::KILL);
                }
                (Stage::Kill, now + POLITE)
            }
        });
    }

    /// It is ended and started again.
    pub(super) fn restart(&mut self, now: Instant) {
        if self.process.is_none() {
            self.resume = None;
            self.state = State::Waiting;
            return;
        }
        self.stop(now, true);
        self.stopped = Some(true);
    }

    pub(super) fn start_again(&mut self) -> Result<(), String> {
        match self.state {
            state if state.is_over() => {
                self.state = State::Waiting;
                self.pause = FIRST_PAUSE;
                Ok(())
            }
            State::Pausing => {
                self.resume = None;
                Ok(())
            }
            state => Err(format!("`{}` is {}", self.part.name, state.name())),
        }
    }

    /// It is not to be started again, as everything ends.
    pub(super) fn forget_restart(&mut self) {
        if self.process.is_none() && !self.state.is_over() {
            self.resume = None;
            self.state = State::Stopped;
        }
    }

    /// Ends it and all that it has started at once.
    pub(super) fn kill(&mut self) {
        if let Some(process) = &self.process {
            self.stopped = Some(false);
            self.stage = Some((Stage::Kill, Instant::now() + POLITE));
            process.signal_all(Signal::KILL);
        }
    }

    pub(super) fn set_argv(&mut self, argv: Vec<String>) {
        self.part.argv = argv;
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal_all(Signal::KILL);
            // It is not to be left a zombie.
            while let Ok(None) = process.ended() {
                let end = rustix::event::PollFd::from_borrowed_fd(
                    process.end(),
                    rustix::event::PollFlags::IN,
                );
                if rustix::event::poll(&mut [end], None).is_err() {
                    break;
                }
            }
        }
    }
}
