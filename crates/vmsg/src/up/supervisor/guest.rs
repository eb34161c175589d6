// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has besides its process: the sockets that its QEMU comes to, and a console.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use vmsg_device::console::{Hub, HubConfig, Serial};

use super::super::plan::{Kind, Part};
use super::super::qmp::Qmp;
use super::super::status::{Note, Shared};

/// What a guest has besides its process.
#[derive(Debug)]
pub(super) struct Guest {
    qmp_listener: Listener,
    /// The connection, with its number.
    pub(super) qmp: Option<(u64, Qmp)>,
    connections: u64,
    serial: Option<(Listener, Serial)>,
    /// Nobody is let in until then.
    pause: Option<Instant>,
}

/// How long nobody is let in after that was not possible.
const PAUSE: Duration = Duration::from_secs(1);

/// A socket in the runtime folder, which goes with it.
#[derive(Debug)]
struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, where one that was killed may have left a socket: nobody else can be here, as the folder is locked.
    fn bind(path: PathBuf) -> anyhow::Result<Self> {
        let context = || format!("cannot listen at {}", path.display());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).with_context(context)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Guest {
    pub(super) fn new(part: &Part, logs: &Path, shared: &Shared) -> anyhow::Result<Option<Self>> {
        let Kind::Guest(machine) = &part.kind else {
            return Ok(None);
        };
        let serial = if machine.has_serial() {
            let path = machine.serial();
            let hub = Hub::open(&HubConfig {
                name: part.name.clone(),
                socket: Some(path.with_extension("console")),
                pty: None,
                log: Some(logs.join(format!("{}.serial.log", part.name))),
            })?;
            shared.consoles.add(hub.handle());
            Some((Listener::bind(path)?, Serial::new(hub)?))
        } else {
            None
        };
        Ok(Some(Self {
            qmp_listener: Listener::bind(machine.qmp())?,
            qmp: None,
            connections: 0,
            serial,
            pause: None,
        }))
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = Vec::new();
        if self.pause.is_none() {
            fds.push(self.qmp_listener.as_fd());
            fds.extend(self.serial.iter().map(|(listener, _)| listener.as_fd()));
        }
        fds.extend(self.serial.iter().map(|(_, serial)| serial.event_fd()));
        fds
    }

    /// When somebody may be let in again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.pause
    }

    pub(super) fn tick(&mut self, now: Instant) {
        self.pause.take_if(|until| *until <= now);
    }

    /// Lets somebody in; none if nobody is there, or that is not possible at present.
    fn accept(listener: &Listener, name: &str, pause: &mut Option<Instant>) -> Option<UnixStream> {
        if pause.is_some() {
            return None;
        }
        match listener.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => {
                // Out of descriptors, most likely: who waits there would wake us at once.
                tracing::warn!(part = name, %error, "cannot let QEMU in");
                *pause = Some(Instant::now() + PAUSE);
                None
            }
        }
    }

    pub(super) fn take_in(&mut self, name: &str, shared: &Shared) {
        while let Some(stream) = Self::accept(&self.qmp_listener, name, &mut self.pause) {
            self.connections += 1;
            let connection = self.connections;
            let tell = {
                let (shared, part) = (shared.clone(), name.to_owned());
                move |event: &str| {
                    // QEMU may say more than anybody wants to know.
                    if !matches!(event, "READY" | "GONE") {
                        return;
                    }
                    shared.note(Note {
                        part: part.clone(),
                        connection,
                        event: event.to_owned(),
                    });
                }
            };
            match Qmp::start(stream, tell) {
                Ok(qmp) => self.qmp = Some((connection, qmp)),
                Err(error) => tracing::warn!(part = name, %error, "no QMP"),
            }
        }
        if let Some((listener, serial)) = &mut self.serial {
            while let Some(stream) = Self::accept(listener, name, &mut self.pause) {
                if let Err(error) = serial.attach(stream) {
                    tracing::warn!(part = name, %error, "no serial line");
                }
            }
            serial.poll();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_goes_with_who_listens_there_and_one_that_was_left_is_replaced() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("vm.qmp");
        // As a killed one leaves it.
        drop(UnixListener::bind(&path).expect("bound"));
        assert!(path.exists());
        let listener = Listener::bind(path.clone()).expect("taken over");
        UnixStream::connect(&path).expect("somebody listens");
        drop(listener);
        assert!(!path.exists());
    }
}
