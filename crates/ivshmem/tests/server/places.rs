// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use ivshmem::client::ConnectError;
use ivshmem::server::{LedgerError, ListenError, Options, Port, Server, ServerError, Source};
use ivshmem::{Client, Event, PeerId};

use crate::support::*;

/// A server of a file.
fn of_file(dir: &std::path::Path) -> Options {
    let mut options = usual(&dir.join("iv.sock"));
    options.source = Source::File(dir.join("memory"));
    options
}

#[test]
fn memory_with_a_name_outlives_its_server_and_ids_never_collide() {
    let (dir, path) = place();
    let server = Running::start(of_file(dir.path()));
    let mut old = [client(&path), client(&path)];
    sees(&mut old[0], PeerId(1), 2);
    rustix::io::pwrite(old[0].memory_fd(), b"kept", 0).unwrap();
    server.stop();
    assert!(!path.exists());

    let server = Running::start(of_file(dir.path()));
    let new = client(&path);
    assert_eq!(new.id(), PeerId(2), "0 and 1 are alive");
    let mut read = [0; 4];
    rustix::io::pread(new.memory_fd(), &mut read, 0).unwrap();
    assert_eq!(&read, b"kept");
    assert_eq!(next(&mut old[0]), Event::ServerGone);
    old[0].ring(PeerId(1), 0).unwrap();
    assert_eq!(rings(&old[1], 0), 1, "old doorbells work");
    server.stop();
    drop((old, new));
    // Nobody has the memory open: nobody has an id.
    let _server = Running::start(of_file(dir.path()));
    assert_eq!(client(&path).id(), PeerId(0));
}

#[test]
fn memory_that_is_to_be_removed_is() {
    let (dir, _) = place();
    let mut options = of_file(dir.path());
    options.unlink = true;
    Running::start(options).stop();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn posix_shared_memory_is_found_by_its_name() {
    let (_dir, path) = place();
    let name = format!("vmsg-test-{}", std::process::id());
    let mut options = usual(&path);
    options.source = Source::Shm(name.clone());
    options.unlink = true;
    let server = Running::start(options);
    let there = std::path::Path::new("/dev/shm").join(&name);
    assert_eq!(fs::metadata(&there).unwrap().len(), 65536);
    assert_eq!(client(&path).memory_size(), 65536);
    server.stop();
    assert!(!there.exists());
}

#[test]
fn a_second_server_is_refused_by_name() {
    let (dir, path) = place();
    let first = Running::start(of_file(dir.path()));
    match Server::bind(of_file(dir.path())) {
        Err(ServerError::Listen(ListenError::InUse { pid, listening, .. })) => {
            assert_eq!((pid, listening), (Some(std::process::id()), true));
        }
        other => panic!("{other:?}"),
    }
    let mut elsewhere = of_file(dir.path());
    elsewhere.ports[0].path = dir.path().join("other.sock");
    let error = Server::bind(elsewhere).unwrap_err();
    assert!(
        matches!(error, ServerError::Ledger(LedgerError::InUse { .. })),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    // The first one has noticed nothing.
    client(&path);
    first.stop();
    assert!(matches!(
        Client::connect(&path, LONG),
        Err(ConnectError::NotThere { .. })
    ));
}

#[test]
fn a_socket_that_a_killed_server_has_left_is_replaced_and_nothing_else_is() {
    let (_dir, path) = place();
    drop(UnixListener::bind(&path).unwrap());
    assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
    let mut options = usual(&path);
    options.ports[0].mode = 0o660;
    let server = Running::start(options.clone());
    client(&path);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    server.stop();
    // Somebody who knows nothing of locks.
    let other = UnixListener::bind(&path).unwrap();
    let error = Server::bind(options.clone()).unwrap_err();
    assert!(
        matches!(error, ServerError::Listen(ListenError::InUse { .. })),
        "{error}"
    );
    drop(other);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "a file").unwrap();
    let error = Server::bind(options).unwrap_err();
    assert!(
        matches!(error, ServerError::Listen(ListenError::NotASocket { .. })),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"a file");
}

#[test]
fn a_path_that_is_too_long_is_refused_by_name() {
    let (dir, _) = place();
    let path = dir.path().join("x".repeat(120));
    let error = Server::bind(Options::new(vec![Port::new(path, 1)], 4096)).unwrap_err();
    assert!(
        matches!(error, ServerError::Listen(ListenError::PathTooLong { .. })),
        "{error}"
    );
}

#[test]
fn a_server_that_does_not_answer_is_waited_for_as_long_as_one_likes() {
    let (_dir, path) = place();
    let _listener = UnixListener::bind(&path).unwrap();
    let error = Client::connect(&path, Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
    assert!(error.is_transient());
}
