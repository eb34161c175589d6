// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The `vmsg` command, as a library with a thin binary.
//!
//! Results go to stdout, logs to stderr. Exit status: 0 done, 1 failed, 2 the
//! command line is wrong.
#![forbid(unsafe_code)]

mod buses;
mod cli;
mod keeper;
mod look;
mod proxy;
mod serve;
mod signals;
mod spec;

pub use cli::{Cli, Command};
pub use spec::{DeviceSpec, NetBackend, NetSpec, RngSpec};

use std::process::ExitCode;

use clap::Parser;

/// A mistake in what the user has written, as opposed to something that went wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

/// Runs the command with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.verbose);
    let result = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Ls(args) => look::ls(args),
        Command::Ping(args) => look::ping(args),
        Command::Keeper(args) => keeper::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmsg: {error:#}");
            if error.is::<Usage>() {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Logs to stderr; `VMSG_LOG` selects what, as in `VMSG_LOG=vmsg_proxy=debug`.
fn start_log(verbose: u8) {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("VMSG_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
