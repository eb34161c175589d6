// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of `vmsg up`.

use std::path::PathBuf;

use clap::Args;

/// What `vmsg up --help` ends with.
const UP: &str = "\
A description is TOML; paths in it start at its folder:
  version = 1
  [bus.b0]
  [device.net0]
  type = \"net\"              # all keys of `vmsg serve --device`; the table's name is the id
  [guest.vm1]
  kernel = \"vmlinuz\"
  initrd = \"${INITRD}\"      # --set INITRD=…, or the environment
  [program.nbd]
  command = [\"nbd-server\", \"-d\"]
There are [switch.X], [port.X], [uplink.X] and [host], too; docs/up.md has all keys.
`vmsg ctl`, `vmsg top` and `vmsg console` take the control socket that is printed.";

/// `vmsg up`.
#[derive(Debug, Args)]
#[command(after_help = UP)]
pub struct UpArgs {
    /// The description
    #[arg(value_name = "FILE.toml")]
    pub file: PathBuf,
    /// Look for mistakes, and do nothing else
    #[arg(long)]
    pub check: bool,
    /// Print the commands that would be run, and do nothing else
    #[arg(long, conflicts_with = "check")]
    pub print: bool,
    /// What ${KEY} in the description stands for; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
    /// Show nothing of what the parts say; it is in their logs
    #[arg(short, long)]
    pub quiet: bool,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

/// `vmsg up-part`.
#[derive(Debug, Args)]
pub struct UpPartArgs {
    /// The process that starts this one
    #[arg(long)]
    pub parent: i32,
    /// The number of the signal that this process is to get when that one ends
    #[arg(long)]
    pub signal: i32,
    /// What to run
    #[arg(last = true, required = true)]
    pub command: Vec<std::ffi::OsString>,
}
