// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The I/O around a [`Session`]: one thread that holds the connection to the bus, connects again when it is lost, keeps the session's
//! timers, and does what fronts ask through a [`SessionHandle`].
//!
//! The thread sleeps unless a message, an operation, a timer or the appearance of the device host's socket wakes it. Kicks and calls of
//! a running device do not pass here.

mod bells;
mod handle;

pub use handle::{LinkStats, SessionHandle};

use bells::Bells;
use handle::{Command, News};

use crate::log_limit::LogLimit;
use crate::pace::Pace;
use crate::session::{CommonMemory, Event, OpError, OpId, Outcome, Outgoing, Session};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::DriverBus;
use vmsg_bus::unix::{ConnectError, Connecting, Connector, Watch};
use vmsg_mem::Doorbell;

/// Messages taken from the bus before anything else has its turn.
const BUDGET: usize = 64;
/// Pause where no event tells when a host has time.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// Pause after an error that only somebody can mend.
const ERROR_PAUSE: Duration = Duration::from_secs(2);
/// How long a host may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Where a link gets its bus from.
#[derive(Debug)]
pub enum Source {
    /// A device host on a Unix socket; connected to again and again.
    Unix(Connector),
    /// A connection there is; when it ends there is no other.
    Given(Box<DriverBus>),
    /// The same, on a bus that has this memory in common.
    GivenWith(Box<DriverBus>, Vec<CommonMemory>),
}

/// A running link. Dropping it stops the thread; operations under way end with [`OpError::Ended`].
#[derive(Debug)]
pub struct Link {
    handle: SessionHandle,
    stop: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts the thread, called `name` in logs.
    ///
    /// # Errors
    /// Of `eventfd` and of starting a thread.
    pub fn start(name: &str, mut session: Session, source: Source) -> io::Result<Link> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(Doorbell::new()?);
        let stop = Arc::new(Doorbell::new()?);
        let news = Arc::new(News {
            events: Mutex::new(VecDeque::new()),
            bell: Doorbell::new()?,
        });
        let handle = SessionHandle {
            commands,
            wake: wake.clone(),
            news: news.clone(),
        };
        let state = match source {
            Source::Unix(connector) => {
                let watch = Watch::new(connector.path());
                if let Err(error) = &watch {
                    tracing::warn!(link = name, %error, "cannot watch for the device host, asking again and again instead");
                }
                State {
                    connector: Some((connector, watch.ok())),
                    phase: Phase::Try { at: None },
                }
            }
            Source::Given(bus) => State {
                connector: None,
                phase: Phase::Connected(bus),
            },
            Source::GivenWith(bus, common) => {
                session.set_common_memory(common);
                State {
                    connector: None,
                    phase: Phase::Connected(bus),
                }
            }
        };
        let runner = Runner {
            name: name.to_owned(),
            session,
            inbox,
            wake,
            stop: stop.clone(),
            news,
            calls: BTreeMap::new(),
            stuck: None,
            stats: LinkStats::default(),
            begin: Instant::now(),
            last_error: String::new(),
            absence_told: false,
            limit: LogLimit::default(),
            pace: Pace::new(Instant::now()),
            bells: Bells::new()?,
            bells_version: (0, 0),
            kicked: false,
        };
        let thread = std::thread::Builder::new()
            .name(format!("link {name}"))
            .spawn(move || runner.run(state))?;
        Ok(Link {
            handle,
            stop,
            thread: Some(thread),
        })
    }

    /// What fronts use.
    pub fn handle(&self) -> SessionHandle {
        self.handle.clone()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// How the link stands with the bus.
enum Phase {
    /// To be tried at that time; `None`: now.
    Try { at: Option<Instant> },
    /// Nobody there: until the watch says otherwise.
    Asleep,
    /// The host has still to answer.
    Handshake {
        connecting: Connecting,
        until: Instant,
    },
    /// Connected.
    Connected(Box<DriverBus>),
    /// Not any more, and never again.
    Over,
}

struct State {
    connector: Option<(Connector, Option<Watch>)>,
    phase: Phase,
}

struct Runner {
    name: String,
    session: Session,
    inbox: Receiver<Command>,
    wake: Arc<Doorbell>,
    stop: Arc<Doorbell>,
    news: Arc<News>,
    calls: BTreeMap<OpId, SyncSender<Result<Outcome, OpError>>>,
    /// A message there was no room for.
    stuck: Option<Outgoing>,
    stats: LinkStats,
    begin: Instant,
    /// So that the same trouble is told once.
    last_error: String,
    absence_told: bool,
    limit: LogLimit,
    pace: Pace,
    bells: Bells,
    bells_version: (u64, u64),
    /// There may be kicks to take.
    kicked: bool,
}

impl Runner {
    fn run(mut self, mut state: State) {
        if let Phase::Connected(bus) = &state.phase {
            self.link_up(bus);
        }
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
            let now = self.now();
            if self.session.poll_timeout().is_some_and(|at| at <= now) {
                self.session.handle_timeout(now);
            }
            self.advance(&mut state);
            self.take_kicks();
            let mut busy = false;
            if let Phase::Connected(bus) = &mut state.phase {
                match self.receive(bus).and_then(|more| {
                    busy = more;
                    self.transmit(bus)
                }) {
                    Ok(()) => {}
                    Err(error) => {
                        if let Some(unsaid) = self.limit.admit() {
                            tracing::warn!(link = self.name, host = bus.peer_name(), %error, unsaid, "connection to the device host lost");
                        }
                        self.link_down(&mut state, matches!(error, ChannelError::Corrupt(_)));
                    }
                }
            }
            self.sync_bells();
            let fault = self
                .deliver()
                .filter(|_| matches!(state.phase, Phase::Connected(_)));
            if let Some(why) = fault {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(link = self.name, why, unsaid, "giving the connection up");
                }
                self.link_down(&mut state, true);
                self.deliver();
            }
            if !self.sleep(&mut state, busy) {
                return;
            }
            self.stats.wakeups += 1;
        }
    }

    fn now(&self) -> virtio_msg::Instant {
        virtio_msg::Instant(u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Op(op, reply) => {
                let now = self.now();
                let id = self.session.submit(now, op);
                self.calls.insert(id, reply);
            }
            Command::Kick(queue) => self.session.kick(queue),
            Command::Stats(reply) => {
                let stats = LinkStats {
                    session: *self.session.counters(),
                    ..self.stats
                };
                // Who asked may have given up.
                let _ = reply.send(stats);
            }
        }
    }

    /// Follows what the session has; here and nowhere else bells come and go.
    fn sync_bells(&mut self) {
        let version = self.session.bells_version();
        if version == self.bells_version {
            return;
        }
        self.bells_version = version;
        let deaf = self.bells.sync(self.session.bells());
        self.kicked = true;
        for queue in deaf {
            if let Some(unsaid) = self.limit.admit() {
                tracing::warn!(
                    link = self.name,
                    queue = queue.0,
                    unsaid,
                    "the kick of the front end cannot be waited on"
                );
            }
        }
    }

    fn take_kicks(&mut self) {
        if !std::mem::take(&mut self.kicked) {
            return;
        }
        let session = &mut self.session;
        if let Err(error) = self.bells.take(|queue| session.kick(queue))
            && let Some(unsaid) = self.limit.admit()
        {
            tracing::error!(link = self.name, %error, unsaid, "cannot look for kicks");
        }
    }

    fn link_up(&mut self, bus: &DriverBus) {
        self.stats.connections += 1;
        self.last_error.clear();
        self.pace.connected(Instant::now());
        if let Some(unsaid) = self.limit.admit() {
            tracing::info!(
                link = self.name,
                host = bus.peer_name(),
                unsaid,
                "connected to the device host"
            );
        }
        let (now, caps) = (self.now(), *bus.capabilities());
        self.session.handle_link_up(now, caps, bus.epoch());
    }

    /// The connection is over; because of a `fault` or because the other side ended it.
    fn link_down(&mut self, state: &mut State, fault: bool) {
        self.stuck = None;
        let now = Instant::now();
        let pause = if fault {
            self.pace.after_fault(now)
        } else {
            self.pace.after_end(now)
        };
        let at = Some(now + pause);
        // Dropping the bus closes the connection: the host forgets what it had from us.
        state.phase = match &state.connector {
            None => Phase::Over,
            Some(_) => Phase::Try { at },
        };
        let now = self.now();
        self.session.handle_link_down(now);
    }

    /// Goes on with connecting, as far as it goes without waiting.
    fn advance(&mut self, state: &mut State) {
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
                        connecting,
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
                    self.tell(&error);
                    state.phase = match error {
                        ConnectError::NotThere { .. } if watch.is_some() => Phase::Asleep,
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

    fn tell(&mut self, error: &ConnectError) {
        let text = error.to_string();
        if text == self.last_error {
            return;
        }
        if let Some(unsaid) = self.limit.admit() {
            match error {
                ConnectError::NotThere { .. } => {
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

    /// True: there may be more.
    fn receive(&mut self, bus: &mut DriverBus) -> Result<bool, ChannelError> {
        // Slots may be longer than messages.
        let mut buf = vec![0; vmsg_bus::slot_size(bus.max_message_size())];
        for _ in 0..BUDGET {
            match bus.try_recv(&mut buf)? {
                None => return Ok(false),
                Some(len) => {
                    self.stats.received += 1;
                    let now = self.now();
                    self.session.handle_message(now, &buf[..len.min(buf.len())]);
                }
            }
        }
        Ok(true)
    }

    fn transmit(&mut self, bus: &mut DriverBus) -> Result<(), ChannelError> {
        while let Some(out) = self.stuck.take().or_else(|| self.session.poll_transmit()) {
            let sent = if out.fds.is_empty() {
                bus.try_send(&out.bytes)
            } else {
                let fds: Vec<BorrowedFd<'_>> = out.fds.iter().map(|fd| fd.as_fd()).collect();
                bus.try_send_with_fds(&out.bytes, &fds)
            };
            match sent {
                Ok(()) => self.stats.sent += 1,
                Err(ChannelError::Full) => {
                    self.stuck = Some(out);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        bus.flush()
    }

    /// Hands results to their callers and news to the front. Gives the reason if the session wants another connection.
    fn deliver(&mut self) -> Option<&'static str> {
        let mut fault = None;
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Done { id, result } => {
                    if let Some(reply) = self.calls.remove(&id) {
                        // Who asked may have given up.
                        let _ = reply.send(result);
                    }
                    continue;
                }
                Event::LinkFault(why) => {
                    fault = Some(why);
                    continue;
                }
                Event::Ready { replayed, new_host } => {
                    self.absence_told = false;
                    if replayed {
                        // What was used before the link was lost may not have been told.
                        self.bells.ring_all();
                    }
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::info!(
                            link = self.name,
                            replayed,
                            new_host,
                            unsaid,
                            "the device is ready"
                        );
                    }
                }
                Event::DeviceAbsent => {
                    // Whoever says that it has come, and then that it has not, can do so often.
                    if !std::mem::replace(&mut self.absence_told, true)
                        && let Some(unsaid) = self.limit.admit()
                    {
                        tracing::warn!(
                            link = self.name,
                            unsaid,
                            "the device host has no {}; `vmsg ls` shows what it has; waiting for it",
                            self.session.target()
                        );
                    }
                }
                Event::NeedsReset(ref reason) => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::error!(link = self.name, %reason, unsaid, "the device needs a reset");
                    }
                }
                Event::QueueUsed(queue) if self.bells.ring(queue) => continue,
                Event::LeftOut { base, len } => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::warn!(
                            link = self.name,
                            unsaid,
                            "memory of the guest at {base:#x} ({len:#x} bytes) is not in common with the device host: buffers there cannot be used"
                        );
                    }
                    continue;
                }
                Event::ConfigChanged | Event::QueueUsed(_) => {}
            }
            let mut events = self
                .news
                .events
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // The last reason is the one that holds; so there is a bounded number of different news.
            if matches!(event, Event::NeedsReset(_)) {
                events.retain(|old| !matches!(old, Event::NeedsReset(_)));
            }
            if !events.contains(&event) {
                events.push_back(event);
            }
            drop(events);
            let _ = self.news.bell.ring();
        }
        fault
    }

    /// Until there is something to do; not at all if that is so already (`busy`). False: the end.
    fn sleep(&mut self, state: &mut State, busy: bool) -> bool {
        let mut until = self
            .session
            .poll_timeout()
            .map(|at| self.begin + Duration::from_nanos(at.0));
        let mut earlier = |at: Instant| until = Some(until.map_or(at, |until| until.min(at)));
        match &mut state.phase {
            Phase::Try { at } => earlier(at.unwrap_or_else(Instant::now)),
            Phase::Handshake { until, .. } => earlier(*until),
            Phase::Connected(_) if busy => earlier(Instant::now()),
            Phase::Connected(bus) => {
                if !bus.arm() || (self.stuck.is_some() && !bus.arm_for_room()) {
                    earlier(Instant::now());
                }
                // Out of descriptors, most likely: until there are some again, look from time to time.
                if bus.poll_fd().is_err() {
                    earlier(Instant::now() + BUSY_PAUSE);
                }
            }
            Phase::Asleep | Phase::Over => {}
        }
        let timeout = until
            .and_then(|at| Timespec::try_from(at.saturating_duration_since(Instant::now())).ok());
        let watch = state
            .connector
            .as_ref()
            .and_then(|(_, watch)| watch.as_ref());
        let third = match &mut state.phase {
            Phase::Asleep => watch.map(|watch| watch.as_fd()),
            Phase::Handshake { connecting, .. } => Some((*connecting).as_fd()),
            Phase::Connected(bus) => bus.poll_fd().ok(),
            Phase::Try { .. } | Phase::Over => None,
        };
        let mut fds = [
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&*self.wake, PollFlags::IN),
            PollFd::new(&self.bells, PollFlags::IN),
            // Stands for nothing where there is no third.
            PollFd::new(&*self.stop, PollFlags::IN),
        ];
        let mut used = 3;
        if let Some(fd) = &third {
            fds[3] = PollFd::new(fd, PollFlags::IN);
            used = 4;
        }
        let fds = &mut fds[..used];
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(link = self.name, %error, "cannot wait");
                return false;
            }
        }
        let is = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let (stopped, woken, kicked, third) = (is(0), is(1), is(2), is(3));
        if woken {
            let _ = self.wake.drain();
        }
        self.kicked |= kicked;
        if third && let Phase::Connected(bus) = &mut state.phase {
            // An error shows again at the next use of the bus.
            let _ = bus.clear_poll_fd();
        }
        !stopped
    }
}
