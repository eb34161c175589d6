// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The listening side: one front end after another, on a thread of its own.

use super::copies::Copies;
use super::guest::{Guest, GuestError, Reply};
use super::memory::MemoryError;
use super::pause::{Patience, Pause};
use super::socket::{Connection, ConnectionError};
use super::wire::Request;
use crate::front::listener::{BindError, Bound};
use crate::front::stats::FrontStats;
use crate::front::thread::{Desk, FrontThread, Visit};
use crate::link::SessionHandle;
use crate::session::{Event, Op, OpError, Outcome, ResetReason};
use crate::shadow;
use rustix::event::{PollFd, PollFlags};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thiserror::Error;

/// A front end sends its memory table right after its features. One that does not has none to share.
const MEMORY_PATIENCE: Duration = Duration::from_secs(2);

/// How long a device is held for a front end that may come back now that the link is up.
const RESERVED: Duration = Duration::from_secs(30);

/// How long to wait before the socket is tried again that somebody else has taken meanwhile.
const BIND_PAUSE: Duration = Duration::from_secs(2);

/// Requests taken before news of the device have their turn.
const BUDGET: usize = 64;

/// How a front is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VhostUserOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether configuration space is offered; `None`: except for network devices, SCSI and file systems, whose configuration QEMU keeps
    /// itself.
    pub config: Option<bool>,
    /// Whether the device host gets copies, and nothing else of the guest's memory.
    pub isolate: bool,
    /// Where the memory for copies comes from.
    pub segment: shadow::Source,
    /// How long a device may have requests under way after its front end has stopped it; the front end, and the guest, stand still
    /// meanwhile. A VMM with a disk of its own waits for ever.
    pub stop_patience: Duration,
}

/// Longer than a medium takes that is about to fail, as a rule.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

impl VhostUserOptions {
    /// A front that listens on `socket`, for this user only, and lends the guest's memory.
    pub fn new(socket: impl Into<PathBuf>) -> VhostUserOptions {
        VhostUserOptions {
            socket: socket.into(),
            mode: 0o600,
            config: None,
            isolate: false,
            segment: shadow::Source::default(),
            stop_patience: STOP_PATIENCE,
        }
    }
}

/// A running front. Dropping it ends the connection, releases the device and removes the socket.
#[derive(Debug)]
pub struct VhostUserFront(FrontThread);

impl VhostUserFront {
    /// Listens, and serves from a thread called `name` in logs. When this returns, front ends can connect.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn start(
        name: &str,
        session: SessionHandle,
        options: VhostUserOptions,
    ) -> Result<VhostUserFront, BindError> {
        let socket = options.socket.clone();
        let mode = options.mode;
        let run = move |desk, listener| {
            Server {
                desk,
                listener: Some(listener),
                pause: None,
                patience: Patience::default(),
                seen: false,
                reserved: None,
                options,
                told_remedy: false,
            }
            .run()
        };
        FrontThread::start(name, session, (&socket, mode), run).map(VhostUserFront)
    }

    /// What has happened so far.
    pub fn stats(&self) -> FrontStats {
        self.0.stats()
    }
}

/// Why a front end is not served any more.
#[derive(Debug, Error)]
enum End {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Guest(GuestError),
    #[error("the link is down")]
    LinkDown,
    #[error("{0}")]
    Lost(ResetReason),
    #[error("the device was removed")]
    Removed,
    #[error("stopping")]
    Stop,
}

struct Server {
    desk: Desk,
    /// `None` while nobody is let in.
    listener: Option<Bound>,
    pause: Option<Pause>,
    patience: Patience,
    /// The device was there.
    seen: bool,
    /// It is held for a front end that was sent away, until then.
    reserved: Option<Instant>,
    options: VhostUserOptions,
    told_remedy: bool,
}

impl Server {
    fn run(mut self) {
        loop {
            let Some(listener) = self.listener.as_ref().filter(|_| self.pause.is_none()) else {
                if !self.sit_out() {
                    return;
                }
                continue;
            };
            let pause = match self.desk.accept(listener) {
                Visit::Vmm(socket) => {
                    if !self.receive(socket) {
                        return;
                    }
                    continue;
                }
                Visit::Nobody => None,
                Visit::NotNow(pause) => Some(pause),
            };
            if !self.wait_for_front_end(pause) {
                return;
            }
        }
    }

    /// One front end, and what became of it. False: stop.
    fn receive(&mut self, socket: UnixStream) -> bool {
        // Whoever comes and goes without having been told of leaves no trace but in the counts.
        let told = self.desk.limit.admit();
        if let Some(unsaid) = told {
            tracing::info!(front = self.desk.name, unsaid, "front end connected");
        }
        let end = Connection::new(socket)
            .map_err(|e| End::from(ConnectionError::from(e)))
            .and_then(|c| self.serve(c));
        match end {
            Err(End::Stop) | Ok(()) => return false,
            Err(End::Connection(ConnectionError::Closed)) if told.is_some() => {
                tracing::info!(front = self.desk.name, "front end gone")
            }
            Err(End::Connection(ConnectionError::Closed)) => {}
            Err(End::LinkDown) => {
                if told.is_some() {
                    tracing::info!(
                        front = self.desk.name,
                        "the link is down: nobody is let in until it is up"
                    );
                }
            }
            Err(End::Removed) => {
                if told.is_some() {
                    tracing::warn!(
                        front = self.desk.name,
                        "the device was removed: nobody is let in until there is one again"
                    );
                }
            }
            Err(End::Guest(error)) => self.dropped(&error, told.is_some()),
            Err(end) => {
                self.desk.counts.malformed.fetch_add(1, Ordering::Relaxed);
                if told.is_some() {
                    tracing::warn!(front = self.desk.name, %end, "front end dropped");
                } else {
                    tracing::debug!(front = self.desk.name, %end, "front end dropped");
                }
            }
        }
        true
    }

    /// A front end was sent away because of what it wanted, or could not be given.
    fn dropped(&mut self, error: &GuestError, tell: bool) {
        self.desk.counts.malformed.fetch_add(1, Ordering::Relaxed);
        if let Some(pause) = self.patience.after(error) {
            self.pause = Some(Pause::Until(Instant::now() + pause));
            self.listener = None;
            if tell {
                tracing::warn!(
                    front = self.desk.name,
                    %error,
                    "front end dropped, and nobody let in for {} s",
                    pause.as_secs()
                );
            }
        } else if tell {
            tracing::warn!(front = self.desk.name, end = %error, "front end dropped");
        } else {
            tracing::debug!(front = self.desk.name, end = %error, "front end dropped");
        }
    }

    /// Waits while nobody is to be let in, and listens again after that. False: stop.
    fn sit_out(&mut self) -> bool {
        if let Some(pause) = &self.pause {
            let news = self.desk.session.event_fd();
            let mut fds = vec![PollFd::new(&news, PollFlags::IN)];
            fds.extend(pause.poll_fd());
            let until = pause.until();
            let left = until.map(|at| at.saturating_duration_since(Instant::now()));
            if !self.desk.wait(&mut fds, left).unwrap_or(false) {
                return false;
            }
            let other = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            let news = self.desk.take_news();
            let is_ready = |event: &Event| matches!(event, Event::Ready { .. });
            let over = match pause {
                Pause::Until(at) => *at <= Instant::now(),
                Pause::Removed => news.iter().any(is_ready),
                Pause::LinkDown { .. } => {
                    let changed = |event: &Event| *event == Event::ConfigChanged || is_ready(event);
                    other || (news.iter().any(changed) && !self.link_is_down())
                }
            };
            if !over {
                return true;
            }
            if matches!(pause, Pause::LinkDown { .. }) {
                self.reserved =
                    Some(Instant::now() + if other { Duration::ZERO } else { RESERVED });
            }
            self.pause = None;
        }
        match Bound::new(&self.options.socket, self.options.mode) {
            Ok(listener) => {
                tracing::info!(front = self.desk.name, "listening again");
                self.listener = Some(listener);
            }
            Err(error) => {
                if let Some(unsaid) = self.desk.limit.admit() {
                    tracing::error!(front = self.desk.name, %error, unsaid, "trying again");
                }
                self.pause = Some(Pause::Until(Instant::now() + BIND_PAUSE));
            }
        }
        true
    }

    /// Whether the device is a network device whose link is down, as far as a front end has to be told by being sent away.
    fn link_is_down(&self) -> bool {
        let guest = Guest::new(
            self.desk.session.clone(),
            (self.options.config, self.options.stop_patience),
            None,
            self.desk.limit.clone(),
        );
        guest
            .and_then(|guest| guest.link_is_down())
            .unwrap_or_default()
    }

    /// With `pause`, only for that long and whether or not anybody comes. False: stop.
    fn wait_for_front_end(&mut self, pause: Option<Duration>) -> bool {
        let door = self.listener.as_ref().filter(|_| pause.is_none());
        let reserved = self
            .reserved
            .map(|at| at.saturating_duration_since(Instant::now()));
        let left = pause.into_iter().chain(reserved).min();
        let Some(news) = self.desk.wait_for_vmm(door, left) else {
            return false;
        };
        if self.reserved.is_some_and(|at| at <= Instant::now()) {
            self.reserved = None;
            // If it cannot be told, the device host knows from the end of the connection.
            let _ = self.desk.session.call(Op::Release);
        }
        // Nobody is there to hear the rest.
        let ready = |event: &Event| matches!(event, Event::Ready { .. });
        if news.iter().any(ready) && !std::mem::replace(&mut self.seen, true) {
            self.tell_of_holder();
        }
        true
    }

    /// A device that another driver holds is known before anybody needs it.
    fn tell_of_holder(&self) {
        match self.desk.session.call(Op::Claim) {
            Ok(Outcome::Done) => {
                // It was to see: others may have it until it is needed.
                let _ = self.desk.session.call(Op::Release);
            }
            Err(OpError::Held(holder)) => tracing::warn!(
                front = self.desk.name,
                "the device is held by {holder}: front ends will be refused until it lets go"
            ),
            _ => {}
        }
    }

    /// One front end, from its first request to its end.
    fn serve(&mut self, mut connection: Connection) -> Result<(), End> {
        self.reserved = None;
        drop(self.desk.take_news());
        let copies = || Copies::new(&self.desk.name, self.options.segment.clone());
        let mut guest = Guest::new(
            self.desk.session.clone(),
            (self.options.config, self.options.stop_patience),
            self.options.isolate.then(copies),
            self.desk.limit.clone(),
        )
        .map_err(End::Guest)?;
        let end = self.converse(&mut connection, &mut guest);
        let shared = guest.has_memory() || guest.waits_for_memory.is_none();
        match &end {
            Err(End::Guest(GuestError::Memory(MemoryError::NotShared { .. }))) => {
                self.tell_remedy(crate::front::qemu::SHARE_REMEDY);
            }
            Err(
                End::Guest(GuestError::Op {
                    error: OpError::OtherMemory(other),
                    ..
                })
                | End::Lost(ResetReason::OtherMemory(other)),
            ) => {
                if let Some(remedy) = crate::front::qemu::memory_remedy(other) {
                    self.tell_remedy(&remedy);
                }
            }
            Err(End::Connection(_)) if !shared => {
                self.tell_remedy(crate::front::qemu::SHARE_REMEDY);
            }
            _ => {}
        }
        if matches!(end, Err(End::LinkDown)) {
            // Before the front end knows: from then on it serves the rings itself.
            if let Err(error) = guest.suspend()
                && let Some(unsaid) = self.desk.limit.admit()
            {
                tracing::warn!(front = self.desk.name, %error, unsaid, "the device was not stopped properly");
            }
            self.pause = Some(Pause::link_down(&connection));
            self.listener = None;
            return end;
        }
        if matches!(end, Err(End::Removed)) {
            // Before the front end knows: it would come again at once, and have a device that does nothing.
            self.pause = Some(Pause::Removed);
            self.listener = None;
        }
        let patient = match &end {
            // It has ended, most likely: nobody waits.
            Err(End::Connection(ConnectionError::Closed)) => {
                drop(connection);
                self.desk.released(guest.release(false));
                return end;
            }
            Err(End::Stop) => false,
            _ => true,
        };
        // A front end that is sent away lives, with its guest: what it takes for other things when it knows must be free.
        self.desk.released(guest.release(patient));
        drop(connection);
        end
    }

    fn converse(&mut self, connection: &mut Connection, guest: &mut Guest) -> Result<(), End> {
        loop {
            // Those that are there now: a device host can make new ones faster than they are passed on.
            let mut removed = false;
            for event in self.desk.take_news() {
                guest.news(&event);
                match event {
                    // Nothing the front end can do from within the connection would mend this. All else is mended when its driver starts over, and there are
                    // front ends that do not connect again.
                    Event::NeedsReset(reason @ ResetReason::OtherMemory(_)) => {
                        return Err(End::Lost(reason));
                    }
                    Event::NeedsReset(ResetReason::Removed) => removed = true,
                    // Another one was found in its place, and has all that the front end has set up.
                    Event::Ready { .. } => removed = false,
                    _ => {}
                }
            }
            if removed {
                return Err(End::Removed);
            }
            if guest
                .looks_at_link_at()
                .is_some_and(|at| at <= Instant::now())
            {
                guest.look_at_link = false;
                // A device that cannot be asked has not told of a change.
                if guest.link_is_down().unwrap_or_default() {
                    return Err(End::LinkDown);
                }
            }
            guest.take_copies_news();
            guest.tell_of_changes();
            connection.flush()?;
            let mut budget = BUDGET;
            while budget > 0 && !connection.is_backed_up() {
                let Some(incoming) = connection.receive()? else {
                    break;
                };
                budget -= 1;
                self.desk.counts.requests.fetch_add(1, Ordering::Relaxed);
                guest.last_request = Instant::now();
                let (id, wants_ack) = (incoming.id, incoming.wants_ack && guest.acks());
                let dispensable = matches!(
                    incoming.request,
                    Request::SetConfig { .. } | Request::NetSetMtu(_)
                );
                match guest.handle(incoming) {
                    Ok(Reply::Number(number)) => connection.reply(id, &number.to_ne_bytes())?,
                    Ok(Reply::Bytes(bytes)) => connection.reply(id, &bytes)?,
                    Ok(Reply::Memory(bytes, fd)) => connection.reply_with_fd(id, &bytes, fd)?,
                    Ok(Reply::Done) if wants_ack => connection.reply(id, &0u64.to_ne_bytes())?,
                    Ok(Reply::Done) => {}
                    Err(error) => {
                        self.desk.counts.refused.fetch_add(1, Ordering::Relaxed);
                        if let Some(unsaid) = self.desk.limit.admit() {
                            tracing::warn!(front = self.desk.name, request = id, %error, unsaid, "refused");
                        }
                        if wants_ack {
                            connection.reply(id, &1u64.to_ne_bytes())?;
                        }
                        // Guests can write what they like into configuration space, and a device away cannot be written to.
                        if dispensable {
                            continue;
                        }
                        // A front end that was not told, or goes on all the same, would believe in a device that is not there.
                        return Err(End::Guest(error));
                    }
                }
            }
            if guest
                .waits_for_memory
                .is_some_and(|since| since.elapsed() >= MEMORY_PATIENCE)
            {
                guest.waits_for_memory = None;
                self.tell_remedy(crate::front::qemu::SHARE_REMEDY);
            }
            if budget > 0 {
                self.wait(connection, guest)?;
            }
        }
    }

    fn wait(&self, connection: &Connection, guest: &Guest) -> Result<(), End> {
        let flags = if connection.is_backed_up() {
            PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let news = self.desk.session.event_fd();
        let mut fds = vec![
            PollFd::new(&news, PollFlags::IN),
            PollFd::from_borrowed_fd(connection.as_fd(), flags),
        ];
        let copies = guest.copies.as_ref().and_then(Copies::news_fd);
        fds.extend(copies.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let memory = guest.waits_for_memory.map(|since| since + MEMORY_PATIENCE);
        let patience = memory
            .into_iter()
            .chain(guest.looks_at_link_at())
            .chain(guest.tells_of_changes_at())
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()));
        match self.desk.wait(&mut fds, patience) {
            Ok(true) => Ok(()),
            Ok(false) => Err(End::Stop),
            Err(error) => Err(ConnectionError::Os(error).into()),
        }
    }

    fn tell_remedy(&mut self, remedy: &str) {
        if !self.told_remedy {
            self.told_remedy = true;
            tracing::error!(front = self.desk.name, "{remedy}");
        }
    }
}
