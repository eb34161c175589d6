// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem server`.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use ivshmem::PeerId;
use ivshmem::server::{ListenError, Options, Port, Server, ServerError, Source, Turn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Deserialize;
use vmsg_bus::keyval;

use super::hold;
use crate::out::Out;
use crate::signals::Interrupt;
use crate::{Usage, descriptors};

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
    /// Start it in the background, unless it runs already, and return when it is ready; with --linger it ends by itself
    #[arg(long, conflicts_with = "hold")]
    pub background: bool,
    /// In a session of its own, and what is in its way is said on stdout
    #[arg(long, hide = true)]
    pub hold: bool,
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
    if args.background {
        hold::ensure(&options)?;
        return ready(&options);
    }
    if args.hold {
        // A ^C on the terminal is for who has started this, and who wants it to outlive that.
        let _ = rustix::process::setsid();
    }
    descriptors::raise_limit();
    let interrupt = Interrupt::new()?;
    let report = Report::new()?;
    let mut server = match Server::bind(options.clone()) {
        Ok(server) => server,
        Err(error) => {
            if let (true, ServerError::Listen(ListenError::InUse { listening, .. })) =
                (args.hold, &error)
            {
                let _ = writeln!(io::stdout(), "{} listening={listening}", hold::HELD);
            }
            return Err(error.into());
        }
    };
    // Who started it may not be there any more.
    let _ = ready(&options);
    notify_service_manager();
    loop {
        let turn = server.turn()?;
        if turn == Turn::Deserted {
            tracing::info!("ending, as nobody is there");
            break;
        }
        let left = server
            .due()
            .map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [
            PollFd::new(&server, PollFlags::IN),
            PollFd::new(&interrupt, PollFlags::IN),
            PollFd::new(&report, PollFlags::IN),
        ];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[2].revents().is_empty() {
            report.take();
            tell(&server);
        }
        if !fds[1].revents().is_empty() {
            tracing::info!("ending");
            break;
        }
    }
    tell(&server);
    Ok(())
}

/// Says where clients can connect.
fn ready(options: &Options) -> anyhow::Result<()> {
    let mut out = Out::lock();
    for port in &options.ports {
        writeln!(out, "ready ivshmem={}", port.path.display())?;
    }
    out.flush()?;
    Ok(())
}

/// Prints what the server has done, in one line.
fn tell(server: &Server) {
    let mut out = Out::lock();
    // A reader that has gone away is no reason not to serve.
    let _ = writeln!(out, "stats {}", server.stats());
    let _ = out.flush();
}

/// Tells a service manager that the server is ready: sd_notify(3).
fn notify_service_manager() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let send = || -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&name)?,
        };
        socket.send_to_addr(b"READY=1\n", &address)?;
        Ok(())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "the service manager is not told that the server is ready");
    }
}

/// Becomes readable when the user wants to know what the server has done.
struct Report(UnixStream);

impl Report {
    /// From now on SIGUSR1 only makes this readable.
    fn new() -> io::Result<Self> {
        let (signal, write) = UnixStream::pair()?;
        signal.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGUSR1, write)?;
        Ok(Self(signal))
    }

    /// Not readable any more.
    fn take(&self) {
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

impl AsFd for Report {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
