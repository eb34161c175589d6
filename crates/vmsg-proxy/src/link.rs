// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The I/O around a [`Session`]: one thread that holds the connection to the bus, connects again when it is lost, keeps the session's
//! timers, and does what fronts ask through a [`SessionHandle`]. On a bus with room for one driver several sessions share a connection.
//!
//! The thread sleeps unless a message, an operation, a timer or the appearance of the device host's socket wakes it. Kicks and calls of
//! a running device do not pass here, unless the bus has no other way for them than messages.

mod bells;
mod connecting;
mod handle;
mod process;
mod seat;
mod vectors;

pub use handle::{Deadline, LinkStats, SessionHandle};

use connecting::{Phase, State};
use handle::Command;
use process::HostProcess;
use seat::Seat;

use crate::log_limit::LogLimit;
use crate::pace::Pace;
use crate::places::SameFile;
use crate::session::{CommonMemory, FAULTLESS, FileId, Op, OtherMemory, Outgoing, Session};
use crate::shadow::Parts;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError, Frame, Kind, Message, decode};
use vmsg_bus::{CommonMode, Connector, DriverBus};
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
    /// A device host; connected to again and again.
    Bus(Connector),
    /// A connection there is; when it ends there is no other.
    Given(Box<DriverBus>),
    /// The same, on a bus that has this memory in common.
    GivenWith(Box<DriverBus>, Vec<CommonMemory>),
}

/// A running link. Dropping it stops the thread; operations under way end with [`OpError::Ended`](crate::session::OpError::Ended).
#[derive(Debug)]
pub struct Link {
    handles: Vec<SessionHandle>,
    stop: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts the thread, called `name` in logs.
    ///
    /// # Errors
    /// Of `eventfd` and of starting a thread.
    pub fn start(name: &str, session: Session, source: Source) -> io::Result<Link> {
        Link::start_shared(name, vec![(name.to_owned(), session)], source)
    }

    /// Starts the thread for several sessions, each with its own name in logs, that share a connection.
    ///
    /// # Errors
    /// As [`Self::start`]; `InvalidInput` for more than [`MAX_SESSIONS`].
    pub fn start_shared(
        name: &str,
        sessions: Vec<(String, Session)>,
        source: Source,
    ) -> io::Result<Link> {
        Link::start_dividing(name, sessions, source, None)
    }

    /// The same, and `parts` are of the memory that the bus turns out to have in common: divided before any session makes use of the connection.
    ///
    /// # Errors
    /// As [`Self::start_shared`].
    pub fn start_dividing(
        name: &str,
        sessions: Vec<(String, Session)>,
        source: Source,
        parts: Option<Arc<Parts>>,
    ) -> io::Result<Link> {
        if sessions.len() > MAX_SESSIONS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(Doorbell::new()?);
        let stop = Arc::new(Doorbell::new()?);
        let limit = Arc::new(LogLimit::default());
        let share = tokens_each(sessions.len());
        let mut seats = Vec::new();
        let mut handles = Vec::new();
        for (seat, (name, mut session)) in sessions.into_iter().enumerate() {
            let first = u16::try_from(seat).unwrap_or(0) * share + 1;
            session.set_tokens(first..=first + (share - 1));
            let new = Seat::new(name, session, limit.clone())?;
            handles.push(SessionHandle {
                seat,
                commands: commands.clone(),
                wake: wake.clone(),
                news: new.news.clone(),
                deadline: None,
            });
            seats.push(new);
        }
        let mut fixed = false;
        let state = match source {
            Source::Bus(connector) => {
                let watch = connector.watch();
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
                fixed = true;
                for seat in &mut seats {
                    seat.session.set_common_memory(Ok(common.clone()));
                }
                State {
                    connector: None,
                    phase: Phase::Connected(bus),
                }
            }
        };
        let runner = Runner {
            name: name.to_owned(),
            seats,
            turn: 0,
            inbox,
            wake,
            stop: stop.clone(),
            stuck: None,
            stats: LinkStats::default(),
            begin: Instant::now(),
            last_error: String::new(),
            limit,
            pace: Pace::new(Instant::now()),
            fixed,
            parts,
            host: None,
        };
        let thread = std::thread::Builder::new()
            .name(format!("link {name}"))
            .spawn(move || runner.run(state))?;
        Ok(Link {
            handles,
            stop,
            thread: Some(thread),
        })
    }

    /// What fronts use.
    ///
    /// # Panics
    /// If the link was started without sessions.
    pub fn handle(&self) -> SessionHandle {
        self.handles[0].clone()
    }

    /// What fronts use, in the order of the sessions.
    pub fn handles(&self) -> &[SessionHandle] {
        &self.handles
    }
}

/// The most sessions that can share a connection.
pub const MAX_SESSIONS: usize = 256;

/// Each session has its own tokens, so that an answer finds it.
fn tokens_each(sessions: usize) -> u16 {
    u16::MAX / u16::try_from(sessions.max(1)).unwrap_or(u16::MAX)
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

struct Runner {
    name: String,
    seats: Vec<Seat>,
    /// Whose messages go first.
    turn: usize,
    inbox: Receiver<(usize, Command)>,
    wake: Arc<Doorbell>,
    stop: Arc<Doorbell>,
    /// A message there was no room for.
    stuck: Option<Outgoing>,
    stats: LinkStats,
    begin: Instant,
    /// So that the same trouble is told once.
    last_error: String,
    limit: Arc<LogLimit>,
    pace: Pace,
    /// The memory in common was given, and does not change.
    fixed: bool,
    /// Of the memory in common, for copies.
    parts: Option<Arc<Parts>>,
    /// Of the device host, of this connection or the last one.
    host: Option<HostProcess>,
}

impl Runner {
    fn run(mut self, mut state: State) {
        if let Phase::Connected(bus) = &state.phase {
            self.link_up(bus);
        }
        loop {
            while let Ok((seat, command)) = self.inbox.try_recv() {
                self.obey(&state, seat, command);
            }
            let now = self.now();
            for seat in &mut self.seats {
                if seat.session.poll_timeout().is_some_and(|at| at <= now) {
                    seat.session.handle_timeout(now);
                }
            }
            self.advance(&mut state);
            for seat in &mut self.seats {
                seat.take_kicks();
            }
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
            let fault = self
                .deliver()
                .filter(|_| matches!(state.phase, Phase::Connected(_)));
            if let Some(why) = fault {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(link = self.name, why, unsaid, "giving the connection up");
                }
                self.link_down(&mut state, !FAULTLESS.contains(&why));
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

    fn obey(&mut self, state: &State, seat: usize, command: Command) {
        let now = self.now();
        let Some(seat) = self.seats.get_mut(seat) else {
            return;
        };
        let lends = match &command {
            Command::Op(Op::SetWindows(add) | Op::ChangeWindows { add, .. }, _) => !add.is_empty(),
            _ => false,
        };
        if let Phase::Connected(bus) = &state.phase
            && lends
            && !self.fixed
        {
            // The VMM has made the file in the meantime, or made it anew.
            seat.session.set_common_memory(common_memory(bus));
        }
        seat.obey(now, command, &self.stats);
    }

    /// The reason of the last session that wants another connection.
    fn deliver(&mut self) -> Option<&'static str> {
        let mut fault = None;
        for seat in &mut self.seats {
            seat.sync_bells();
            fault = seat.deliver().or(fault);
        }
        fault
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
        if let (Some(parts), Some(ram)) = (&self.parts, bus.common())
            && let Err(error) = parts.provide_ram(ram)
            && let Some(unsaid) = self.limit.admit()
        {
            tracing::error!(link = self.name, %error, unsaid, "the fronts have no memory for copies");
        }
        self.host = HostProcess::new(bus.peer().pid);
        let (now, caps) = (self.now(), *bus.capabilities());
        for (number, seat) in self.seats.iter_mut().enumerate() {
            if !self.fixed {
                seat.session.set_common_memory(common_memory(bus));
            }
            if let Some(places) = common_file(bus) {
                seat.session.set_places_of_link(Arc::new(places));
            }
            let plan = bus.vectors().map(|all| vectors::plan(all, number));
            seat.bells.set_vectors(bus.vectors().cloned());
            seat.session.set_vectors(plan.unwrap_or_default());
            seat.session.set_host_seen(self.host.is_some());
            seat.session.handle_link_up(now, caps, bus.epoch());
        }
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
        for seat in &mut self.seats {
            seat.bells.set_vectors(None);
            seat.session.handle_link_down(now);
        }
    }

    /// The process that served the last connection has ended.
    fn host_ended(&mut self) {
        self.host = None;
        let now = self.now();
        for seat in &mut self.seats {
            seat.session.handle_host_ended(now);
        }
    }

    /// True: there may be more.
    fn receive(&mut self, bus: &mut DriverBus) -> Result<bool, ChannelError> {
        // Slots may be longer than messages.
        let mut buf = vec![0; vmsg_bus::slot_size(bus.max_message_size())];
        let mut fds = Vec::new();
        for _ in 0..BUDGET {
            match bus.try_recv_with_fds(&mut buf, &mut fds)? {
                None => return Ok(false),
                Some(len) => {
                    self.stats.received += 1;
                    let max = bus.max_message_size();
                    self.dispatch(&buf[..len.min(buf.len())], std::mem::take(&mut fds), max);
                }
            }
        }
        Ok(true)
    }

    /// To the session it is for.
    fn dispatch(&mut self, bytes: &[u8], mut fds: Vec<OwnedFd>, max: usize) {
        let now = self.now();
        if let [only] = &mut *self.seats {
            return only.session.handle_message_with_fds(now, bytes, fds);
        }
        let share = tokens_each(self.seats.len());
        let is_for = |index: usize, seat: &Seat, frame: &Frame<'_>| match frame.message {
            Message::EventDevice { .. } => true,
            _ => match frame.message.kind() {
                // Some answers come without their token: whoever does not wait for one drops it.
                Kind::Response => frame
                    .token
                    .0
                    .checked_sub(1)
                    .is_none_or(|token| usize::from(token / share) == index),
                Kind::Event => seat
                    .session
                    .device()
                    .is_some_and(|device| device.number == frame.dev_num),
                Kind::Request => index == 0,
            },
        };
        let frame = decode(bytes, max).ok();
        for (index, seat) in self.seats.iter_mut().enumerate() {
            // What cannot be read is counted by one of them.
            if frame
                .as_ref()
                .map_or(index == 0, |frame| is_for(index, seat, frame))
            {
                // Answers, which are what has descriptors, are for one of them.
                let fds = std::mem::take(&mut fds);
                seat.session.handle_message_with_fds(now, bytes, fds);
            }
        }
    }

    /// The next message, of each session in turn.
    fn next_message(&mut self) -> Option<Outgoing> {
        let count = self.seats.len();
        for _ in 0..count {
            self.turn = (self.turn + 1) % count;
            if let Some(out) = self.seats[self.turn].poll_transmit() {
                return Some(out);
            }
        }
        None
    }

    fn transmit(&mut self, bus: &mut DriverBus) -> Result<(), ChannelError> {
        while let Some(out) = self.stuck.take().or_else(|| self.next_message()) {
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

    /// Until there is something to do; not at all if that is so already (`busy`). False: the end.
    fn sleep(&mut self, state: &mut State, busy: bool) -> bool {
        let timeouts = self
            .seats
            .iter()
            .filter_map(|seat| seat.session.poll_timeout());
        let mut until = timeouts
            .min()
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
        // With a connection that is what tells.
        let host = self.host.as_ref();
        let host = host.filter(|_| !matches!(state.phase, Phase::Connected(_)));
        let third = match &mut state.phase {
            Phase::Asleep => watch.map(|watch| watch.as_fd()),
            Phase::Handshake { connecting, .. } => Some((**connecting).as_fd()),
            Phase::Connected(bus) => bus.poll_fd().ok(),
            Phase::Try { .. } | Phase::Over => None,
        };
        let mut fds = Vec::with_capacity(3 + self.seats.len());
        fds.push(PollFd::new(&*self.stop, PollFlags::IN));
        fds.push(PollFd::new(&*self.wake, PollFlags::IN));
        fds.extend(
            self.seats
                .iter()
                .map(|seat| PollFd::new(&seat.bells, PollFlags::IN)),
        );
        fds.extend(host.map(|host| PollFd::new(host, PollFlags::IN)));
        let seen = host.is_some();
        fds.extend(third.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(link = self.name, %error, "cannot wait");
                return false;
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let stopped = ready.next().unwrap_or_default();
        let woken = ready.next().unwrap_or_default();
        let kicked: Vec<bool> = ready.by_ref().take(self.seats.len()).collect();
        let ended = seen && ready.next().unwrap_or_default();
        let third = ready.next().unwrap_or_default();
        for (seat, kicked) in self.seats.iter_mut().zip(kicked) {
            seat.kicked |= kicked;
        }
        if woken {
            let _ = self.wake.drain();
        }
        if ended {
            self.host_ended();
        }
        if third && let Phase::Connected(bus) = &mut state.phase {
            // An error shows again at the next use of the bus.
            let _ = bus.clear_poll_fd();
        }
        !stopped
    }
}

/// The file that guests can have their memory in, if the bus has one in common.
fn common_file(bus: &DriverBus) -> Option<SameFile> {
    let common = bus.common()?;
    let file = common.file?;
    (common.mode != CommonMode::Bounce).then(|| SameFile {
        id: FileId {
            device: file.device,
            inode: file.inode,
        },
        offset: file.offset,
        len: common.len,
        name: common.name.clone(),
    })
}

/// What the bus has in common, as it is now; nothing for buses that lend memory.
fn common_memory(bus: &DriverBus) -> Result<Vec<CommonMemory>, OtherMemory> {
    if bus.capabilities().runtime_windows {
        return Ok(Vec::new());
    }
    let ram = bus.static_ram().ok_or(OtherMemory::NotSaid)?;
    // QEMU may be started in another folder.
    let path = std::path::absolute(ram.path()).unwrap_or_else(|_| ram.path().to_owned());
    let path = path.to_string_lossy();
    let trouble = |why: String| OtherMemory::NoFile {
        path: path.to_string(),
        why,
    };
    let windows = ram.windows().map_err(|error| trouble(error.to_string()))?;
    let shown: Arc<str> = Arc::from(&*path);
    let common = windows.iter().map(|window| {
        let stat = rustix::fs::fstat(&window.file).map_err(|error| trouble(error.to_string()))?;
        Ok(CommonMemory {
            base: window.base,
            len: window.len,
            file_offset: window.file_offset,
            file: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            path: shown.clone(),
        })
    });
    common.collect()
}
