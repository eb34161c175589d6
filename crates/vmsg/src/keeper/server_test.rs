// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::thread;

use tempfile::TempDir;

use super::super::Keeper;
use super::*;

struct Running {
    folder: TempDir,
    thread: thread::JoinHandle<anyhow::Result<()>>,
}

impl Running {
    fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let listener = listen_at(&folder.path().join("keep")).expect("listens");
        let thread = thread::spawn(move || keep(&listener, Duration::from_secs(60)));
        Self { folder, thread }
    }

    fn find(&self) -> (Keeper, usize) {
        let path = self.folder.path().join("keep");
        let (keeper, kept) = Keeper::find_or_start(&path, 60).expect("a keeper");
        assert!(keeper.was_found());
        (keeper, kept.values().map(Vec::len).sum())
    }
}

/// A `serve` that connects and dies before it has read a word.
fn die_early(running: &Running) {
    let path = running.folder.path().join("keep");
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket");
    let address = SocketAddrUnix::new(&path).expect("short");
    rustix::net::connect(&socket, &address).expect("connected");
}

#[test]
fn connections_outlive_a_serve_that_dies_while_it_is_given_them() {
    let running = Running::start();
    let (keeper, kept) = running.find();
    assert_eq!(kept, 0);
    let file = std::fs::File::open("/dev/null").expect("a descriptor");
    for key in 1..=500 {
        keeper.put("net0", key, b"record", file.as_fd());
    }
    keeper.remove("net0", 7);
    keeper.hang_up();
    for _ in 0..20 {
        die_early(&running);
    }
    let (keeper, kept) = running.find();
    assert_eq!(kept, 499);
    keeper.dismiss();
    running.thread.join().expect("no panic").expect("no error");
}
