// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `linux-user`, as QEMU's `virtio-msg-bus-linux-user` speaks it: docs/bus-linux-user.md.
//!
//! Two files with a queue each, a stream socket as doorbell, and the driver's memory in a third
//! file. One driver and one device host at a time; either may listen on the socket, and either
//! may be QEMU, which knows no handshake.

mod connector;
mod door;
mod listener;
mod program;
mod queues;
mod ram;
mod spec;
mod stream;

pub use connector::{Connecting, Connector};
pub use door::Listening;
pub use listener::Listener;
pub use queues::{QUEUE_BYTES, QueueError};
pub use ram::{StaticRam, StaticRamError, StaticWindow};
pub use spec::{LinuxUserSpec, QueueName, Revision};
pub(crate) use stream::Stream;

use crate::Capabilities;
use crate::link::Framing;
use crate::trace::Trace;
use std::path::PathBuf;

/// Longest message in bytes, in either revision as seen from above.
pub const MESSAGE_SIZE: usize = 48;

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Driver,
    Device,
}

impl Role {
    fn other(self) -> Self {
        match self {
            Self::Driver => Self::Device,
            Self::Device => Self::Driver,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Device => "device",
        }
    }
}

/// Where a bus is and what goes over it.
#[derive(Clone, Debug)]
struct Site {
    name: String,
    dir: PathBuf,
    socket: PathBuf,
    server: bool,
    revision: Revision,
    ram: Option<StaticRam>,
    trace: Option<Trace>,
}

impl Site {
    fn new(spec: &LinuxUserSpec, role: Role) -> Self {
        let ram = spec.ram.as_ref();
        let trace = spec.trace.as_ref();
        Self {
            name: spec.name.as_str().to_owned(),
            dir: spec.dir.clone(),
            socket: spec.socket_path(),
            server: spec.server.unwrap_or(role == Role::Device),
            revision: spec.revision,
            ram: ram.map(|path| {
                StaticRam::new(path, spec.mem_offset, spec.mem_low_size, spec.mem_hole)
            }),
            trace: trace.map(|path| Trace::new(path, spec.name.as_str())),
        }
    }

    /// The queue that `role` fills.
    fn queue(&self, role: Role) -> PathBuf {
        self.dir
            .join(format!("queue-{}-{}", self.name, role.name()))
    }

    /// Held as long as a program of ours has that role.
    fn role_lock(&self, role: Role) -> PathBuf {
        self.dir
            .join(format!("queue-{}.{}.lock", self.name, role.name()))
    }

    /// Held while the queues are being looked at, or a role is taken.
    fn short_lock(&self) -> PathBuf {
        self.dir.join(format!("queue-{}.lock", self.name))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            passes_fds: false,
            runtime_windows: false,
            out_of_band_notify: false,
            enumerates: self.revision == Revision::One,
            claims: false,
            views: false,
            shared_memory: false,
            queue_vectors: false,
            max_message_size: MESSAGE_SIZE,
        }
    }

    fn framing(&self) -> Framing {
        match self.revision {
            Revision::One => Framing::Padded(MESSAGE_SIZE),
            Revision::R1 => Framing::Fixed(virtio_msg::r1::SIZE),
        }
    }
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the bus `{}` in `{}`", self.name, self.dir.display())
    }
}

/// A number that no other start has.
fn random() -> std::io::Result<u64> {
    let mut random = [0u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(random))
}

impl LinuxUserSpec {
    /// The driver's memory, if it is said where that is.
    pub fn static_ram(&self) -> Option<StaticRam> {
        Site::new(self, Role::Driver).ram
    }

    /// Serves it as a device host called `name`.
    ///
    /// # Errors
    /// [`BindError`](crate::BindError).
    pub fn listen(&self, name: &str) -> Result<Listener, crate::BindError> {
        Listener::bind(self, name)
    }

    /// Drives it as a program called `name`.
    pub fn connector(&self, name: &str) -> Connector {
        Connector::new(self, name)
    }
}
