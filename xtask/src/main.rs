// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests, demos, end-to-end tests and benchmarks of vmsg: run as `cargo xtask`.
#![forbid(unsafe_code)]

mod bench;
mod cpio;
mod cross;
mod debian;
mod demo;
mod demo2b;
mod described;
mod dirs;
mod disk;
mod e2e;
mod gate;
mod guest;
mod guest_bench;
mod guest_files;
mod http;
mod initrd;
mod inner;
mod kit;
mod lan;
mod lspci;
mod machine;
mod modules;
mod namespace;
mod no_std;
mod outer;
mod pair;
mod pcap;
mod proof;
mod qemu;
mod qtest;
mod report;
mod scene;
mod secret;
mod shell;
mod sources;
mod stream;
mod tftp;
mod tree;
mod vmsg;
mod vswitch;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::report::Report;

#[derive(Parser, Debug)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Guests, demos and tests of vmsg"
)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand, Debug)]
enum Task {
    /// Show what vmsg does, on a guest with a stock kernel
    #[command(subcommand)]
    Demo(Demo),
    /// Run the tests that every change must pass
    Test(gate::Options),
    /// Boot guests and check that all works in them
    E2e(e2e::Options),
    /// Build a static vmsg for guests, and print where it is
    Build {
        /// Architecture of the guests
        #[arg(long, value_enum, default_value_t = machine::Machine::X86)]
        machine: machine::Machine,
        /// Go ahead with fetching without asking
        #[arg(long)]
        yes: bool,
    },
    /// Write what the descriptions in demos/ boot: a kernel, file systems, and a file of variables that name them
    GuestFiles(guest_files::Options),
    /// Measure, and print or save the figures
    Bench(bench::Options),
}

#[derive(Subcommand, Debug)]
enum Demo {
    /// A guest reaches the network through a proxy and a device host joined by a bus
    #[command(name = "2a")]
    TwoA(demo::Options),
    /// Two machines joined by shared memory: a guest in one reaches the network through the other
    #[command(name = "2b")]
    TwoB(demo2b::Options),
    /// Three guests on one switch, from a description; its rules, its captures, and its round trips beside QEMU's own
    Vswitch(vswitch::Options),
}

/// Runs something that reports; trouble that ends it early is a failure of its own.
fn reported(run: impl FnOnce(&mut Report) -> anyhow::Result<()>) -> bool {
    let mut report = Report::default();
    let ended = run(&mut report);
    if ended.is_err() {
        report.result("the run itself", ended);
    }
    report.finish()
}

/// Options that contradict each other end it as clap ends it on wrong ones: with 2.
fn checked(options: anyhow::Result<()>) {
    if let Err(error) = options {
        Cli::command()
            .error(ErrorKind::ArgumentConflict, error)
            .exit();
    }
}

fn main() -> ExitCode {
    let passed = match Cli::parse().command {
        Task::Demo(Demo::TwoA(options)) => {
            checked(options.check());
            demo::run(&options)
        }
        Task::Demo(Demo::TwoB(options)) => {
            checked(options.check());
            demo2b::run(&options)
        }
        Task::Demo(Demo::Vswitch(options)) => vswitch::run(&options),
        Task::Test(options) => reported(|report| gate::run(&options, report)),
        Task::E2e(options) => reported(|report| e2e::run(&options, report)),
        Task::Build { machine, yes } => kit::gather_to_build(machine, yes)
            .and_then(|()| cross::vmsg(machine))
            .map(|path| println!("{}", path.display()))
            .inspect_err(|error| eprintln!("{error:#}"))
            .is_ok(),
        Task::GuestFiles(options) => guest_files::run(&options)
            .inspect_err(|error| eprintln!("{error:#}"))
            .is_ok(),
        Task::Bench(options) => bench::run(&options)
            .inspect_err(|error| eprintln!("{error:#}"))
            .is_ok(),
    };
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
