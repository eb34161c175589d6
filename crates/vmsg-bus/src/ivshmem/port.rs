// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One end in its memory, with all that wakes it: doorbell, clock, news of the server.

use super::block::Card;
use super::doors::{Bell, Doors, ring_all};
use super::geometry::Geometry;
use super::machine::{Config, Event, Machine, Queues, Turn, Whom};
use super::open::Opened;
use super::queues;
use super::spec::QueueLayout;
use crate::link;
use crate::room_wait::RoomWait;
use crate::{Peer, Vectors};
use ivshmem::PeerId;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmsg_mem::DeviceSlice;
use vmsg_mem::amp::Side;

/// How often an end without doorbells looks at the memory: after a message, and at rest.
const FIRST_LOOK: Duration = Duration::from_micros(100);
const LONGEST_LOOK: Duration = Duration::from_millis(25);

/// News of the server that are taken in one go, and how long that may take: one who never stops must not hold up this end.
const NEWS: usize = 256;
const NEWS_TIME: Duration = Duration::from_millis(5);

/// How long an end that polls may go on without a look at the other one, and at its own heartbeat, in milliseconds.
const LOOK_AFTER: u64 = 250;

/// How often an end that has a connection to one of ours looks for them, in milliseconds: it looks at all else whenever it is about to
/// sleep, and this would be a system call each time. News that are left wait for the next message, or for the heartbeat.
const NEWS_AFTER: u64 = 20;

/// Of [`epoll::EventData`].
const BELL: u64 = 1;

/// A message that begins with these is a PING request.
const PING: [u8; 2] = [0x02, 0x03];

/// One end.
pub(crate) struct Port {
    begin: Instant,
    /// Nobody can ring this end.
    deaf: bool,
    /// The other end rings nobody, as it has no doorbells itself.
    mute: AtomicBool,
    geometry: Geometry,
    side: Side,
    vector: u16,
    /// The other end, where it was said.
    said: Option<(u16, u16)>,
    timer: OwnedFd,
    /// Holds all, edge-triggered.
    epoll: OwnedFd,
    inner: Mutex<Inner>,
    /// When the timer rings for the machine, in milliseconds; 0 if it was set to something else since.
    armed: AtomicU64,
    /// Who is rung for messages.
    bells: Mutex<Vec<Bell>>,
    /// The connection is over.
    over: AtomicBool,
    /// Together with an end that is not ours.
    foreign: AtomicBool,
    /// When the other end was looked at last, by [`coarse_now`].
    looked: AtomicU64,
    /// How often in a row there was no room, and nothing to do.
    room_wait: RoomWait,
    looks: AtomicU32,
}

struct Inner {
    machine: Machine,
    device: Doors,
    memory: DeviceSlice,
    /// When news are looked for again.
    news_at: u64,
    /// An error in the layout was told since the last connection: there are many, and a hostile device has another one each time.
    told: bool,
}

/// A connection that has come about.
pub(super) struct Joined {
    pub(super) peer: Option<(u32, Card)>,
    pub(super) queues: link::Queues,
    pub(super) message_size: usize,
}

/// What has become of an end that has no connection.
pub(super) enum Outcome {
    Joined(Box<Joined>),
    /// The place is another end's.
    Taken(String),
}

impl Port {
    pub(super) fn new(opened: Opened, side: Side, card: Card, epoch: u32) -> io::Result<Self> {
        let Opened {
            device,
            geometry,
            said,
            message,
        } = opened;
        vmsg_mem::fault::install()?;
        let memory = device.memory();
        let len = memory.len();
        let memory = memory.slice(0, len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let watch = |fd: BorrowedFd<'_>, data, flags| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(data), flags)
        };
        watch(timer.as_fd(), 0, edge)?;
        let vector = card.vector;
        if let Some(fd) = device.vector_fd(vector) {
            watch(fd, BELL, edge)?;
        }
        if let Some(fd) = device.news_fd() {
            watch(fd, 0, edge)?;
        }
        let deaf = device.vector_fd(vector).is_none();
        let config = Config {
            side,
            geometry,
            card,
            epoch,
            message,
            // What is behind a FIFO may be no end of ours, which shows nothing of itself.
            blind: said.is_some() || device.is_fifo(),
        };
        let port = Self {
            begin: Instant::now(),
            deaf,
            mute: AtomicBool::new(false),
            geometry,
            side,
            vector,
            said,
            timer,
            epoll,
            inner: Mutex::new(Inner {
                machine: Machine::new(config),
                device,
                memory,
                news_at: 0,
                told: false,
            }),
            armed: AtomicU64::new(0),
            bells: Mutex::default(),
            over: AtomicBool::new(true),
            foreign: AtomicBool::new(false),
            looked: AtomicU64::new(0),
            room_wait: RoomWait::default(),
            looks: AtomicU32::new(0),
        };
        port.start_timer(Duration::from_nanos(1));
        Ok(port)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bells(&self) -> MutexGuard<'_, Vec<Bell>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether news of the memory's server still come, or never did.
    pub(super) fn has_server(&self) -> bool {
        let inner = self.lock();
        inner
            .device
            .as_client()
            .is_none_or(|client| client.has_server())
    }

    pub(super) fn is_looking(&self) -> bool {
        self.lock().machine.is_looking()
    }

    /// Looks whether the place is free, and no further.
    pub(super) fn look_only(&self) -> io::Result<Option<Outcome>> {
        let rung = self.take_events()?;
        let event = self.look(rung);
        if !self.is_looking() {
            self.start_timer(Duration::from_nanos(1));
        }
        Ok(match event {
            Some(Event::Taken(name)) => Some(Outcome::Taken(name)),
            _ => None,
        })
    }

    /// Looks at everything; only for an end without a connection.
    pub(super) fn turn(&self) -> io::Result<Option<Outcome>> {
        let rung = self.take_events()?;
        let looked = self.is_looking();
        let mut event = self.look(rung);
        if looked && event.is_none() && !self.is_looking() {
            event = self.look(rung);
        }
        match event {
            Some(Event::Up { peer, queues }) => {
                let joined = self.join(peer, queues)?;
                Ok(Some(Outcome::Joined(Box::new(joined))))
            }
            Some(Event::Taken(name)) => Ok(Some(Outcome::Taken(name))),
            Some(Event::Down(_)) | None => {
                if self.deaf {
                    self.start_timer(LONGEST_LOOK);
                }
                Ok(None)
            }
        }
    }

    /// Where the memory's server listened, if there is one.
    pub(super) fn server_path(&self) -> Option<std::path::PathBuf> {
        let inner = self.lock();
        inner
            .device
            .as_client()
            .map(|client| client.path().to_owned())
    }

    fn look(&self, rung: bool) -> Option<Event> {
        let now = self.now();
        let mut inner = self.lock();
        let inner = &mut *inner;
        let foreign = self.foreign.load(Ordering::Acquire);
        if foreign || now >= inner.news_at || self.is_over() {
            inner.news_at = now + NEWS_AFTER;
            if self.take_news(inner) && foreign {
                // It may have come back under another number.
                *self.bells() = self.everyone(inner);
            }
        }
        // One who takes no more doorbells does not know of everybody.
        let client = inner
            .device
            .as_client()
            .filter(|client| client.has_server() && client.ignored() == 0);
        let gone = |id: u16| {
            client.is_some_and(|client| !client.peers().any(|(peer, _)| peer == PeerId(id)))
        };
        let turn = inner.machine.poll(now, &inner.memory, rung, &gone);
        if let Some(error) = inner.machine.layout_error.take()
            && !std::mem::replace(&mut inner.told, true)
        {
            tracing::warn!(%error, "the device's layout cannot be used");
        }
        self.follow(inner, turn, now)
    }

    /// Hears what the server has told; false if that is nothing.
    fn take_news(&self, inner: &mut Inner) -> bool {
        if inner.device.poll().is_none() {
            return false;
        }
        let begin = Instant::now();
        // What is left is heard at the next heartbeat.
        for _ in 0..NEWS {
            if inner.device.poll().is_none() || begin.elapsed() > NEWS_TIME {
                break;
            }
        }
        true
    }

    /// Rings, sets the clock, and passes on what has happened.
    fn follow(&self, inner: &mut Inner, turn: Turn, now: u64) -> Option<Event> {
        if let Some(whom) = turn.ring {
            self.ring_whom(inner, whom);
        }
        let due = inner.machine.deadline();
        let armed = self.armed.load(Ordering::Acquire);
        if armed <= now || due < armed {
            self.armed.store(due, Ordering::Release);
            if due != u64::MAX {
                self.set_timer(Duration::from_millis(due.saturating_sub(now).max(1)));
            }
        }
        turn.event
    }

    fn ring_whom(&self, inner: &Inner, whom: Whom) {
        match whom {
            Whom::One(id, vector) => inner.device.ring(PeerId(id), vector),
            Whom::Everyone => ring_all(&self.everyone(inner)),
            Whom::Nameless => ring_all(inner.device.only_bell().as_slice()),
        }
    }

    /// The bells of all who may be the other end.
    fn everyone(&self, inner: &Inner) -> Vec<Bell> {
        if let Some(bell) = inner.device.only_bell() {
            return vec![bell];
        }
        let bell = |id, vector| inner.device.bell(PeerId(id), vector).map(Bell::Door);
        if let Some((id, vector)) = self.said {
            return bell(id, vector).into_iter().collect();
        }
        let peers = inner
            .device
            .as_client()
            .into_iter()
            .flat_map(|client| client.peers());
        peers
            .filter_map(|(peer, vectors)| bell(peer.0, self.vector.min(vectors.saturating_sub(1))))
            .collect()
    }

    fn join(&self, peer: Option<(u32, Card)>, queues: Queues) -> io::Result<Joined> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let bells = match &peer {
            Some((
                _,
                Card {
                    id: Some(id),
                    vector,
                    ..
                },
            )) => inner
                .device
                .bell(PeerId(*id), *vector)
                .map(Bell::Door)
                .into_iter()
                .collect(),
            Some(_) => inner.device.only_bell().into_iter().collect(),
            None => self.everyone(inner),
        };
        *self.bells() = bells;
        inner.told = false;
        self.over.store(false, Ordering::Release);
        self.foreign.store(peer.is_none(), Ordering::Release);
        let mute = peer.as_ref().is_some_and(|(_, card)| card.id.is_none());
        let mute = mute && !inner.device.is_fifo();
        self.mute.store(mute, Ordering::Relaxed);
        let (queues, message_size) =
            queues::make(queues, &inner.memory, &self.geometry, self.side)?;
        Ok(Joined {
            peer,
            queues,
            message_size,
        })
    }

    /// The doorbells that the bus has no use for itself.
    pub(super) fn vectors(&self, peer: &Card) -> io::Result<Vectors> {
        let inner = self.lock();
        let mut own = Vec::new();
        for (vector, fd) in inner.device.spare(self.vector) {
            own.push((vector, fd.try_clone_to_owned()?));
        }
        let mut theirs = Vec::new();
        if let Some(id) = peer.id {
            for vector in (0..peer.vectors).filter(|vector| *vector != peer.vector) {
                // A hostile card may have more vectors than there are.
                match inner.device.bell(PeerId(id), vector) {
                    Some(bell) if theirs.len() < MAX_VECTORS => theirs.push((vector, bell)),
                    _ => break,
                }
            }
        }
        Ok(Vectors::new(own, theirs))
    }

    /// Begins once more, for another connection of a driver.
    pub(super) fn begin_anew(&self, epoch: u32) {
        let now = self.now();
        let mut inner = self.lock();
        let inner = &mut *inner;
        let turn = inner.machine.begin_anew(now, &inner.memory, epoch);
        self.follow(inner, turn, now);
        self.start_timer(Duration::from_nanos(1));
    }

    /// The connection is dropped; waits for the next one.
    pub(super) fn again(&self) {
        let now = self.now();
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.machine.again(now, &inner.memory);
        let turn = inner.machine.retake(now, &inner.memory);
        self.follow(inner, turn, now);
        self.over.store(true, Ordering::Release);
        self.start_timer(Duration::from_nanos(1));
    }

    /// Its memory is not what others have any more.
    pub(super) fn is_lost(&self) -> bool {
        self.lock().memory.is_lost()
    }

    /// The last words of this end.
    pub(super) fn leave(&self) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let Some(whom) = inner.machine.leave(&inner.memory) {
            self.ring_whom(inner, whom);
        }
    }

    /// Wakes the other side. Whoever is not there any more is not missed.
    pub(crate) fn ring(&self) {
        // An end that is not ours and begins anew would take what stands there for its own.
        if self.is_over() && self.foreign.load(Ordering::Acquire) {
            return;
        }
        ring_all(&self.bells());
    }

    /// Looks whether the other end is still there.
    pub(crate) fn drain(&self) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        self.looked.store(coarse_now(), Ordering::Relaxed);
        let event = self.look(false);
        let lost = self.lock().memory.is_lost();
        let why = match event {
            None | Some(Event::Up { .. }) if lost => "its memory is gone".to_owned(),
            None | Some(Event::Up { .. }) => return,
            Some(Event::Down(why)) => why.to_owned(),
            Some(Event::Taken(name)) => format!("its place was taken by `{name}`"),
        };
        tracing::debug!(why, "the connection is over");
        self.over.store(true, Ordering::Release);
    }

    /// Whether [`Self::drain`] has come to the end.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether nobody rings when there is a message.
    #[inline]
    fn looks_itself(&self) -> bool {
        self.deaf || self.mute.load(Ordering::Relaxed)
    }

    /// The owner has looked for messages: who polls does not go to sleep, and would never show a sign of life. True if the connection
    /// turns out to be over.
    #[inline]
    pub(crate) fn polled(&self) -> bool {
        if coarse_now().saturating_sub(self.looked.load(Ordering::Relaxed)) < LOOK_AFTER {
            return false;
        }
        self.drain();
        self.is_over()
    }

    /// A message was received.
    #[inline]
    pub(crate) fn received(&self, message: &[u8]) {
        self.polled();
        if self.looks_itself() {
            self.looks.store(0, Ordering::Relaxed);
        }
        if self.foreign.load(Ordering::Relaxed) {
            let now = self.now();
            self.lock().machine.heard(now, message.starts_with(&PING));
        }
    }

    /// The owner goes to sleep: without doorbells it has to wake by itself.
    pub(crate) fn before_sleep(&self) {
        if self.looks_itself() {
            let looks = self.looks.fetch_add(1, Ordering::Relaxed).min(8);
            self.start_timer((FIRST_LOOK * (1 << looks)).min(LONGEST_LOOK));
        }
    }

    /// Makes sure that this side wakes, though nobody may ring when there is room.
    pub(crate) fn wait_for_room(&self) {
        self.start_timer(self.room_wait.next());
    }

    /// There was room.
    pub(crate) fn room_found(&self) {
        self.room_wait.found();
    }

    /// Ends the connection.
    pub(crate) fn let_go(&self) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let Some(whom) = inner.machine.let_go(&inner.memory) {
            self.ring_whom(inner, whom);
        }
        self.over.store(true, Ordering::Release);
    }

    /// Wakes this side once after `time`, whatever the machine waits for: that is to be set again.
    fn start_timer(&self, time: Duration) {
        self.set_timer(time);
        self.armed.store(0, Ordering::Release);
    }

    fn set_timer(&self, time: Duration) {
        let zero = Timespec::default();
        let timer = Itimerspec {
            it_interval: zero,
            it_value: Timespec::try_from(time).unwrap_or(zero),
        };
        // Fails only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer);
    }

    /// Takes what [`AsFd`] tells; whether this end was rung.
    fn take_events(&self) -> io::Result<bool> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 4];
        let now = Timespec::default();
        match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok((events, _)) => Ok(events.iter().any(|event| {
                let data = event.data;
                data.u64() == BELL
            })),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Who the other end is, for people.
    pub(super) fn peer(&self, card: Option<&Card>) -> Peer {
        match card {
            Some(card) => Peer::named(&card.name),
            None => Peer::named(match (self.side, self.geometry.layout) {
                (Side::Device, QueueLayout::Amp) => "a foreign driver",
                (Side::Device, _) => "a driver that says nothing of itself",
                (Side::Driver, _) => "a foreign device host",
            }),
        }
    }
}

/// The most vectors of a peer that are taken, each a descriptor: queues share them where there are more of those.
const MAX_VECTORS: usize = ivshmem::protocol::MAX_VECTORS as usize;

/// Milliseconds by a clock that costs next to nothing and is some of them late.
#[inline]
fn coarse_now() -> u64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let millis = u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0);
    seconds * 1000 + millis
}

impl AsFd for Port {
    /// Readable when there is something to look at.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.leave();
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("side", &self.side)
            .field("geometry", &self.geometry)
            .field("over", &self.is_over())
            .finish_non_exhaustive()
    }
}
