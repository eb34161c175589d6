// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same without us: bare copies, a pair of Unix datagram sockets.

use std::hint::{black_box, spin_loop};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair, sockopt};
use vmsg_mem::{Mapping, RamSlice};

use crate::frames::{HEADER, QUEUE, Shape};
use crate::measure::{Plan, pace};
use crate::two_sides::{Places, beside};

/// Memory as that of one sender and one receiver.
pub(crate) struct Copies {
    shape: Shape,
    source: RamSlice<'static>,
    target: RamSlice<'static>,
    sent: usize,
    taken: usize,
}

impl Copies {
    pub(crate) fn new(shape: &Shape) -> Self {
        // The same kind of memory; the process is short.
        let filled = |len: usize| {
            let (mapping, _fd) = Mapping::memfd("copies", len as u64, true).expect("memory");
            let mapping: &'static Mapping = Box::leak(Box::new(mapping));
            mapping.ram().fill(0x5a);
            mapping.ram()
        };
        Self {
            shape: *shape,
            source: filled(shape.outgoing * shape.stride),
            target: filled(QUEUE * shape.buffer),
            sent: 0,
            taken: 0,
        }
    }

    /// Copies a batch, from and to where the switch does; returns its frames.
    pub(crate) fn batch(&mut self) -> usize {
        let Shape {
            len,
            batch,
            outgoing,
            stride,
            buffer,
            ..
        } = self.shape;
        for _ in 0..batch {
            let at = self.sent % outgoing * stride + HEADER;
            let mut frame = self.source.get(at, len).expect("inside");
            let mut room = HEADER;
            while !frame.is_empty() {
                let at = self.taken % QUEUE * buffer + room;
                let (now, rest) = frame.split_at(frame.len().min(buffer - room));
                now.copy_to(self.target.get(at, now.len()).expect("inside"));
                frame = rest;
                room = 0;
                self.taken += 1;
            }
            self.sent += 1;
        }
        batch
    }
}

#[repr(align(128))]
#[derive(Default)]
struct Count(AtomicUsize);

/// Nanoseconds for a frame that is written here, copied there, and read here: what drivers and a worker do, without queues.
pub(crate) fn copies_across(plan: &Plan, places: &Places, shape: &Shape) -> f64 {
    let words = |bytes: usize| -> Vec<AtomicU64> {
        let word = || AtomicU64::new(0x5a5a_5a5a_5a5a_5a5a);
        (0..bytes / 8).map(|_| word()).collect()
    };
    let source = words(shape.outgoing * shape.stride);
    let target = words(QUEUE * shape.buffer);
    let (source, target) = (
        RamSlice::from_atomics(&source),
        RamSlice::from_atomics(&target),
    );
    let (written, copied) = (Count::default(), Count::default());
    let stop = AtomicBool::new(false);
    let outgoing = |number: usize| {
        let at = number % shape.outgoing * shape.stride + HEADER;
        source.get(at, shape.len).expect("inside")
    };
    // Pieces of the receiver's memory, for the frame that begins in buffer `taken`.
    let incoming = |taken: usize, each: &mut dyn FnMut(usize, RamSlice<'_>)| {
        let (mut done, mut room) = (0, HEADER);
        for number in taken..taken + shape.buffers() {
            let now = (shape.len - done).min(shape.buffer - room);
            let at = number % QUEUE * shape.buffer + room;
            each(done, target.get(at, now).expect("inside"));
            done += now;
            room = 0;
        }
    };
    let copy = || {
        let mut done = 0;
        while !stop.load(Ordering::Relaxed) {
            let until = written
                .0
                .load(Ordering::Acquire)
                .min(done + shape.batch / 2);
            if done == until {
                spin_loop();
                continue;
            }
            while done < until {
                let frame = outgoing(done);
                incoming(done * shape.buffers(), &mut |at, room| {
                    frame.get(at, room.len()).expect("inside").copy_to(room);
                });
                done += 1;
            }
            copied.0.store(done, Ordering::Release);
        }
    };
    let mut frame = vec![0x5a; shape.len];
    let most = most_in_flight(shape);
    let (mut sent, mut taken) = (0, 0);
    beside(places, copy, || {
        let result = pace(plan, || {
            let before = taken;
            if sent - taken + shape.batch / 2 <= most {
                for _ in 0..shape.batch / 2 {
                    outgoing(sent).write(0, &frame);
                    sent += 1;
                }
                written.0.store(sent, Ordering::Release);
            }
            let until = copied.0.load(Ordering::Acquire);
            while taken < until {
                incoming(taken * shape.buffers(), &mut |at, piece| {
                    piece.read(0, &mut frame[at..]);
                });
                taken += 1;
            }
            black_box(&mut frame);
            taken - before
        });
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Frames that may be under way where nobody drops any.
pub(crate) fn most_in_flight(shape: &Shape) -> usize {
    (QUEUE / shape.buffers()).min(shape.outgoing)
}

/// Two datagram sockets that are connected to each other.
pub(crate) struct Datagrams {
    ends: (OwnedFd, OwnedFd),
    frame: Vec<u8>,
    room: Vec<u8>,
}

/// Datagrams that a socket holds (`net.unix.max_dgram_qlen` is 10 by default).
const DATAGRAMS: usize = 8;

impl Datagrams {
    pub(crate) fn new(shape: &Shape) -> Self {
        let ends = socketpair(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("sockets");
        for end in [&ends.0, &ends.1] {
            sockopt::set_socket_send_buffer_size(end, 2 << 20).expect("a size");
        }
        Self {
            ends,
            frame: vec![0x5a; shape.len],
            room: vec![0; shape.len + 1],
        }
    }

    fn send(&self) {
        let sent = rustix::net::send(&self.ends.0, &self.frame, SendFlags::empty());
        assert_eq!(sent.expect("sent"), self.frame.len());
    }

    fn take(end: &OwnedFd, room: &mut [u8]) {
        rustix::io::read(end, room).expect("received");
    }

    /// Sends some and takes them; how many.
    pub(crate) fn batch(&mut self) -> usize {
        for _ in 0..DATAGRAMS {
            self.send();
        }
        for _ in 0..DATAGRAMS {
            Self::take(&self.ends.1, &mut self.room);
        }
        DATAGRAMS
    }

    /// Nanoseconds for each, sent here and taken there.
    pub(crate) fn across(&mut self, plan: &Plan, places: &Places) -> f64 {
        let stop = AtomicBool::new(false);
        let (end, room) = (&self.ends.1, &mut self.room);
        let other = || {
            while !stop.load(Ordering::Relaxed) {
                Self::take(end, room);
            }
        };
        let (send_end, frame) = (&self.ends.0, &self.frame);
        let result = beside(places, other, || {
            let send = || rustix::net::send(send_end, frame, SendFlags::empty()).expect("sent");
            let result = pace(plan, || {
                send();
                1
            });
            stop.store(true, Ordering::Relaxed);
            // Whoever waits for one sees that it is over.
            send();
            result
        });
        // The next one begins with nothing.
        let flags = rustix::net::RecvFlags::DONTWAIT;
        while rustix::net::recv(&self.ends.1, self.room.as_mut_slice(), flags).is_ok() {}
        result
    }
}
