// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg up-guard`: a process that outlives `vmsg up` for a moment and ends what that has left behind.
//!
//! The kernel ends the parts themselves when `up` is killed; what they have started, it does not. The guard knows the process
//! group of each part, hears of `up`'s end by the end of its standard input, and ends all that is left in these groups.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How long a device host may take to put things in order.
const PATIENCE: Duration = Duration::from_secs(5);

/// The guard, as `up` knows it. Dropping it lets it go, once all its groups were taken from it.
#[derive(Debug)]
pub(super) struct Guard {
    /// None once it is being let go.
    stdin: Mutex<Option<ChildStdin>>,
    child: Mutex<Child>,
}

impl Guard {
    pub(super) fn start() -> anyhow::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("up-guard")
            // ^C in the terminal is for `up`.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Whoever reads what `up` says need not wait for its guard as well.
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a guard")?;
        let stdin = child.stdin.take().expect("stdin is piped");
        ioctl_fionbio(&stdin, true)?;
        Ok(Self {
            stdin: Mutex::new(Some(stdin)),
            child: Mutex::new(child),
        })
    }

    /// There is a part with this process group; `polite`: it is given time to end.
    pub(super) fn add(&self, group: i32, polite: bool) {
        let kind = if polite { 't' } else { 'k' };
        self.say(&format!("+{kind}{group}\n"));
    }

    /// Nothing is left of it.
    pub(super) fn remove(&self, group: i32) {
        self.say(&format!("-{group}\n"));
    }

    fn say(&self, line: &str) {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = stdin.as_mut().map(|stdin| stdin.write_all(line.as_bytes())) {
            tracing::warn!(%error, "the guard is gone: should this process be killed, some of what it has started may be left");
            *stdin = None;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        *self.stdin.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // It ends at once, as no groups are left.
        let _ = self
            .child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .wait();
    }
}

/// A part's process group.
struct Group {
    /// The part itself, if it was still there.
    leader: Option<OwnedFd>,
    /// It is told to end, and given time for it.
    polite: bool,
}

/// Guards whatever standard input names, until that ends.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut groups: BTreeMap<i32, Group> = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let number = |text: &str| text.parse::<i32>().ok().filter(|number| *number > 1);
        if let Some(group) = line.strip_prefix('-').and_then(number) {
            groups.remove(&group);
        } else if let Some(text) = line.strip_prefix('+') {
            let polite = text.starts_with('t');
            let Some(group) = text.get(1..).and_then(number) else {
                continue;
            };
            let leader =
                Pid::from_raw(group).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
            groups.insert(group, Group { leader, polite });
        }
    }
    let signal = |group: i32, signal| {
        if let Some(group) = Pid::from_raw(group) {
            // Nothing may be left of it.
            let _ = kill_process_group(group, signal);
        }
    };
    for (number, _) in groups.iter().filter(|(_, group)| !group.polite) {
        signal(*number, Signal::KILL);
    }
    let due = Instant::now() + PATIENCE;
    for (number, group) in groups.iter().filter(|(_, group)| group.polite) {
        signal(*number, Signal::TERM);
        if let Some(leader) = &group.leader {
            let left = due.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let _ = poll(&mut [PollFd::new(leader, PollFlags::IN)], Some(&timeout));
        }
        signal(*number, Signal::KILL);
    }
    Ok(())
}
