// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::process::{Child, Command, Stdio};

fn sleeper() -> Child {
    // It ends by itself when its standard input does.
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.spawn().expect("cat")
}

#[test]
fn state_and_flags_are_found_behind_any_name() {
    for name in [
        "vmsg",
        "a b",
        ") Z 1 (",
        "x) Z 1 1 1 1 1 4 (y",
        "(((",
        "\n)",
    ] {
        let stat = |state: &str, flags: u32| {
            is_exiting(format!("12 ({name}) {state} 1 12 12 0 -1 {flags} 4 4 4 4\n").as_bytes())
        };
        assert!(!stat("S", 0x0040_0000), "{name}");
        assert!(!stat("D", 0x0040_0100), "{name}");
        assert!(stat("R", 0x0040_0004), "{name}");
        assert!(stat("D", 0x0040_010c), "{name}");
        assert!(stat("Z", 0), "{name}");
        assert!(stat("X", 0), "{name}");
    }
    assert!(is_exiting(b"1 (\xff\xfe) Z 1"));
    for text in ["", "1", "1 (x", "1 (x)", "1 (x) S", "1 (x) S 1 1 1 1 1 x"] {
        assert!(!is_exiting(text.as_bytes()), "{text}");
    }
}

#[test]
fn a_pending_kill_is_found_and_no_other_signal() {
    let status = |own: &str, shared: &str| {
        is_killed(
            format!("Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t0000000000000100\n")
                .as_bytes(),
        )
    };
    let (none, kill) = ("0000000000000000", "0000000000000100");
    assert!(!status(none, none));
    assert!(status(kill, none));
    assert!(status(none, kill));
    assert!(!status("fffffffffffffeff", "fffffffffffffeff"));
    assert!(!status("", "x"));
    assert!(!is_killed(b""));
}

#[test]
fn who_runs_is_not_waited_for_and_who_was_killed_is() {
    assert!(!ends(std::process::id()));
    let mut child = sleeper();
    let pid = child.id();
    let begin = Instant::now();
    assert!(!ends(pid));
    assert!(begin.elapsed() < PATIENCE);
    child.kill().expect("it is ours");
    assert!(ends(pid), "not waited for until it is dead");
    // Dead, and nobody has asked how.
    assert!(ends(pid));
    child.wait().expect("it is ours");
    assert!(ends(pid), "gone");
    assert!(!ends(0) && !ends(u32::MAX));
}

#[test]
fn there_is_a_second_attempt_only_after_an_end() {
    let attempts = |holder: Option<u32>| {
        let mut count = 0;
        let result: Result<(), ()> = attempt_past(
            || {
                count += 1;
                Err(())
            },
            |()| holder,
        );
        assert!(result.is_err());
        count
    };
    assert_eq!(attempts(None), 1);
    assert_eq!(attempts(Some(std::process::id())), 1);
    let mut child = sleeper();
    child.kill().expect("it is ours");
    assert_eq!(attempts(Some(child.id())), 2);
    child.wait().expect("it is ours");
}
