// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is on its way to the keeper. Whoever has something for it does not wait: what the socket
//! does not take at once goes later, in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::client::PATIENCE;
use super::protocol::{Kind, send};

#[derive(Debug)]
struct Order {
    kind: Kind,
    device: String,
    key: u64,
    record: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Order {
    fn send(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let fd = self.fd.as_ref().map(AsFd::as_fd);
        send(socket, self.kind, &self.device, self.key, &self.record, fd)
    }
}

#[derive(Debug, Default)]
struct State {
    /// A connection that comes and goes while the keeper does not read is taken out again, so that
    /// there are never more than there are connections and what the keeper holds.
    waiting: VecDeque<Order>,
    /// The keeper is gone.
    lost: bool,
    /// Single connections that cannot be kept have been spoken of.
    complained: bool,
}

/// The line to the keeper.
#[derive(Debug)]
pub(super) struct Line {
    socket: OwnedFd,
    state: Mutex<State>,
    /// Something waits, or nothing does any more.
    changed: Condvar,
}

impl Line {
    /// Takes over a connected socket.
    pub(super) fn start(socket: OwnedFd) -> io::Result<Arc<Self>> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let line = Arc::new(Self {
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let writer = Arc::clone(&line);
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || writer.run())?;
        Ok(line)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, device: &str, key: u64, record: &[u8], fd: BorrowedFd<'_>) {
        let mut state = self.state();
        if state.lost {
            return;
        }
        let result = if state.waiting.is_empty() {
            send(
                self.socket.as_fd(),
                Kind::Put,
                device,
                key,
                record,
                Some(fd),
            )
        } else {
            Err(Errno::AGAIN.into())
        };
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match fd.try_clone_to_owned() {
                    Ok(fd) => self.wait(
                        &mut state,
                        Order {
                            kind: Kind::Put,
                            device: device.to_owned(),
                            key,
                            record: record.to_vec(),
                            fd: Some(fd),
                        },
                    ),
                    Err(error) => state.complain(&error),
                }
            }
            Err(error) => state.fail(&error),
        }
    }

    pub(super) fn remove(&self, device: &str, key: u64) {
        let mut state = self.state();
        if state.lost {
            return;
        }
        let waits = state.waiting.iter().position(|order| {
            order.kind == Kind::Put && order.key == key && order.device == device
        });
        if let Some(index) = waits {
            state.waiting.remove(index);
            return;
        }
        self.order(&mut state, Kind::Remove, device, key);
    }

    /// The last word; waits a little for the keeper to take it.
    pub(super) fn dismiss(&self) {
        let mut state = self.state();
        if state.lost {
            return;
        }
        self.order(&mut state, Kind::Dismiss, "", 0);
        let done = |state: &mut State| !state.waiting.is_empty() && !state.lost;
        drop(self.changed.wait_timeout_while(state, PATIENCE, done));
    }

    /// Ends without a farewell, once all is said that was to be said before.
    #[cfg(test)]
    pub(super) fn hang_up(&self) {
        let said = self.changed.wait_while(self.state(), |state| {
            !state.waiting.is_empty() && !state.lost
        });
        drop(said);
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).expect("connected");
    }

    fn order(&self, state: &mut State, kind: Kind, device: &str, key: u64) {
        let order = Order {
            kind,
            device: device.to_owned(),
            key,
            record: Vec::new(),
            fd: None,
        };
        self.wait(state, order);
        self.send_waiting(state);
    }

    fn wait(&self, state: &mut State, order: Order) {
        state.waiting.push_back(order);
        self.changed.notify_all();
    }

    /// Sends what the socket takes now.
    fn send_waiting(&self, state: &mut State) {
        while let Some(order) = state.waiting.front() {
            match order.send(self.socket.as_fd()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => state.fail(&error),
            }
            state.waiting.pop_front();
        }
        self.changed.notify_all();
    }

    /// Sends what has to wait, when the socket takes more.
    fn run(&self) {
        loop {
            let empty = |state: &mut State| state.waiting.is_empty() && !state.lost;
            let state = self
                .changed
                .wait_while(self.state(), empty)
                .unwrap_or_else(PoisonError::into_inner);
            if state.lost {
                return;
            }
            drop(state);
            let writable = PollFd::new(&self.socket, PollFlags::OUT);
            if let Err(error) = poll(&mut [writable], None)
                && error != Errno::INTR
            {
                self.state().fail(&error.into());
            }
            self.send_waiting(&mut self.state());
        }
    }
}

impl State {
    fn fail(&mut self, error: &io::Error) {
        // More descriptors on the way than one user may have: that is about this one only.
        if error.raw_os_error() == Some(Errno::TOOMANYREFS.raw_os_error()) {
            self.complain(error);
            return;
        }
        if !self.lost {
            self.lost = true;
            tracing::warn!(%error, "the keeper is gone: connections will not survive this process");
        }
        self.waiting.clear();
    }

    fn complain(&mut self, error: &io::Error) {
        if !self.complained {
            self.complained = true;
            tracing::warn!(%error, "some connections would not survive this process");
        }
    }
}

#[cfg(test)]
#[path = "line_test.rs"]
mod tests;
