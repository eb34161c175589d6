// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recording: a bounded buffer, and a thread that writes it to the file.

use super::file::{self, OpenError};
use super::{Head, Layout, Side, block};
use crate::tap::Direction;
use crate::{Capabilities, Peer};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// Bytes of blocks that may wait for the file. The thread has as many again in its hands.
pub(super) const BUFFER: usize = 1 << 20;

/// How long messages are gathered before they are written, unless the buffer is half full.
const GATHER: Duration = Duration::from_millis(10);

/// After which time it is tried again when the file could not be written.
const RETRY: Duration = Duration::from_secs(1);

/// How long the last user of a trace waits for what is still to be written.
const FAREWELL: Duration = Duration::from_secs(1);

/// Where blocks go. After an error nothing of `bytes` may be left behind; they come again.
pub(super) trait Sink: Send + 'static {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
}

#[derive(Default)]
struct State {
    /// Whole blocks.
    buffer: Vec<u8>,
    /// Messages in `buffer`.
    messages: u64,
    /// Interfaces announced in this section.
    interfaces: u32,
    /// The thread sleeps until there is something.
    asleep: bool,
    /// Nobody records any more.
    closed: bool,
    /// The thread has ended.
    finished: bool,
}

struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    /// For the thread.
    wake: Condvar,
    /// For who waits until the thread has ended.
    done: Condvar,
    /// The clock of the section: the time of day when it began, and what has passed since. Never goes backwards.
    began: (Duration, Instant),
    /// Interfaces of the sections before.
    interfaces_before: u32,
}

/// The number of a connection in a message's head.
fn connection(interface: u32) -> u16 {
    let [low, high, ..] = interface.to_le_bytes();
    u16::from_le_bytes([low, high])
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds since 1970.
    fn time(&self) -> u64 {
        let now = self.began.0 + self.began.1.elapsed();
        u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Wakes the thread if what was appended is the first, or fills half of the buffer.
    fn appended(&self, state: &mut State, before: usize) {
        let half = BUFFER / 2;
        if state.asleep || (before < half && state.buffer.len() >= half) {
            state.asleep = false;
            self.wake.notify_one();
        }
    }

    /// Writes until nobody records any more.
    fn run(&self, mut sink: impl Sink) {
        let mut writing = Vec::new();
        loop {
            let mut state = self.lock();
            while state.buffer.is_empty() && !state.closed {
                state.asleep = true;
                state = self.wait(state, None);
            }
            state.asleep = false;
            if !state.closed && state.buffer.len() < BUFFER / 2 {
                state = self.wait(state, Some(GATHER));
            }
            if state.buffer.is_empty() && state.closed {
                break;
            }
            std::mem::swap(&mut state.buffer, &mut writing);
            let messages = std::mem::take(&mut state.messages);
            drop(state);
            if !self.write(&mut sink, &writing) {
                let more = self.lock().messages;
                tracing::warn!(file = %self.path.display(), messages = messages + more, "the last messages could not be recorded");
                break;
            }
            writing.clear();
        }
        // Who waits for the end may open the file again at once.
        drop(sink);
        self.lock().finished = true;
        self.done.notify_all();
    }

    /// Until it is written, or nobody records any more.
    fn write(&self, sink: &mut impl Sink, bytes: &[u8]) -> bool {
        let mut told = false;
        loop {
            let Err(error) = sink.write(bytes) else {
                if told {
                    tracing::info!(file = %self.path.display(), "recording goes on");
                }
                return true;
            };
            if !told {
                tracing::warn!(file = %self.path.display(), %error, "cannot record messages; they are kept while there is room");
                told = true;
            }
            let state = self.lock();
            if state.closed {
                return false;
            }
            drop(self.wait(state, Some(RETRY)));
        }
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match timeout {
            None => self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                let result = self.wake.wait_timeout_while(state, timeout, |state| {
                    !state.closed && state.buffer.len() < BUFFER / 2
                });
                result.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

/// Ends the thread when the last [`Writer`] and [`Interface`] are gone.
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.wake.notify_all();
        // A file that hangs must not keep the process.
        let waited = self
            .shared
            .done
            .wait_timeout_while(state, FAREWELL, |state| !state.finished);
        if waited.is_ok_and(|(_, timeout)| timeout.timed_out()) {
            tracing::warn!(file = %self.shared.path.display(), "the end of the trace may be missing: the file is too slow");
        }
    }
}

/// Device and inode of a file.
type FileId = (u64, u64);

/// The traces this process writes.
static OPEN: Mutex<Vec<(FileId, Weak<Handle>)>> = Mutex::new(Vec::new());

/// A file that messages are recorded to; clones write to the same one.
#[derive(Clone)]
pub struct Writer(Arc<Handle>);

impl Writer {
    /// Opens the trace at `path`: a new file, for the owner alone, or one that goes on behind what is there (a block that was
    /// not finished is cut off). A file that this process writes already is shared.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = file::open(path)?;
        open.retain(|(_, handle)| handle.strong_count() > 0);
        let known = open.iter().find(|(id, _)| *id == opened.id);
        if let Some(handle) = known.and_then(|(_, handle)| handle.upgrade()) {
            return Ok(Self(handle));
        }
        let id = opened.id;
        let output = opened.output()?;
        let before = output.interfaces();
        let writer = Self::to(path, output, before).map_err(|source| OpenError::Os {
            what: "start a thread for",
            path: path.to_owned(),
            source,
        })?;
        open.push((id, Arc::downgrade(&writer.0)));
        Ok(writer)
    }

    /// Records to `sink`, in which there are interfaces already; `path` is for messages to people.
    pub(super) fn to(path: &Path, sink: impl Sink, interfaces_before: u32) -> io::Result<Self> {
        let mut state = State::default();
        let application = format!(
            "vmsg {} (pid {})",
            env!("CARGO_PKG_VERSION"),
            std::process::id()
        );
        block::section(&mut state.buffer, &application);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            state: Mutex::new(state),
            wake: Condvar::new(),
            done: Condvar::new(),
            began: (now.unwrap_or_default(), Instant::now()),
            interfaces_before,
        });
        let handle = Arc::new(Handle {
            shared: Arc::clone(&shared),
        });
        std::thread::Builder::new()
            .name("trace".to_owned())
            .spawn(move || shared.run(sink))?;
        Ok(Self(handle))
    }

    /// Where it records to.
    pub fn path(&self) -> &Path {
        &self.0.shared.path
    }

    /// An end of the bus called `bus`; `peer` is at the other end.
    pub fn interface(
        &self,
        bus: &str,
        side: Side,
        peer: &Peer,
        capabilities: &Capabilities,
    ) -> Interface {
        let end = match side {
            Side::Driver => "driver",
            Side::Device => "device",
        };
        let mut description = format!(
            "the {end}'s end of virtio-msg bus {bus}; peer: {peer}; messages of up to {} bytes",
            capabilities.max_message_size
        );
        if let Some(uid) = peer.uid {
            description.push_str(&format!("; peer's uid {uid}"));
        }
        let mut interface = Interface {
            writer: self.clone(),
            name: format!("{bus}/{peer}"),
            description,
            side,
            layout: Layout::default(),
            number: None,
            seen: 0,
            lost: 0,
            lost_before: 0,
        };
        let shared = &self.0.shared;
        let mut state = shared.lock();
        let before = state.buffer.len();
        interface.announce(&mut state);
        shared.appended(&mut state, before);
        drop(state);
        interface
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Writer").field(&self.path()).finish()
    }
}

/// One end of a bus in a trace.
pub struct Interface {
    writer: Writer,
    name: String,
    description: String,
    side: Side,
    layout: Layout,
    /// Once it stands in the file.
    number: Option<u32>,
    seen: u64,
    lost: u64,
    /// Of those, since the last message that was recorded.
    lost_before: u64,
}

impl Interface {
    /// How the messages that are recorded from now on are laid out; as revision 1 otherwise.
    pub fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// Records a message that came or went with `fds` file descriptors. Never waits for the file.
    pub fn record(&mut self, direction: Direction, message: &[u8], fds: usize) {
        self.seen += 1;
        let writer = self.writer.clone();
        let shared = &writer.0.shared;
        let mut state = shared.lock();
        let before = state.buffer.len();
        // The rest of the block, options included, is far below 512 bytes.
        let fits = message.len() <= usize::from(u16::MAX) + 1
            && before + message.len() + 512 <= BUFFER
            && self.announce(&mut state);
        let Some(interface) = self.number.filter(|_| fits) else {
            drop(state);
            return self.lose();
        };
        let head = Head {
            layout: self.layout,
            way: self.side.way(direction),
            fds: u8::try_from(fds).unwrap_or(u8::MAX),
            side: self.side,
            connection: connection(shared.interfaces_before.wrapping_add(interface)),
        };
        let packet = block::Packet {
            interface,
            time: shared.time(),
            head: head.to_bytes(),
            message,
            outbound: direction == Direction::Sent,
            lost: std::mem::take(&mut self.lost_before),
        };
        block::packet(&mut state.buffer, &packet);
        state.messages += 1;
        shared.appended(&mut state, before);
    }

    /// Messages seen, and those of them that could not be recorded.
    pub fn counts(&self) -> (u64, u64) {
        (self.seen, self.lost)
    }

    #[cold]
    fn lose(&mut self) {
        if self.lost == 0 {
            tracing::warn!(file = %self.writer.path().display(), interface = self.name, "messages are not recorded: the file cannot keep up");
        }
        self.lost += 1;
        self.lost_before += 1;
    }

    /// Puts the interface into the file, before its first message. False: there is no room now.
    fn announce(&mut self, state: &mut State) -> bool {
        if self.number.is_some() {
            return true;
        }
        // Two texts of at most 512 bytes, and what goes around them.
        if state.buffer.len() + 2048 > BUFFER {
            return false;
        }
        let Some(next) = state.interfaces.checked_add(1) else {
            return false;
        };
        block::interface(&mut state.buffer, &self.name, &self.description);
        self.number = Some(std::mem::replace(&mut state.interfaces, next));
        true
    }
}

impl Drop for Interface {
    /// Says in the file how much went over this end.
    fn drop(&mut self) {
        if self.lost > 0 {
            tracing::warn!(
                file = %self.writer.path().display(),
                interface = self.name,
                messages = self.seen,
                lost = self.lost,
                "messages were not recorded"
            );
        }
        let shared = &self.writer.0.shared;
        let mut state = shared.lock();
        let before = state.buffer.len();
        if let Some(number) = self.number.filter(|_| before + 128 <= BUFFER) {
            let time = shared.time();
            block::statistics(&mut state.buffer, number, time, self.seen, self.lost);
            shared.appended(&mut state, before);
        }
    }
}

impl fmt::Debug for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interface")
            .field("file", &self.writer.path())
            .field("name", &self.name)
            .field("seen", &self.seen)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "writer_test.rs"]
mod tests;
