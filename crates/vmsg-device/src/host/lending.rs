// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that drivers lend, and take back.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_msg::Token;
use vmsg_bus::control::{self, BackingAdd, Request, Status, ViewAdd, WindowAdd};
use vmsg_mem::WindowTable;

use super::connection::ConnId;
use super::core::{Answer, Core, Waiter};
use super::windows::{Description, Refusal, Shares};
use crate::worker::Command;

impl Core {
    /// What all connections have lent.
    fn shares(&self) -> Shares {
        let mut all = Shares::default();
        let mut files = 0;
        for connection in self.connections.values() {
            let windows = connection.windows_of.values();
            for windows in windows.chain([&connection.windows]) {
                let shares = windows.shares();
                all.mappings += shares.mappings;
                all.views += shares.views;
                files += shares.files.unwrap_or(0);
            }
        }
        all.files = (self.passthroughs > 0).then_some(files);
        all
    }

    pub(super) fn add_window(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        window: WindowAdd,
        fds: Vec<OwnedFd>,
    ) -> Option<Status> {
        let all = self.shares();
        let connection = self.connections.get_mut(&conn)?;
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Some(Status::BAD_FD);
        };
        let description = Description {
            id: window.id,
            writable: window.writable,
            base: window.base.0,
            len: window.len,
            file_offset: window.file_offset,
        };
        let changed = connection.windows.add(description, &fd, window.more, all);
        self.window_changed(conn, token, request, changed)
    }

    pub(super) fn add_view(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        view: ViewAdd,
    ) -> Option<Status> {
        let all = self.shares();
        let Some(windows) = self.windows_for(conn, view.id) else {
            return Some(Status::NOT_FOUND);
        };
        let changed = windows.add_view(view, all);
        self.window_changed(conn, token, request, changed)
    }

    pub(super) fn add_backing(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        backing: BackingAdd,
        fds: Vec<OwnedFd>,
    ) -> Option<Status> {
        let all = self.shares();
        let connection = self.connections.get_mut(&conn)?;
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Some(Status::BAD_FD);
        };
        match connection.windows.add_backing(backing, &fd, all) {
            Ok(()) => Some(Status::OK),
            Err(refusal) => self.window_changed(conn, token, request, Err(refusal)),
        }
    }

    /// Answered when nothing has the file mapped any more: a table from before may still be in use.
    pub(super) fn remove_backing(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        id: u32,
    ) -> Option<Status> {
        let windows = &mut self.connections.get_mut(&conn)?.windows;
        let removed = windows.remove_backing(id).map(|()| true);
        self.window_changed(conn, token, request, removed)
    }

    pub(super) fn remove_window(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        id: u32,
        more: bool,
    ) -> Option<Status> {
        let all = self.shares();
        let Some(windows) = self.windows_for(conn, id) else {
            return Some(Status::NOT_FOUND);
        };
        let changed = windows.remove(id, more, all);
        self.window_changed(conn, token, request, changed)
    }

    /// Shows a changed table to the workers of all devices that this driver
    /// holds or has just released; the answer waits until each has let go of the old one.
    fn window_changed(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        changed: Result<bool, Refusal>,
    ) -> Option<Status> {
        match changed {
            Ok(false) => return Some(Status::OK),
            Ok(true) => {}
            Err(refusal) => {
                if self.first_complaint(self.now, conn) {
                    let connection = self.connections.get(&conn)?;
                    tracing::warn!(peer = %connection.peer, %refusal, "window refused; what else goes wrong here is not logged");
                }
                return Some(refusal.status());
            }
        }
        let connection = self.connections.get(&conn)?;
        let only = connection
            .common
            .then(|| control::device_of_window(request.subject()));
        let held = self.entries.iter().filter(|(num, entry)| {
            entry.memory_of == Some(conn) && only.is_none_or(|only| only == **num)
        });
        let held: Vec<(u16, Arc<WindowTable>)> = held
            .map(|(num, _)| (*num, connection.table_for(*num)))
            .collect();
        if held.is_empty() {
            return Some(Status::OK);
        }
        let answer = self.defer_answer(Answer {
            conn,
            missing: held.len(),
            failed: false,
            token,
            request,
        });
        for (num, table) in held {
            self.order_for(num, Waiter::Driver(answer), Command::SetMemory(table));
        }
        None
    }
}
