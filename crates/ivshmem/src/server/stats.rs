// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server has done.

use std::fmt;
use std::path::PathBuf;

use crate::PeerId;

/// What happened at a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStats {
    /// Its socket.
    pub path: PathBuf,
    /// The id of its client, if that is fixed.
    pub id: Option<PeerId>,
    /// Clients at the moment.
    pub clients: usize,
    /// Clients there ever were.
    pub joined: u64,
    /// Clients that were dropped since they did not read.
    pub stalled: u64,
    /// Clients that were dropped since they sent something.
    pub spoke: u64,
    /// Connections that did not become clients: there were enough, or no id or descriptor was left.
    pub refused: u64,
}

/// What a server has done. Shown in one line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Its ports.
    pub ports: Vec<PortStats>,
}

impl Stats {
    /// Clients at the moment.
    pub fn clients(&self) -> usize {
        self.ports.iter().map(|port| port.clients).sum()
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "clients={}", self.clients())?;
        for port in &self.ports {
            write!(f, " socket={}", port.path.display())?;
            if let Some(id) = port.id {
                write!(f, ",id={id}")?;
            }
            write!(
                f,
                ",clients={},joined={},stalled={},spoke={},refused={}",
                port.clients, port.joined, port.stalled, port.spoke, port.refused
            )?;
        }
        Ok(())
    }
}
