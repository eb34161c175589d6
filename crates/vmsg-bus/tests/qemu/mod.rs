// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A peer on the bus `linux-user` that behaves as QEMU does, written from the layout alone: it opens the files
//! and never zeroes or locks them, writes whole slots, rings with a blocking write, and after a request looks
//! for the answer in the queue without reading the socket.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) const SLOTS: u32 = 4096;
pub(crate) const BYTES: u64 = 262_272;

/// Which end it stands in for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Driver,
    Device,
}

/// The two queues as it has them open.
pub(crate) struct Queues {
    pub(crate) tx: File,
    pub(crate) rx: File,
}

pub(crate) fn word(file: &File, at: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at).unwrap();
    u32::from_le_bytes(bytes)
}

pub(crate) fn set_word(file: &File, at: u64, value: u32) {
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
}

impl Queues {
    /// As QEMU's device does when it is made.
    pub(crate) fn open(dir: &Path, end: End) -> Self {
        let open = |name: &str| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(dir.join(name))
                .unwrap();
            file.set_len(BYTES).unwrap();
            file
        };
        let (to_device, to_driver) = (open("queue-t-driver"), open("queue-t-device"));
        match end {
            End::Driver => Self {
                tx: to_device,
                rx: to_driver,
            },
            End::Device => Self {
                tx: to_driver,
                rx: to_device,
            },
        }
    }

    /// False: no room.
    pub(crate) fn push(&self, message: &[u8]) -> bool {
        let (head, tail) = (word(&self.tx, 0), word(&self.tx, 0x40));
        let next = (head + 1) % SLOTS;
        if next == tail {
            return false;
        }
        let mut slot = [0; 48];
        slot[..message.len()].copy_from_slice(message);
        self.tx
            .write_all_at(&slot, 0x80 + u64::from(head) * 64)
            .unwrap();
        set_word(&self.tx, 0, next);
        true
    }

    pub(crate) fn pop(&self) -> Option<[u8; 48]> {
        let (head, tail) = (word(&self.rx, 0), word(&self.rx, 0x40));
        if head == tail {
            return None;
        }
        let mut slot = [0; 48];
        self.rx
            .read_exact_at(&mut slot, 0x80 + u64::from(tail) * 64)
            .unwrap();
        set_word(&self.rx, 0x40, (tail + 1) % SLOTS);
        Some(slot)
    }
}

pub(crate) struct Qemu {
    pub(crate) queues: Queues,
    pub(crate) socket: UnixStream,
}

impl Qemu {
    /// Connects first and opens the files later, as a character device does that its user follows.
    pub(crate) fn connect(dir: &Path, end: End) -> Self {
        let socket = UnixStream::connect(dir.join("linux-user.socket")).unwrap();
        let queues = Queues::open(dir, end);
        Self { queues, socket }
    }

    pub(crate) fn send(&mut self, message: &[u8]) {
        while !self.queues.push(message) {}
        self.socket.write_all(&[0xed]).unwrap();
    }

    /// Sends a request and polls for the answer for as long as QEMU does; longer, and it ends itself.
    pub(crate) fn ask(&mut self, message: &[u8]) -> [u8; 48] {
        self.send(message);
        let begin = Instant::now();
        loop {
            if let Some(answer) = self.queues.pop() {
                return answer;
            }
            // QEMU's patience is 70 ms on an idle machine; this one may be busy.
            assert!(begin.elapsed() < Duration::from_secs(60), "no answer");
            std::thread::sleep(Duration::from_micros(5));
        }
    }

    /// One turn of its main loop: reads what is in the socket, which it waits for, and drains the queue.
    pub(crate) fn turn(&mut self, mut each: impl FnMut(&Queues, [u8; 48])) {
        let mut bytes = [0; 128];
        let read = self.socket.read(&mut bytes).unwrap();
        assert!(read > 0, "the other side is gone");
        while let Some(message) = self.queues.pop() {
            each(&self.queues, message);
        }
    }
}
