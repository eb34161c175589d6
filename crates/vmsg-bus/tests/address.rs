// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Socket files: who may have one, and how a driver learns that one is there.
#![cfg(feature = "unix")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Instant;
use vmsg_bus::unix::{
    BindError, ConnectError, Connector, Listener, ListenerOptions, MAX_PATH, Watch,
};

fn bind(path: &Path) -> Result<Listener, BindError> {
    Listener::bind(path, ListenerOptions::default())
}

/// A listening socket without a lock, as another program would make it.
fn foreign(path: &Path, kind: SocketType) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 1).unwrap();
    socket
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn socket_and_lock_are_there_while_it_listens_and_gone_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let listener = bind(&path).unwrap();
    assert_eq!(names(dir.path()), ["b.sock", "b.sock.lock"]);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        fs::read_to_string(dir.path().join("b.sock.lock")).unwrap(),
        format!("{}\n", std::process::id())
    );
    drop(listener);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn the_mode_is_the_one_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let _listener = Listener::bind(
        &path,
        ListenerOptions {
            mode: 0o666,
            ..ListenerOptions::default()
        },
    )
    .unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o666
    );
}

#[test]
fn a_socket_that_nobody_answers_on_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    drop(foreign(&path, SocketType::SEQPACKET));
    // What a killed host leaves besides.
    fs::write(dir.path().join("b.sock.lock"), "1\n").unwrap();
    drop(foreign(
        &dir.path().join("b.sock.new"),
        SocketType::SEQPACKET,
    ));
    let mut listener = bind(&path).unwrap();
    let mut connecting = Connector::new(&path, "driver").start().unwrap();
    let device = listener.accept(Instant::now()).unwrap().unwrap();
    assert_eq!(device.peer_name(), "driver");
    assert_eq!(device.peer().pid, Some(std::process::id()));
    assert_eq!(
        connecting.advance().unwrap().unwrap().peer().pid,
        Some(std::process::id())
    );
    assert_eq!(names(dir.path()), ["b.sock", "b.sock.lock"]);
}

#[test]
fn a_path_in_use_is_left_alone_and_the_holder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let _first = bind(&path).unwrap();
    let error = bind(&path).unwrap_err();
    assert!(
        matches!(&error, BindError::InUse { pid: Some(pid), .. } if *pid == std::process::id())
    );
    let expected = format!(
        "is in use by process {}; end that process or choose another path",
        std::process::id()
    );
    assert!(error.to_string().ends_with(&expected), "{error}");
    assert!(Connector::new(&path, "driver").start().is_ok());
    for kind in [SocketType::SEQPACKET, SocketType::STREAM] {
        let path = dir.path().join(format!("{kind:?}.sock"));
        let _other = foreign(&path, kind);
        assert!(matches!(bind(&path), Err(BindError::InUse { .. })));
        assert!(path.exists());
    }
}

#[test]
fn other_files_and_impossible_paths_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(matches!(bind(&file), Err(BindError::NotASocket { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    let long = dir.path().join("x".repeat(MAX_PATH));
    let error = bind(&long).unwrap_err();
    assert!(matches!(error, BindError::PathTooLong { .. }));
    assert!(error.to_string().contains("at most 103"));
    let missing = bind(&dir.path().join("no/b.sock")).unwrap_err().to_string();
    assert!(
        missing.starts_with("cannot open the lock file"),
        "{missing}"
    );
}

#[test]
fn a_driver_without_host_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let error = Connector::new(&path, "driver").connect().unwrap_err();
    assert!(matches!(error, ConnectError::NotThere { .. }) && error.is_transient());
    assert!(error.to_string().starts_with("no device host listens on"));
    drop(foreign(&path, SocketType::SEQPACKET));
    assert!(matches!(
        Connector::new(&path, "driver").connect(),
        Err(ConnectError::NotThere { .. })
    ));
    let other = dir.path().join("s.sock");
    let _other = foreign(&other, SocketType::STREAM);
    assert!(matches!(
        Connector::new(&other, "driver").connect(),
        Err(ConnectError::Handshake { .. })
    ));
}

/// Waits until the watch says that it is worth trying.
fn wait(watch: &mut Watch) {
    loop {
        let mut fds = [PollFd::new(watch, PollFlags::IN)];
        let long = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        assert_eq!(
            poll(&mut fds, Some(&long)).unwrap(),
            1,
            "the watch slept on"
        );
        if watch.ready().unwrap() {
            return;
        }
    }
}

#[test]
fn a_watch_tells_when_a_host_starts_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.sock");
    let connector = Connector::new(&path, "driver");
    let mut watch = Watch::new(&path).unwrap();
    for _ in 0..20 {
        assert!(matches!(
            connector.start(),
            Err(ConnectError::NotThere { .. })
        ));
        let host = thread::spawn({
            let path = path.clone();
            move || bind(&path).unwrap()
        });
        // One event, one attempt: it must succeed.
        wait(&mut watch);
        connector.start().unwrap();
        drop(host.join().unwrap());
        // A killed one leaves its socket; the next renames over it.
        drop(foreign(&path, SocketType::SEQPACKET));
        while watch.ready().unwrap() {}
    }
}

#[test]
fn a_watch_waits_for_directories_that_do_not_exist_yet() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/c/b.sock");
    let mut watch = Watch::new(&path).unwrap();
    fs::write(dir.path().join("unrelated"), "").unwrap();
    assert!(!watch.ready().unwrap());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    // The directory may have come with the socket in it.
    wait(&mut watch);
    let listener = bind(&path).unwrap();
    wait(&mut watch);
    drop(listener);
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    let _ = watch.ready().unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _listener = bind(&path).unwrap();
    wait(&mut watch);
    assert!(Connector::new(&path, "driver").start().is_ok());
}
