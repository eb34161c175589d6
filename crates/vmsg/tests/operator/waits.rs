// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an operator hears while somebody else is waited for.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use crate::process::Serve;

#[test]
fn who_is_waited_for_and_how_long_is_said_before_the_answer() {
    let serve = Serve::start(&[]);
    let socket = serve.file("nbd");
    // A server that takes nobody in.
    let _server = UnixListener::bind(&socket).expect("bound");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mut ctl = Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .arg("ctl")
        .arg(serve.control())
        .args(["add-device", &format!("blk,path={uri}")])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let stderr = ctl.stderr.take().expect("piped");
    let line = BufReader::new(stderr).lines().next();
    let line = line.expect("a line").expect("text");
    assert_eq!(
        line,
        format!("waiting for the NBD server at {uri}, up to 30 s")
    );
    ctl.kill().expect("killed");
    ctl.wait().expect("waited for");
}

#[test]
fn what_qemu_writes_for_a_server_is_answered_with_what_is_written_here() {
    let serve = Serve::start(&[]);
    let words = serve.refused(&["add-device", "blk,path=nbd:localhost:1"]);
    assert!(words.contains("nbd://localhost:1/ here"), "{words}");
}
