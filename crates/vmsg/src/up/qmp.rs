// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A QEMU by its monitor protocol: commands with their answers, and events.
//!
//! A thread reads; callers wait for what it has read. QEMU's words are not trusted: a line may not be endless, events that nobody
//! waits for are dropped.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes of a line: QEMU's longest answers to what is asked here have a few hundred.
const MAX_LINE: u64 = 1 << 20;

/// Events that are kept for somebody who waits.
const MAX_EVENTS: usize = 256;

/// Bytes of such an event.
const MAX_EVENT: usize = 16 << 10;

/// How long QEMU may take to read a command.
const WRITE: Duration = Duration::from_secs(5);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// QEMU does not do it.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// What was asked.
        command: String,
        /// QEMU's words.
        description: String,
    },
    /// No answer.
    #[error("QEMU has not answered {0} in time")]
    Late(String),
    /// The connection has ended.
    #[error("QEMU is gone")]
    Gone,
}

/// What is known of the other side.
#[derive(Debug, Default)]
struct Heard {
    /// The greeting was answered: commands can be given.
    is_ready: bool,
    is_gone: bool,
    /// The next command's number.
    next: u64,
    /// Answers that somebody waits for, by the command's number.
    answers: VecDeque<(u64, Result<Value, String>)>,
    waiting: Vec<u64>,
    events: VecDeque<(u64, Value)>,
    /// How many events there were.
    count: u64,
}

/// A connection to a QEMU. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Shared {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        // What is in it is whole at any time.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, line: &Value) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        (&self.stream).write_all(&bytes)
    }
}

impl Qmp {
    /// Talks to the QEMU at the other end of `stream`. `tell` is called once commands can be given, and with each event.
    pub(super) fn start(
        stream: UnixStream,
        tell: impl Fn(&str) + Send + 'static,
    ) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE))?;
        let shared = Arc::new(Shared {
            stream,
            heard: Mutex::default(),
            changed: Condvar::new(),
        });
        let reader = shared.stream.try_clone()?;
        let qmp = Self {
            shared: Arc::clone(&shared),
        };
        std::thread::Builder::new()
            .name("qmp".to_owned())
            .spawn(move || {
                read(&shared, reader, &tell);
                shared.heard().is_gone = true;
                shared.changed.notify_all();
                tell("GONE");
            })?;
        Ok(qmp)
    }

    /// Carries out a command.
    pub(super) fn execute(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &self.shared;
        let number = {
            let mut heard = shared.heard();
            heard.next += 1;
            let number = heard.next;
            heard.waiting.push(number);
            number
        };
        let mut line = json!({ "execute": command, "id": number });
        if !arguments.is_null() {
            line["arguments"] = arguments;
        }
        let sent = shared.send(&line);
        let answer = match sent {
            Ok(()) => self.wait(within, |heard| {
                let at = heard.answers.iter().position(|(id, _)| *id == number)?;
                heard.answers.remove(at).map(|(_, answer)| answer)
            }),
            Err(_) => Err(QmpError::Gone),
        };
        {
            // It may have come a moment too late.
            let mut heard = shared.heard();
            heard.waiting.retain(|id| *id != number);
            heard.answers.retain(|(id, _)| *id != number);
        }
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(description)) => Err(QmpError::Refused {
                command: command.to_owned(),
                description,
            }),
            Err(QmpError::Late(_)) => Err(QmpError::Late(command.to_owned())),
            Err(error) => Err(error),
        }
    }

    /// Gives a command and waits for nothing.
    pub(super) fn tell(&self, command: &str) {
        // A QEMU that is gone has done it.
        let _ = self.shared.send(&json!({ "execute": command }));
    }

    /// How many events there have been: where to wait from.
    pub(super) fn events(&self) -> u64 {
        self.shared.heard().count
    }

    /// Waits for an event behind the first `since` for which `pick` gives something.
    pub(super) fn event<T>(
        &self,
        since: u64,
        within: Duration,
        pick: impl Fn(&str, &Value) -> Option<T>,
    ) -> Result<T, QmpError> {
        self.wait(within, |heard| {
            heard
                .events
                .iter()
                .filter(|(number, _)| *number > since)
                .find_map(|(_, event)| {
                    let name = event.get("event").and_then(Value::as_str)?;
                    pick(name, event.get("data").unwrap_or(&Value::Null))
                })
        })
    }

    fn wait<T>(
        &self,
        within: Duration,
        mut pick: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Result<T, QmpError> {
        let due = Instant::now() + within;
        let mut heard = self.shared.heard();
        loop {
            if let Some(found) = pick(&mut heard) {
                return Ok(found);
            }
            if heard.is_gone {
                return Err(QmpError::Gone);
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Late(String::new()));
            }
            let waited = self.shared.changed.wait_timeout(heard, left);
            heard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The reader and this one: nobody can ask any more.
        if Arc::strong_count(&self.shared) <= 2 {
            let _ = self.shared.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Reads until the connection ends, or QEMU says what cannot be.
fn read(shared: &Shared, stream: UnixStream, tell: &dyn Fn(&str)) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(count) if count > 0 && line.ends_with(b"\n") => {}
            _ => return,
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            return;
        };
        if message.get("QMP").is_some() {
            let ready = json!({ "execute": "qmp_capabilities", "id": 0 });
            if shared.send(&ready).is_err() {
                return;
            }
            continue;
        }
        let mut heard = shared.heard();
        let mut told = None;
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            // Words of our own are not QEMU's to say.
            told = (!["READY", "GONE"].contains(&name)).then(|| name.to_owned());
            heard.count += 1;
            let number = heard.count;
            // What somebody waits for is short.
            if line.len() <= MAX_EVENT {
                heard.events.push_back((number, message));
            }
            if heard.events.len() > MAX_EVENTS {
                heard.events.pop_front();
            }
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            let answer = match (message.get("return"), message.get("error")) {
                (Some(value), _) => Ok(value.clone()),
                (None, Some(error)) => Err(error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given")
                    .to_owned()),
                (None, None) => return,
            };
            if id == 0 {
                if answer.is_err() {
                    return;
                }
                heard.is_ready = true;
                told = Some("READY".to_owned());
            } else if let Some(at) = heard.waiting.iter().position(|other| *other == id) {
                // One answer for each.
                heard.waiting.swap_remove(at);
                heard.answers.push_back((id, answer));
            }
        }
        drop(heard);
        shared.changed.notify_all();
        if let Some(name) = told {
            tell(&name);
        }
    }
}

#[cfg(test)]
#[path = "qmp_test.rs"]
mod tests;
