// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a bridge is to be like.

use std::path::PathBuf;
use std::time::Duration;

use super::Listener;

/// What is done with requests that were under way when a daemon, or this process, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The queues are used in order, and nothing is kept between requests: what is not used is done again.
    InOrder,
    /// Nothing is kept between requests, and they overtake each other: there must be a record of what is in flight, or nothing.
    Record,
    /// The daemon keeps something between requests: its driver has to start over.
    Never,
}

/// A daemon's device.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the device is called, in what is logged.
    pub name: Option<String>,
    /// Its socket.
    pub socket: PathBuf,
    /// Where it connects, if it is the one that does: at `socket`.
    pub listener: Option<Listener>,
    /// The virtio id of its type.
    pub device_id: u32,
    /// Queues; by default as many as the daemon says, or the type has.
    pub queues: Option<u16>,
    /// Entries of a queue at most; by default what the known daemons of this type take.
    pub queue_size: Option<u16>,
    /// Bytes of the configuration space; by default those of the type.
    pub config_size: Option<u32>,
    /// The configuration, instead of what the daemon says.
    pub config: Option<Vec<u8>>,
    /// Features beside those of the daemon, which go with `config`.
    pub features: u64,
    /// By default what goes with the type.
    pub resume: Option<Resume>,
    /// Between two attempts to reach the daemon at most.
    pub reconnect: Duration,
    /// How long a daemon may take for an answer.
    pub patience: Duration,
    /// How long the memory of a queue that was kicked may stay away.
    pub away: Duration,
}

impl Settings {
    /// A daemon may take so long for an answer.
    pub const PATIENCE: Duration = Duration::from_secs(5);
    /// The memory of a queue that was kicked may stay away so long.
    pub const AWAY: Duration = Duration::from_secs(1);
    /// Between two attempts to reach it.
    pub const RECONNECT: Duration = Duration::from_secs(1);

    /// The daemon at `socket`, which is a device of type `device_id`.
    pub fn new(socket: impl Into<PathBuf>, device_id: u32) -> Self {
        Self {
            name: None,
            socket: socket.into(),
            listener: None,
            device_id,
            queues: None,
            queue_size: None,
            config_size: None,
            config: None,
            features: 0,
            resume: None,
            reconnect: Self::RECONNECT,
            patience: Self::PATIENCE,
            away: Self::AWAY,
        }
    }
}
