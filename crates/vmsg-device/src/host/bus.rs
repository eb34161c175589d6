// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus of the host with its connections, and messages between these and its core.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use virtio_msg::{Channel, ChannelError};
use vmsg_bus::{DeviceBus, Listener};

use super::connection::ConnId;
use super::core::Core;
use super::log_limit::LogLimit;

/// Messages taken from one connection before others have their turn.
const BUDGET: usize = 64;
/// Or, if they are expensive ones, this much time.
const TURN: Duration = Duration::from_micros(500);

#[derive(Debug)]
pub(super) struct Bus {
    pub(super) core: Core,
    pub(super) listener: Option<Listener>,
    /// What goes wrong with the listener goes wrong again at each attempt.
    pub(super) listener_log: LogLimit,
    pub(super) connections: BTreeMap<ConnId, DeviceBus>,
    /// Connections that may have more to read.
    pub(super) unread: BTreeSet<ConnId>,
}

impl Bus {
    pub(super) fn new(core: Core, listener: Option<Listener>) -> Self {
        Self {
            core,
            listener,
            listener_log: LogLimit::new(),
            connections: BTreeMap::new(),
            unread: BTreeSet::new(),
        }
    }

    /// Reads from a connection until it is empty, others must have a turn, or
    /// the core wants no more.
    pub(super) fn read(
        &mut self,
        now: virtio_msg::Instant,
        conn: ConnId,
    ) -> Result<(), ChannelError> {
        let Self {
            core,
            connections,
            unread,
            ..
        } = self;
        let Some(connection) = connections.get_mut(&conn) else {
            unread.remove(&conn);
            return Ok(());
        };
        // Cleared before the messages are read: what comes later makes it readable again.
        if connection.clear_poll_fd().is_err() {
            return Err(ChannelError::Closed);
        }
        let mut buffer = vec![0; connection.max_message_size()];
        let mut fds = Vec::new();
        let begin = Instant::now();
        for _ in 0..BUDGET {
            if !core.wants_input(conn) || begin.elapsed() > TURN {
                return Ok(());
            }
            match connection.try_recv_with_fds(&mut buffer, &mut fds)? {
                Some(len) => {
                    core.handle_message(now, conn, &buffer[..len], std::mem::take(&mut fds));
                }
                None if connection.arm() => {
                    unread.remove(&conn);
                    return if connection.is_closed() {
                        Err(ChannelError::Closed)
                    } else {
                        Ok(())
                    };
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Sends what waits for a connection, as far as there is room.
    pub(super) fn write(&mut self, conn: ConnId) -> Result<(), ChannelError> {
        let Self {
            core, connections, ..
        } = self;
        let Some(connection) = connections.get_mut(&conn) else {
            return Ok(());
        };
        let mut any = false;
        while let Some(message) = core.poll_transmit(conn) {
            let sent = match core.transmit_fd(conn) {
                Some(fd) => connection.try_send_with_fds(message, &[fd]),
                None => connection.try_send(message),
            };
            match sent {
                Ok(()) => {
                    core.sent(conn);
                    any = true;
                }
                Err(ChannelError::Full) => {
                    if connection.arm_for_room() {
                        return Ok(());
                    }
                }
                Err(ChannelError::TooLong) => core.sent(conn),
                Err(error) => return Err(error),
            }
        }
        if any { connection.flush() } else { Ok(()) }
    }
}
