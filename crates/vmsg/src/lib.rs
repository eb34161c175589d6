// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The `vmsg` command, as a library with a thin binary.
//!
//! Results go to stdout, logs to stderr. Exit status: 0 done, 1 failed, 2 the
//! command line is wrong.
#![forbid(unsafe_code)]

mod buses;
mod cli;
mod console;
mod control;
mod descriptors;
mod ivshmem;
mod keeper;
mod look;
mod out;
mod proxy;
mod serve;
mod signals;
mod spec;
mod top;
mod trace;
mod up;

pub use cli::{Cli, Command};
pub use console::{ConsoleAction, ConsoleArgs};
pub use spec::{
    BackendKeys, BlkSpec, ConsoleSpec, DeviceSpec, DiskCache, DiskEngine, DiskFormat, Duplex,
    NetBackend, NetSpec, Pin, PortSetSpec, PortSpec, ResumeMode, RngSpec, Setting, SizeOrder,
    SocketMode, SwitchSpec, UplinkSpec, VhostUserSpec,
};

#[cfg(fuzzing)]
pub use up::exercise as description_exercise;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// A mistake in what the user has written, as opposed to something that went wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

/// Runs the command with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Who asks one thing wants the answer alone.
    let quiet = matches!(&cli.command, Command::Proxy(args) if args.print_qemu);
    let writer = match &cli.command {
        // It looks after others: it must not wait for whoever reads what it says.
        Command::Up(_) => BoxMakeWriter::new(|| up::Unhurried),
        _ => BoxMakeWriter::new(std::io::stderr),
    };
    start_log(cli.verbose, quiet, writer);
    let result = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Ctl(args) => control::run(args),
        Command::Top(args) => top::run(args),
        Command::Console(args) => console::run(&args),
        Command::Ls(args) => look::ls(args),
        Command::Ping(args) => look::ping(args),
        Command::Trace(args) => trace::run(args),
        Command::Ivshmem(args) => ivshmem::run(args),
        Command::Keeper(args) => keeper::run(args),
        Command::Up(args) => up::run(args),
        Command::UpPart(args) => up::run_part(args),
        Command::UpGuard => up::run_guard(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if out::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done if stderr is closed, too.
            let _ = writeln!(std::io::stderr(), "vmsg: {}", out::chain(&error));
            if error.is::<Usage>() {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Logs to stderr; `VMSG_LOG` selects what, as in `VMSG_LOG=vmsg_proxy=debug`.
fn start_log(verbose: u8, quiet: bool, writer: BoxMakeWriter) {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 if quiet => "warn",
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let chosen = std::env::var("VMSG_LOG").ok().map(EnvFilter::try_new);
    let mistake = chosen.as_ref().and_then(|chosen| chosen.as_ref().err());
    let mistake = mistake.map(ToString::to_string);
    let filter = chosen
        .and_then(Result::ok)
        .unwrap_or_else(|| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        // It would panic if nobody reads stderr any more.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    if let Some(error) = mistake {
        tracing::warn!(error, "VMSG_LOG is not understood");
    }
}
