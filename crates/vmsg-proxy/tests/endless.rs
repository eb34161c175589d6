// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Front ends that come and go without end leave neither descriptors nor threads nor a disk full of log. One test, for it counts what the
//! whole process has.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use stage::{FEATURES, PROTOCOL_FEATURES, Stage, Vmm, is_closed, request};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tracing::span;

/// Lines of log at the level that is told unless more is asked for.
static LINES: AtomicUsize = AtomicUsize::new(0);

struct Count;

impl tracing::Subscriber for Count {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        LINES.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn entries(of: &str) -> usize {
    std::fs::read_dir(of).unwrap().count()
}

/// Descriptors and threads of this process.
fn held() -> (usize, usize) {
    (entries("/proc/self/fd"), entries("/proc/self/task"))
}

#[track_caller]
fn until_held(what: (usize, usize)) {
    let end = Instant::now() + stage::PATIENCE;
    loop {
        let now = held();
        if now.0 <= what.0 && now.1 <= what.1 {
            return;
        }
        assert!(Instant::now() < end, "{now:?}, should be {what:?}");
        std::thread::yield_now();
    }
}

#[test]
fn front_ends_without_end_leave_nothing_behind() {
    tracing::subscriber::set_global_default(Count).unwrap();
    // Threads and descriptors that are made once in a process.
    drop(Vmm::start(&Stage::new(Host::rng()), 1));
    let outside = held();
    let stage = Stage::new(Host::rng());
    drop(Vmm::start(&stage, 1));
    stage.until("released", |host| !host.claimed);
    let inside = held();
    LINES.store(0, Ordering::Relaxed);
    let begin = Instant::now();
    for round in 0..500 {
        // A good guest that is killed.
        if round % 10 == 0 {
            drop(Vmm::start(&stage, 1));
        }
        // Nobody.
        drop(UnixStream::connect(stage.socket()).unwrap());
        // Features that are not offered.
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        socket
            .write_all(&request(2, &u64::MAX.to_ne_bytes()))
            .unwrap();
        assert!(is_closed(&mut socket));
        // No vhost-user at all.
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        socket.write_all(&[0xff; 64]).unwrap();
        assert!(is_closed(&mut socket));
        // Half a message with too many descriptors, and a whole one with the wrong ones.
        for (bytes, count) in [
            (
                request(2, &(FEATURES | PROTOCOL_FEATURES).to_ne_bytes())[..5].to_vec(),
                64,
            ),
            (request(5, &[0; 40]), 8),
            (request(13, &[0; 8]), 2),
        ] {
            let socket = UnixStream::connect(stage.socket()).unwrap();
            let fds = vec![socket.as_fd(); count];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(
                &socket,
                &[IoSlice::new(&bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
            .unwrap();
            let mut socket = socket;
            assert!(is_closed(&mut socket), "{count}");
        }
    }
    until_held(inside);
    stage.until("released", |host| !host.claimed && host.windows.is_empty());
    assert!(stage.front().stats().connections >= 3000);
    let lines = LINES.load(Ordering::Relaxed);
    // A few in a row, and then with time.
    let seconds = usize::try_from(begin.elapsed().as_secs()).unwrap();
    assert!(lines < 200 + seconds, "{lines} lines of log");
    assert!(lines > 0, "the first are told");
    drop(stage);
    until_held(outside);
}
