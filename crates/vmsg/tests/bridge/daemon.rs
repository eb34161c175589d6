// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon in a thread of the test: a disk in memory, which does as it is told, well or badly.

mod connection;
mod ring;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vmsg_mem::Doorbell;

use self::connection::Connection;
use crate::station::until;

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
pub(crate) const ALL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15;
/// Sectors of the disk.
pub(crate) const SECTORS: u64 = 2048;
const QUEUES: u16 = 2;
const CONFIG: u32 = 60;

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mischief {
    /// There is no answer.
    Hang,
    /// The connection is closed.
    Close,
    /// The answer is a byte short.
    Short,
    /// The answer is said to have 4 GiB.
    Endless,
    /// The answer is to something else.
    Other,
    /// The answer is not marked as one.
    Unmarked,
    /// The answer comes twice.
    Twice,
    /// It comes with descriptors that nobody wants.
    Descriptors,
    /// All bits of the answer are set.
    Ones,
    /// Before the answer comes a message that nobody has asked for.
    Unasked,
    /// The answer is cut off, and the connection closed.
    CutOff,
    /// There is no answer, nor does it hear of the end of the connection, until it is let go.
    Stuck,
}

pub(crate) const ALL_MISCHIEF: &[Mischief] = &[
    Mischief::Hang,
    Mischief::Close,
    Mischief::Short,
    Mischief::Endless,
    Mischief::Other,
    Mischief::Unmarked,
    Mischief::Twice,
    Mischief::Descriptors,
    Mischief::Ones,
    Mischief::Unasked,
    Mischief::CutOff,
];

/// What tests and daemons share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// At which message what is done wrong, once.
    pub(crate) mischief: Mutex<Option<(u32, Mischief)>>,
    /// It was done.
    pub(crate) done_wrong: AtomicBool,
    /// Who is stuck goes on.
    pub(crate) let_go: AtomicBool,
    /// Queues that were enabled when it last had nothing to answer.
    pub(crate) enabled: AtomicUsize,
    /// How often each queue was kicked.
    pub(crate) kicks: [AtomicUsize; QUEUES as usize],
    /// Writes to the configuration.
    pub(crate) config_writes: AtomicUsize,
    /// Milliseconds before each answer.
    pub(crate) slow: AtomicU64,
    /// These messages are always refused, by closing the connection or by saying so.
    pub(crate) refused: Mutex<Vec<u32>>,
    pub(crate) refuses_by_closing: AtomicBool,
    /// As libvhost-user: a queue that was set up, be it stopped, must be in the memory when some comes, or the connection is closed.
    pub(crate) keeps_addresses: AtomicBool,
    pub(crate) lost_addresses: AtomicUsize,
    /// Requests are taken and not finished.
    pub(crate) hold: AtomicBool,
    /// The connection ends with the first request that is taken.
    pub(crate) dies: AtomicBool,
    /// The disk.
    pub(crate) disk: Mutex<Vec<u8>>,
    pub(crate) connections: AtomicUsize,
    pub(crate) taken: AtomicUsize,
    pub(crate) executed: AtomicUsize,
    /// Of the connection that there is.
    socket: Mutex<Option<UnixStream>>,
    /// Where the daemon asks by itself.
    channel: Mutex<Option<UnixStream>>,
    /// What the driver of the first ring is interrupted by.
    pub(crate) call: Mutex<Option<Doorbell>>,
    /// What the first ring is complained of by.
    error: Mutex<Option<Doorbell>>,
    /// Regions that there are.
    pub(crate) regions: AtomicUsize,
    /// Their addresses and lengths.
    pub(crate) memory: Mutex<Vec<(u64, u64)>>,
    pub(crate) write_back: AtomicBool,
    ended: AtomicBool,
}

/// A daemon.
pub(crate) struct Daemon {
    pub(crate) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Unless it is the one that connects.
    listener: Option<UnixListener>,
}

impl Daemon {
    /// A daemon that connects to `path`, again and again, as Open vSwitch does.
    pub(crate) fn calling(path: &Path, protocol: u64, shared: Arc<Shared>) -> Self {
        let bytes = usize::try_from(SECTORS * 512).expect("small");
        shared.ended.store(false, Ordering::SeqCst);
        shared.disk.lock().expect("sound").resize(bytes, 0);
        let of_thread = Arc::clone(&shared);
        let path = path.to_owned();
        let thread = std::thread::spawn(move || {
            while !of_thread.ended.load(Ordering::SeqCst) {
                let Ok(socket) = UnixStream::connect(&path) else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let copy = socket.try_clone().expect("a descriptor");
                *of_thread.socket.lock().expect("sound") = Some(copy);
                if of_thread.ended.load(Ordering::SeqCst) {
                    return;
                }
                let mut connection = Connection::new(socket, protocol, Arc::clone(&of_thread));
                while connection.serve().is_some() {}
                // The copy would keep it open.
                of_thread.socket.lock().expect("sound").take();
            }
        });
        Self {
            shared,
            thread: Some(thread),
            listener: None,
        }
    }

    pub(crate) fn start(path: &Path, protocol: u64, shared: Arc<Shared>) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        shared
            .disk
            .lock()
            .expect("sound")
            .resize(usize::try_from(SECTORS * 512).expect("small"), 0);
        let of_thread = Arc::clone(&shared);
        let copy = listener.try_clone().expect("a descriptor");
        let thread = std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                if of_thread.ended.load(Ordering::SeqCst) {
                    return;
                }
                let copy = socket.try_clone().expect("a descriptor");
                *of_thread.socket.lock().expect("sound") = Some(copy);
                // Who waits for it may hang it up at once.
                of_thread.connections.fetch_add(1, Ordering::SeqCst);
                let mut connection = Connection::new(socket, protocol, Arc::clone(&of_thread));
                while connection.serve().is_some() {}
                // The copy would keep it open.
                of_thread.socket.lock().expect("sound").take();
            }
        });
        Self {
            shared,
            thread: Some(thread),
            listener: Some(copy),
        }
    }

    /// The connection ends as it does when a daemon is killed: what was taken and not finished stays so.
    pub(crate) fn hang_up(&self) {
        if let Some(socket) = self.shared.socket.lock().expect("sound").take() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Waits until all queues are enabled. The first may be at work before the last is.
    pub(crate) fn has_queues(&self) {
        until("the queues", || {
            let enabled = self.shared.enabled.load(Ordering::SeqCst);
            (enabled == usize::from(QUEUES)).then_some(())
        });
    }

    /// Says that a ring is broken.
    pub(crate) fn complain(&self) {
        let error = self.shared.error.lock().expect("sound");
        error.as_ref().expect("given").ring().expect("rung");
    }

    /// Asks for something by itself, and never reads the answer; false if nobody hears that any more.
    pub(crate) fn ask_on(&self) -> bool {
        self.tell(2, 8)
    }

    /// Says something by itself that it takes no answer of; false if nobody hears that any more, which is so from when
    /// it is cut off until it is connected again.
    pub(crate) fn tell(&self, id: u32, flags: u32) -> bool {
        let channel = self.shared.channel.lock().expect("sound");
        let Some(mut channel) = channel.as_ref() else {
            return false;
        };
        let bytes: Vec<u8> = [id, 1 | flags, 0].map(u32::to_ne_bytes).concat();
        channel.write_all(&bytes).is_ok()
    }

    /// Asks for something by itself, and what was answered.
    pub(crate) fn ask(&self, id: u32) -> u64 {
        assert!(self.tell(id, 8), "nobody hears {id}");
        let channel = self.shared.channel.lock().expect("sound");
        let mut channel = channel.as_ref().expect("a channel");
        let mut answer = [0; 20];
        channel.read_exact(&mut answer).expect("an answer");
        u64::from_ne_bytes(answer[12..].try_into().expect("eight"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.hang_up();
        if let Some(listener) = &self.listener {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the daemon has not panicked");
            }
        }
    }
}
