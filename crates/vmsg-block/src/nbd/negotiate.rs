// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Fixed newstyle negotiation, client's side, without I/O.
//!
//! Bytes of the server go in, bytes for it come out, until it is known what the export is like. Nothing it sends makes this
//! keep more than [`MOST_KEPT`] bytes or go on for more than [`MOST_ANSWERS`] answers.

use super::wire::{self, be16, be32, be64};
use super::{NbdUri, ProtocolError};

/// Bytes of the server's that are kept at most: an answer's head and the longest text.
const MOST_KEPT: usize = ANSWER_LEN + LONGEST_ANSWER;
/// Bytes of what each answer begins with.
const ANSWER_LEN: usize = 20;
/// The longest answer that is taken, in bytes: more than a text and the numbers before it.
const LONGEST_ANSWER: usize = wire::LONGEST_TEXT + 64;
/// Answers to one option that are taken.
const MOST_ANSWERS: u32 = 64;
/// Bytes of zeroes behind an answer to `OPT_EXPORT_NAME`, unless both sides want none.
const ZEROES: usize = 124;

/// What the server says about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Requests must be aligned to that, in bytes; a power of two.
    pub minimum: u32,
    /// Requests are best aligned to that, in bytes; a power of two.
    pub preferred: u32,
    /// The most data of one request, in bytes.
    pub maximum: u32,
    /// Reads are answered by structured replies.
    pub structured: bool,
}

/// Why a negotiation comes to no good end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The server does not keep to the protocol.
    Protocol(ProtocolError),
    /// The server has said no, in these words.
    No(String),
    /// The server ends, in these words: another one may come.
    Shutdown(String),
}

impl From<ProtocolError> for Refusal {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    Structured,
    Go,
    /// As the server does not know `OPT_GO`.
    Name,
    Done,
}

/// One negotiation.
#[derive(Debug)]
pub struct Negotiation {
    state: State,
    name: String,
    /// What the server has sent and was not yet looked at.
    kept: Vec<u8>,
    /// For the server.
    out: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    /// Size and flags.
    export: Option<(u64, u16)>,
    /// The smallest, the preferred and the largest.
    blocks: Option<(u32, u32, u32)>,
    answers: u32,
}

impl Negotiation {
    /// For the export that `uri` names.
    pub fn new(uri: &NbdUri) -> Self {
        Self {
            state: State::Greeting,
            name: uri.export.clone(),
            kept: Vec::new(),
            out: Vec::new(),
            no_zeroes: false,
            structured: false,
            export: None,
            blocks: None,
            answers: 0,
        }
    }

    /// What is to be sent.
    pub fn output(&self) -> &[u8] {
        &self.out
    }

    /// The first `len` bytes of [`output`](Self::output) are sent.
    pub fn sent(&mut self, len: usize) {
        self.out.drain(..len.min(self.out.len()));
    }

    /// Takes bytes of the server's off the front of `bytes`: all of them, unless the negotiation comes to its end among them.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; the connection is of no use any more.
    pub fn input(&mut self, bytes: &mut &[u8]) -> Result<Option<Export>, Refusal> {
        while self.state != State::Done {
            let need = self.need()?;
            debug_assert!(need <= MOST_KEPT, "bounded");
            if self.kept.len() < need {
                let (now, rest) = bytes.split_at(bytes.len().min(need - self.kept.len()));
                self.kept.extend_from_slice(now);
                *bytes = rest;
                if self.kept.len() < need {
                    return Ok(None);
                }
                continue;
            }
            let message = std::mem::take(&mut self.kept);
            self.message(&message)?;
        }
        let (size, flags) = self.export.ok_or(ProtocolError::NoExport)?;
        let (minimum, preferred, maximum) = self.blocks.unwrap_or((1, 4096, 32 << 20));
        Ok(Some(Export {
            size,
            flags,
            minimum,
            preferred,
            maximum,
            structured: self.structured,
        }))
    }

    /// Bytes of the message that is next, as far as is known yet.
    fn need(&self) -> Result<usize, ProtocolError> {
        let zeroes = if self.no_zeroes { 0 } else { ZEROES };
        match self.state {
            State::Greeting => Ok(18),
            State::Name => Ok(10 + zeroes),
            State::Done => Ok(0),
            State::Structured | State::Go => {
                let Some(len) = be32(&self.kept, ANSWER_LEN - 4) else {
                    return Ok(ANSWER_LEN);
                };
                let magic = be64(&self.kept, 0).unwrap_or(0);
                if magic != wire::ANSWER_MAGIC {
                    return Err(ProtocolError::OptionMagic(magic));
                }
                match usize::try_from(len) {
                    Ok(len) if len <= LONGEST_ANSWER => Ok(ANSWER_LEN + len),
                    _ => Err(ProtocolError::LongAnswer(len)),
                }
            }
        }
    }

    /// A message as long as [`need`](Self::need) says.
    fn message(&mut self, message: &[u8]) -> Result<(), Refusal> {
        match self.state {
            State::Greeting => self.greeting(message)?,
            State::Structured => self.structured_answer(message)?,
            State::Go => self.go_answer(message)?,
            State::Name => {
                self.export = be64(message, 0).zip(be16(message, 8));
                self.state = State::Done;
            }
            State::Done => {}
        }
        Ok(())
    }

    fn greeting(&mut self, message: &[u8]) -> Result<(), ProtocolError> {
        if be64(message, 0) != Some(wire::GREETING) {
            return Err(ProtocolError::Greeting);
        }
        match be64(message, 8) {
            Some(wire::OPTION_MAGIC) => {}
            Some(wire::OLDSTYLE_MAGIC) => return Err(ProtocolError::Oldstyle),
            _ => return Err(ProtocolError::Greeting),
        }
        let flags = be16(message, 16).unwrap_or(0);
        if flags & wire::FIXED_NEWSTYLE == 0 {
            return Err(ProtocolError::NotFixed);
        }
        let known = flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        self.no_zeroes = known & wire::NO_ZEROES != 0;
        self.out.extend_from_slice(&u32::from(known).to_be_bytes());
        self.option(wire::OPT_STRUCTURED_REPLY, &[]);
        self.state = State::Structured;
        Ok(())
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("names are short");
        self.out
            .extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&option.to_be_bytes());
        self.out.extend_from_slice(&len.to_be_bytes());
        self.out.extend_from_slice(data);
        self.answers = 0;
    }

    /// Type and data of an answer to `asked`.
    fn answer<'a>(
        &mut self,
        asked: u32,
        message: &'a [u8],
    ) -> Result<(u32, &'a [u8]), ProtocolError> {
        let answered = be32(message, 8).unwrap_or(0);
        if answered != asked {
            return Err(ProtocolError::OtherOption { asked, answered });
        }
        self.answers += 1;
        if self.answers > MOST_ANSWERS {
            return Err(ProtocolError::ManyAnswers);
        }
        Ok((
            be32(message, 12).unwrap_or(0),
            message.get(ANSWER_LEN..).unwrap_or(&[]),
        ))
    }

    fn structured_answer(&mut self, message: &[u8]) -> Result<(), Refusal> {
        let option = wire::OPT_STRUCTURED_REPLY;
        let (kind, data) = self.answer(option, message)?;
        match kind {
            wire::REP_ACK => self.structured = true,
            // It says no to all that follows, too.
            wire::REP_ERR_TLS_REQD | wire::REP_ERR_SHUTDOWN => return Err(refusal(kind, data)),
            _ if kind & wire::REP_ERROR != 0 => {}
            _ => return Err(ProtocolError::OptionReply { option, kind }.into()),
        }
        let name = self.name.as_bytes();
        let mut data = Vec::with_capacity(name.len() + 8);
        data.extend_from_slice(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
        data.extend_from_slice(name);
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
        self.option(wire::OPT_GO, &data);
        self.state = State::Go;
        Ok(())
    }

    fn go_answer(&mut self, message: &[u8]) -> Result<(), Refusal> {
        let option = wire::OPT_GO;
        let (kind, data) = self.answer(option, message)?;
        match kind {
            wire::REP_INFO => Ok(self.info(data)?),
            wire::REP_ACK => {
                self.state = State::Done;
                Ok(())
            }
            wire::REP_ERR_UNSUP => {
                let name = self.name.clone();
                self.option(wire::OPT_EXPORT_NAME, name.as_bytes());
                (self.export, self.blocks) = (None, None);
                self.state = State::Name;
                Ok(())
            }
            _ if kind & wire::REP_ERROR != 0 => Err(refusal(kind, data)),
            _ => Err(ProtocolError::OptionReply { option, kind }.into()),
        }
    }

    fn info(&mut self, data: &[u8]) -> Result<(), ProtocolError> {
        let len = data.len();
        let kind = be16(data, 0).ok_or(ProtocolError::InfoLength { kind: 0, len })?;
        match (kind, len) {
            (wire::INFO_EXPORT, 12) => {
                self.export = be64(data, 2).zip(be16(data, 10));
            }
            (wire::INFO_BLOCK_SIZE, 14) => {
                let number = |at| be32(data, at).unwrap_or(0);
                let (minimum, preferred, maximum) = (number(2), number(6), number(10));
                let ordered = minimum <= 1 << 16 && minimum <= preferred && preferred <= maximum;
                if !minimum.is_power_of_two() || !preferred.is_power_of_two() || !ordered {
                    return Err(ProtocolError::BlockSizes {
                        minimum,
                        preferred,
                        maximum,
                    });
                }
                self.blocks = Some((minimum, preferred, maximum));
            }
            (wire::INFO_EXPORT | wire::INFO_BLOCK_SIZE, _) => {
                return Err(ProtocolError::InfoLength { kind, len });
            }
            _ => {}
        }
        Ok(())
    }
}

fn refusal(kind: u32, data: &[u8]) -> Refusal {
    let meaning = match kind {
        wire::REP_ERR_POLICY => "not allowed",
        wire::REP_ERR_INVALID => "invalid request",
        wire::REP_ERR_PLATFORM => "not possible there",
        wire::REP_ERR_TLS_REQD => "TLS is wanted",
        wire::REP_ERR_UNKNOWN => "there is no such export",
        wire::REP_ERR_SHUTDOWN => "it is shutting down",
        wire::REP_ERR_BLOCK_SIZE_REQD => "it wants block sizes to be kept to",
        _ => "an error without a name",
    };
    let words = wire::words(data);
    let text = if words.is_empty() {
        meaning.to_owned()
    } else {
        format!("{meaning} ({words})")
    };
    if kind == wire::REP_ERR_SHUTDOWN {
        Refusal::Shutdown(text)
    } else {
        Refusal::No(text)
    }
}
