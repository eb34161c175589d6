// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has besides its process: the sockets that its QEMU comes to, and a console.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Context;
use vmsg_device::console::{Hub, HubConfig, Serial};

use super::super::plan::{Kind, Part};
use super::super::qmp::Qmp;
use super::super::status::{Note, Shared};

/// What a guest has besides its process.
#[derive(Debug)]
pub(super) struct Guest {
    qmp_listener: UnixListener,
    /// The connection, with its number.
    pub(super) qmp: Option<(u64, Qmp)>,
    connections: u64,
    serial: Option<(UnixListener, Serial)>,
}

/// Listens at `path`, where one that is gone may have left a socket: nobody else can be here, as the folder is locked.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let context = || format!("cannot listen at {}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(context);
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(context)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
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
            Some((listen(&path)?, Serial::new(hub)?))
        } else {
            None
        };
        Ok(Some(Self {
            qmp_listener: listen(&machine.qmp())?,
            qmp: None,
            connections: 0,
            serial,
        }))
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = vec![self.qmp_listener.as_fd()];
        if let Some((listener, serial)) = &self.serial {
            fds.extend([listener.as_fd(), serial.event_fd()]);
        }
        fds
    }

    pub(super) fn take_in(&mut self, name: &str, shared: &Shared) {
        while let Ok((stream, _)) = self.qmp_listener.accept() {
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
            while let Ok((stream, _)) = listener.accept() {
                if let Err(error) = serial.attach(stream) {
                    tracing::warn!(part = name, %error, "no serial line");
                }
            }
            serial.poll();
        }
    }
}
