// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One session of a link, with those who use it.

use super::bells::{Bells, Rung};
use super::handle::{Command, LinkStats, News};
use crate::log_limit::LogLimit;
use crate::session::{Event, OpError, OpId, Outcome, Outgoing, ResetReason, Session};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_msg::Instant;
use vmsg_mem::Doorbell;

pub(super) struct Seat {
    pub(super) name: String,
    pub(super) session: Session,
    pub(super) news: Arc<News>,
    calls: BTreeMap<OpId, SyncSender<Result<Outcome, OpError>>>,
    absence_told: bool,
    limit: Arc<LogLimit>,
    pub(super) bells: Bells,
    bells_version: (u64, u64),
    /// There may be kicks to take.
    pub(super) kicked: bool,
}

impl Seat {
    pub(super) fn new(name: String, session: Session, limit: Arc<LogLimit>) -> io::Result<Seat> {
        Ok(Seat {
            name,
            session,
            news: Arc::new(News {
                events: Mutex::new(VecDeque::new()),
                bell: Doorbell::new()?,
            }),
            calls: BTreeMap::new(),
            absence_told: false,
            limit,
            bells: Bells::new()?,
            bells_version: (0, 0),
            kicked: false,
        })
    }

    pub(super) fn obey(&mut self, now: Instant, command: Command, stats: &LinkStats) {
        match command {
            Command::Op(op, reply) => {
                let id = self.session.submit(now, op);
                self.calls.insert(id, reply);
            }
            Command::Kick(queue) => {
                if !self.bells.kick(queue) {
                    self.session.kick(queue);
                }
            }
            Command::Stats(reply) => {
                let stats = LinkStats {
                    session: *self.session.counters(),
                    ..*stats
                };
                // Who asked may have given up.
                let _ = reply.send(stats);
            }
        }
    }

    /// Follows what the session has; here and nowhere else bells come and go.
    pub(super) fn sync_bells(&mut self) {
        let version = self.session.bells_version();
        if version == self.bells_version {
            return;
        }
        self.bells_version = version;
        self.kicked = true;
        for queue in self.bells.sync(self.session.bells()) {
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

    pub(super) fn take_kicks(&mut self) {
        if !std::mem::take(&mut self.kicked) {
            return;
        }
        let (session, bells) = (&mut self.session, &self.bells);
        let taken = bells.take(|rung| match rung {
            Rung::Kick(queue) if bells.kick(queue) => {}
            Rung::Kick(queue) => session.kick(queue),
            Rung::Used(queue) => session.queue_used(queue),
        });
        if let Err(error) = taken
            && let Some(unsaid) = self.limit.admit()
        {
            tracing::error!(link = self.name, %error, unsaid, "cannot look for kicks");
        }
    }

    pub(super) fn poll_transmit(&mut self) -> Option<Outgoing> {
        self.session.poll_transmit()
    }

    /// Hands results to their callers and news to the front. Gives the reason if the session wants another connection.
    pub(super) fn deliver(&mut self) -> Option<&'static str> {
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
                _ => self.tell(&event),
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
            if matches!(event, Event::NeedsReset(ResetReason::Removed)) {
                // Whoever waits for a device to come must not hear of one that has gone.
                events.retain(|old| !matches!(old, Event::Ready { .. }));
            }
            if !events.contains(&event) {
                events.push_back(event);
            }
            drop(events);
            let _ = self.news.bell.ring();
        }
        fault
    }

    /// News, for people.
    fn tell(&mut self, event: &Event) {
        match event {
            Event::Ready { replayed, new_host } => {
                self.absence_told = false;
                if *replayed {
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
            Event::NeedsReset(reason) => {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::error!(link = self.name, %reason, unsaid, "the device needs a reset");
                }
            }
            _ => {}
        }
    }
}
