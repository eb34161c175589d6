// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `serve`'s way to its keeper.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::protocol::{Kind, receive, send};

/// A connection that was held while no device host was there.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The name under which it is held.
    pub(crate) key: u64,
    /// What the device's back end has written about it.
    pub(crate) record: Vec<u8>,
    /// Its socket.
    pub(crate) fd: OwnedFd,
}

/// The keeper, as `serve` knows it. Dropping it without
/// [`dismiss`](Self::dismiss) leaves the keeper waiting for the next `serve`.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    socket: Arc<OwnedFd>,
    found: bool,
}

impl Keeper {
    /// Finds the keeper at `path` and takes what it holds, by device; starts
    /// one that waits `keep` seconds for a new `serve`, if there is none.
    pub(crate) fn find_or_start(
        path: &Path,
        keep: u64,
    ) -> anyhow::Result<(Self, HashMap<String, Vec<Kept>>)> {
        let (socket, found) = match connect_to(path)? {
            Some(socket) => (socket, true),
            None => {
                start(path, keep)?;
                let socket = connect_to(path)?.context("the keeper has ended at once")?;
                (socket, false)
            }
        };
        let mut kept: HashMap<String, Vec<Kept>> = HashMap::new();
        loop {
            let packet = receive(socket.as_fd())?.context("the keeper has hung up")?;
            match (packet.kind, packet.fd) {
                (Kind::Kept, Some(fd)) => {
                    let list = kept.entry(packet.device).or_default();
                    list.push(Kept {
                        key: packet.key,
                        record: packet.record,
                        fd,
                    });
                }
                (Kind::End, _) => break,
                _ => bail!("the keeper answers in an unknown way"),
            }
        }
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok((
            Self {
                socket: Arc::new(socket),
                found,
            },
            kept,
        ))
    }

    /// True if a `serve` before this one has left the keeper behind: this one goes on for it.
    pub(crate) fn was_found(&self) -> bool {
        self.found
    }

    /// Has a connection held.
    pub(crate) fn put(&self, device: &str, key: u64, record: &[u8], fd: BorrowedFd<'_>) {
        if let Err(error) = send(
            self.socket.as_fd(),
            Kind::Put,
            device,
            key,
            record,
            Some(fd),
        ) {
            tracing::warn!(device, %error, "a connection would not survive the device host");
        }
    }

    /// Has a connection let go.
    pub(crate) fn remove(&self, device: &str, key: u64) {
        // If this fails the keeper holds a closed connection until it is asked next.
        let _ = send(self.socket.as_fd(), Kind::Remove, device, key, &[], None);
    }

    /// Sends the keeper home.
    pub(crate) fn dismiss(&self) {
        let _ = send(self.socket.as_fd(), Kind::Dismiss, "", 0, &[], None);
    }
}

fn connect_to(path: &Path) -> anyhow::Result<Option<OwnedFd>> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let address = SocketAddrUnix::new(path)
        .with_context(|| format!("socket path {} is too long", path.display()))?;
    match connect(&socket, &address) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot reach {}", path.display())),
    }
}

/// Starts a keeper and returns when it listens.
fn start(path: &Path, keep: u64) -> anyhow::Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg("keeper")
        .arg("--socket")
        .arg(path)
        .args(["--keep", &keep.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Whoever reads what `serve` writes must not have to wait for its keeper as well.
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start a keeper")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if !line.starts_with("ready ") {
        bail!("the keeper did not start");
    }
    Ok(())
}
