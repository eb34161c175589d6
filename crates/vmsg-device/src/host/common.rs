// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses that pass no descriptors between two ends of ours: windows are views of memory that both have from the start, and queues have doorbell
//! vectors in place of eventfds.

use std::sync::Arc;

use virtio_msg::Token;
use vmsg_bus::Vectors;
use vmsg_bus::control::{QueueVectors, Request, Status, device_of_window};
use vmsg_mem::{Doorbell, Mapping};

use super::connection::ConnId;
use super::core::Core;
use super::windows::Windows;
use crate::worker::Command;

impl Core {
    /// Says that the bus of `conn` passes no descriptors. Windows are views of `memory`, if there is any; queues can be kicked and call by `vectors`.
    pub fn set_common(
        &mut self,
        conn: ConnId,
        memory: Option<Arc<Mapping>>,
        vectors: Option<Arc<Vectors>>,
    ) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.common = true;
        connection.vectors = vectors;
        connection.common_memory = memory;
    }

    /// The windows among which the one with this id is, or would be: of the connection, or on such a bus of one device. `None`: there is no such device.
    pub(super) fn windows_for(&mut self, conn: ConnId, id: u32) -> Option<&mut Windows> {
        let connection = self.connections.get_mut(&conn)?;
        if !connection.common {
            return Some(&mut connection.windows);
        }
        let num = device_of_window(id);
        // There are no more of them than devices.
        if !self.entries.contains_key(&num) {
            return None;
        }
        let memory = &connection.common_memory;
        let windows = connection.windows_of.entry(num);
        Some(windows.or_insert_with(|| {
            let mut windows = Windows::new();
            if let Some(memory) = memory {
                windows.set_common(Arc::clone(memory));
            }
            windows
        }))
    }

    /// Gives a queue doorbells of its own, or such that it shares with others. Answered when the device waits for the one and rings the other.
    pub(super) fn set_vectors(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        asked: QueueVectors,
    ) -> Option<Status> {
        if let Err(status) = self.entry_with_queue(conn, asked.dev, asked.queue) {
            return Some(status);
        }
        let Some(vectors) = &self.connections.get(&conn)?.vectors else {
            return Some(Status::UNSUPPORTED);
        };
        let command = match (kick(vectors, asked.kick), call(vectors, asked.call)) {
            (Ok(kick), Ok(call)) => Command::SetNotify {
                queue: asked.queue.to_usize(),
                kick,
                call,
            },
            (Err(status), _) | (_, Err(status)) => return Some(status),
        };
        self.order_for_driver(conn, token, request, asked.dev.0, command);
        None
    }
}

/// A vector of ours. Each queue has a descriptor of its own for it: a ring is then told to each.
fn kick(vectors: &Vectors, vector: Option<u16>) -> Result<Option<Doorbell>, Status> {
    let Some(vector) = vector else {
        return Ok(None);
    };
    let fd = vectors.own_fd(vector).ok_or(Status::NOT_FOUND)?;
    let bell = fd.try_clone_to_owned().and_then(Doorbell::from_fd);
    bell.map(Some).map_err(|_| Status::BAD_STATE)
}

/// A vector of the driver.
fn call(vectors: &Vectors, vector: Option<u16>) -> Result<Option<Doorbell>, Status> {
    let Some(vector) = vector else {
        return Ok(None);
    };
    let bell = vectors.bell(vector).ok_or(Status::NOT_FOUND)?;
    bell.try_clone().map(Some).map_err(|_| Status::BAD_STATE)
}

#[cfg(test)]
#[path = "common_test.rs"]
mod tests;
