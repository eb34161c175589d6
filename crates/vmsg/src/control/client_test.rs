// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets of others.

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connect;

#[test]
fn who_listens_and_takes_no_connection_is_not_waited_for_for_ever() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("socket");
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("short")).expect("bound");
    rustix::net::listen(&socket, 0).expect("listening");
    let listener = UnixListener::from(socket);
    let first = UnixStream::connect(&path).expect("room for one");
    let error = connect(&path, Duration::from_millis(200)).expect_err("no room");
    assert!(error.to_string().contains("takes no connection"), "{error}");
    drop((first, listener));
}
