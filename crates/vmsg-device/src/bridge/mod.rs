// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user daemon as a device: what the driver wants is told to the daemon, which works on the driver's queues itself.
//!
//! The daemon gets the driver's memory and eventfds; nothing of the data passes through here. What is negotiated, and where the queues
//! stand, is kept here, so that a daemon that was started anew goes on where the last one was, as far as that can be known ([`Resume`]).
//!
//! Nothing here waits for the daemon. What is wanted of it and what it has are two things; one function asks for what is missing
//! whenever the daemon has done what it was asked. A daemon that does not answer in time, or not properly, is cut off.

mod away;
mod calls;
mod clinging;
mod device;
mod fit;
mod kind;
mod link;
mod listen;
mod memory;
mod monitor;
mod record;
mod ring;
mod settings;
mod stop;
mod vain;
mod work;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use virtio_msg::{FeatureSet, feature};
use vmsg_mem::{AddressSpace, Doorbell, WindowTable};
pub use vmsg_vhost_user::MAX_QUEUES;
use vmsg_vhost_user::{Fault, Greeting, Inflight, Offer, Region};

use self::away::Kicks;
use self::clinging::Clinging;
use self::kind::Kind;
use self::link::Link;
pub use self::listen::Listener;
use self::monitor::Counters;
use self::ring::{Base, Ring};
pub use self::settings::{Resume, Settings};
use crate::host::LogLimit;

/// The first pause before another attempt to reach a daemon; each is twice as long as the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A connection that lasted so long was a good one.
const LASTING: Duration = Duration::from_secs(1);
/// The longest pause after one that was cut off.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// So many connections in a row may end before a driver's queues work; then it is told.
const ATTEMPTS: u32 = 5;
/// So many may end over the record of what is in flight; then it is done without.
const RECORD_ATTEMPTS: u32 = 2;

/// What epoll tells: the connection, the daemon's own requests, this side's wish to be polled, the daemon's complaint about a ring, kicks of
/// queues that are away, who connects, a daemon that was cut off; from `CALLS` on each queue.
const LINK: u64 = 0;
const CHANNEL: u64 = 1;
const WAKE: u64 = 2;
const BROKEN: u64 = 3;
const KICKS: u64 = 4;
const LISTENER: u64 = 5;
const HELD: u64 = 6;
const CALLS: u64 = 16;

/// Why there is no device yet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody is there.
    #[error("no daemon at {path}: {source}")]
    Nobody {
        /// The socket.
        path: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// Somebody is there who does not do what a daemon does.
    #[error("the daemon at {path} is of no use: {fault}")]
    Fault {
        /// The socket.
        path: String,
        /// What is wrong.
        fault: Fault,
    },
    /// Nobody can be there.
    #[error("socket={path}: {why}")]
    NotASocket {
        /// The socket.
        path: String,
        /// What it is.
        why: &'static str,
    },
    /// It is another device than what is asked for.
    #[error("the daemon at {path}: {why}")]
    Unfit {
        /// The socket.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// No descriptor is left, or the like.
    #[error("{0}")]
    Os(std::io::Error),
}

impl ConnectError {
    /// Whether waiting may help: the daemon may come, or another one.
    pub const fn is_temporary(&self) -> bool {
        matches!(self, Self::Nobody { .. } | Self::Fault { .. })
    }
}

/// Where the connection stands.
#[derive(Debug)]
enum State {
    /// There is none; the next attempt is at this time.
    Down(Instant),
    Greeting(Box<(Link, Greeting)>),
    Up(Box<Link>),
}

/// A vhost-user daemon as a device.
#[derive(Debug)]
pub struct Bridge {
    settings: Settings,
    kind: Kind,
    resume: Resume,
    queue_size: u16,
    /// What drivers are offered, transport features included.
    offered: FeatureSet,
    config: Vec<u8>,
    state: State,
    /// The daemon that was cut off and may still use the driver's memory.
    clinging: Option<Clinging>,
    /// Of the daemon that is there, or was.
    offer: Offer,
    pause: Duration,
    /// Since when the daemon is there.
    since: Instant,
    epoll: OwnedFd,
    /// Has this polled.
    wake: Doorbell,
    /// The daemon rings it when a ring is broken.
    broken: Doorbell,
    rings: Vec<Ring>,
    /// So many of them are the daemon's.
    forwarded: usize,
    table: Arc<WindowTable>,
    /// What the driver has negotiated, once it is ready.
    running: Option<FeatureSet>,
    /// The driver was told to start over; until then nothing is begun.
    halted: bool,
    /// Why, if it was not told yet.
    trouble: Option<String>,
    /// What the daemon has been told.
    told: Told,
    preparing: Option<Preparing>,
    /// The configuration is to be read again.
    config_due: bool,
    config_asked: bool,
    /// The driver is to be told of another configuration.
    config_changed: bool,
    counters: Arc<Counters>,
    log: LogLimit,
    began: Instant,
    /// That nobody is there has been said.
    complained: bool,
    /// Has this polled when a queue that is away is kicked.
    kicks: Kicks,
    /// When all queues have stopped, the daemon is called anew.
    leaving: bool,
    /// It was this side that ended the last connection.
    left: bool,
    /// What there is to say to the driver is about an address that no window has.
    unmapped: bool,
    /// Connections in a row that ended before the driver's queues worked.
    in_vain: u32,
    /// Those in a row that ended soon and with nothing done of what was there to do.
    ends_in_vain: u32,
    /// Connections that ended over the record of what is in flight.
    record_in_vain: u32,
    /// The daemon does not want one: until the next driver it is done without.
    no_record: bool,
    /// That has been said.
    no_record_said: bool,
    /// The daemon is to connect, and may do so at any time.
    expecting: bool,
}

/// What a daemon has been told since it is there.
#[derive(Debug, Default)]
struct Told {
    features: bool,
    driver_ok: bool,
    /// Some ring, be it only before a reset.
    rings: bool,
    memory: Vec<Region>,
    /// Where it notes what is in flight.
    inflight: bool,
    inflight_asked: bool,
    /// That memory, if the daemon has made it: kept for the next daemon.
    kept: Option<Inflight>,
}

/// Something that must end before the worker goes on.
#[derive(Clone, Copy, Debug)]
struct Preparing {
    /// Requests under way in the daemon are waited for until then.
    drained_by: Instant,
    /// The daemon has answered all that it was asked until then, or is given up: each answer may take its time, and many may be due.
    answered_by: Instant,
    /// No queue goes on after that.
    for_good: bool,
}

impl Bridge {
    /// Makes the device of the daemon, which must be there and answer its first questions within `patience` in all.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(settings: &Settings, patience: Duration) -> Result<Self, ConnectError> {
        let path = || settings.socket.display().to_string();
        let nobody = |error: Errno| ConnectError::Nobody {
            path: path(),
            source: match error {
                Errno::AGAIN if settings.listener.is_some() => {
                    std::io::Error::new(std::io::ErrorKind::WouldBlock, "it has not connected")
                }
                error => error.into(),
            },
        };
        let kind = Kind::of(settings.device_id);
        if let Some(why) = link::never_a_socket(settings) {
            return Err(ConnectError::NotASocket { path: path(), why });
        }
        let (mut link, mut greeting) = Link::open(settings, &kind).map_err(nobody)?;
        let offer = link.greet(&mut greeting, patience);
        let offer = offer.map_err(|fault| ConnectError::Fault {
            path: path(),
            fault,
        })?;
        let unfit = |why| ConnectError::Unfit { path: path(), why };
        let (count, forwarded) = count_queues(settings, &kind, &offer).map_err(unfit)?;
        let config = first_config(settings, &kind, &offer).map_err(unfit)?;
        if let Some(doubt) = fit::doubt(settings, &kind, &offer) {
            let device = settings.name.as_deref().unwrap_or_default();
            tracing::warn!(device, path = %path(), "type={}, but the daemon {doubt}: is the type right?", kind.name());
        }
        let mut features = kind.offered(offer.features) | settings.features;
        if kind.id == 2 && config.get(8..12) == Some(&[0; 4]) {
            // VIRTIO_BLK_F_SIZE_MAX and no size, as qemu-storage-daemon has it: old drivers take that for a page.
            features &= !(1 << 1);
        }
        let offered = FeatureSet::from_u64(features).with(feature::ACCESS_PLATFORM);
        let os = |error: std::io::Error| ConnectError::Os(error);
        let now = Instant::now();
        let mut this = Self {
            queue_size: settings.queue_size.unwrap_or(kind.queue_size),
            resume: settings.resume.unwrap_or(kind.resume),
            settings: settings.clone(),
            offered,
            config,
            state: State::Down(now),
            clinging: None,
            offer,
            pause: FIRST_PAUSE,
            since: now,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| os(error.into()))?,
            wake: Doorbell::new().map_err(os)?,
            broken: Doorbell::new().map_err(os)?,
            rings: (0..count).map(|_| Ring::default()).collect(),
            forwarded,
            table: Arc::default(),
            running: None,
            halted: false,
            trouble: None,
            told: Told::default(),
            preparing: None,
            config_due: false,
            config_asked: false,
            config_changed: false,
            counters: Arc::default(),
            log: LogLimit::new(),
            began: now,
            complained: false,
            kicks: Kicks::new().map_err(|error| os(error.into()))?,
            leaving: false,
            left: false,
            unmapped: false,
            in_vain: 0,
            ends_in_vain: 0,
            record_in_vain: 0,
            no_record: false,
            no_record_said: false,
            expecting: false,
            kind,
        };
        this.fit_config();
        let watched = this
            .watch(this.wake.as_fd(), WAKE, epoll::EventFlags::IN)
            .and_then(|()| this.watch_edges(this.broken.as_fd(), BROKEN))
            .and_then(|()| this.watch(&this.kicks, KICKS, epoll::EventFlags::IN))
            .and_then(|()| match &this.settings.listener {
                Some(listener) => this.watch_edges(listener, LISTENER),
                None => Ok(()),
            })
            .and_then(|()| this.watch_link(&link));
        watched.map_err(|error| os(error.into()))?;
        this.state = State::Up(Box::new(link));
        this.arrived(now);
        Ok(this)
    }

    /// Who it is, for people.
    pub fn describe(&self) -> String {
        format!(
            "{} queues of up to {}, features {:#x}, protocol {:?}",
            self.rings.len(),
            self.queue_size,
            self.offer.features,
            self.offer.protocol
        )
    }

    fn watch(&self, fd: impl AsFd, data: u64, flags: epoll::EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(data), flags)
    }

    /// Watches what the daemon rings, which it may do as often as it likes: each time counts once.
    fn watch_edges(&self, fd: impl AsFd, data: u64) -> Result<(), Errno> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        self.watch(fd, data, flags)
    }

    fn watch_link(&self, link: &Link) -> Result<(), Errno> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        self.watch(link, LINK, flags)?;
        self.watch(link.channel(), CHANNEL, epoll::EventFlags::IN)
    }

    /// Has this polled soon.
    fn wake(&self) {
        // Full: then it is readable anyhow.
        let _ = self.wake.ring();
    }

    fn is_logged(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.began).as_nanos();
        let now = u64::try_from(since).unwrap_or(u64::MAX);
        self.log.admit(virtio_msg::Instant(now))
    }

    /// A daemon is there.
    fn arrived(&mut self, now: Instant) {
        Counters::count(&self.counters.connections);
        self.since = now;
        self.counters.connected.store(true, Ordering::Relaxed);
        self.complained = false;
        if std::mem::take(&mut self.left) {
            tracing::debug!(path = %self.settings.socket.display(), "the daemon is there again");
        } else if self.is_logged(now) {
            let path = self.settings.socket.display();
            let what = self.describe();
            tracing::info!(%path, "the daemon is there: {what}");
        }
        self.wake();
    }

    /// Has operators see how many queues the daemon has, and what of them passes by here.
    fn note_queues(&self) {
        let live = || self.rings.iter().filter(|ring| ring.live);
        let note = |gauge: &AtomicU64, count: usize| gauge.store(count as u64, Ordering::Relaxed);
        note(&self.counters.queues, live().count());
        let direct = |bell: &Option<Doorbell>| bell.as_ref().and_then(Doorbell::eventfd).is_some();
        let kicked = live().filter(|ring| direct(&ring.kick)).count();
        note(&self.counters.direct_kicks, kicked);
        let calling = live().filter(|ring| direct(&ring.call)).count();
        note(&self.counters.direct_calls, calling);
    }

    /// The driver has to start over.
    fn fail(&mut self, why: String) {
        if !self.halted {
            self.halted = true;
            self.trouble = Some(why);
            self.wake();
        }
    }

    /// Ends the connection, for another one to the same daemon. No queue is at work.
    fn hang_up(&mut self) {
        self.counters.connected.store(false, Ordering::Relaxed);
        self.told = Told {
            kept: self.told.kept.take(),
            ..Told::default()
        };
        self.config_asked = false;
        self.left = true;
        self.state = State::Down(Instant::now());
        self.wake();
    }

    /// The connection is no more, or is not to be.
    fn lost(&mut self, now: Instant, fault: &Fault, space: AddressSpace<'_>) {
        let was_up = matches!(self.state, State::Up(_));
        let pause = self.ended(now, space);
        let first = !std::mem::replace(&mut self.complained, true);
        if fault.is_peer_fault() {
            Counters::count(&self.counters.faults);
        }
        self.counters.connected.store(false, Ordering::Relaxed);
        self.left = false;
        self.leaving = false;
        if (was_up || first || fault.is_peer_fault()) && self.is_logged(now) {
            let path = self.settings.socket.display();
            if fault.is_peer_fault() {
                tracing::warn!(%path, %fault, "the daemon is cut off");
            } else {
                tracing::warn!(%path, %fault, "the daemon is gone");
            }
        }
        if *fault != Fault::Closed {
            self.cling(space);
        }
        let (mut live, mut pausing, mut parked) = (false, false, false);
        for ring in &mut self.rings {
            ring.stopped_at = None;
            ring.kick_due = false;
            ring.held = false;
            let was_live = std::mem::take(&mut ring.live);
            let was_pausing = std::mem::take(&mut ring.pausing);
            live |= was_live;
            pausing |= was_pausing;
            parked |= std::mem::take(&mut ring.parked);
            if was_live || was_pausing {
                ring.call_due = true;
                // What comes from now on was not begun by anybody.
                let idle = ring.idle_at(space).filter(|_| self.clinging.is_none());
                if let Some(wanted) = &mut ring.wanted {
                    wanted.base = idle.map_or(Base::InRing, Base::At);
                    wanted.recorded = self.told.inflight;
                }
            }
        }
        if self.told.inflight_asked && !matches!(fault, Fault::Os(_)) {
            self.record_in_vain += 1;
            if self.record_in_vain >= RECORD_ATTEMPTS {
                self.do_without_record(&fault.to_string());
            }
        }
        self.told = Told {
            kept: self.told.kept.take(),
            ..Told::default()
        };
        self.config_asked = false;
        let stopping = self.preparing.is_some_and(|preparing| preparing.for_good);
        if self.running.is_some() && !stopping && !self.halted {
            let had_queues = live || pausing || parked;
            let wants_queues = self.rings.iter().any(|ring| ring.wanted.is_some());
            self.in_vain += u32::from(wants_queues && (was_up || fault.is_peer_fault()));
            match (self.resume, fault) {
                (Resume::Never, _) if had_queues => {
                    self.fail(format!("{fault}, and what it knew of the device is lost"));
                }
                // It would be so again.
                (_, Fault::Refused { .. }) if live => self.fail(fault.to_string()),
                _ if self.in_vain >= ATTEMPTS => self.fail(format!(
                    "{fault}; {ATTEMPTS} connections in a row came to nothing"
                )),
                _ => {}
            }
        }
        let longest = match fault.is_peer_fault() {
            true => LONGEST_PAUSE,
            false => self.settings.reconnect,
        };
        self.state = State::Down(now + self.pause.max(pause));
        self.pause = (self.pause * 2).min(longest.max(FIRST_PAUSE));
        self.wake();
    }
}

/// Queues and bytes of configuration of a type, as far as that is known without its daemon.
pub fn defaults(device_id: u32) -> (u16, u32) {
    let kind = Kind::of(device_id);
    (kind.queues, (kind.config_len)(0))
}

/// How many queues there are, and how many of them are the daemon's.
fn count_queues(settings: &Settings, kind: &Kind, offer: &Offer) -> Result<(u16, usize), String> {
    let said = offer.queues.filter(|_| !kind.queues_fixed);
    let said = said.map(|queues| u16::try_from(queues).unwrap_or(u16::MAX).min(MAX_QUEUES));
    let has = said.unwrap_or_else(|| settings.queues.unwrap_or(kind.queues));
    let count = settings.queues.unwrap_or(has.max(kind.queues));
    if count == 0 || count > MAX_QUEUES {
        return Err(format!("queues={count}: 1 to {MAX_QUEUES} are possible"));
    }
    if has < count && !kind.may_lack_queues {
        return Err(format!(
            "it has {has} queues, and {count} are wanted; is it of type {}?",
            kind.name()
        ));
    }
    Ok((count, usize::from(has.min(count))))
}

/// The configuration as it is at first.
fn first_config(settings: &Settings, kind: &Kind, offer: &Offer) -> Result<Vec<u8>, String> {
    let len = settings.config_size;
    let len = len.unwrap_or_else(|| (kind.config_len)(offer.features));
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut config = match (&settings.config, &offer.config) {
        (Some(given), _) => given.clone(),
        (None, Some(told)) => told.clone(),
        (None, None) => Vec::new(),
    };
    if settings.config_size.is_some() && config.len() > len {
        return Err(format!(
            "its configuration has {} bytes, more than config-size={len}",
            config.len()
        ));
    }
    if config.is_empty() && len > 0 {
        tracing::warn!(
            path = %settings.socket.display(),
            "the daemon tells no configuration of {len} bytes, as devices of type {} have; it is all zero (config= sets it)",
            kind.name()
        );
    }
    let len = len.max(config.len());
    config.resize(len, 0);
    Ok(config)
}
