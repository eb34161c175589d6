// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a link comes by its connection.

use super::{BUSY_PAUSE, ERROR_PAUSE, HANDSHAKE, Runner};
use std::path::Path;
use std::time::Instant;
use vmsg_bus::{ConnectError, Connecting, Connector, DriverBus, Watch};

/// How the link stands with the bus.
pub(super) enum Phase {
    /// To be tried at that time; `None`: now.
    Try { at: Option<Instant> },
    /// Nobody there: until the watch says otherwise.
    Asleep,
    /// The host has still to answer.
    Handshake {
        connecting: Box<Connecting>,
        until: Instant,
    },
    /// Connected.
    Connected(Box<DriverBus>),
    /// Not any more, and never again.
    Over,
}

pub(super) struct State {
    pub(super) connector: Option<(Connector, Option<Watch>)>,
    pub(super) phase: Phase,
}

impl Runner {
    /// Goes on with connecting, as far as it goes without waiting.
    pub(super) fn advance(&mut self, state: &mut State) {
        let Some((connector, watch)) = &mut state.connector else {
            return;
        };
        loop {
            let result = match &mut state.phase {
                Phase::Over | Phase::Connected(_) => return,
                Phase::Asleep => match watch.as_mut().map(Watch::ready) {
                    Some(Ok(true)) => {
                        state.phase = Phase::Try { at: None };
                        continue;
                    }
                    Some(Ok(false)) => return,
                    Some(Err(_)) | None => {
                        *watch = None;
                        state.phase = Phase::Try {
                            at: Some(Instant::now() + ERROR_PAUSE),
                        };
                        return;
                    }
                },
                Phase::Try { at: Some(at) } if *at > Instant::now() => return,
                Phase::Try { .. } => connector.start().map(|connecting| {
                    state.phase = Phase::Handshake {
                        connecting: Box::new(connecting),
                        until: Instant::now() + HANDSHAKE,
                    };
                    None
                }),
                Phase::Handshake { connecting, until } => match connecting.advance() {
                    Ok(None) if *until > Instant::now() => return,
                    Ok(None) => Err(ConnectError::TimedOut {
                        path: connector.path().to_owned(),
                        after: HANDSHAKE,
                    }),
                    result => result,
                },
            };
            match result {
                Ok(None) => {}
                Ok(Some(bus)) => {
                    self.link_up(&bus);
                    state.phase = Phase::Connected(Box::new(bus));
                    return;
                }
                Err(error) => {
                    self.tell(&error, connector.path());
                    state.phase = match error {
                        error if error.is_not_there() && watch.is_some() => Phase::Asleep,
                        error if error.is_transient() => Phase::Try {
                            at: Some(Instant::now() + BUSY_PAUSE),
                        },
                        _ => Phase::Try {
                            at: Some(Instant::now() + ERROR_PAUSE),
                        },
                    };
                    if !matches!(state.phase, Phase::Asleep) {
                        return;
                    }
                }
            }
        }
    }

    fn tell(&mut self, error: &ConnectError, path: &Path) {
        let mut text = error.to_string();
        if let Some(folder) = path.parent().filter(|folder| {
            error.is_not_there() && !folder.as_os_str().is_empty() && !folder.exists()
        }) {
            // Most likely a slip of the pen.
            text = format!("{text}: there is no folder `{}`", folder.display());
        }
        if text == self.last_error {
            return;
        }
        if let Some(unsaid) = self.limit.admit() {
            match error {
                error if error.is_not_there() => {
                    tracing::info!(link = self.name, unsaid, "{text}; waiting for it")
                }
                // A host that was just killed, for example.
                error if error.is_transient() => {
                    tracing::info!(link = self.name, unsaid, "{text}; trying again");
                }
                _ => tracing::warn!(link = self.name, unsaid, "{text}; trying again"),
            }
        }
        self.last_error = text;
    }
}
