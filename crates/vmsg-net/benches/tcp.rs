// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP through the user-mode stack in large segments, as a ratio to a plain copy through a TCP
//! socket of the loopback interface in the same run: floor, subject, floor; the median of at
//! least 15 repetitions, without those whose floors differ by more than 30 %.
#![forbid(unsafe_code)]

mod guest_tcp;

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use guest_tcp::{Amount, BATCH, Frame, Guest, HEADERS, SEGMENT, Wire};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::user::{User, UserConfig};
use vmsg_net::{Backend, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Bytes of a receive buffer: a frame as large as they get.
const BUFFER: usize = 65600;
const BUFFERS: usize = 32;
/// Room for the headers of a frame to be sent.
const HEAD: usize = 64;

/// What the guest has negotiated.
const OFFLOADS: Offloads = Offloads {
    csum: true,
    tso4: true,
    guest_csum: true,
    guest_tso4: true,
    mtu: 1500,
    ..Offloads::NONE
};

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(1)).collect()
}

/// The guest's receive buffers, used in a circle; frames are looked at only as far as the headers.
struct Buffers<'a> {
    buffers: Vec<[RamSlice<'a>; 1]>,
    next: usize,
    left: usize,
    frames: Vec<[u8; HEADERS]>,
}

impl RxSink for Buffers<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        let room = Pieces::new(&self.buffers[self.next]);
        (self.left > 0 && len <= room.len()).then_some(room)
    }

    fn commit(&mut self, _: &VnetHeader, _: usize) {
        if let Some(head) = Pieces::new(&self.buffers[self.next]).read_array() {
            self.frames.push(head);
        }
        self.next = (self.next + 1) % self.buffers.len();
        self.left -= 1;
    }
}

/// The stack without a device before it: frames in memory, one thread.
struct Direct<'a> {
    user: User,
    buffers: Buffers<'a>,
    heads: RamSlice<'a>,
    payload: RamSlice<'a>,
}

impl Wire for Direct<'_> {
    fn send(&mut self, frames: &[Frame]) {
        let pieces: Vec<_> = frames
            .iter()
            .enumerate()
            .map(|(index, frame)| {
                let head = frame.head();
                let to = self.heads.get(index * HEAD, head.len()).expect("room");
                to.write(0, head);
                let payload = self.payload.get(index * SEGMENT, frame.payload);
                [to, payload.expect("room")]
            })
            .collect();
        let frames: Vec<_> = frames
            .iter()
            .zip(&pieces)
            .map(|(frame, pieces)| TxFrame {
                header: frame.vnet,
                payload: Pieces::new(pieces),
            })
            .collect();
        let taken = self.user.transmit(Instant::now(), 0, &frames);
        assert_eq!(taken, frames.len(), "the stack takes whatever comes");
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS])) {
        let Self { user, buffers, .. } = self;
        buffers.frames.clear();
        buffers.left = buffers.buffers.len();
        let now = Instant::now();
        user.poll(now);
        user.receive(now, buffers);
        if buffers.frames.is_empty() {
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 5_000_000,
            };
            let fd = user.event_fd().expect("a descriptor");
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            poll(&mut fds, Some(&timeout)).expect("poll");
        }
        for head in &buffers.frames {
            each(head);
        }
    }
}

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let mut user = User::new(UserConfig::default()).expect("a stack");
    user.set_guest(&vmsg_net::Guest {
        offloads: OFFLOADS,
        ..vmsg_net::Guest::NONE
    });
    let store = memory(BUFFERS * BUFFER);
    let all = RamSlice::from_atomics(&store);
    let heads = memory(BATCH * HEAD);
    let payload = memory(BATCH * SEGMENT);
    let mut guest = Guest::new(Direct {
        user,
        buffers: Buffers {
            buffers: (0..BUFFERS)
                .map(|i| [all.get(i * BUFFER, BUFFER).expect("room")])
                .collect(),
            next: 0,
            left: 0,
            frames: Vec::new(),
        },
        heads: RamSlice::from_atomics(&heads),
        payload: RamSlice::from_atomics(&payload),
    });
    guest_tcp::print_head("TCP through `user`, large segments");
    let amount = if test { Amount::TEST } else { Amount::FULL };
    guest_tcp::print_rows(&mut guest, "all CPUs", amount);
    // Connections that rest cost nothing.
    let idle = if test { 10 } else { 2000 };
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("up to the hard limit");
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let held: Vec<TcpStream> = (0..idle)
        .map(|_| {
            guest.hold(port);
            listener.accept().expect("accept").0
        })
        .collect();
    let place = format!("beside {} that rest", held.len());
    guest_tcp::print_rows(&mut guest, &place, amount);
}
