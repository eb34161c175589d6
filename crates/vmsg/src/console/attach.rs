// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One terminal for all consoles.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::args::ConsoleAttachArgs;
use super::control::Console;
use super::keys::{Escape, Keys, Typed};
use super::line::Line;
use super::terminal::{Raw, Signals, size};
use super::{choose, consoles};
use crate::control::{Client, Request};
use crate::out::Out;
use crate::trace::clean;

/// How long to wait before a console that has gone is looked for again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long an answer is waited for while somebody types.
const PATIENCE: Duration = Duration::from_secs(1);
/// A terminal's escape key is looked for in so many bytes at a time.
const CHUNK: usize = 4096;

/// What there is on this terminal.
struct Session<'a> {
    control: &'a Path,
    read_only: bool,
    escape: Escape,
    lines: Vec<Line>,
    shown: usize,
    out: Out,
}

/// Attaches this terminal.
pub(super) fn attach(control: &Path, args: &ConsoleAttachArgs) -> anyhow::Result<()> {
    let found = consoles(control, None)?;
    let chosen = choose(&found, args.name.as_deref())?;
    let name = chosen.name.clone();
    let signals = Signals::new()?;
    if !Raw::is_possible() {
        return pipe(chosen, args, &signals);
    }
    let lines = lines(&found);
    let shown = lines
        .iter()
        .position(|line| line.name == name)
        .with_context(|| format!("the console {} has no socket", clean(&name)))?;
    let mut session = Session {
        control,
        read_only: args.read_only,
        escape: args.escape,
        lines,
        shown,
        out: Out::lock(),
    };
    session.connect();
    let _raw = Raw::new()?;
    session.show(shown)?;
    session.run(&signals)
}

/// Those that can be attached to.
fn lines(consoles: &[Console]) -> Vec<Line> {
    consoles
        .iter()
        .filter_map(|console| Some(Line::new(console.name.clone(), console.socket.clone()?)))
        .collect()
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or_default()
}

impl Session<'_> {
    fn run(&mut self, signals: &Signals) -> anyhow::Result<()> {
        let mut keys = Keys::new(self.escape);
        loop {
            let away = self.lines.iter().any(|line| line.stream().is_none());
            let stdin = std::io::stdin();
            let mut fds = vec![
                PollFd::new(&stdin, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.end(), PollFlags::IN),
                PollFd::new(signals.window(), PollFlags::IN),
            ];
            let mut places = Vec::new();
            for (place, line) in self.lines.iter().enumerate() {
                if let Some(stream) = line.stream() {
                    let mut flags = PollFlags::IN;
                    if line.is_waiting() {
                        flags |= PollFlags::OUT;
                    }
                    places.push(place);
                    fds.push(PollFd::from_borrowed_fd(stream.as_fd(), flags));
                }
            }
            let timeout = away.then(|| timespec(AGAIN));
            let count = match poll(&mut fds, timeout.as_ref()) {
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[1] {
                return Ok(());
            }
            for (place, _) in places.iter().zip(&ready[3..]).filter(|(_, ready)| **ready) {
                self.take(*place)?;
            }
            if ready[2] {
                while matches!(signals.window().read(&mut [0; 64]), Ok(count) if count > 0) {}
                self.tell_size();
            }
            if ready[0] {
                let mut chunk = [0; CHUNK];
                match rustix::io::read(&stdin, &mut chunk) {
                    Ok(0) => return Ok(()),
                    Ok(count) => {
                        for typed in keys.read(&chunk[..count]) {
                            if !self.obey(typed)? {
                                return Ok(());
                            }
                        }
                    }
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if count == 0 {
                self.look_again()?;
            }
        }
    }

    /// Shows what has come from a console, or keeps it until it is switched to.
    fn take(&mut self, place: usize) -> anyhow::Result<()> {
        let shown = place == self.shown;
        let line = &mut self.lines[place];
        line.flush();
        match line.read(shown) {
            Some(bytes) if shown => {
                self.out.write_all(&bytes)?;
                self.out.flush()?;
            }
            Some(_) => {}
            None if shown => self.say("gone; waiting for it")?,
            None => {}
        }
        Ok(())
    }

    /// Does what was typed; false to detach.
    fn obey(&mut self, typed: Typed) -> anyhow::Result<bool> {
        let count = self.lines.len();
        match typed {
            Typed::Text(text) if !self.read_only => {
                if !self.lines[self.shown].write(&text) {
                    self.out.write_all(b"\x07")?;
                    self.out.flush()?;
                }
            }
            Typed::Text(_) => {}
            Typed::Next => self.show((self.shown + 1) % count)?,
            Typed::Previous => self.show((self.shown + count - 1) % count)?,
            Typed::Choose(place) if place < count => self.show(place)?,
            Typed::Choose(place) => self.say(&format!("there is no console {place}"))?,
            Typed::List => self.list()?,
            Typed::Detach => return Ok(false),
            Typed::Help => {
                let escape = self.escape;
                self.say(&format!(
                    "{escape} and: n next, p previous, 0-9 choose, l list, d detach, {escape} sends itself"
                ))?;
            }
        }
        Ok(true)
    }

    /// Says something that is not from a guest.
    fn say(&mut self, words: &str) -> anyhow::Result<()> {
        let name = clean(&self.lines[self.shown].name);
        write!(self.out, "\r\n\x1b[0;7m[{name}: {words}]\x1b[0m\r\n")?;
        self.out.flush()?;
        Ok(())
    }

    fn list(&mut self) -> anyhow::Result<()> {
        let mut text = String::from("\r\n");
        for (place, line) in self.lines.iter().enumerate() {
            let mark = match (place == self.shown, line.stream(), line.fresh) {
                (true, ..) => '>',
                (_, None, _) => '-',
                (_, _, true) => '*',
                _ => ' ',
            };
            text.push_str(&format!(
                "\x1b[0;7m{mark} {place} {}\x1b[0m\r\n",
                clean(&line.name)
            ));
        }
        self.out.write_all(text.as_bytes())?;
        self.out.flush()?;
        Ok(())
    }

    /// Brings a console to the terminal.
    fn show(&mut self, place: usize) -> anyhow::Result<()> {
        self.shown = place;
        let count = self.lines.len();
        let fresh = self.lines.iter().enumerate();
        let fresh = fresh.filter(|(other, line)| *other != place && line.fresh);
        let fresh = match fresh.count() {
            0 => String::new(),
            fresh => format!(", {fresh} with new output"),
        };
        self.out.write_all(b"\x1b[0m\x1b[2J\x1b[H")?;
        let escape = self.escape;
        let only = if self.read_only { " read-only" } else { "" };
        self.say(&format!(
            "console {place} of {count}{only}{fresh}; {escape} ? for help"
        ))?;
        let replay = self.lines[place].replay();
        self.out.write_all(&replay)?;
        self.out.flush()?;
        if self.lines[place].stream().is_none() {
            self.say("gone; waiting for it")?;
        }
        self.tell_size();
        Ok(())
    }

    /// Tells the guest that is shown how large the window is. Nothing depends on it.
    fn tell_size(&self) {
        if self.read_only {
            return;
        }
        let Some((cols, rows)) = size() else {
            return;
        };
        let console = self.lines[self.shown].name.clone();
        let request = Request::ConsoleSize {
            console,
            cols,
            rows,
        };
        if let Ok(mut client) = Client::connect(self.control)
            && client.set_patience(PATIENCE).is_ok()
        {
            let _ = client.ask(&request);
        }
    }

    fn connect(&mut self) -> bool {
        let mut back = false;
        for (place, line) in self.lines.iter_mut().enumerate() {
            // Who cannot be connected to now is tried again.
            back |= line.connect().unwrap_or(false) && place == self.shown;
        }
        back
    }

    /// Looks for consoles that have come, or come again.
    fn look_again(&mut self) -> anyhow::Result<()> {
        if let Ok(found) = consoles(self.control, Some(PATIENCE)) {
            for new in lines(&found) {
                match self.lines.iter_mut().find(|line| line.name == new.name) {
                    Some(line) => line.socket = new.socket,
                    None => self.lines.push(new),
                }
            }
        }
        if self.connect() {
            self.say("here again")?;
            self.tell_size();
        }
        Ok(())
    }
}

/// Carries stdin to a console and the console to stdout, as they are.
fn pipe(console: &Console, args: &ConsoleAttachArgs, signals: &Signals) -> anyhow::Result<()> {
    let name = clean(&console.name);
    let Some(socket) = &console.socket else {
        bail!("the console {name} has no socket");
    };
    let idle = match args.idle {
        Some(seconds) => Some(
            Duration::try_from_secs_f64(seconds)
                .map_err(|_| crate::Usage(format!("--idle {seconds}: a number of seconds")))?,
        ),
        None => None,
    };
    let mut line = Line::new(console.name.clone(), socket.clone());
    line.connect()
        .with_context(|| format!("cannot attach to {name} at {}", socket.display()))?;
    line.expect_no_replay();
    let mut out = Out::lock();
    let mut ended = args.read_only;
    let mut said = false;
    let mut last = Instant::now();
    loop {
        let stdin = std::io::stdin();
        let Some(stream) = line.stream() else {
            bail!("the console {name} has gone");
        };
        let mut interest = PollFlags::IN;
        if line.is_waiting() {
            interest |= PollFlags::OUT;
        }
        let mut fds = vec![
            PollFd::from_borrowed_fd(signals.end(), PollFlags::IN),
            PollFd::from_borrowed_fd(stream.as_fd(), interest),
        ];
        // One text at a time: a guest that does not read holds up who writes.
        let reading = !ended && !line.is_waiting();
        if reading {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        let left = idle
            .filter(|_| ended)
            .map(|idle| (last + idle).saturating_duration_since(Instant::now()));
        let timeout = left.map(timespec);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            return Ok(());
        }
        if ready[1] {
            line.flush();
            if let Some(bytes) = line.read(true)
                && !bytes.is_empty()
            {
                last = Instant::now();
                out.write_all(&bytes)?;
                out.flush()?;
            }
        }
        if reading && ready[2] {
            let mut chunk = [0; CHUNK];
            match rustix::io::read(&stdin, &mut chunk) {
                Ok(0) => {
                    ended = true;
                    last = Instant::now();
                }
                Ok(count) => {
                    line.write(&chunk[..count]);
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if ended && !said && !line.is_waiting() {
            said = true;
            line.end_typing();
        }
    }
}
