// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's end of the memory, by hand: what the recorded drivers did with it, each doorbell included.

use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use ivshmem::{Client, Memory, PeerId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const SLOT: usize = 64;
/// Indices of the states in a queue head.
const INIT: u16 = 0;
const READY: u16 = 1;
const RUN: u16 = 2;
const SHUTDOWN: u16 = 3;

/// How the queues lie in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Amp,
    Spsc,
    AmpPci,
}

/// One index of a queue: where it is, and how many bytes it has.
#[derive(Clone, Copy, Debug)]
struct Index {
    at: usize,
    long: bool,
}

/// Queues that a driver has found.
#[derive(Clone, Copy, Debug)]
struct Queues {
    /// Slots of each queue.
    count: usize,
    out: usize,
    out_mine: Index,
    out_theirs: Index,
    into: usize,
    into_mine: Index,
    into_theirs: Index,
    /// AMP: our own queue head.
    head: Option<usize>,
}

/// A driver's end.
pub(crate) struct Wire {
    /// Doorbells, where there are some.
    client: Option<Client>,
    memory: Memory,
    queues: Queues,
}

impl Wire {
    /// A client of the server at `socket`, which begins as Linux's drivers do.
    pub(crate) fn client(socket: &Path, layout: Layout) -> Self {
        let client = Client::connect(socket, PATIENCE).expect("a server");
        let memory = Memory::of_file(client.memory_fd(), client.memory_size()).expect("a mapping");
        let queues = begin(&memory, layout);
        Self {
            client: Some(client),
            memory,
            queues,
        }
    }

    /// Memory in a file, without doorbells.
    pub(crate) fn file(path: &Path, layout: Layout) -> Self {
        use std::os::fd::AsFd;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("a file");
        let size = file.metadata().expect("a file").len();
        let memory = Memory::of_file(file.as_fd(), size).expect("a mapping");
        let queues = begin(&memory, layout);
        Self {
            client: None,
            memory,
            queues,
        }
    }

    /// Writes a message into the next slot and rings once, as Linux's and QEMU's drivers do for each.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let queues = self.queues;
        let tail = get(&self.memory, queues.out_mine);
        let following = (tail + 1) % queues.count;
        let end = Instant::now() + PATIENCE;
        while following == get(&self.memory, queues.out_theirs) {
            assert!(Instant::now() < end, "the queue stays full");
            self.wait(Duration::from_millis(1));
        }
        let region = self.memory.region();
        assert_eq!(region.write(queues.out + SLOT * tail, bytes), bytes.len());
        fence(Ordering::SeqCst);
        put(&self.memory, queues.out_mine, following);
        self.ring();
    }

    fn ring(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        while client.poll().is_some() {}
        let peers: Vec<PeerId> = client.peers().map(|(peer, _)| peer).collect();
        for peer in peers {
            // Who has gone meanwhile hears nothing.
            let _ = client.ring(peer, 0);
        }
    }

    /// The next slot; `None` if there is none in time.
    pub(crate) fn recv(&mut self, timeout: Duration) -> Option<[u8; SLOT]> {
        let queues = self.queues;
        let end = Instant::now() + timeout;
        loop {
            let head = get(&self.memory, queues.into_mine);
            if head != get(&self.memory, queues.into_theirs) {
                fence(Ordering::SeqCst);
                let mut slot = [0; SLOT];
                let region = self.memory.region();
                assert_eq!(region.read(queues.into + SLOT * head, &mut slot), SLOT);
                put(&self.memory, queues.into_mine, (head + 1) % queues.count);
                return Some(slot);
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return None;
            }
            self.wait(rest);
        }
    }

    /// Waits for a doorbell; without any, for a moment.
    pub(crate) fn wait(&self, timeout: Duration) {
        let vector = self.client.as_ref().and_then(|client| client.vector_fd(0));
        let limit = if vector.is_some() {
            timeout
        } else {
            timeout.min(Duration::from_millis(1))
        };
        let limit = Timespec::try_from(limit).expect("seconds");
        match vector {
            Some(fd) => {
                let mut fds = [PollFd::new(&fd, PollFlags::IN)];
                if poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0) {
                    let mut count = [0; 8];
                    // Somebody else can have read it.
                    let _ = rustix::io::read(fd, &mut count);
                }
            }
            None => {
                let _ = poll(&mut [], Some(&limit));
            }
        }
    }

    /// As Linux's driver at removal: no doorbell.
    pub(crate) fn shut_down(&mut self) {
        if let Some(head) = self.queues.head {
            store16(&self.memory, head + 2, SHUTDOWN);
        }
    }
}

fn load16(memory: &Memory, at: usize) -> u16 {
    memory.region().read_u16(at).expect("inside and aligned")
}

fn store16(memory: &Memory, at: usize, value: u16) {
    assert!(memory.region().write_u16(at, value), "{at:#x}");
}

fn get(memory: &Memory, index: Index) -> usize {
    if index.long {
        let word = memory.region().read_u32(index.at).expect("inside");
        usize::try_from(word).expect("64 bits")
    } else {
        usize::from(load16(memory, index.at))
    }
}

fn put(memory: &Memory, index: Index, value: usize) {
    if index.long {
        let word = u32::try_from(value).expect("small");
        assert!(memory.region().write_u32(index.at, word));
    } else {
        store16(memory, index.at, u16::try_from(value).expect("small"));
    }
}

fn begin(memory: &Memory, layout: Layout) -> Queues {
    match layout {
        Layout::Amp => probe(memory, 4096),
        Layout::Spsc => pages(0, 4096),
        Layout::AmpPci => pages(4096, 8192),
    }
}

/// Two pages, which are taken as they are.
fn pages(to_device: usize, to_driver: usize) -> Queues {
    let index = |at| Index { at, long: true };
    Queues {
        count: (4096 - 0x80) / SLOT,
        out: to_device + 0x80,
        out_mine: index(to_device),
        out_theirs: index(to_device + 0x40),
        into: to_driver + 0x80,
        into_mine: index(to_driver + 0x40),
        into_theirs: index(to_driver),
        head: None,
    }
}

/// As Linux's driver of 2026 begins: no doorbell, and it looks again and again.
fn probe(memory: &Memory, at: usize) -> Queues {
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "in vain: {what}");
            let moment = Timespec::try_from(Duration::from_millis(5)).expect("short");
            let _ = poll(&mut [], Some(&moment));
        }
    };
    wait("the layout", &|| load16(memory, at) == 0x4c4f);
    let mut layout = [0; 64];
    assert_eq!(memory.region().read(at, &mut layout), 64);
    let short = |from: usize| usize::from(u16::from_le_bytes([layout[from], layout[from + 1]]));
    let long = |from: usize| {
        let bytes: [u8; 8] = layout[from..from + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_le_bytes(bytes)).expect("64 bits")
    };
    assert_eq!(
        (short(2), short(4), short(14)),
        (64, 1, 0),
        "length, version, reserved"
    );
    let count = short(10);
    assert_eq!(
        short(12),
        SLOT,
        "the recorded drivers have elements of 64 bytes"
    );
    let (theirs, into) = (at + long(24), at + long(32));
    let (mine, out) = (at + long(48), at + long(56));
    assert_eq!(
        memory.region().write(out, &vec![0; count * SLOT]),
        count * SLOT
    );
    store16(memory, mine + 2, INIT);
    store16(memory, mine, 0x514f);
    wait("the device's queue head", &|| {
        load16(memory, theirs) == 0x514f
    });
    let state = || load16(memory, theirs + 2) & 0x1f;
    assert!(state() <= RUN, "the probe would fail for good: {}", state());
    store16(memory, mine + 6, 0);
    store16(memory, mine + 4, 0);
    store16(memory, mine + 2, READY);
    wait("the device to be ready", &|| state() != INIT);
    assert!(state() <= RUN, "the probe would fail for good: {}", state());
    store16(memory, mine + 2, RUN);
    let index = |at| Index { at, long: false };
    Queues {
        count,
        out,
        out_mine: index(mine + 4),
        out_theirs: index(theirs + 6),
        into,
        into_mine: index(mine + 6),
        into_theirs: index(theirs + 4),
        head: Some(mine),
    }
}
