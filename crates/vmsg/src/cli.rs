// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

mod ctl;
mod help;

use std::path::PathBuf;

use crate::console::ConsoleArgs;
use crate::ivshmem::IvshmemArgs;
use crate::up::{UpArgs, UpPartArgs};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};

use help::DEVICES;

pub(crate) use ctl::{CtlAction, CtlArgs, PortAction, RuleAction, TopArgs};

/// What `vmsg --help` ends with.
const FIRST_STEPS: &str = "\
A network device in one process, shown to QEMU by another:
  vmsg serve --bus unix,path=b0.sock --device net,id=net0
  vmsg proxy --bus unix,path=b0.sock --front vhost-user,socket=net.sock,dev=net0
  vmsg proxy --bus unix,path=b0.sock --front vhost-user,socket=net.sock,dev=net0 --print-qemu
  vmsg ls --bus unix,path=b0.sock";

/// What `vmsg proxy --help` ends with.
const FRONTS: &str = "\
vhost-user and vfio-user:
  socket=PATH    where QEMU connects
  dev=NUMBER|ID  the device on the bus, as `vmsg ls` shows it
  bus=NAME|N     which --bus it is on, by name or counted from 0; the first one by default
  mode=OCTAL     permissions of the socket; 0600 by default
  isolate=on|off the device host sees copies of what the guest gives to the device and nothing
                 else of the guest's memory; off by default, but on an ivshmem bus with
                 memory=bounce; not on a linux-user bus
  segment=SIZE   memory for these copies; 64M by default

vhost-user, the queues of a virtio device that QEMU has:
  config=on|off  whether QEMU is to read the device's configuration from here; on by default,
                 except for network devices, SCSI and file systems, where QEMU has its own

vfio-user, a whole virtio-pci device (QEMU 10.1 and later, cloud-hypervisor): nothing more

What --print-qemu prints can be pasted into a shell, or used in a script:
  qemu-system-x86_64 -kernel … $(vmsg proxy … --print-qemu)";

/// What `vmsg trace --help` ends with.
const TRACES: &str = "\
A line is: microseconds since the first message; of a response, the time since its request;
the number of the interface, if there are several; → to the device or ← from it; the message.

Example:
  vmsg serve --bus unix,path=b0.sock,trace=b0.pcapng --device rng
  vmsg trace b0.pcapng --follow";

/// virtio for machines that can only exchange messages and share some memory.
#[derive(Debug, Parser)]
#[command(
    name = "vmsg",
    version,
    about = "virtio for machines that can only exchange messages and share some memory",
    after_help = FIRST_STEPS,
    max_term_width = 100
)]
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
    /// Run buses, devices, switches and guests that a file describes, and watch over them
    Up(UpArgs),
    /// Look at a running `serve` and change it, over its control socket
    Ctl(CtlArgs),
    /// Show switches, ports and devices of a running `serve`, live
    Top(TopArgs),
    /// Bring the consoles of guests to this terminal, list and log them
    Console(ConsoleArgs),
    /// List the devices on a bus
    Ls(LsArgs),
    /// Measure the way to the other side of a bus and back
    Ping(PingArgs),
    /// Show messages that were recorded with trace=FILE of a bus
    Trace(TraceArgs),
    /// Memory and doorbells between virtual machines: QEMU's ivshmem
    Ivshmem(IvshmemArgs),
    /// Hold the connections of `backend=user` while `serve` is away; started by `serve`
    #[command(hide = true)]
    Keeper(KeeperArgs),
    /// A part of a running `up`; started by it
    #[command(hide = true)]
    UpPart(UpPartArgs),
    /// Ends what a killed `up` has left behind; started by it
    #[command(hide = true)]
    UpGuard,
}

/// `vmsg serve`.
#[derive(Debug, Args)]
#[command(after_help = DEVICES)]
pub struct ServeArgs {
    /// A bus: unix,path=SOCKET, linux-user,ram=FILE or ivshmem,socket=SOCKET; devices call it by the name of the socket
    /// without its ending, or by its id= or name=; may be repeated
    #[arg(long = "bus", value_name = "SPEC", required = true)]
    pub buses: Vec<String>,
    /// A device: net, blk, console, rng or vhost-user, and what is to be set about it, as in net,id=net0,mtu=9000; may be repeated
    #[arg(
        long = "device",
        value_name = "SPEC",
        required_unless_present = "control"
    )]
    pub devices: Vec<String>,
    /// A switch that network devices plug into, as in 'id=s0,allow=net0 <> net1'; may be repeated
    #[arg(long = "switch", value_name = "SPEC")]
    pub switches: Vec<String>,
    /// What the port of a device or uplink lets pass, as in id=net0,vlan=10,rate-in=100M; may be repeated
    #[arg(long = "port", value_name = "SPEC")]
    pub ports: Vec<String>,
    /// A switch's way out, as in id=up0,switch=s0,backend=tap,ifname=tap0; may be repeated
    #[arg(long = "uplink", value_name = "SPEC")]
    pub uplinks: Vec<String>,
    /// Threads that serve the devices' queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = workers())]
    pub workers: usize,
    /// A socket on which `vmsg ctl` reaches this process; only this user may
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Seconds for which network connections outlive a killed `serve`, waiting for the next; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub keep: u64,
}

fn workers() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=256)
}

/// `vmsg proxy`.
#[derive(Debug, Args)]
#[command(after_help = FRONTS)]
pub struct ProxyArgs {
    /// A bus where devices are: unix,path=SOCKET, linux-user,ram=FILE or ivshmem,socket=SOCKET, and more as
    /// `vmsg serve --help` has it; may be repeated
    #[arg(long = "bus", value_name = "SPEC", required = true)]
    pub buses: Vec<String>,
    /// A front: vhost-user or vfio-user,socket=PATH,dev=NUMBER|ID; may be repeated
    #[arg(long = "front", value_name = "SPEC", required = true)]
    pub fronts: Vec<String>,
    /// Print the QEMU arguments that fit the fronts, and do nothing else; `serve` must be running
    #[arg(long)]
    pub print_qemu: bool,
    /// With --print-qemu: the kind of machine the guest is
    #[arg(
        long,
        requires = "print_qemu",
        value_name = "x86|arm64",
        default_value = "x86"
    )]
    pub machine: String,
    /// With --print-qemu: which QEMU it is for; 7.2 by default, with a vfio-user front 10.1
    #[arg(long, requires = "print_qemu", value_name = "MAJOR.MINOR")]
    pub qemu_version: Option<String>,
    /// With --print-qemu: the guest's memory
    #[arg(
        long,
        requires = "print_qemu",
        value_name = "SIZE",
        default_value = "512M"
    )]
    pub memory: String,
}

/// `vmsg ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// The bus: unix,path=SOCKET, linux-user or ivshmem,socket=SOCKET, and more as `vmsg serve --help` has it
    #[arg(long, value_name = "SPEC")]
    pub bus: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Give up on an answer after this many milliseconds [default: 3000; 5000 to come to an ivshmem bus]
    #[arg(long, value_name = "MS")]
    pub timeout: Option<u64>,
}

/// `vmsg ping`.
#[derive(Debug, Args)]
pub struct PingArgs {
    /// The bus: unix,path=SOCKET, linux-user or ivshmem,socket=SOCKET, and more as `vmsg serve --help` has it
    #[arg(long, value_name = "SPEC")]
    pub bus: String,
    /// Stop after so many; without, go on until interrupted
    #[arg(short, long, value_name = "N")]
    pub count: Option<u64>,
    /// Seconds from one to the next; 0: as fast as answers come
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Give up on an answer after this many milliseconds [default: 3000; 5000 to come to an ivshmem bus]
    #[arg(long, value_name = "MS")]
    pub timeout: Option<u64>,
}

/// `vmsg trace`.
#[derive(Debug, Args)]
#[command(after_help = TRACES)]
pub struct TraceArgs {
    /// The file: pcapng, as trace=FILE of a bus makes it
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Go on with what is recorded from now on
    #[arg(short, long)]
    pub follow: bool,
    /// Only messages about this device number
    #[arg(long, value_name = "N")]
    pub dev: Option<u16>,
    /// Only messages of this name, such as GET_CONFIG; may be repeated
    #[arg(long = "type", value_name = "NAME")]
    pub types: Vec<String>,
    /// Date and time of day (UTC) in place of the time since the first message
    #[arg(long)]
    pub absolute: bool,
    /// Print JSON, one object a line
    #[arg(long, conflicts_with = "absolute")]
    pub json: bool,
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
