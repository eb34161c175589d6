// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets to where a server is, without waiting for them.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::NbdAddress;

/// Where to connect to.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Inet(SocketAddr),
    Unix(SocketAddrUnix),
}

/// The addresses of a name, or on their way.
#[derive(Debug)]
pub(super) enum Targets {
    Known(Vec<Target>),
    /// A thread asks for them, as that can take long; `wake` is written to when it is done.
    Asked(mpsc::Receiver<io::Result<Vec<SocketAddr>>>),
}

/// What `address` stands for.
pub(super) fn resolve(address: &NbdAddress, wake: &Arc<OwnedFd>) -> io::Result<Targets> {
    match address {
        NbdAddress::Unix(path) => {
            let bytes = path.as_os_str().as_bytes();
            let target = match bytes.split_first() {
                Some((0, name)) => SocketAddrUnix::new_abstract_name(name)?,
                _ => SocketAddrUnix::new(path)?,
            };
            Ok(Targets::Known(vec![Target::Unix(target)]))
        }
        NbdAddress::Tcp { host, port } => {
            if let Ok(address) = host.parse::<IpAddr>() {
                let address = SocketAddr::new(address, *port);
                return Ok(Targets::Known(vec![Target::Inet(address)]));
            }
            let (send, receive) = mpsc::channel();
            let (host, port, wake) = (host.clone(), *port, Arc::clone(wake));
            thread::Builder::new()
                .name("nbd-name".to_owned())
                .spawn(move || {
                    let addresses = (host.as_str(), port).to_socket_addrs();
                    let _ = send.send(addresses.map(Iterator::collect));
                    let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
                })?;
            Ok(Targets::Asked(receive))
        }
    }
}

/// Begins to connect; the socket is writable when that is done, and [`outcome`] says how it went.
pub(super) fn begin(target: &Target) -> io::Result<OwnedFd> {
    let family = match target {
        Target::Inet(SocketAddr::V4(_)) => AddressFamily::INET,
        Target::Inet(SocketAddr::V6(_)) => AddressFamily::INET6,
        Target::Unix(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
    let begun = match target {
        Target::Inet(address) => {
            sockopt::set_tcp_nodelay(&socket, true)?;
            // So that a host that has vanished is noticed while nothing is asked of it.
            sockopt::set_socket_keepalive(&socket, true)?;
            sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10))?;
            sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
            sockopt::set_tcp_keepcnt(&socket, 3)?;
            net::connect(&socket, address)
        }
        Target::Unix(address) => net::connect(&socket, address),
    };
    match begun {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// How connecting went.
pub(super) fn outcome(socket: &OwnedFd) -> io::Result<()> {
    sockopt::socket_error(socket.as_fd())?.map_err(io::Error::from)
}
