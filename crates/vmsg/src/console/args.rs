// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of `vmsg console`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::keys::Escape;

/// What `vmsg console --help` ends with.
const KEYS: &str = "\
While attached, the escape key (^], that is Ctrl and ]) followed by:
  n, p        the next console, the one before
  0 … 9       the console with this number
  l           the list, with a mark at those with output that was not seen
  d, q        detach
  ?           these keys
  ^]          send ^] itself

When stdin is no terminal it is sent to the guest as it is, and there are no keys:
  echo uname -r | vmsg console c.sock attach con0 --idle 2

Consoles are devices of `vmsg serve --device console,…` and, with `vmsg up`, serial lines of guests.";

/// `vmsg console`.
#[derive(Debug, Args)]
#[command(after_help = KEYS)]
pub struct ConsoleArgs {
    /// The socket that was given to `serve --control`, or that of `vmsg up`
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// What to do; by default attach to the first console
    #[command(subcommand)]
    pub action: Option<ConsoleAction>,
}

/// What `vmsg console` can do.
#[derive(Debug, Subcommand)]
pub enum ConsoleAction {
    /// List the consoles
    List(ConsoleListArgs),
    /// Bring consoles to this terminal
    Attach(ConsoleAttachArgs),
    /// Append what a console's guest writes to a file
    Log(ConsoleLogArgs),
}

/// `vmsg console PATH list`.
#[derive(Debug, Args)]
pub struct ConsoleListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmsg console PATH attach`.
#[derive(Debug, Args, Default)]
pub struct ConsoleAttachArgs {
    /// The console; the first by default
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Only watch: nothing is typed, and the guest is not told the window's size
    #[arg(short, long)]
    pub read_only: bool,
    /// The escape key, as ^X or a character, or `none`
    #[arg(long, value_name = "KEY", default_value = "^]")]
    pub escape: Escape,
    /// When stdin is no terminal: end when it has ended and there was no output for so long
    #[arg(long, value_name = "SECONDS")]
    pub idle: Option<f64>,
}

/// `vmsg console PATH log`.
#[derive(Debug, Args)]
pub struct ConsoleLogArgs {
    /// The console
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The file, or `off`
    #[arg(value_name = "FILE|off")]
    pub file: PathBuf,
}
