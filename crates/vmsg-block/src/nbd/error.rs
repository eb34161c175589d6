// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server may do wrong.

/// A server does not keep to the protocol. The connection is given up then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// It does not begin with the magic numbers of a newstyle negotiation.
    #[error("what it says first is not an NBD greeting")]
    Greeting,
    /// The negotiation of before 2011, in which no export can be named.
    #[error("it speaks the oldstyle negotiation only")]
    Oldstyle,
    /// The negotiation of 2011, in which no question is answered.
    #[error("it speaks the newstyle negotiation, but not the fixed one")]
    NotFixed,
    /// The answer to an option does not begin with its magic number.
    #[error("an answer to an option begins with {0:#018x}")]
    OptionMagic(u64),
    /// The answer is to an option that was not asked.
    #[error("an answer to option {answered} instead of {asked}")]
    OtherOption {
        /// What the client has asked.
        asked: u32,
        /// What the server has answered.
        answered: u32,
    },
    /// An answer of a type that the option does not have.
    #[error("answer of type {kind} to option {option}")]
    OptionReply {
        /// The option.
        option: u32,
        /// The type.
        kind: u32,
    },
    /// More than any answer needs.
    #[error("an answer to an option of {0} bytes")]
    LongAnswer(u32),
    /// More answers than any option needs.
    #[error("answers to an option without end")]
    ManyAnswers,
    /// An answer too short, or too long, for what it is.
    #[error("information of type {kind} in {len} bytes")]
    InfoLength {
        /// Type of the information.
        kind: u16,
        /// Bytes of it.
        len: usize,
    },
    /// The server accepts the export without saying what it is like.
    #[error("it says nothing of the export's size")]
    NoExport,
    /// Block sizes that are no powers of two, or not in order.
    #[error("block sizes {minimum}, {preferred} and at most {maximum}")]
    BlockSizes {
        /// The smallest.
        minimum: u32,
        /// The preferred one.
        preferred: u32,
        /// The most that one request may have.
        maximum: u32,
    },
    /// Neither a simple nor a structured reply.
    #[error("a reply begins with {0:#010x}")]
    Magic(u32),
    /// No request is under way that has this cookie.
    #[error("a reply with cookie {0:#x}, which no request has")]
    Cookie(u64),
    /// Structured replies were not agreed on, or a read is answered by a simple one although they were.
    #[error("a {0} reply where it must not be")]
    Form(&'static str),
    /// A part of a reply that has a length which its type cannot have.
    #[error("part of a reply of type {kind} with {len} bytes")]
    ChunkLength {
        /// The type.
        kind: u16,
        /// Its length in bytes.
        len: u32,
    },
    /// A part of a reply that is no error and not known.
    #[error("part of a reply of type {0}, which is not known")]
    ChunkKind(u16),
    /// Data where none was asked for, outside what was asked for, or more of it.
    #[error("{len} bytes of data at {offset}, which are not what was asked for")]
    Data {
        /// Where on the export.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// The reply ends without an error and before all was there.
    #[error("a reply that ends {missing} bytes early")]
    Short {
        /// What is missing, in bytes.
        missing: u32,
    },
    /// An error with number 0, or errors for one request without end.
    #[error("errors that make no sense")]
    Errors,
}
