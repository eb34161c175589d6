// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ctl` and `vmsg top` on the command line.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::control::LinkState;

/// What `vmsg ctl --help` ends with.
const NAMES: &str = "\
A device is named by its id, or as BUS/ID if several buses have one of this id; a port as PORT, or SWITCH/PORT.
SPEC is as `vmsg serve --help` has it behind --device, --port and --uplink; paths in it are those of the serving process.

Example:
  vmsg ctl ctl.sock rule deny 'net0 <> net1'
  vmsg ctl ctl.sock port set net0 rate-in=10M storm=100
  vmsg ctl ctl.sock add-device net,id=net7,switch=s0";

/// `vmsg ctl`.
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct CtlArgs {
    /// The socket that was given to `serve --control`
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub action: CtlAction,
}

/// What `vmsg ctl` can do.
#[derive(Debug, Subcommand)]
pub enum CtlAction {
    /// List the devices with their drivers, links and counters, and the ports of switches
    List(CtlListArgs),
    /// Put the cable of a network device, or of a port, in, or take it out
    Link(CtlLinkArgs),
    /// Have the guest announce its addresses to the network
    Announce(CtlDeviceArgs),
    /// Have a disk look at once whether it was resized, and tell its guest
    Rescan(CtlDeviceArgs),
    /// Show switches with their rules, ports and counters
    Switches(CtlListArgs),
    /// Show the addresses that switches know
    Macs(CtlMacsArgs),
    /// Change who may send to whom
    Rule(CtlRuleArgs),
    /// Say where frames to unknown addresses go
    Unknown(CtlUnknownArgs),
    /// Change a port
    #[command(subcommand)]
    Port(PortAction),
    /// Record the frames of a port to a file
    Capture(CtlCaptureArgs),
    /// Forget the addresses that were learned
    Flush(CtlFlushArgs),
    /// Put a device on a bus
    AddDevice(CtlAddDeviceArgs),
    /// Take a device from its bus
    RemoveDevice(CtlDeviceArgs),
    /// List consoles; `vmsg console` attaches to them
    Consoles(CtlListArgs),
    /// Say what the port of a device or uplink is like that will be added
    AddPort(CtlSpecArgs),
    /// Forget what add-port or --port has said
    RemovePort(CtlPortArgs),
    /// Give a switch a way out
    AddUplink(CtlSpecArgs),
    /// Take a way out away
    RemoveUplink(CtlPortArgs),
    /// Of `vmsg up`: list its processes
    Parts(CtlListArgs),
    /// Of `vmsg up`: start a part that has ended
    StartPart(CtlPartArgs),
    /// Of `vmsg up`: end a part; it stays ended until it is started
    StopPart(CtlPartArgs),
    /// Of `vmsg up`: end a part and start it again
    RestartPart(CtlPartArgs),
}

/// Arguments of what lists things.
#[derive(Debug, Args)]
pub struct CtlListArgs {
    /// Print JSON, with all counters
    #[arg(long)]
    pub json: bool,
}

/// `vmsg ctl PATH link`.
#[derive(Debug, Args)]
pub struct CtlLinkArgs {
    /// The device: ID, or BUS/ID; or the port of an uplink
    #[arg(value_name = "ID")]
    pub device: String,
    /// Whether the cable is in
    #[arg(value_name = "up|down")]
    pub state: LinkState,
}

/// Names a part of `vmsg up`.
#[derive(Debug, Args)]
pub struct CtlPartArgs {
    /// The part, as `parts` lists it
    #[arg(value_name = "PART")]
    pub part: String,
}

/// Names a device.
#[derive(Debug, Args)]
pub struct CtlDeviceArgs {
    /// The device: ID, or BUS/ID
    #[arg(value_name = "ID")]
    pub device: String,
}

/// `vmsg ctl PATH macs`.
#[derive(Debug, Args)]
pub struct CtlMacsArgs {
    /// Of this switch only
    #[arg(value_name = "SWITCH")]
    pub switch: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmsg ctl PATH rule`.
#[derive(Debug, Args)]
pub struct CtlRuleArgs {
    /// What to do with it; of several rules for two ports the last one counts
    #[arg(value_name = "allow|deny|remove")]
    pub action: RuleAction,
    /// Who may send to whom: 'a > b', 'a <> b' for both directions; * is any part of a name
    #[arg(value_name = "RULE")]
    pub rule: String,
    /// The switch, if there are several
    #[arg(long, value_name = "SWITCH")]
    pub switch: Option<String>,
}

/// What to do with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RuleAction {
    /// Frames pass.
    Allow,
    /// Frames do not.
    Deny,
    /// It is as if it had not been there.
    Remove,
}

/// `vmsg ctl PATH unknown`.
#[derive(Debug, Args)]
pub struct CtlUnknownArgs {
    /// Everywhere, nowhere, or to an uplink
    #[arg(value_name = "flood|drop|UPLINK")]
    pub unknown: String,
    /// The switch, if there are several
    #[arg(long, value_name = "SWITCH")]
    pub switch: Option<String>,
}

/// `vmsg ctl PATH port`.
#[derive(Debug, Subcommand)]
pub enum PortAction {
    /// Change settings: link, vlan, trunk, native, pin, mac, macs, rate-in, rate-out, storm; off takes a limit away
    Set(CtlPortSetArgs),
}

/// `vmsg ctl PATH port set`.
#[derive(Debug, Args)]
pub struct CtlPortSetArgs {
    /// The port: PORT, or SWITCH/PORT
    #[arg(value_name = "PORT")]
    pub port: String,
    /// As behind --port, such as rate-in=10M
    #[arg(value_name = "KEY=VALUE", required = true)]
    pub settings: Vec<String>,
}

/// Names a port.
#[derive(Debug, Args)]
pub struct CtlPortArgs {
    /// The port: PORT, or SWITCH/PORT
    #[arg(value_name = "PORT")]
    pub port: String,
}

/// `vmsg ctl PATH capture`.
#[derive(Debug, Args)]
pub struct CtlCaptureArgs {
    /// The port: PORT, or SWITCH/PORT
    #[arg(value_name = "PORT")]
    pub port: String,
    /// Where to; what is there is overwritten
    #[arg(value_name = "FILE|off")]
    pub file: PathBuf,
}

/// `vmsg ctl PATH flush`.
#[derive(Debug, Args)]
pub struct CtlFlushArgs {
    /// At this port only: PORT, or SWITCH/PORT
    #[arg(value_name = "PORT")]
    pub port: Option<String>,
    /// The switch, if there are several
    #[arg(long, value_name = "SWITCH", conflicts_with = "port")]
    pub switch: Option<String>,
}

/// `vmsg ctl PATH add-device`.
#[derive(Debug, Args)]
pub struct CtlAddDeviceArgs {
    /// The device, as in net,id=net7,switch=s0
    #[arg(value_name = "SPEC")]
    pub spec: String,
    /// Of `vmsg up`: the guest that gets it
    #[arg(long, value_name = "GUEST")]
    pub guest: Option<String>,
}

/// What is to be added.
#[derive(Debug, Args)]
pub struct CtlSpecArgs {
    /// As in id=up0,switch=s0,backend=tap
    #[arg(value_name = "SPEC")]
    pub spec: String,
}

/// `vmsg top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The socket that was given to `serve --control`
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Print one table and end
    #[arg(long)]
    pub once: bool,
    /// Print JSON, one object an interval
    #[arg(long)]
    pub json: bool,
    /// Show each queue of each device, too
    #[arg(short, long)]
    pub queues: bool,
    /// Seconds over which rates are measured
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
}
