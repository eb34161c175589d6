// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::path::PathBuf;

use crate::control::LinkState;
use crate::ivshmem::IvshmemArgs;
use crate::up::{UpArgs, UpPartArgs};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};

/// What `vmsg --help` ends with.
const FIRST_STEPS: &str = "\
A network device in one process, shown to QEMU by another:
  vmsg serve --bus unix,path=b0.sock --device net,id=net0
  vmsg proxy --bus unix,path=b0.sock --front vhost-user,socket=net.sock,dev=net0
  vmsg proxy --bus unix,path=b0.sock --front vhost-user,socket=net.sock,dev=net0 --print-qemu
  vmsg ls --bus unix,path=b0.sock";

/// What `vmsg serve --help` ends with.
const DEVICES: &str = "\
A bus, unix:
  path=SOCKET                  where drivers connect
  mode=OCTAL                   permissions of the socket; 0600 by default
  message-size=BYTES, slots=N  the largest message, and the slots for messages in each queue
  max-connections=N            how many drivers there may be at a time
  trace=FILE                   record all messages, for `vmsg trace` and Wireshark

A bus, linux-user (as QEMU's virtio-msg-bus-linux-user; one driver at a time):
  name=NAME, dir=DIR           the queues are DIR/queue-NAME-driver and -device; linux-user and . by default
  socket=SOCKET                the doorbell, in DIR; linux-user.socket by default
  server=on|off                listen on the socket, or connect to it; serve listens by default
  ram=FILE                     the guest's memory, as in QEMU's memory-backend-file with share=on
  mem-offset=ADDR              where it begins for the guest; 0x40000000 by default
  mem-low-size=SIZE, mem-hole=SIZE
                               how much of it lies below a hole, and how large that is; no hole by default
  revision=1|r1                the messages; r1 are those of February 2025
  trace=FILE                   record all messages

A bus, ivshmem (memory that two machines have in common; one driver at a time):
  socket=SOCKET                that of an ivshmem server (`vmsg ivshmem server`, QEMU's); or
  listen=SOCKET                start one here, with size=SIZE (1M; 32M with ram=bar), vectors=N (1) and
                               shm=NAME or file=FILE; drivers have socket=SOCKET; or
  pci=ADDRESS|auto             in a guest: ivshmem's PCI function; or
  shm=NAME, file=FILE          memory alone, without doorbells; size=SIZE makes it
  memory=bounce|segment|whole|known
                               how a device reaches the guest's memory, the same on both sides: copies, the
                               only way that isolates; a part in which the guest lives; all of the driver's
                               machine; the guest's file, as foreign drivers have it
  ram=bar|pci:ADDRESS|FILE     where that memory is on this side: behind the messages, in a PCI function, a file
  ram-offset=BYTES, ram-size=SIZE
                               which part of that; all by default, with bar from the first whole MiB behind
                               the messages
  node=N | window=BASE+SIZE    proxy, segment and whole: which physical memory that is here, in place of ram=
  layout=amp|spsc|amp-pci      how the messages lie in the memory; amp by default
  offset=BYTES                 where they begin; 4096 by default with amp, else 0
  peer=ID, vector=N            whom to ring, if it does not show itself; this bus's vector, 0 by default
  message-size=BYTES           the largest message, with amp; 64 by default
  mem-offset=, mem-low-size=, mem-hole=
                               with memory=known, as for linux-user
  trace=FILE                   record all messages

All devices:
  id=NAME        net0, net1, … or rng0, rng1, … by default
  num=NUMBER     on the bus; the lowest free one by default
  bus=NAME       the first one by default
  worker=N       which thread serves it, counted from 0

net:
  backend=user|tap|socket|none a private network with DHCP, DNS and a way out (default), an interface
                               of the host, a socket to another VM or to passt, or nothing
  mac=XX:XX:XX:XX:XX:XX        derived from the id by default
  mtu=BYTES                    576 to 65520; 1500 by default, or that of the tap interface
  queues=N                     pairs of queues, 1 to 256; 1 by default
  link=up|down                 whether the cable is in at first; `vmsg ctl` changes it; up by default
  speed=MBITS, duplex=full|half
                               what the guest is told about the line; nothing by default
  rss=on|off                   offer the guest to choose queues by its own table; on by default
  hash=on|off                  offer the guest to report the hash of each frame; on by default
  pcap=FILE                    record all frames, for Wireshark

net, backend=user:
  hostfwd=tcp|udp:[ADDR]:PORT-[GUEST]:PORT
                               lead a port of the host into the guest; may be repeated;
                               ADDR is 127.0.0.1 by default
  net=ADDR/LENGTH              the guest's network; 10.0.2.0/24 by default
  host=ADDR, dns=ADDR          gateway and name server as the guest sees them: .2 and .3 in it
  dhcpstart=ADDR               the guest's address: .15 in it
  ipv6=on|off                  whether there is IPv6, too; on by default
  ipv6-net=PREFIX/64           the network in IPv6; fd00:10:0:2::/64 by default
  ipv6-host=ADDR, ipv6-dns=ADDR
                               gateway and name server: ::2 and ::3 in it
  tcp-flows=N, udp-flows=N     connections and conversations at a time; 4096 and 1024 by default
  hostname=NAME                which DHCP tells the guest
  resolver=ADDR[:PORT]         name server to ask; those of /etc/resolv.conf by default;
                               may be repeated
  host-loopback=on|off         whether the gateway's address leads to services on the host's own
                               127.0.0.1; on by default
  restrict=on|off              the guest reaches nothing but who came in by hostfwd; off by default

net, backend=tap:
  ifname=NAME                  joined, or created, for which this process needs CAP_NET_ADMIN, if it
                               is not there (`ip tuntap add`); tap%d, the next free number, by default
  fd=N, fds=N:N:…              instead: descriptors of an interface that were opened for vmsg
  addr=ADDR/LENGTH             an address for the host's side; may be repeated
  up=on|off                    set the interface up; by default if it is created here
  offloads=on|off              large frames, checksums left to the other side; on by default
  queues=N                     more than one needs an interface with multi_queue

net, backend=socket (QEMU's -netdev stream, dgram and socket; passt):
  mode=stream|dgram            stream by default
  path=SOCKET                  stream: connect to a Unix socket, as of passt
  host=NAME, port=N            stream: connect by TCP
  server=on                    stream: listen there instead
  reconnect=SECONDS            stream: longest pause between attempts, 1 by default; 0: no attempts
  local=…, remote=…            dgram: both ends: paths with a `/` in them, or ADDR:PORT
  mcast=GROUP:PORT             dgram: a multicast group instead
  localaddr=ADDR               dgram: with mcast, the address of the interface to use

Example:
  vmsg serve --bus unix,path=b0.sock --device net,id=net0,hostfwd=tcp::2222-:22 --device rng";

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
                 except for network devices

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
}

/// `vmsg serve`.
#[derive(Debug, Args)]
#[command(after_help = DEVICES)]
pub struct ServeArgs {
    /// A bus: unix,path=SOCKET, linux-user,ram=FILE or ivshmem,socket=SOCKET; devices call it by the name of the socket
    /// without its ending, or by its name=; may be repeated
    #[arg(long = "bus", value_name = "SPEC", required = true)]
    pub buses: Vec<String>,
    /// A device: net or rng, and what is to be set about it, as in net,id=net0,mtu=9000; may be repeated
    #[arg(long = "device", value_name = "SPEC", required = true)]
    pub devices: Vec<String>,
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

/// `vmsg ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The socket that was given to `serve --control`
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub action: CtlAction,
}

/// What `vmsg ctl` can do. A device is named by its id, or as BUS/ID if several buses have one of this id.
#[derive(Debug, Subcommand)]
pub enum CtlAction {
    /// List the devices with their drivers, links and counters
    List(CtlListArgs),
    /// Put the cable of a network device in, or take it out
    Link(CtlLinkArgs),
    /// Have the guest announce its addresses to the network
    Announce(CtlAnnounceArgs),
}

/// `vmsg ctl PATH list`.
#[derive(Debug, Args)]
pub struct CtlListArgs {
    /// Print JSON, with all counters
    #[arg(long)]
    pub json: bool,
}

/// `vmsg ctl PATH link`.
#[derive(Debug, Args)]
pub struct CtlLinkArgs {
    /// The device: ID, or BUS/ID
    #[arg(value_name = "ID")]
    pub device: String,
    /// Whether the cable is in
    #[arg(value_name = "up|down")]
    pub state: LinkState,
}

/// `vmsg ctl PATH announce`.
#[derive(Debug, Args)]
pub struct CtlAnnounceArgs {
    /// The device: ID, or BUS/ID
    #[arg(value_name = "ID")]
    pub device: String,
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
    /// Give up on an answer after this many milliseconds [default: 1000; 5000 to come to an ivshmem bus]
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
    /// Give up on an answer after this many milliseconds [default: 1000; 5000 to come to an ivshmem bus]
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
