// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of a message that an adapter is given.

use crate::message::DecodeError;
use thiserror::Error;

/// There is no room for this message now: keep it, fetch what the adapter has to send, and offer it again. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the adapter has no room for another message")]
pub struct Busy;

/// What became of a message that an adapter was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was taken.
    Taken,
    /// It was dropped: nothing answers it, and nothing is passed on.
    Ignored(Ignored),
}

/// Why a message was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Ignored {
    /// It is no message.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// The other layout has nothing like it.
    #[error("no counterpart in the other message layout")]
    NoCounterpart,
    /// A response that answers nothing: too late, twice, or made up.
    #[error("response to no request that is outstanding")]
    Unexpected,
    /// A message that the other end has no business to send.
    #[error("message that only the other side sends")]
    WrongWay,
    /// Another device number than the one behind the adapter.
    #[error("message for a device that is not there")]
    OtherDevice,
    /// Its answer would not fit a message.
    #[error("response would be longer than a message")]
    ResponseTooLong,
    /// A size, offset or index that no message of the other layout can carry.
    #[error("value out of range")]
    OutOfRange,
}
