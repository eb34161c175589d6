// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Revision 1 towards the user of an end, r1 on the link.

use crate::line::Recorded;
use virtio_msg::ChannelError;
use virtio_msg::r1::{self, DeviceAdapter, DriverAdapter, Outcome};

/// Messages of the other side that may come to nothing in one attempt to receive.
const BUDGET: usize = 64;

/// Between an end and its link.
pub(crate) struct Translation {
    adapter: Adapter,
    /// For the link, which was full.
    outgoing: Option<[u8; r1::SIZE]>,
    /// From the link; the adapter had no room.
    incoming: Option<[u8; r1::SIZE]>,
    /// For the user, found while nobody received.
    ready: Option<([u8; r1::MESSAGE_SIZE], usize)>,
    /// The other side is gone, and what it still had to say there is no room for.
    over: bool,
    /// Something was dropped that has no counterpart.
    told: bool,
}

enum Adapter {
    Driver(Box<DriverAdapter>),
    Device(Box<DeviceAdapter>),
}

impl Adapter {
    fn take(&mut self, message: &[u8]) -> Result<Outcome, r1::Busy> {
        match self {
            Self::Driver(adapter) => adapter.handle_request(message),
            Self::Device(adapter) => adapter.handle_message(message),
        }
    }

    fn take_wire(&mut self, message: &[u8]) -> Result<Outcome, r1::Busy> {
        match self {
            Self::Driver(adapter) => adapter.handle_wire(message),
            Self::Device(adapter) => adapter.handle_wire(message),
        }
    }

    fn poll_message(&mut self, out: &mut [u8]) -> Option<usize> {
        match self {
            Self::Driver(adapter) => adapter.poll_message(out),
            Self::Device(adapter) => adapter.poll_message(out),
        }
    }

    fn poll_wire(&mut self, out: &mut [u8]) -> Option<usize> {
        match self {
            Self::Driver(adapter) => adapter.poll_wire(out),
            Self::Device(adapter) => adapter.poll_wire(out),
        }
    }
}

impl Translation {
    /// For a driver's end.
    pub(crate) fn for_driver() -> Self {
        Self::with(Adapter::Driver(Box::default()))
    }

    /// For a device host's end.
    pub(crate) fn for_device() -> Self {
        Self::with(Adapter::Device(Box::default()))
    }

    fn with(adapter: Adapter) -> Self {
        Self {
            adapter,
            outgoing: None,
            incoming: None,
            ready: None,
            over: false,
            told: false,
        }
    }

    /// Tells the first time that something does not get through.
    fn note(&mut self, outcome: Outcome, from: &str) {
        if let Outcome::Ignored(why) = outcome
            && !std::mem::replace(&mut self.told, true)
        {
            tracing::debug!(%why, from, "a message is not passed on; further ones are only counted");
        }
    }

    pub(crate) fn send(
        &mut self,
        line: &mut Recorded<'_>,
        message: &[u8],
    ) -> Result<(), ChannelError> {
        if message.len() > r1::MESSAGE_SIZE {
            return Err(ChannelError::TooLong);
        }
        self.pass_on(line)?;
        let Ok(outcome) = self.adapter.take(message) else {
            return Err(ChannelError::Full);
        };
        self.note(outcome, "this side");
        self.pass_on(line)?;
        // An answer may make way for the next request, of which no doorbell tells any more.
        if self.incoming.is_some() || self.find_ready() {
            line.link.wake_self();
        }
        Ok(())
    }

    /// Whether there is a message for the user.
    fn find_ready(&mut self) -> bool {
        if self.ready.is_none() {
            let mut message = [0; r1::MESSAGE_SIZE];
            let len = self.adapter.poll_message(&mut message);
            self.ready = len.map(|len| (message, len));
        }
        self.ready.is_some()
    }

    /// Gives the link what there is for it and fits.
    pub(crate) fn pass_on(&mut self, line: &mut Recorded<'_>) -> Result<(), ChannelError> {
        loop {
            let mut next = [0; r1::SIZE];
            let message = match self.outgoing.take() {
                Some(message) => message,
                None => match self.adapter.poll_wire(&mut next) {
                    Some(_) => next,
                    None => return Ok(()),
                },
            };
            match line.try_send(&message, &[]) {
                Ok(()) => {}
                Err(ChannelError::Full) => {
                    self.outgoing = Some(message);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn receive(
        &mut self,
        line: &mut Recorded<'_>,
        buf: &mut [u8],
    ) -> Result<Option<usize>, ChannelError> {
        let Some(buf) = buf.get_mut(..r1::MESSAGE_SIZE) else {
            return Err(ChannelError::TooLong);
        };
        if let Some((message, len)) = self.ready.take() {
            buf.copy_from_slice(&message);
            return Ok(Some(len));
        }
        for _ in 0..BUDGET {
            if let Some(len) = self.adapter.poll_message(buf) {
                return Ok(Some(len));
            }
            if self.over {
                return Err(ChannelError::Closed);
            }
            if !self.take_next(line)? {
                // What this brought about may be for the other side.
                self.pass_on(line)?;
                return line.link.flush().map(|()| None);
            }
        }
        Ok(None)
    }

    /// Gives the adapter one message of the link; false if there is none, or no room for it.
    fn take_next(&mut self, line: &mut Recorded<'_>) -> Result<bool, ChannelError> {
        let message = match self.incoming.take() {
            Some(message) => message,
            None => {
                let mut slot = [0; r1::MESSAGE_SIZE];
                if line.try_recv(&mut slot, None)?.is_none() {
                    return Ok(false);
                }
                slot.first_chunk().copied().unwrap_or([0; r1::SIZE])
            }
        };
        match self.adapter.take_wire(&message) {
            Ok(outcome) => {
                self.note(outcome, "the other side");
                // A request of several steps goes on.
                self.pass_on(line)?;
                Ok(true)
            }
            Err(r1::Busy) => {
                self.incoming = Some(message);
                Ok(false)
            }
        }
    }

    /// As [`Bus::arm`](crate::Bus::arm).
    pub(crate) fn arm(&mut self, line: &mut Recorded<'_>) -> bool {
        if self.pass_on(line).is_err() || self.find_ready() {
            return false;
        }
        // What waits for room waits for the user as well.
        if self.outgoing.is_some() && !line.link.arm_for_room() {
            return false;
        }
        if line.link.arm() {
            return true;
        }
        // A message that the adapter has no room for, and others behind it, wait until the user has sent something.
        self.over |= self.incoming.is_some() && line.link.look_for_end();
        self.incoming.is_some() && !line.link.is_closed()
    }

    /// As [`Bus::arm_for_room`](crate::Bus::arm_for_room).
    pub(crate) fn arm_for_room(&mut self, line: &mut Recorded<'_>) -> bool {
        self.pass_on(line).is_ok() && self.outgoing.is_some() && line.link.arm_for_room()
    }
}
