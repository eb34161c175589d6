// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hub for a serial line that is a stream: QEMU's `-chardev socket`.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use super::Hub;

/// Bytes taken from the line in one turn, or given to it.
const TURN: usize = 64 * 1024;

/// A hub, and the line that it is for while that is there.
#[derive(Debug)]
pub struct Serial {
    epoll: OwnedFd,
    hub: Hub,
    line: Option<UnixStream>,
    watched: EventFlags,
}

impl Serial {
    /// A console whose line is still to come.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub fn new(hub: Hub) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            hub.event_fd(),
            EventData::new_u64(0),
            EventFlags::IN,
        )?;
        Ok(Self {
            epoll,
            hub,
            line: None,
            watched: EventFlags::empty(),
        })
    }

    /// The hub.
    pub fn hub(&mut self) -> &mut Hub {
        &mut self.hub
    }

    /// Goes on with this line; the one before is closed.
    ///
    /// # Errors
    ///
    /// It cannot be watched.
    pub fn attach(&mut self, line: UnixStream) -> std::io::Result<()> {
        self.detach();
        line.set_nonblocking(true)?;
        self.watched = EventFlags::IN;
        epoll::add(&self.epoll, &line, EventData::new_u64(1), self.watched)?;
        self.line = Some(line);
        self.hub.set_guest_open(true);
        Ok(())
    }

    fn detach(&mut self) {
        if let Some(line) = self.line.take() {
            let _ = epoll::delete(&self.epoll, &line);
        }
        self.hub.set_guest_open(false);
    }

    /// Whether there is a line.
    pub fn is_attached(&self) -> bool {
        self.line.is_some()
    }

    /// Readable when [`poll`](Self::poll) has work.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Carries what has come, either way. A line that has ended is let go.
    pub fn poll(&mut self) {
        self.hub.poll();
        if !self.carry() {
            self.detach();
        }
    }

    /// False when the line has ended.
    fn carry(&mut self) -> bool {
        let Self {
            line: Some(line),
            hub,
            ..
        } = self
        else {
            return true;
        };
        let mut chunk = [MaybeUninit::uninit(); 4096];
        let mut taken = 0;
        while taken < TURN {
            match rustix::io::read(&*line, &mut chunk) {
                Ok(([], _)) => return false,
                Ok((bytes, _)) => {
                    taken += bytes.len();
                    hub.output(bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        // Clients may type as fast as the line takes it: others have their turn, too.
        let mut typed = 0;
        while !hub.input().is_empty() && typed < TURN {
            match rustix::io::write(&*line, hub.input().as_slices().0) {
                Ok(count) => {
                    typed += count;
                    hub.consume(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        let mut wanted = EventFlags::IN;
        if !hub.input().is_empty() {
            wanted |= EventFlags::OUT;
        }
        if wanted != self.watched {
            self.watched = wanted;
            let data = EventData::new_u64(1);
            return epoll::modify(&self.epoll, &*line, data, wanted).is_ok();
        }
        true
    }
}
