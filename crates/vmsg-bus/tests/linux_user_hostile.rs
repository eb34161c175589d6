// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `linux-user` in a folder where somebody else has files, links and locks of those names.
#![cfg(feature = "linux-user")]

mod place;

use place::{LONG, spec, wait};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vmsg_bus::linux_user::{Connector, Listener};
use vmsg_bus::{ConnectError, DeviceBus, DriverBus, LinuxUserSpec};

/// What a bus makes itself and would write over.
const FILES: [&str; 5] = [
    "queue-t-driver",
    "queue-t-device",
    "queue-t.lock",
    "queue-t.device.lock",
    "linux-user.socket.lock",
];

const PRECIOUS: &str = "precious";

/// A driver of ours and the device host's end of the same connection.
fn join(spec: &LinuxUserSpec, listener: &mut Listener) -> (DriverBus, DeviceBus) {
    let connector = Connector::new(spec, "driver").timeout(LONG);
    let driver = std::thread::spawn(move || connector.connect().unwrap());
    let until = Instant::now() + LONG;
    let device = loop {
        // Trouble that passes is reported and waited out.
        if let Ok(Some(bus)) = listener.accept(Instant::now()) {
            break bus;
        }
        assert!(Instant::now() < until, "nobody connected");
        wait(&*listener, listener.next_deadline());
    };
    (driver.join().unwrap(), device)
}

/// Locks `path` as another program would.
fn lock(path: &Path) -> File {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    File::from(file)
}

#[test]
fn links_pipes_and_folders_in_the_place_of_files_are_named_and_left_alone() {
    for name in FILES {
        for (kind, says) in [
            ("a symbolic link", ["symbolic link", "not a regular file"]),
            ("a hard link", ["hard links", "hard links"]),
            ("a pipe", ["not a regular file", "not a regular file"]),
            ("a folder", ["not a regular file", "directory"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (path, victim) = (dir.path().join(name), dir.path().join("victim"));
            fs::write(&victim, PRECIOUS).unwrap();
            match kind {
                "a symbolic link" => symlink(&victim, &path).unwrap(),
                "a hard link" => fs::hard_link(&victim, &path).unwrap(),
                "a pipe" => {
                    let mode = Mode::RUSR | Mode::WUSR;
                    let kind = rustix::fs::FileType::Fifo;
                    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
                }
                _ => fs::create_dir(&path).unwrap(),
            }
            let error = Listener::bind(&spec(dir.path()), "host").unwrap_err();
            let error = error.to_string();
            assert!(
                says.iter().any(|says| error.contains(says)),
                "{kind}: {error}"
            );
            assert!(error.contains(name), "{kind}: {error}");
            assert_eq!(
                fs::read_to_string(&victim).unwrap(),
                PRECIOUS,
                "{kind} {name}"
            );
            assert!(path.symlink_metadata().is_ok(), "{kind} {name} is gone");
        }
    }
}

#[test]
fn a_lock_that_a_stranger_keeps_ends_the_waiting_of_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let path = dir.path().join("queue-t.lock");
    let stranger = lock(&path);
    let refused = Listener::bind(&spec, "host").unwrap_err().to_string();
    assert!(
        refused.contains("queue-t.lock") && refused.contains("keeps it locked"),
        "{refused}"
    );
    drop(stranger);
    // While the host is running: it waits no longer than others can bear.
    let mut listener = Listener::bind(&spec, "host").unwrap();
    let stranger = lock(&path);
    let error = Connector::new(&spec, "driver").connect().unwrap_err();
    assert!(error.to_string().contains("keeps it locked"), "{error}");
    let _visitor = UnixStream::connect(listener.path()).unwrap();
    let begin = Instant::now();
    listener.accept(begin).unwrap_err();
    let took = begin.elapsed();
    // At the start it is waited for 2 s.
    assert!(took < Duration::from_millis(1900), "others waited {took:?}");
    // And tries again by itself, but not at once.
    assert!(listener.next_deadline().is_some_and(|at| at > begin));
    drop(stranger);
    drop(_visitor);
    join(&spec, &mut listener);
}

#[test]
fn files_that_are_exchanged_under_a_running_host_are_made_again_and_those_of_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut listener = Listener::bind(&spec, "host").unwrap();
    for name in ["queue-t-driver", "queue-t-device"] {
        let path = dir.path().join(name);
        fs::rename(&path, path.with_extension("old")).unwrap();
        fs::write(&path, "x").unwrap();
        drop(join(&spec, &mut listener));
        fs::remove_file(&path).unwrap();
        symlink("/dev/null", &path).unwrap();
        // The first call may still be about the end of the last connection.
        let until = Instant::now() + LONG;
        while listener.accept(Instant::now()).is_ok() {
            assert!(Instant::now() < until, "a link was taken for a queue");
        }
        fs::remove_file(&path).unwrap();
        drop(join(&spec, &mut listener));
    }
    // Locks and the socket.
    let mine = [
        "queue-t.device.lock",
        "linux-user.socket.lock",
        "linux-user.socket",
    ];
    for name in mine {
        let path = dir.path().join(name);
        fs::remove_file(&path).unwrap();
        fs::write(&path, PRECIOUS).unwrap();
    }
    drop(listener);
    for name in mine {
        let text = fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(text, PRECIOUS, "{name}");
    }
}

#[test]
fn a_stranger_on_the_socket_that_says_nothing_costs_a_driver_its_patience_only() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let listener = Listener::bind(&spec, "host").unwrap();
    fs::remove_file(listener.path()).unwrap();
    let stranger = UnixListener::bind(listener.path()).unwrap();
    let connector = Connector::new(&spec, "driver").timeout(Duration::from_millis(50));
    let error = connector.connect().unwrap_err();
    assert!(matches!(error, ConnectError::NotTaken { .. }), "{error}");
    // One that takes the connection and never empties the queue.
    let (silent, _) = stranger.accept().unwrap();
    let error = connector.connect().unwrap_err();
    assert!(matches!(error, ConnectError::NotTaken { .. }), "{error}");
    drop(silent);
    // The host can be reached by nobody now, and says so by nothing but its being there.
    drop((connector, listener));
    assert!(
        dir.path().join("linux-user.socket").exists(),
        "it is the stranger's"
    );
}

#[test]
fn a_storm_of_connections_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let mut listener = Listener::bind(&spec, "host").unwrap();
    let fds = || fs::read_dir("/proc/self/fd").unwrap().count();
    drop(join(&spec, &mut listener));
    for _ in 0..500 {
        let visitor = UnixStream::connect(listener.path()).unwrap();
        drop(visitor);
        if let Ok(Some(bus)) = listener.accept(Instant::now()) {
            drop(bus);
        }
    }
    let before = fds();
    for round in 0..500 {
        let visitor = UnixStream::connect(listener.path()).unwrap();
        let bus = listener.accept(Instant::now()).unwrap();
        // Silent, or gone before it is taken, or after.
        if round % 3 == 0 {
            drop(visitor);
            drop(bus);
        } else {
            drop(bus);
            drop(visitor);
        }
    }
    // Other tests of this process open files, too, but not hundreds.
    assert!(
        fds() < before + 100,
        "{} descriptors, before {before}",
        fds()
    );
    join(&spec, &mut listener);
}
