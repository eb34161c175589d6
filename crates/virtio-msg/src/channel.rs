// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a bus has to offer to carry messages.

use thiserror::Error;

/// Why a [`Channel`] did not carry a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// No room at the moment: try again after the other side has read. Nothing was sent.
    #[error("no room in the message queue")]
    Full,
    /// The other side is gone.
    #[error("the other side is gone")]
    Closed,
    /// The message, or the buffer to receive it, does not fit the bus's message size: a mistake on this side.
    #[error("message or buffer does not fit the message size of the bus")]
    TooLong,
    /// The other side broke the rules of the carrier. The channel is of no use any more.
    #[error("the other side broke the message queue: {0}")]
    Corrupt(&'static str),
}

impl ChannelError {
    /// Whether the channel can still be used after this error.
    pub fn is_fatal(self) -> bool {
        matches!(self, ChannelError::Closed | ChannelError::Corrupt(_))
    }
}

/// A way to send messages to the other side and to receive its messages, in order, without ever waiting.
pub trait Channel {
    /// The longest message the bus carries, in bytes: 48 to 65535.
    fn max_message_size(&self) -> usize;

    /// Sends one whole message. It may stay with this side until [`flush`](Channel::flush).
    ///
    /// # Errors
    /// [`ChannelError::Full`] when there is no room now; then nothing was sent.
    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError>;

    /// Receives one message into `buf`, which holds at least [`max_message_size`](Channel::max_message_size) bytes, and says how many
    /// bytes came: at least those of the message, as many as the carrier's slots have at most. `None` if nothing is there.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] once the other side is gone and everything it sent was received.
    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError>;

    /// Makes the other side see everything sent so far, and wakes it if it sleeps.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] if the other side is gone.
    fn flush(&mut self) -> Result<(), ChannelError>;
}

impl<T: Channel + ?Sized> Channel for &mut T {
    fn max_message_size(&self) -> usize {
        (**self).max_message_size()
    }
    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        (**self).try_send(message)
    }
    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
        (**self).try_recv(buf)
    }
    fn flush(&mut self) -> Result<(), ChannelError> {
        (**self).flush()
    }
}
