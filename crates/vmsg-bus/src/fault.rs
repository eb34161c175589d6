// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus that loses, repeats, spoils and delays messages, for tests and simulation.
//!
//! The same seed and the same calls give the same faults.

use std::collections::VecDeque;
use virtio_msg::{Channel, ChannelError};

/// The most messages held back at a time; one more is carried at once.
const MAX_HELD: usize = 256;

/// How often faults happen to the messages of one direction: one in so many, 0 for never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// The message disappears.
    pub drop: u32,
    /// The message comes twice.
    pub duplicate: u32,
    /// One bit of the message is flipped.
    pub corrupt: u32,
    /// The message comes later, after up to [`Self::delay_by`] of those that follow it.
    pub delay: u32,
    /// The longest delay, in messages of the same direction.
    pub delay_by: u32,
}

/// What was done to messages so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Messages that disappeared.
    pub dropped: u64,
    /// Messages that came twice.
    pub duplicated: u64,
    /// Messages with a bit flipped.
    pub corrupted: u64,
    /// Messages that came late.
    pub delayed: u64,
}

/// Injects faults into the messages sent and received through a channel.
///
/// A message that is delayed waits for others of the same direction, however
/// long they take; [`release`](FaultInjector::release) ends all waiting. Messages with file descriptors are
/// only ever dropped.
#[derive(Debug)]
pub struct FaultInjector<C> {
    inner: C,
    random: Random,
    sent: Lane,
    received: Lane,
    faults: Faults,
}

/// One direction.
#[derive(Debug)]
struct Lane {
    rates: Rates,
    /// To be carried before anything else, in this order.
    due: VecDeque<Vec<u8>>,
    /// To be carried after so many others.
    held: Vec<(u32, Vec<u8>)>,
}

impl Lane {
    fn new(rates: Rates) -> Self {
        Self {
            rates,
            due: VecDeque::new(),
            held: Vec::new(),
        }
    }

    /// A message has passed: others come nearer.
    fn passed(&mut self) {
        let due = &mut self.due;
        self.held.retain_mut(|(left, message)| {
            *left -= 1;
            if *left == 0 {
                due.push_back(std::mem::take(message));
            }
            *left > 0
        });
    }

    fn has_room(&self) -> bool {
        self.due.len() + self.held.len() < MAX_HELD
    }
}

/// What happens to a message now.
enum Fate {
    Pass,
    Drop,
    Delay(u32),
}

/// SplitMix64.
#[derive(Clone, Copy, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, rate: u32) -> bool {
        rate != 0 && self.below(u64::from(rate)) == 0
    }
}

impl<C> FaultInjector<C> {
    /// Wraps `inner`; `sent` happens to messages sent from here, `received` to those received.
    pub fn new(inner: C, seed: u64, sent: Rates, received: Rates) -> Self {
        Self {
            inner,
            random: Random(seed),
            sent: Lane::new(sent),
            received: Lane::new(received),
            faults: Faults::default(),
        }
    }

    /// What was done so far.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// What is wrapped.
    pub fn get_ref(&self) -> &C {
        &self.inner
    }

    /// What is wrapped, without faults.
    pub fn get_mut(&mut self) -> &mut C {
        &mut self.inner
    }

    /// Lets everything go that is held back: it is carried by the next calls.
    pub fn release(&mut self) {
        for lane in [&mut self.sent, &mut self.received] {
            lane.due
                .extend(lane.held.drain(..).map(|(_, message)| message));
        }
    }

    /// Whether a received message comes through now.
    fn lets_in(&mut self, message: &mut [u8]) -> bool {
        let fate = Self::strike(
            &mut self.random,
            &mut self.faults,
            &mut self.received,
            message,
        );
        self.received.passed();
        if let Fate::Delay(by) = fate {
            self.received.held.push((by, message.to_vec()));
        }
        matches!(fate, Fate::Pass)
    }

    /// Draws what happens to `message`, and does what can be done at once.
    fn strike(
        random: &mut Random,
        faults: &mut Faults,
        lane: &mut Lane,
        message: &mut [u8],
    ) -> Fate {
        let rates = lane.rates;
        if random.one_in(rates.drop) {
            faults.dropped += 1;
            return Fate::Drop;
        }
        if random.one_in(rates.corrupt) && !message.is_empty() {
            let bit = random.below(message.len() as u64 * 8);
            if let Some(byte) = usize::try_from(bit / 8)
                .ok()
                .and_then(|at| message.get_mut(at))
            {
                *byte ^= 1 << (bit % 8);
                faults.corrupted += 1;
            }
        }
        if random.one_in(rates.duplicate) && lane.has_room() {
            lane.due.push_back(message.to_vec());
            faults.duplicated += 1;
        }
        if rates.delay_by > 0 && random.one_in(rates.delay) && lane.has_room() {
            faults.delayed += 1;
            let by = 1 + random.below(u64::from(rates.delay_by));
            return Fate::Delay(u32::try_from(by).unwrap_or(rates.delay_by));
        }
        Fate::Pass
    }
}

impl<C: Channel> FaultInjector<C> {
    /// Sends what is due, as far as there is room.
    fn send_due(&mut self) -> Result<(), ChannelError> {
        while let Some(message) = self.sent.due.front() {
            self.inner.try_send(message)?;
            self.sent.due.pop_front();
        }
        Ok(())
    }
}

impl<C: Channel> Channel for FaultInjector<C> {
    fn max_message_size(&self) -> usize {
        self.inner.max_message_size()
    }

    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        if message.len() > self.max_message_size() {
            return Err(ChannelError::TooLong);
        }
        self.send_due()?;
        // If there is no room, nothing has happened: the next attempt draws the same.
        let before = (self.random, self.faults, self.sent.due.len());
        let mut spoiled = message.to_vec();
        let fate = Self::strike(
            &mut self.random,
            &mut self.faults,
            &mut self.sent,
            &mut spoiled,
        );
        match fate {
            Fate::Drop => {}
            Fate::Delay(by) => {
                self.sent.passed();
                self.sent.held.push((by, spoiled));
                return Ok(());
            }
            Fate::Pass => {
                if let Err(error) = self.inner.try_send(&spoiled) {
                    self.random = before.0;
                    self.faults = before.1;
                    self.sent.due.truncate(before.2);
                    return Err(error);
                }
            }
        }
        self.sent.passed();
        match self.send_due() {
            Ok(()) | Err(ChannelError::Full) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
        loop {
            if let Some(message) = self.received.due.pop_front() {
                let Some(to) = buf.get_mut(..message.len()) else {
                    self.received.due.push_front(message);
                    return Err(ChannelError::TooLong);
                };
                to.copy_from_slice(&message);
                return Ok(Some(message.len()));
            }
            let Some(len) = self.inner.try_recv(buf)? else {
                return Ok(None);
            };
            if self.lets_in(&mut buf[..len]) {
                return Ok(Some(len));
            }
        }
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        match self.send_due() {
            Ok(()) | Err(ChannelError::Full) => self.inner.flush(),
            Err(error) => Err(error),
        }
    }
}

#[cfg(any(feature = "loopback", feature = "unix"))]
mod bus {
    use super::FaultInjector;
    use crate::{Bus, Capabilities, Peer, WakeFds};
    use std::os::fd::{BorrowedFd, OwnedFd};
    use virtio_msg::{Channel, ChannelError};

    impl<B: Bus> Bus for FaultInjector<B> {
        fn capabilities(&self) -> &Capabilities {
            self.inner.capabilities()
        }

        fn try_send_with_fds(
            &mut self,
            message: &[u8],
            fds: &[BorrowedFd<'_>],
        ) -> Result<(), ChannelError> {
            if fds.is_empty() {
                return self.try_send(message);
            }
            self.send_due()?;
            if self.random.one_in(self.sent.rates.drop) {
                self.faults.dropped += 1;
                return Ok(());
            }
            self.inner.try_send_with_fds(message, fds)
        }

        fn try_recv_with_fds(
            &mut self,
            buf: &mut [u8],
            fds: &mut Vec<OwnedFd>,
        ) -> Result<Option<usize>, ChannelError> {
            fds.clear();
            loop {
                if !self.received.due.is_empty() {
                    return self.try_recv(buf);
                }
                let Some(len) = self.inner.try_recv_with_fds(buf, fds)? else {
                    return Ok(None);
                };
                if fds.is_empty() {
                    if self.lets_in(&mut buf[..len]) {
                        return Ok(Some(len));
                    }
                } else if self.random.one_in(self.received.rates.drop) {
                    self.faults.dropped += 1;
                    fds.clear();
                } else {
                    return Ok(Some(len));
                }
            }
        }

        fn arm(&mut self) -> bool {
            // What is due is there to be received.
            self.received.due.is_empty() && self.flush().is_ok() && self.inner.arm()
        }

        fn arm_for_room(&mut self) -> bool {
            self.inner.arm_for_room()
        }

        fn wake_fds(&self) -> WakeFds<'_> {
            self.inner.wake_fds()
        }

        fn is_closed(&self) -> bool {
            self.inner.is_closed()
        }

        fn peer(&self) -> &Peer {
            self.inner.peer()
        }
    }
}

#[cfg(all(test, feature = "loopback"))]
#[path = "fault_test.rs"]
mod tests;
