// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the control socket tells of consoles, and does to them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmsg_device::console::{Handle, Report, Size};

use super::Registry;
use crate::control::{FailureKind, Response};

/// A console, as `consoles` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Console {
    /// Its name: that of its device, with `:PORT` for another port than the console.
    pub(crate) name: String,
    /// The socket of its clients.
    pub(crate) socket: Option<PathBuf>,
    /// The link to its pseudoterminal.
    pub(crate) pty: Option<PathBuf>,
    /// The file that its output is appended to.
    pub(crate) log: Option<PathBuf>,
    /// Clients on the socket.
    pub(crate) clients: usize,
    /// Bytes from the guest.
    pub(crate) output: u64,
    /// Bytes to the guest.
    pub(crate) input: u64,
    /// Bytes that clients have not read in time.
    pub(crate) lost: u64,
    /// Bytes that could not be logged.
    pub(crate) log_failed: u64,
    /// The guest has it open.
    pub(crate) open: bool,
    /// Columns and rows, if somebody has said them.
    pub(crate) size: Option<(u16, u16)>,
}

impl From<Report> for Console {
    fn from(report: Report) -> Self {
        Self {
            name: report.name,
            socket: report.socket,
            pty: report.pty,
            log: report.log,
            clients: report.clients,
            output: report.output,
            input: report.input,
            lost: report.lost,
            log_failed: report.log_failed,
            open: report.guest_open,
            size: report.size.map(|size| (size.cols, size.rows)),
        }
    }
}

/// The answer to `consoles`.
pub(crate) fn list(registry: &Registry) -> Response {
    let consoles = registry.list();
    Response::Consoles(consoles.iter().map(|c| c.report().into()).collect())
}

/// Does what `console-log` says.
pub(crate) fn log(registry: &Registry, console: &str, file: Option<&Path>) -> Response {
    with(registry, console, |handle| match handle.set_log(file) {
        Ok(()) => Response::Done {},
        Err(error) => {
            let file = file.unwrap_or(Path::new("")).display();
            let message = format!("cannot log to {file}: {error}");
            Response::error(FailureKind::Refused, message)
        }
    })
}

/// Does what `console-size` says.
pub(crate) fn size(registry: &Registry, console: &str, cols: u16, rows: u16) -> Response {
    with(registry, console, |handle| {
        handle.set_size(Size { cols, rows });
        Response::Done {}
    })
}

fn with(registry: &Registry, name: &str, act: impl FnOnce(Handle) -> Response) -> Response {
    match registry.find(name) {
        Some(handle) => act(handle),
        None => {
            let consoles = registry.list();
            let names: Vec<&str> = consoles.iter().map(Handle::name).collect();
            let known = match names.as_slice() {
                [] => "there are none".to_owned(),
                names => format!("known: {}", names.join(", ")),
            };
            let message = format!("there is no console {name}; {known}");
            Response::error(FailureKind::NotFound, message)
        }
    }
}
