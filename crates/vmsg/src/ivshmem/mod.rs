// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem`: memory and doorbells that virtual machines share.

pub(crate) mod hold;
mod server;

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
}

/// Does what was asked.
pub(crate) fn run(args: IvshmemArgs) -> anyhow::Result<()> {
    match args.command {
        IvshmemCommand::Server(args) => server::run(args),
    }
}
