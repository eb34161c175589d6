// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem`: memory and doorbells that virtual machines share.

mod bells;
mod copy;
mod ears;
pub(crate) mod hold;
mod info;
mod ping;
mod place;
mod server;
mod words;

use clap::{Args, Subcommand};

/// `vmsg ivshmem`.
#[derive(Debug, Args)]
pub struct IvshmemArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: IvshmemCommand,
}

/// What `vmsg ivshmem` can do.
#[derive(Debug, Subcommand)]
pub enum IvshmemCommand {
    /// Hand out memory and doorbells, in the place of QEMU's ivshmem-server
    Server(server::ServerArgs),
    /// Show the PCI functions of this machine, or one end with its id, vectors and peers
    Info(info::InfoArgs),
    /// In a guest: give a PCI function to vfio-pci, so that its doorbells are heard
    Bind(info::BindArgs),
    /// In a guest: take a PCI function from its driver
    Unbind(info::BindArgs),
    /// Load a word
    Peek(words::PeekArgs),
    /// Store a word
    Poke(words::PokeArgs),
    /// Show bytes
    Dump(words::DumpArgs),
    /// Ring a doorbell of a peer
    Ring(bells::RingArgs),
    /// Show each doorbell that rings here
    Wait(bells::WaitArgs),
    /// Measure round trips
    Ping(ping::PingArgs),
    /// Send or receive a file
    Copy(copy::CopyArgs),
}

/// Does what was asked.
pub(crate) fn run(args: IvshmemArgs) -> anyhow::Result<()> {
    match args.command {
        IvshmemCommand::Server(args) => server::run(args),
        IvshmemCommand::Info(args) => info::info(&args),
        IvshmemCommand::Bind(args) => info::bind(&args),
        IvshmemCommand::Unbind(args) => info::unbind(&args),
        IvshmemCommand::Peek(args) => words::peek(&args),
        IvshmemCommand::Poke(args) => words::poke(&args),
        IvshmemCommand::Dump(args) => words::dump(&args),
        IvshmemCommand::Ring(args) => bells::ring(&args),
        IvshmemCommand::Wait(args) => bells::wait(&args),
        IvshmemCommand::Ping(args) => ping::ping(&args),
        IvshmemCommand::Copy(args) => copy::copy(&args),
    }
}
