// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};

/// virtio for machines that can only exchange messages and share some memory.
#[derive(Debug, Parser)]
#[command(name = "vmsg", version, about, max_term_width = 100)]
pub struct Cli {
    /// Say more on stderr; twice for everything. VMSG_LOG=module=level selects.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the command can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run devices and offer them on buses
    Serve(ServeArgs),
    /// Show devices on a bus to unmodified guests as ordinary virtio devices
    Proxy(ProxyArgs),
    /// List the devices on a bus
    Ls(LsArgs),
    /// Measure the way to the other side of a bus and back
    Ping(PingArgs),
    /// Hold the connections of `backend=user` while `serve` is away; started by `serve`
    #[command(hide = true)]
    Keeper(KeeperArgs),
}

/// `vmsg serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A bus: unix,path=SOCKET[,message-size=BYTES][,mode=OCTAL]; devices call it by the name of the socket
    #[arg(long = "bus", value_name = "SPEC", required = true)]
    pub buses: Vec<String>,
    /// A device: net[,id=][,num=][,bus=][,backend=user|none][,mac=][,mtu=][,pcap=FILE][,hostfwd=…] or rng[,id=][,num=][,bus=]
    #[arg(long = "device", value_name = "SPEC", required = true)]
    pub devices: Vec<String>,
    /// Threads that serve the devices' queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = workers())]
    pub workers: usize,
    /// Seconds for which network connections outlive a killed `serve`, waiting for the next; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub keep: u64,
}

fn workers() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=256)
}

/// `vmsg proxy`.
#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// A bus where devices are: unix,path=SOCKET
    #[arg(long = "bus", value_name = "SPEC", required = true)]
    pub buses: Vec<String>,
    /// A front: vhost-user,socket=PATH,dev=NUMBER|ID
    #[arg(long = "front", value_name = "SPEC", required = true)]
    pub fronts: Vec<String>,
    /// Print the QEMU arguments that fit the fronts, and do nothing else
    #[arg(long)]
    pub print_qemu: bool,
    /// With --print-qemu: the kind of machine the guest is
    #[arg(long, value_name = "x86|arm64", default_value = "x86")]
    pub machine: String,
    /// With --print-qemu: the guest's memory
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
}

/// `vmsg ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// The bus: unix,path=SOCKET
    #[arg(long, value_name = "SPEC")]
    pub bus: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Give up on an answer after this many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub timeout: u64,
}

/// `vmsg ping`.
#[derive(Debug, Args)]
pub struct PingArgs {
    /// The bus: unix,path=SOCKET
    #[arg(long, value_name = "SPEC")]
    pub bus: String,
    /// Stop after so many; without, go on until interrupted
    #[arg(short, long, value_name = "N")]
    pub count: Option<u64>,
    /// Seconds from one to the next; 0: as fast as answers come
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Give up on an answer after this many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub timeout: u64,
}

/// `vmsg keeper`.
#[derive(Debug, Args)]
pub struct KeeperArgs {
    /// Where the next `serve` finds this keeper
    #[arg(long)]
    pub socket: PathBuf,
    /// Seconds to wait for it
    #[arg(long)]
    pub keep: u64,
}
