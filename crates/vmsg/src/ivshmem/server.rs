// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem server`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ivshmem::PeerId;
use ivshmem::server::{Options, Port, Source};
use serde::Deserialize;
use vmsg_bus::keyval;

use crate::Usage;

/// What `vmsg ivshmem server --help` ends with.
const SOCKETS: &str = "\
A socket, PATH and what is to be set about it:
  id=N           one client at a time, always with this id; without, any number, counted up from 0
  vectors=N      interrupt vectors of each client, 1 to 256; those of --vectors by default
  mode=OCTAL     permissions of the socket; 0600 by default

Example:
  vmsg ivshmem server --socket ivshmem.sock --size 1M --vectors 2
  qemu-system-x86_64 … -chardev socket,path=ivshmem.sock,id=iv -device ivshmem-doorbell,vectors=2,chardev=iv";

/// `vmsg ivshmem server`.
#[derive(Debug, Args)]
#[command(after_help = SOCKETS)]
pub struct ServerArgs {
    /// Where clients connect: PATH[,id=N,vectors=N,mode=OCTAL]; may be repeated
    #[arg(long = "socket", value_name = "SPEC", required = true)]
    pub sockets: Vec<String>,
    /// Bytes of memory, a power of two
    #[arg(long, value_name = "SIZE", default_value = "4M")]
    pub size: String,
    /// Interrupt vectors of each client
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vectors: u16,
    /// Memory that is /dev/shm/NAME, and stays when this ends; a memfd by default
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    pub shm: Option<String>,
    /// Memory that is this file, and stays when this ends
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Remove the memory's name at the end
    #[arg(long)]
    pub unlink: bool,
    /// How many clients there may be at a time
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_clients: usize,
    /// Seconds after which a client that does not read is dropped
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stall: u64,
    /// End when there was no client for so many seconds; without, stay
    #[arg(long, value_name = "SECONDS")]
    pub linger: Option<u64>,
}

/// What `--socket` says.
#[derive(Debug, Deserialize)]
struct Socket {
    path: PathBuf,
    id: Option<u16>,
    vectors: Option<u16>,
    mode: Option<vmsg_bus::Mode>,
}

/// A number of bytes, as in other specifications.
#[derive(Debug, Deserialize)]
struct Size {
    size: u64,
}

/// What the command line asks for.
fn options(args: &ServerArgs) -> Result<Options, Usage> {
    let Size { size } = keyval::from_str(&args.size)
        .map_err(|error| Usage(format!("--size {}: {error}", args.size)))?;
    let mut ports = Vec::new();
    for text in &args.sockets {
        let socket: Socket =
            keyval::from_str(text).map_err(|error| Usage(format!("--socket {text}: {error}")))?;
        let mut port = Port::new(socket.path, socket.vectors.unwrap_or(args.vectors));
        port.id = socket.id.map(PeerId);
        port.mode = socket.mode.map_or(port.mode, |mode| mode.0);
        ports.push(port);
    }
    let mut options = Options::new(ports, size);
    options.source = match (&args.shm, &args.file) {
        (Some(name), _) => Source::Shm(name.clone()),
        (None, Some(path)) => Source::File(path.clone()),
        (None, None) => Source::Memfd,
    };
    options.unlink = args.unlink;
    options.max_clients = args.max_clients;
    options.stall = Duration::from_secs(args.stall);
    options.linger = args.linger.map(Duration::from_secs);
    options.check().map_err(|error| Usage(error.to_string()))?;
    Ok(options)
}

/// Serves until a signal comes, or nobody needs it any more.
pub(crate) fn run(args: ServerArgs) -> anyhow::Result<()> {
    let options = options(&args)?;
    anyhow::bail!("{} sockets: there is no server yet", options.ports.len())
}
