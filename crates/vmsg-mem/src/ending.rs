// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes that are ending: what they hold is free in a moment.
//!
//! A process that was killed keeps its files until its memory is unmapped, which takes a while with a guest's memory.
//! Who starts the next one right after `kill -9` finds its locks taken and its sockets answering.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::os::fd::AsFd;
use std::str;
use std::time::{Duration, Instant};

/// The longest wait for an end.
const PATIENCE: Duration = Duration::from_secs(2);

/// In the flags of a task (`include/linux/sched.h`): it is being shut down.
const PF_EXITING: u64 = 0x4;

/// SIGKILL, 9, in the masks of signals of `/proc/PID/status`.
const KILL: u64 = 1 << 8;

/// Does `attempt`, and does it once more if what was in its way belongs to a process that was ending: `holder` takes its
/// id from the error. The end is waited for up to two seconds. A process that is not ending is not waited for.
///
/// # Errors
/// That of the last attempt.
pub fn attempt_past<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    holder: impl FnOnce(&E) -> Option<u32>,
) -> Result<T, E> {
    match attempt() {
        Err(error) if holder(&error).is_some_and(ends) => attempt(),
        result => result,
    }
}

/// Whether the process `pid` has ended, waiting for that if it is about to.
fn ends(pid: u32) -> bool {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    // First: from here on the number cannot become that of another process unseen.
    let process = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(error) => return error == Errno::SRCH,
    };
    let patience = if is_ending(pid) {
        PATIENCE
    } else {
        Duration::ZERO
    };
    // Readable when all threads are gone, and with them all files.
    is_readable_within(&process, patience)
}

fn is_readable_within(fd: impl AsFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Whether a process shuts down, or will because it was killed. What cannot be read is not known to.
fn is_ending(pid: u32) -> bool {
    let read = |file| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    // In this order: a signal that is no longer pending has had its effect.
    is_killed(&read("status")) || is_exiting(&read("stat"))
}

/// What `/proc/PID/stat` says: proc(5), fields 3 (state) and 9 (flags). The name before them may have any bytes in it.
fn is_exiting(stat: &[u8]) -> bool {
    let Some(end) = stat.iter().rposition(|&byte| byte == b')') else {
        return false;
    };
    let Ok(rest) = str::from_utf8(&stat[end + 1..]) else {
        return false;
    };
    let mut fields = rest.split_ascii_whitespace();
    let dead = matches!(fields.next(), Some("Z" | "X" | "x"));
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    dead || flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

/// Whether `/proc/PID/status` has SIGKILL pending, for the thread or for the process.
fn is_killed(status: &[u8]) -> bool {
    status.split(|&byte| byte == b'\n').any(|line| {
        let mask = line
            .strip_prefix(b"SigPnd:")
            .or_else(|| line.strip_prefix(b"ShdPnd:"))
            .and_then(|mask| str::from_utf8(mask).ok())
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask & KILL != 0)
    })
}

#[cfg(test)]
#[path = "ending_test.rs"]
mod tests;
