// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for doorbells; where there are none, for the next look.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use ivshmem::{Device, Event};
use rustix::event::{Timespec, epoll};

use crate::signals::Interrupt;

/// From one look to the next where no doorbell rings.
const LOOK: Duration = Duration::from_millis(1);
/// The same where doorbells ring: the peer may not know yet whom to ring.
const LOOK_ANYWAY: Duration = Duration::from_millis(100);
/// News of the server that are taken in one go: one who never stops must not keep the user from ending this. And how many are kept,
/// for a command that may never ask for them.
const NEWS_AT_A_TIME: usize = 64;
const MAX_NEWS: usize = 1024;
/// Marks of descriptors that are not those of vectors.
const SIGNAL: u64 = 1 << 32;
const NEWS: u64 = 2 << 32;

/// Hears the doorbells of a device, and the user's wish to end.
pub(super) struct Ears {
    epoll: OwnedFd,
    interrupt: Interrupt,
    /// What the counter of each vector was when last looked at.
    counts: Vec<u64>,
    news: Vec<Event>,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// A doorbell rang, or it is time to look again.
    Look,
    /// The user wants to end.
    Interrupted,
}

/// The user has ended a command that was not done.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

impl Ears {
    pub(super) fn new(device: &Device) -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: BorrowedFd<'_>, mark: u64, flags| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(mark), flags)
        };
        let mut counts = Vec::new();
        for vector in 0..device.vectors() {
            if let Some(fd) = device.vector_fd(vector) {
                // What was rung before nobody waits for.
                counts.push(count(fd).unwrap_or(0));
                add(
                    fd,
                    u64::from(vector),
                    epoll::EventFlags::IN | epoll::EventFlags::ET,
                )?;
            }
        }
        if let Some(fd) = device.news_fd() {
            add(fd, NEWS, epoll::EventFlags::IN)?;
        }
        let interrupt = Interrupt::new()?;
        add(interrupt.as_fd(), SIGNAL, epoll::EventFlags::IN)?;
        Ok(Self {
            epoll,
            interrupt,
            counts,
            news: Vec::new(),
        })
    }

    /// Waits for a doorbell, but no longer than until it is wise to look anyway.
    pub(super) fn pause(&mut self, device: &mut Device, until: Instant) -> anyhow::Result<Woken> {
        let look = if self.counts.is_empty() {
            LOOK
        } else {
            LOOK_ANYWAY
        };
        self.wait(device, Some(until.min(Instant::now() + look)))
    }

    /// Waits for a doorbell, news, or until then.
    pub(super) fn wait(
        &mut self,
        device: &mut Device,
        until: Option<Instant>,
    ) -> anyhow::Result<Woken> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut events = Vec::with_capacity(16);
        let buffer = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, buffer, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            match event.data.u64() {
                SIGNAL => return Ok(Woken::Interrupted),
                NEWS => {
                    // The descriptor of a server that is gone is closed, and with that taken out.
                    for _ in 0..NEWS_AT_A_TIME {
                        let Some(news) = device.poll() else { break };
                        keep(&mut self.news, news);
                    }
                }
                _ => {}
            }
        }
        Ok(Woken::Look)
    }

    /// Vectors that were rung since this was last asked, and how often.
    pub(super) fn rung(&mut self, device: &Device) -> Vec<(u16, u64)> {
        let mut rung = Vec::new();
        for (vector, before) in (0u16..).zip(&mut self.counts) {
            let Some(now) = device.vector_fd(vector).and_then(count) else {
                continue;
            };
            // Somebody else who holds it has read it, and it began anew.
            let times = now.checked_sub(*before).unwrap_or(now);
            *before = now;
            if times > 0 {
                rung.push((vector, times));
            }
        }
        rung
    }

    /// What the server has told since this was last asked.
    pub(super) fn news(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.news)
    }

    /// Whether the user wants to end, without waiting.
    pub(super) fn is_interrupted(&self) -> anyhow::Result<bool> {
        Ok(self.interrupt.wait_until(Instant::now())?)
    }
}

fn keep(news: &mut Vec<Event>, event: Event) {
    if news.len() < MAX_NEWS {
        news.push(event);
    }
}

/// The counter of an eventfd, as /proc shows it: reading the eventfd itself would block if another holder has made it
/// so.
fn count(eventfd: BorrowedFd<'_>) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd())).ok()?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("eventfd-count:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
#[path = "ears_test.rs"]
mod tests;
