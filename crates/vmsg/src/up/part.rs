// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg up-part`: becomes a part of a running description that does not outlive `vmsg up`, whatever happens to that.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::args::UpPartArgs;

/// Runs the command in place of this process.
///
/// # Errors
/// The command cannot be run. This process's parent is not the one that it was started by any more.
pub(crate) fn run(args: UpPartArgs) -> anyhow::Result<()> {
    let signal = Signal::from_named_raw(args.signal).context("there is no such signal")?;
    set_parent_process_death_signal(Some(signal)).context("cannot ask for a signal")?;
    // It may have ended before the kernel was asked.
    if getppid().map(Pid::as_raw_pid) != Some(args.parent) {
        bail!("the process that has started this one is gone");
    }
    let (program, words) = args.command.split_first().context("there is no command")?;
    let error = Command::new(program).args(words).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
