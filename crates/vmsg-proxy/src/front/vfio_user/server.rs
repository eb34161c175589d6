// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The listening side: one client after another, on a thread of its own.

use super::away::{Nobody, Refusal};
use super::behind::Behind;
use super::function::{self, Served};
use crate::front::listener::{BindError, Bound};
use crate::front::stats::FrontStats;
use crate::front::thread::{Desk, FrontThread, Visit};
use crate::link::SessionHandle;
use crate::memory::DmaMemory;
use crate::session::{self, Op, OpError};
use crate::shadow;
use crate::transport::{Backend, Direct};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmsg_vfio_user::{Connection, Options, Turn};

/// How long a client waits for a device that was never seen. QEMU gives up after 5 s.
const FIRST_CONTACT: Duration = Duration::from_secs(4);

/// How long a client that is turned away has to read why.
const FAREWELL: Duration = Duration::from_secs(5);

/// Messages taken before news of the device have their turn.
const BUDGET: u32 = 64;

/// The session's times, as clients of vfio-user need them.
pub(crate) fn session_options() -> session::Options {
    session::Options {
        first_contact_timeout: FIRST_CONTACT,
        // A client that comes again was started again by somebody.
        second_contact_timeout: FIRST_CONTACT,
        // The driver asks again, and its processor does not stand still between.
        overdue_timeout: Duration::ZERO,
        ..session::Options::default()
    }
}

/// How a front is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VfioUserOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether the device host gets copies, and nothing else of the guest's memory.
    pub isolate: bool,
    /// Where the memory for copies comes from.
    pub segment: shadow::Source,
}

impl VfioUserOptions {
    /// A front that listens on `socket`, for this user only, and lends the guest's memory.
    pub fn new(socket: impl Into<PathBuf>) -> VfioUserOptions {
        VfioUserOptions {
            socket: socket.into(),
            mode: 0o600,
            isolate: false,
            segment: shadow::Source::default(),
        }
    }
}

/// A running front. Dropping it ends the connection, releases the device and removes the socket.
#[derive(Debug)]
pub struct VfioUserFront(FrontThread);

impl VfioUserFront {
    /// Listens, and serves from a thread called `name` in logs. When this returns, clients can connect.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn start(
        name: &str,
        session: SessionHandle,
        options: VfioUserOptions,
    ) -> Result<VfioUserFront, BindError> {
        let socket = options.socket.clone();
        let run = {
            let (isolate, segment) = (options.isolate, options.segment);
            move |desk, listener| {
                Server {
                    desk,
                    isolate,
                    segment,
                }
                .run(&listener)
            }
        };
        FrontThread::start(name, session, (&socket, options.mode), run).map(VfioUserFront)
    }

    /// What has happened so far.
    pub fn stats(&self) -> FrontStats {
        self.0.stats()
    }
}

/// Why a client is not served any more.
enum End {
    Stop,
    Client(vmsg_vfio_user::End),
    /// It was never served.
    Away,
    Os(io::Error),
}

/// What there is to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    /// The session has news.
    pub(super) news: bool,
    /// The device has rung, or the copies have news.
    pub(super) calls: bool,
}

struct Server {
    desk: Desk,
    /// As [`VfioUserOptions`] has them.
    isolate: bool,
    segment: shadow::Source,
}

impl Server {
    fn run(self, listener: &Bound) {
        loop {
            let (door, pause) = match self.desk.accept(listener) {
                Visit::Vmm(socket) => {
                    // The process at the other end lives only as long as this one.
                    let go_on = catch_unwind(AssertUnwindSafe(|| self.serve(socket)));
                    if !go_on.unwrap_or_else(|_| self.recover()) {
                        return;
                    }
                    continue;
                }
                Visit::Nobody => (Some(listener), None),
                Visit::NotNow(pause) => (None, Some(pause)),
            };
            // Nobody is there to hear the news.
            if self.desk.wait_for_vmm(door, pause).is_none() {
                return;
            }
        }
    }

    /// After a panic that nobody has expected: the client is gone, and nothing of it may stay. True: go on.
    fn recover(&self) -> bool {
        tracing::error!(
            front = self.desk.name,
            "a mistake in this program has cost a client its device; the next one is served"
        );
        self.desk.released(self.desk.session.call(Op::Release));
        true
    }

    /// One client, from its first message to its end. False: stop.
    fn serve(&self, socket: UnixStream) -> bool {
        // Whoever comes and goes without having been told of leaves no trace but in the counts.
        let told = self.desk.limit.admit();
        if let Some(unsaid) = told {
            tracing::info!(front = self.desk.name, unsaid, "client connected");
        }
        // Of the client before, or of nobody.
        drop(self.desk.take_news());
        let mut connection = match Connection::new(socket, Options::default()) {
            Ok(connection) => connection,
            Err(error) => {
                if let Some(unsaid) = self.desk.limit.admit() {
                    tracing::error!(front = self.desk.name, %error, unsaid, "cannot serve a client");
                }
                return true;
            }
        };
        let end = match self.meet(&connection) {
            Ok(mut served) => {
                let end = self.converse(&mut connection, &mut served);
                self.tell_nonsense(&connection);
                // First: copying stops, and nobody rings the client's eventfds.
                drop(served);
                end
            }
            Err(refusal) => self.turn_away(&mut connection, refusal),
        };
        // Before a client that lives knows: then it takes its guest's memory for other things.
        self.desk.released(self.desk.session.call(Op::Release));
        drop(connection);
        match end {
            End::Stop => return false,
            End::Client(vmsg_vfio_user::End::Closed) => {
                if told.is_some() {
                    tracing::info!(front = self.desk.name, "client gone");
                }
            }
            End::Client(end) => {
                self.desk.counts.malformed.fetch_add(1, Ordering::Relaxed);
                if told.is_some() {
                    tracing::warn!(front = self.desk.name, %end, "client dropped");
                }
            }
            End::Away => {}
            End::Os(error) => {
                if let Some(unsaid) = self.desk.limit.admit() {
                    tracing::error!(front = self.desk.name, %error, unsaid, "cannot serve a client any more");
                }
            }
        }
        true
    }

    /// Says how much a client has sent that no correct one sends.
    fn tell_nonsense(&self, connection: &Connection) {
        let counters = connection.counters();
        if counters.malformed + counters.stray_replies > 0
            && let Some(unsaid) = self.desk.limit.admit()
        {
            tracing::warn!(
                front = self.desk.name,
                malformed = counters.malformed,
                stray_replies = counters.stray_replies,
                unsaid,
                "the client has sent what no correct client sends"
            );
        }
    }

    /// Finds out what there is to serve. A client waits meanwhile.
    fn meet(&self, connection: &Connection) -> Result<Served, Refusal> {
        let (session, deadline) = self.desk.session.bounded();
        deadline.set(Some(Instant::now() + FIRST_CONTACT));
        let absent = |error| match error {
            OpError::Held(holder) => Refusal::Held(holder),
            OpError::TimedOut | OpError::NoDevice => Refusal::Absent,
            error => Refusal::Other(error),
        };
        let direct = Direct::new(session.clone()).map_err(absent)?;
        session.call(Op::Claim).map_err(absent)?;
        let device_id = direct.facts().info.device_id;
        let shared = function::shared_memory(&session, device_id);
        deadline.set(None);
        // Of another name space: then it is not known.
        let client = rustix::net::sockopt::socket_peercred(connection).ok();
        let client = client.map(|client| client.pid);
        let memory = Arc::new(DmaMemory::new(Box::new(connection.dma()), client));
        let copying = (self.desk.name.clone(), self.segment.clone());
        let lends = (!self.isolate).then_some(session);
        let behind = Behind::new(direct, memory, lends, copying, self.desk.limit.clone())
            .map_err(Refusal::Copies)?;
        Ok(Served::new(
            &self.desk.name,
            behind,
            deadline,
            shared,
            self.desk.limit.clone(),
        ))
    }

    /// Tells a client that there is nothing for it, and waits until it has read that.
    fn turn_away(&self, connection: &mut Connection, refusal: Refusal) -> End {
        let stopped = matches!(refusal, Refusal::Other(OpError::Ended));
        if !stopped && let Some(unsaid) = self.desk.limit.admit() {
            tracing::error!(
                front = self.desk.name,
                unsaid,
                "a client is turned away: {refusal}"
            );
        }
        self.desk.counts.refused.fetch_add(1, Ordering::Relaxed);
        let mut nobody = Nobody(refusal.errno());
        let until = Instant::now() + FAREWELL;
        loop {
            let Ok(turn) = connection.turn(&mut nobody, BUDGET) else {
                return End::Away;
            };
            self.count(turn);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || stopped {
                return End::Away;
            }
            // Whoever goes on talking does not get more time for it.
            let left = if turn.more { Duration::ZERO } else { left };
            if let Err(end) = self.wait(connection, None, Some(left)) {
                return end;
            }
        }
    }

    fn converse(&self, connection: &mut Connection, served: &mut Served) -> End {
        let mut ready = Ready {
            news: true,
            calls: true,
        };
        loop {
            if ready.news || ready.calls {
                let pass_on = || {
                    #[cfg(test)]
                    tests::stumble();
                    served.pass_on(&self.desk.session, ready)
                };
                match self.survive(pass_on) {
                    Some(Ok(())) => {}
                    Some(Err(error)) => return End::Os(error),
                    None => self.mistake(served),
                }
            }
            let more = match connection.turn(served, BUDGET) {
                Ok(turn) => {
                    self.count(turn);
                    let refused = std::mem::take(&mut served.refused);
                    self.desk
                        .counts
                        .refused
                        .fetch_add(refused, Ordering::Relaxed);
                    if turn.panics > 0 {
                        self.mistake(served);
                    }
                    turn.more
                }
                Err(end) => return End::Client(end),
            };
            if served.is_late() && !more && !has_input(connection) {
                served.rested();
            }
            match self.wait(connection, Some(served), more.then_some(Duration::ZERO)) {
                Ok(what) => ready = what,
                Err(end) => return end,
            }
        }
    }

    /// Does something. `None`: it has panicked, and this thread goes on.
    fn survive<T>(&self, what: impl FnOnce() -> T) -> Option<T> {
        let result = catch_unwind(AssertUnwindSafe(what));
        if result.is_err()
            && let Some(unsaid) = self.desk.limit.admit()
        {
            tracing::error!(
                front = self.desk.name,
                unsaid,
                "a mistake in this program; going on"
            );
        }
        result.ok()
    }

    /// Nobody knows how the device is.
    fn mistake(&self, served: &mut Served) {
        if let Some(unsaid) = self.desk.limit.admit() {
            tracing::error!(front = self.desk.name, unsaid, "the device needs a reset");
        }
        self.survive(|| served.broken());
    }

    fn count(&self, turn: Turn) {
        self.desk
            .counts
            .requests
            .fetch_add(turn.handled.into(), Ordering::Relaxed);
    }

    /// Until there is something to do, or for so long.
    fn wait(
        &self,
        connection: &Connection,
        served: Option<&Served>,
        left: Option<Duration>,
    ) -> Result<Ready, End> {
        let interest = connection.interest();
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.read);
        flags.set(PollFlags::OUT, interest.write);
        let news = self.desk.session.event_fd();
        let mut fds = vec![PollFd::new(connection, flags)];
        if let Some(served) = served {
            fds.push(PollFd::new(&news, PollFlags::IN));
            fds.push(PollFd::new(served.behind().calls(), PollFlags::IN));
            let copies = served.behind().news_fd();
            fds.extend(copies.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        }
        if !self.desk.wait(&mut fds, left).map_err(End::Os)? {
            return Err(End::Stop);
        }
        let is = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            news: is(1),
            calls: is(2) || is(3),
        })
    }
}

/// Whether the client has sent something that was not read yet.
fn has_input(connection: &Connection) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
