// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server of ivshmem in a process of its own, which outlives who has started it.
//!
//! A device host that plays the server for its guests must not take their doorbells and ids with it when it is killed:
//! QEMU's device never connects again. So the server is another process, in another session, that ends by itself when
//! nobody needs it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ivshmem::Client;
use ivshmem::client::{ConnectError, Limits};
use ivshmem::server::{Options, Source};

/// First word of what a server says that finds its socket taken.
pub(super) const HELD: &str = "held";

/// How long a server may take to listen, or to end after it has said that it does.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pause before the next attempt while another server begins or ends. Nothing tells when it has.
const PAUSE: Duration = Duration::from_millis(5);

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// It was started now.
    Started,
    /// It was there, perhaps with other options: its clients see the memory's size.
    Found,
}

/// Starts a server as `options` say, unless one listens on the first port's path. When this returns, it can be
/// connected to; with [`Options::linger`] it ends after that time without a client, and then the one who comes next has
/// to begin with this again. One that was found is visited at a port with an id, if there is one, so that it is not just
/// about to end; it may have other memory than `options` say, which is logged.
///
/// Of several that do this at a time one starts the server, which the lock on the socket decides.
pub(crate) fn ensure(options: &Options) -> anyhow::Result<Held> {
    options.check()?;
    let path = options.ports[0].path.display();
    let until = Instant::now() + PATIENCE;
    loop {
        match start(options)? {
            Some(Held::Found) if !visit(options) && Instant::now() < until => {}
            Some(held) => return Ok(held),
            None if Instant::now() < until => std::thread::sleep(PAUSE),
            None => bail!("the ivshmem server on `{path}` neither begins nor ends"),
        }
    }
}

/// Is a client for a moment of the server that was found; false if it has ended meanwhile. It costs no id, and no other
/// client is told.
fn visit(options: &Options) -> bool {
    let Some(port) = options.ports.iter().find(|port| port.id.is_some()) else {
        return true;
    };
    // It does not matter how many vectors it has.
    let limits = Limits {
        vectors: Some(0),
        ..Limits::default()
    };
    match Client::connect_with(&port.path, limits, PATIENCE) {
        Ok(client) => {
            let (have, wanted) = (client.memory_size(), options.size);
            if have != wanted {
                let path = port.path.display();
                tracing::warn!(%path, have, wanted, "the server that is there has other memory; it ends with its last client");
            }
            true
        }
        Err(ConnectError::NotThere { .. }) => false,
        // It has a client already, or is another kind of server: whoever connects next is told so.
        Err(_) => true,
    }
}

/// Starts a server; `None` if another one is just beginning or ending.
fn start(options: &Options) -> anyhow::Result<Option<Held>> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("vmsg")
        .args(["ivshmem", "server", "--hold"])
        .args(arguments(options)?)
        // It is not this process whose service manager waits for it.
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Whoever reads what this process writes must not have to wait for the server as well.
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a server of ivshmem")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.starts_with("ready ") {
        // What it logs from here on is lost; it must not have to wait until somebody reads it.
        drop(child.stderr.take());
        // Nobody else waits for its end.
        std::thread::Builder::new()
            .name("ivshmem-server".to_owned())
            .spawn(move || child.wait())?;
        return Ok(Some(Held::Started));
    }
    let output = child.wait_with_output()?;
    match line.trim_end().strip_prefix(HELD) {
        Some(" listening=true") => Ok(Some(Held::Found)),
        Some(_) => Ok(None),
        None => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.trim_end().rsplit('\n').next().unwrap_or_default();
            bail!("{}", last.strip_prefix("vmsg: ").unwrap_or(last))
        }
    }
}

/// The options on a command line.
fn arguments(options: &Options) -> anyhow::Result<Vec<String>> {
    let text = |path: &std::path::Path| {
        let text = path.to_str().map(str::to_owned);
        text.with_context(|| format!("the path `{}` is not UTF-8", path.display()))
    };
    let mut arguments = Vec::new();
    for port in &options.ports {
        let path = text(&port.path)?.replace(',', ",,");
        let id = port.id.map(|id| format!(",id={id}")).unwrap_or_default();
        arguments.push(format!(
            "--socket=path={path}{id},vectors={},mode={:04o}",
            port.vectors, port.mode
        ));
    }
    arguments.push(format!("--size={}", options.size));
    match &options.source {
        Source::Memfd => {}
        Source::Shm(name) => arguments.push(format!("--shm={name}")),
        Source::File(path) => arguments.push(format!("--file={}", text(path)?)),
    }
    if options.unlink {
        arguments.push("--unlink".to_owned());
    }
    arguments.push(format!("--max-clients={}", options.max_clients));
    arguments.push(format!("--stall={}", options.stall.as_secs()));
    if let Some(linger) = options.linger {
        arguments.push(format!("--linger={}", linger.as_secs()));
    }
    Ok(arguments)
}
