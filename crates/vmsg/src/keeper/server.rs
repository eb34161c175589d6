// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The keeper's own process.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use super::protocol::{Kind, receive, send};
use crate::cli::KeeperArgs;

/// Connections held at most; more are simply not kept.
const MAX_KEPT: usize = 65_536;

/// Holds connections until it is dismissed, or nobody has come for them in time.
pub(crate) fn run(args: KeeperArgs) -> anyhow::Result<()> {
    // A ^C on the terminal is for `serve`, which then dismisses its keeper.
    let _ = rustix::process::setsid();
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

fn keep(listener: &OwnedFd, patience: Duration) -> anyhow::Result<()> {
    let mut kept: HashMap<(String, u64), (Vec<u8>, OwnedFd)> = HashMap::new();
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: patience.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        if poll(&mut fds, Some(&timeout))? == 0 {
            tracing::info!(connections = kept.len(), "nobody came back in time");
            return Ok(());
        }
        let serve = accept_with(listener, SocketFlags::CLOEXEC)?;
        for ((device, key), (record, fd)) in &kept {
            send(
                serve.as_fd(),
                Kind::Kept,
                device,
                *key,
                record,
                Some(fd.as_fd()),
            )?;
        }
        send(serve.as_fd(), Kind::End, "", 0, &[], None)?;
        // Until `serve` is gone; without a farewell it is expected to come back.
        while let Ok(Some(packet)) = receive(serve.as_fd()) {
            let place = (packet.device, packet.key);
            match (packet.kind, packet.fd) {
                (Kind::Put, Some(fd)) if kept.len() < MAX_KEPT => {
                    kept.insert(place, (packet.record, fd));
                }
                (Kind::Remove, _) => {
                    kept.remove(&place);
                }
                (Kind::Dismiss, _) => return Ok(()),
                _ => {}
            }
        }
    }
}
