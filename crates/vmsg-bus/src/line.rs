// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A link with what may stand between it and its user: a record of the messages, a translation.

use crate::link::{Link, Parts};
use crate::tap::Direction;
use crate::trace::Interface;
#[cfg(feature = "linux-user")]
use crate::translation::Translation;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;
use virtio_msg::ChannelError;

pub(crate) struct Line {
    pub(crate) link: Link,
    trace: Option<Interface>,
    #[cfg(feature = "linux-user")]
    translation: Option<Box<Translation>>,
}

impl Line {
    pub(crate) fn new(parts: Parts) -> Result<Self, vmsg_mem::Error> {
        Ok(Self {
            link: Link::new(parts)?,
            trace: None,
            #[cfg(feature = "linux-user")]
            translation: None,
        })
    }

    /// Records all messages from now on to a trace, or to none, as the link carries them.
    pub(crate) fn set_trace(&mut self, trace: Option<Interface>) {
        self.trace = trace;
        #[cfg(feature = "linux-user")]
        if let (Some(trace), true) = (&mut self.trace, self.translation.is_some()) {
            trace.set_layout(crate::trace::Layout::R1);
        }
    }

    /// From now on the link carries other messages than its user sees.
    #[cfg(feature = "linux-user")]
    pub(crate) fn translate(&mut self, translation: Translation) {
        self.translation = Some(Box::new(translation));
    }

    #[inline]
    pub(crate) fn try_send(
        &mut self,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        #[cfg(feature = "linux-user")]
        if let Some(mut translation) = self.translation.take() {
            let sent = match fds {
                [] => translation.send(&mut self.recorded(), message),
                _ => Err(ChannelError::TooLong),
            };
            self.translation = Some(translation);
            return sent;
        }
        self.recorded().try_send(message, fds)
    }

    #[inline]
    pub(crate) fn try_recv(
        &mut self,
        buf: &mut [u8],
        fds: Option<&mut Vec<OwnedFd>>,
    ) -> Result<Option<usize>, ChannelError> {
        #[cfg(feature = "linux-user")]
        if let Some(mut translation) = self.translation.take() {
            let received = translation.receive(&mut self.recorded(), buf);
            self.translation = Some(translation);
            return received;
        }
        self.recorded().try_recv(buf, fds)
    }

    #[inline]
    pub(crate) fn flush(&mut self) -> Result<(), ChannelError> {
        #[cfg(feature = "linux-user")]
        if let Some(mut translation) = self.translation.take() {
            let passed = translation.pass_on(&mut self.recorded());
            self.translation = Some(translation);
            passed?;
        }
        self.link.flush()
    }

    pub(crate) fn arm(&mut self) -> bool {
        #[cfg(feature = "linux-user")]
        if let Some(mut translation) = self.translation.take() {
            let idle = translation.arm(&mut self.recorded());
            self.translation = Some(translation);
            return idle;
        }
        self.link.arm()
    }

    /// Arms and sleeps. False: the time is over.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        if !self.arm() {
            return Ok(true);
        }
        self.link.sleep(timeout)
    }

    pub(crate) fn arm_for_room(&mut self) -> bool {
        #[cfg(feature = "linux-user")]
        if let Some(mut translation) = self.translation.take() {
            let full = translation.arm_for_room(&mut self.recorded());
            self.translation = Some(translation);
            return full;
        }
        self.link.arm_for_room()
    }

    #[inline]
    fn recorded(&mut self) -> Recorded<'_> {
        Recorded {
            link: &mut self.link,
            trace: self.trace.as_mut(),
        }
    }
}

/// A link whose messages are recorded.
pub(crate) struct Recorded<'a> {
    pub(crate) link: &'a mut Link,
    trace: Option<&'a mut Interface>,
}

impl Recorded<'_> {
    #[inline]
    pub(crate) fn try_send(
        &mut self,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        if fds.is_empty() {
            self.link.try_send(message)?;
        } else {
            self.link.try_send_with_fds(message, fds)?;
        }
        if let Some(trace) = &mut self.trace {
            trace.record(Direction::Sent, message, fds.len());
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn try_recv(
        &mut self,
        buf: &mut [u8],
        fds: Option<&mut Vec<OwnedFd>>,
    ) -> Result<Option<usize>, ChannelError> {
        let before = self.link.counters().fds_received;
        let received = self.link.try_recv(buf, fds)?;
        if let (Some(trace), Some(len)) = (&mut self.trace, received) {
            // Also those that were closed as they are not wanted.
            let fds = self.link.counters().fds_received - before;
            let fds = usize::try_from(fds).unwrap_or(usize::MAX);
            trace.record(Direction::Received, &buf[..len], fds);
        }
        Ok(received)
    }
}
