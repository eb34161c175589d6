// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What others may know of a running description, and ask of it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::guard::Guard;
use super::plan::Part;
use super::qmp::Qmp;
use crate::console::Registry;

/// How a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Those that it waits for are not ready.
    Waiting,
    /// It runs and is not ready yet.
    Starting,
    Ready,
    /// It has failed and will be started again.
    Pausing,
    Stopping,
    /// Somebody has stopped it.
    Stopped,
    /// It has ended by itself.
    Ended,
    /// It has failed for good.
    Failed,
}

impl State {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Pausing => "pausing",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Ended => "ended",
            Self::Failed => "failed",
        }
    }

    /// No process is there, and none will be by itself.
    pub(super) const fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Ended | Self::Failed)
    }
}

/// A part as others see it.
#[derive(Clone, Debug)]
pub(super) struct PartStatus {
    pub(super) name: String,
    pub(super) kind: &'static str,
    pub(super) state: State,
    pub(super) pid: Option<i32>,
    /// How often it was started, less one.
    pub(super) restarts: u64,
    /// Since when the process runs.
    pub(super) since: Option<Instant>,
    pub(super) log: PathBuf,
    /// How it ended last.
    pub(super) note: Option<String>,
    /// Its QEMU, if it is one that can be told something.
    pub(super) qmp: Option<Qmp>,
}

/// What can be asked.
#[derive(Debug)]
pub(super) enum Ask {
    /// There is another part.
    Add(Box<Part>),
    Start(String),
    Stop(String),
    Restart(String),
    /// Ends it without ado.
    Kill(String),
    /// Forgets a part that is over.
    Remove(String),
    /// From its next start on it has this command.
    SetArgv(String, Vec<String>),
}

pub(super) type Reply = Result<(), String>;

/// Something that a guest's QEMU has said.
#[derive(Clone, Debug)]
pub(super) struct Note {
    pub(super) part: String,
    /// Which connection it was.
    pub(super) connection: u64,
    /// An event's name, `READY` or `GONE`.
    pub(super) event: String,
}

#[derive(Debug, Default)]
struct Board {
    parts: Vec<PartStatus>,
    is_stopping: bool,
    /// The supervisor is no more.
    is_over: bool,
}

/// The way between the supervisor and all others.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    board: Arc<(Mutex<Board>, Condvar)>,
    asks: mpsc::Sender<(Ask, mpsc::Sender<Reply>)>,
    notes: mpsc::Sender<Note>,
    wake: Arc<UnixStream>,
    /// Serial lines of guests.
    pub(super) consoles: Registry,
    /// Knows the processes' groups.
    pub(super) guard: Arc<Guard>,
}

/// The supervisor's end of it.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) wake: UnixStream,
    pub(super) asks: mpsc::Receiver<(Ask, mpsc::Sender<Reply>)>,
    pub(super) notes: mpsc::Receiver<Note>,
}

impl Shared {
    pub(super) fn new(guard: Guard) -> std::io::Result<(Self, Inbox)> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (asks, asked) = mpsc::channel();
        let (notes, noted) = mpsc::channel();
        let shared = Self {
            board: Arc::default(),
            asks,
            notes,
            wake: Arc::new(wake),
            consoles: Registry::default(),
            guard: Arc::new(guard),
        };
        let inbox = Inbox {
            wake: woken,
            asks: asked,
            notes: noted,
        };
        Ok((shared, inbox))
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        // What is in it is whole at any time.
        self.board.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // If it is full, the supervisor will wake anyway.
        let _ = (&*self.wake).write(&[0]);
    }

    pub(super) fn publish(&self, parts: Vec<PartStatus>, is_stopping: bool) {
        let mut board = self.board();
        board.parts = parts;
        board.is_stopping = is_stopping;
        drop(board);
        self.board.1.notify_all();
    }

    /// Nobody will answer any more.
    pub(super) fn end(&self) {
        self.board().is_over = true;
        self.board.1.notify_all();
    }

    pub(super) fn note(&self, note: Note) {
        // The supervisor may be gone.
        if self.notes.send(note).is_ok() {
            self.wake();
        }
    }

    pub(super) fn ask(&self, ask: Ask) -> Reply {
        let over = || "everything has ended".to_owned();
        let (answer, answered) = mpsc::channel();
        self.asks.send((ask, answer)).map_err(|_| over())?;
        self.wake();
        answered.recv().map_err(|_| over())?
    }

    pub(super) fn parts(&self) -> Vec<PartStatus> {
        self.board().parts.clone()
    }

    pub(super) fn part(&self, name: &str) -> Option<PartStatus> {
        self.board()
            .parts
            .iter()
            .find(|part| part.name == name)
            .cloned()
    }

    /// Waits until `pick` gives something of the part called `name`; `None` when time is up, the part is gone, or all ends.
    pub(super) fn wait_part<T>(
        &self,
        name: &str,
        within: Duration,
        mut pick: impl FnMut(&PartStatus) -> Option<T>,
    ) -> Option<T> {
        let due = Instant::now() + within;
        let mut board = self.board();
        loop {
            let part = board.parts.iter().find(|part| part.name == name)?;
            if let Some(found) = pick(part) {
                return Some(found);
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() || board.is_over || board.is_stopping {
                return None;
            }
            let waited = self.board.1.wait_timeout(board, left);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until `pick` gives something of all parts; `None` when everything ends.
    pub(super) fn wait_change<T>(&self, pick: impl Fn(&[PartStatus]) -> Option<T>) -> Option<T> {
        let mut board = self.board();
        loop {
            if board.is_over || board.is_stopping {
                return None;
            }
            if let Some(found) = pick(&board.parts) {
                return Some(found);
            }
            board = self
                .board
                .1
                .wait(board)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
