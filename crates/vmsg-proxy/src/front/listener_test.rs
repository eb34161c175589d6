// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

const SOCKET: &str = "VMSG_TEST_SOCKET";

/// The process that is killed: not a test when it is run as one.
#[test]
#[ignore = "started by another test"]
fn one_that_listens() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let _listener = UnixListener::bind(path).expect("a free path");
    // Unmapping this takes longer than the next one needs to start.
    let memory = vec![1_u8; 256 << 20];
    println!("\nready");
    // Until it is killed, or whoever started it is gone.
    let _ = io::stdin().read(&mut [0]);
    assert!(std::hint::black_box(memory)[0] == 1);
}

#[test]
fn the_socket_of_a_front_that_was_just_killed_is_free() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("net.sock");
    let name = format!("{}::one_that_listens", module_path!());
    let (_, name) = name.split_once("::").expect("a crate");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(SOCKET, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert!(
        lines.any(|line| line.expect("text") == "ready"),
        "it has ended"
    );
    assert!(matches!(Bound::new(&path, 0o600), Err(BindError::InUse(_))));
    child.kill().expect("it is ours");
    let bound = Bound::new(&path, 0o600);
    child.wait().expect("it is ours");
    bound.expect("nobody listens any more");
}
