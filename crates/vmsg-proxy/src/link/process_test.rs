// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::HostProcess;
use rustix::event::{PollFd, PollFlags, poll};
use std::process::{Command, Stdio};

#[test]
fn a_process_is_seen_until_it_has_ended() {
    let mut child = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let process = HostProcess::new(Some(child.id())).unwrap();
    assert!(!process.has_ended());
    child.kill().unwrap();
    // Nobody has taken note of its end yet.
    poll(&mut [PollFd::new(&process, PollFlags::IN)], None).unwrap();
    assert!(process.has_ended());
    assert!(
        HostProcess::new(Some(child.id())).is_none(),
        "it serves nothing"
    );
    child.wait().unwrap();
}

#[test]
fn this_process_and_none_are_not_seen() {
    assert!(HostProcess::new(Some(std::process::id())).is_none());
    assert!(HostProcess::new(Some(0)).is_none());
    assert!(HostProcess::new(None).is_none());
}
