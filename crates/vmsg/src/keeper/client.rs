// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `serve`'s way to its keeper.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

use super::line::Line;
use super::protocol::{Kind, receive};

/// How long a keeper may take for each packet; one that does not answer is done without.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// How often a keeper is looked for that goes away while it is being asked: one that was
/// dismissed a moment ago, or whose time is up.
const TRIES: usize = 10;

/// Connections by device.
type KeptByDevice = HashMap<String, Vec<Kept>>;

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
    line: Arc<Line>,
    found: bool,
}

impl Keeper {
    /// Finds the keeper at `path` and takes what it holds, by device; starts
    /// one that waits `keep` seconds for a new `serve`, if there is none.
    pub(crate) fn find_or_start(path: &Path, keep: u64) -> anyhow::Result<(Self, KeptByDevice)> {
        for _ in 0..TRIES {
            let (socket, found) = match connect_to(path)? {
                Some(socket) => (socket, true),
                None => {
                    start(path, keep)?;
                    let socket = connect_to(path)?.context("the keeper has ended at once")?;
                    (socket, false)
                }
            };
            if let Some(kept) = take(&socket)? {
                let line = Line::start(socket)?;
                return Ok((Self { line, found }, kept));
            }
        }
        bail!("the keeper at {} hangs up", path.display());
    }

    /// True if a `serve` before this one has left the keeper behind: this one goes on for it.
    pub(crate) fn was_found(&self) -> bool {
        self.found
    }

    /// Has a connection held.
    pub(crate) fn put(&self, device: &str, key: u64, record: &[u8], fd: BorrowedFd<'_>) {
        self.line.put(device, key, record, fd);
    }

    /// Has a connection let go.
    pub(crate) fn remove(&self, device: &str, key: u64) {
        self.line.remove(device, key);
    }

    /// Sends the keeper home.
    pub(crate) fn dismiss(&self) {
        self.line.dismiss();
    }

    /// Ends without a farewell, as a kill does.
    #[cfg(test)]
    pub(super) fn hang_up(&self) {
        self.line.hang_up();
    }
}

/// What the keeper holds; `None` if it has gone away.
fn take(socket: &OwnedFd) -> anyhow::Result<Option<KeptByDevice>> {
    let mut kept = KeptByDevice::new();
    loop {
        let packet = match receive(socket.as_fd()) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                bail!("the keeper does not answer")
            }
            Err(error) => return Err(error.into()),
        };
        match (packet.kind, packet.fd) {
            (Kind::Kept, Some(fd)) => {
                let list = kept.entry(packet.device).or_default();
                list.push(Kept {
                    key: packet.key,
                    record: packet.record,
                    fd,
                });
            }
            (Kind::Kept, None) => tracing::warn!(
                device = packet.device,
                "a connection is lost, as there are too many open files"
            ),
            (Kind::End, _) => return Ok(Some(kept)),
            _ => bail!("the keeper answers in an unknown way"),
        }
    }
}

fn connect_to(path: &Path) -> anyhow::Result<Option<OwnedFd>> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for direction in [sockopt::Timeout::Send, sockopt::Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, direction, Some(PATIENCE))?;
    }
    let address = SocketAddrUnix::new(path)
        .with_context(|| format!("socket path {} is too long", path.display()))?;
    match connect(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot reach {}", path.display()));
        }
    }
    // Where everybody may write, somebody else may have taken the name: they shall not have
    // the guest's connections.
    if sockopt::socket_peercred(&socket)?.uid != rustix::process::geteuid() {
        bail!("{} belongs to another user", path.display());
    }
    Ok(Some(socket))
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
        let _ = child.wait();
        bail!("the keeper cannot listen at {}", path.display());
    }
    Ok(())
}
