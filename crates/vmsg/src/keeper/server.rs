// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The keeper's own process.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt,
};

use super::client::PATIENCE;
use super::protocol::{Kind, receive, send};
use crate::cli::KeeperArgs;
use crate::descriptors;

/// Connections held at most; more are simply not kept.
const MAX_KEPT: usize = 65_536;

/// Holds connections until it is dismissed, or nobody has come for them in time.
pub(crate) fn run(args: KeeperArgs) -> anyhow::Result<()> {
    // A ^C on the terminal is for `serve`, which then dismisses its keeper.
    let _ = rustix::process::setsid();
    descriptors::raise_limit();
    let listener = listen_at(&args.socket)?;
    println!("ready keeper={}", args.socket.display());
    std::io::stdout().flush()?;
    let result = keep(&listener, Duration::from_secs(args.keep));
    // The next keeper may have put its own socket there by now only if this one is unreachable.
    let _ = std::fs::remove_file(&args.socket);
    result
}

fn listen_at(path: &Path) -> anyhow::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // `serve` has found nobody answering here, and holds the bus's lock.
    let _ = std::fs::remove_file(path);
    let address = SocketAddrUnix::new(path)
        .with_context(|| format!("socket path {} is too long", path.display()))?;
    bind(&socket, &address).with_context(|| format!("cannot listen at {}", path.display()))?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// Records and sockets by device and key.
type Held = HashMap<(String, u64), (Vec<u8>, OwnedFd)>;

fn keep(listener: &OwnedFd, patience: Duration) -> anyhow::Result<()> {
    let mut held = Held::new();
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        let timeout = Timespec::try_from(patience).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let serve = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(serve) => serve,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(error) => return Err(error.into()),
        };
        // One that is killed here, or does not read, has not taken anything: the next one can.
        if hand_over(&serve, &held).is_ok() && follow(&serve, &mut held) == Farewell::Dismissed {
            return Ok(());
        }
    }
}

/// Gives a new `serve` all that is held.
fn hand_over(serve: &OwnedFd, held: &Held) -> io::Result<()> {
    sockopt::set_socket_timeout(serve, sockopt::Timeout::Send, Some(PATIENCE))?;
    for ((device, key), (record, fd)) in held {
        let fd = Some(fd.as_fd());
        send(serve.as_fd(), Kind::Kept, device, *key, record, fd)?;
    }
    send(serve.as_fd(), Kind::End, "", 0, &[], None)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Farewell {
    Dismissed,
    /// Killed: it is expected to come back.
    None,
}

/// Does what `serve` says until it is gone.
fn follow(serve: &OwnedFd, held: &mut Held) -> Farewell {
    while let Ok(Some(packet)) = receive(serve.as_fd()) {
        let place = (packet.device, packet.key);
        match (packet.kind, packet.fd) {
            (Kind::Put, Some(fd)) if held.len() < MAX_KEPT => {
                held.insert(place, (packet.record, fd));
            }
            (Kind::Remove, _) => {
                held.remove(&place);
            }
            (Kind::Dismiss, _) => return Farewell::Dismissed,
            _ => {}
        }
    }
    Farewell::None
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
