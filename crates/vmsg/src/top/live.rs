// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The terminal while `vmsg top` has it.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Source;
use super::keys::{Key, Keys};
use super::rates::{Rates, Sample};
use super::view::{Line, View};
use crate::console::terminal::{Raw, Signals, size};
use crate::out::Out;
use crate::trace::clean;

/// The other screen, no cursor, lines are cut at the edge.
const BEGIN: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[?7l";
/// Lines go on again; [`Raw`] does the rest.
const END: &[u8] = b"\x1b[?7h";

/// Shows it until the user has seen enough.
pub(super) fn run(path: &Path, interval: Duration, view: View) -> anyhow::Result<()> {
    // That nobody is there is said where it can be read afterwards.
    let mut source = Source::connect(path)?;
    let first = source.sample()?;
    let (samples, mut news) = sampler(path.to_owned(), source, interval)?;
    let signals = Signals::new()?;
    let _raw = Raw::new()?;
    let _cut = Cut;
    let mut out = Out::lock();
    out.write_all(BEGIN)?;
    let mut screen = Screen {
        path: clean(&path.display().to_string()),
        rates: Rates::between(None, &first),
        trouble: None,
        view,
        top: 0,
    };
    screen.show(&mut out, first, &samples, &mut news, &signals)
}

/// Lines are cut at the edge until this is dropped, also by a panic.
struct Cut;

impl Drop for Cut {
    fn drop(&mut self) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(END);
        let _ = out.flush();
    }
}

type News = Result<Sample, String>;

/// Looks again and again in a thread of its own: keys are heard while an answer takes long. The stream is readable when there is news;
/// the thread ends when it is closed.
fn sampler(
    path: PathBuf,
    source: Source,
    interval: Duration,
) -> anyhow::Result<(Receiver<News>, UnixStream)> {
    let (sender, samples) = mpsc::channel();
    let (news, bell) = UnixStream::pair()?;
    news.set_nonblocking(true)?;
    std::thread::Builder::new()
        .name("sampler".to_owned())
        .spawn(move || look(&path, source, interval, &sender, &bell))?;
    Ok((samples, news))
}

fn look(path: &Path, source: Source, interval: Duration, sender: &Sender<News>, bell: &UnixStream) {
    let mut source = Some(source);
    let mut due = Instant::now() + interval;
    loop {
        if is_over(bell, due) {
            return;
        }
        due = Instant::now() + interval;
        // One that was started again is found again.
        let result = match &mut source {
            Some(source) => source.sample(),
            None => Source::connect(path).and_then(|mut new| {
                let sample = new.sample();
                source = Some(new);
                sample
            }),
        };
        let result = result.map_err(|error| crate::out::chain(&error));
        if result.is_err() {
            source = None;
        }
        if sender.send(result).is_err() || (&mut &*bell).write_all(&[0]).is_err() {
            return;
        }
    }
}

/// Waits until `due`; true if nobody looks any more.
fn is_over(bell: &UnixStream, due: Instant) -> bool {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

/// What is on the screen.
struct Screen {
    path: String,
    rates: Rates,
    /// Why there is nothing new.
    trouble: Option<String>,
    view: View,
    /// Lines that are above it.
    top: usize,
}

impl Screen {
    fn show(
        &mut self,
        out: &mut Out,
        first: Sample,
        samples: &Receiver<News>,
        news: &mut UnixStream,
        signals: &Signals,
    ) -> anyhow::Result<()> {
        let mut before = Some(first);
        let mut keys = Keys::default();
        let stdin = std::io::stdin();
        loop {
            let (columns, rows) = size().unwrap_or((80, 24));
            let frame = self.frame(columns.into(), rows.into());
            out.write_all(frame.as_bytes())?;
            out.flush()?;

            let mut fds = [
                PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(signals.end(), PollFlags::IN),
                PollFd::from_borrowed_fd(signals.window().as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(news.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [typed, end, window, new] = fds.map(|fd| !fd.revents().is_empty());
            if end {
                return Ok(());
            }
            if window {
                let _ = signals.window().read(&mut [0; 64]);
            }
            if new {
                let _ = news.read(&mut [0; 64]);
                for result in samples.try_iter() {
                    match result {
                        Ok(now) => {
                            self.rates = Rates::between(before.as_ref(), &now);
                            self.trouble = None;
                            before = Some(now);
                        }
                        Err(why) => self.trouble = Some(why),
                    }
                }
            }
            if typed {
                let mut bytes = [0; 64];
                let count = rustix::io::read(stdin.as_fd(), &mut bytes)?;
                // Nobody can type any more.
                if count == 0 {
                    return Ok(());
                }
                for key in keys.take(&bytes[..count]) {
                    if key == Key::Quit {
                        return Ok(());
                    }
                    self.press(key, rows.into());
                }
            }
        }
    }

    fn press(&mut self, key: Key, rows: usize) {
        let page = rows.saturating_sub(2).max(1).cast_signed();
        match key {
            Key::Quit => {}
            Key::Reverse => self.view.reversed = !self.view.reversed,
            Key::Queues => self.view.queues = !self.view.queues,
            Key::Sort(steps) => self.view.sort = self.view.sort.step(steps),
            Key::Scroll(lines) => self.top = self.top.saturating_add_signed(lines),
            Key::Page(pages) => self.top = self.top.saturating_add_signed(pages * page),
            Key::Home => self.top = 0,
        }
    }

    /// Everything that is written to have it on a screen of this size.
    fn frame(&mut self, columns: usize, rows: usize) -> String {
        let lines = self.view.lines(&self.rates, Some(columns));
        let room = rows.saturating_sub(2);
        self.top = self.top.min(lines.len().saturating_sub(room));
        let mut frame = String::from("\x1b[H");
        let mut put = |line: &Line| {
            let text: String = line.text.chars().take(columns).collect();
            let (on, off) = if line.is_head {
                ("\x1b[7m", "\x1b[0m")
            } else {
                ("", "")
            };
            // Writing to a String cannot fail.
            let _ = write!(frame, "{on}{text}{off}\x1b[K\r\n");
        };
        let seconds = self
            .rates
            .seconds
            .map(|seconds| format!(" over {seconds:.1} s"));
        let title = match &self.trouble {
            Some(why) => format!("vmsg top: {}; trying again", clean(why)),
            None => format!(
                "vmsg top {}{}: {} ports, {} devices",
                self.path,
                seconds.unwrap_or_default(),
                self.rates.ports.len(),
                self.rates.devices.len()
            ),
        };
        put(&Line {
            text: title,
            is_head: false,
        });
        for line in lines.iter().skip(self.top).take(room) {
            put(line);
        }
        let order = if self.view.reversed { ", reversed" } else { "" };
        let help = format!(
            "q ends  ←→ sorts by: {}{order}  r reverses  t queues  ↑↓ scrolls",
            self.view.sort.name()
        );
        let help: String = help.chars().take(columns).collect();
        // The last line is not ended: that would scroll.
        let _ = write!(frame, "\x1b[J\x1b[{};1H{help}\x1b[K", rows.max(1));
        frame
    }
}

#[cfg(test)]
#[path = "live_test.rs"]
mod tests;
