// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of a daemon, and what it answers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::Fault;
use crate::stream::{Incoming, Message};
use crate::wire::{Writer, id, long, word};

/// Bytes of a number, and of a ring's state.
const EIGHT: usize = 8;
/// Bytes of the description of in-flight memory: two numbers of 64 bits and two of 16; some send four more to round it up.
const INFLIGHT: std::ops::RangeInclusive<usize> = 20..=24;
/// Bytes before the configuration itself: offset, length, flags.
const CONFIG: usize = 12;

/// Memory that the daemon may map.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where queues find it.
    pub guest: u64,
    /// Where the addresses in [`RingAddresses`] find it.
    pub user: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
    /// The file.
    pub file: Arc<OwnedFd>,
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        (self.guest, self.user, self.len, self.offset)
            == (other.guest, other.user, other.len, other.offset)
            && Arc::ptr_eq(&self.file, &other.file)
    }
}

/// Where a ring lies, as "user" addresses of [`Region`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptors.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
}

/// Memory in which a daemon notes what is in flight.
#[derive(Clone, Debug)]
pub struct Inflight {
    /// Its file.
    pub file: Arc<OwnedFd>,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file, in bytes: a multiple of the page size.
    pub offset: u64,
    /// Queues that have a part of it.
    pub queues: u16,
    /// Entries of each of them at most.
    pub queue_size: u16,
}

/// What is asked of a daemon.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Request {
    /// What virtio features it has. Answer: [`Answer::Number`].
    GetFeatures,
    /// These are in use.
    SetFeatures(u64),
    /// This connection is the front end.
    SetOwner,
    /// What features of the protocol it has. Answer: [`Answer::Number`].
    GetProtocolFeatures,
    /// These are in use.
    SetProtocolFeatures(u64),
    /// How many queues it has. Answer: [`Answer::Number`].
    GetQueueNum,
    /// How many regions it can have. Answer: [`Answer::Number`].
    GetMaxMemSlots,
    /// All memory there is, at most [`TABLE_REGIONS`](crate::TABLE_REGIONS).
    SetMemTable(Vec<Region>),
    /// More memory.
    AddRegion(Region),
    /// Less memory.
    RemoveRegion(Region),
    /// Entries of a ring.
    SetRingSize {
        /// Which queue.
        queue: u16,
        /// Its entries.
        size: u16,
    },
    /// Where in the available ring to begin.
    SetRingBase {
        /// Which queue.
        queue: u16,
        /// The index.
        base: u16,
    },
    /// Where a ring is.
    SetRingAddresses {
        /// Which queue.
        queue: u16,
        /// Its addresses.
        addresses: RingAddresses,
    },
    /// By what a queue is kicked; the ring starts.
    SetRingKick {
        /// Which queue.
        queue: u16,
        /// An eventfd.
        file: Arc<OwnedFd>,
    },
    /// By what the driver is interrupted.
    SetRingCall {
        /// Which queue.
        queue: u16,
        /// An eventfd.
        file: Arc<OwnedFd>,
    },
    /// By what the daemon says that a queue is broken.
    SetRingError {
        /// Which queue.
        queue: u16,
        /// An eventfd.
        file: Arc<OwnedFd>,
    },
    /// Whether a ring is processed.
    EnableRing {
        /// Which queue.
        queue: u16,
        /// Yes or no.
        on: bool,
    },
    /// Stop a ring, and say where. Answer: [`Answer::Base`].
    GetRingBase {
        /// Which queue.
        queue: u16,
    },
    /// Where the daemon can ask.
    SetBackendChannel(Arc<OwnedFd>),
    /// Read the configuration. Answer: [`Answer::Config`]; empty if the daemon has not so much.
    GetConfig {
        /// From this byte on.
        offset: u32,
        /// So many bytes.
        len: u32,
    },
    /// Write the configuration as the driver does.
    SetConfig {
        /// From this byte on.
        offset: u32,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Memory for what is in flight. Answer: [`Answer::Inflight`], or [`Answer::Refused`] where it has none.
    GetInflight {
        /// For so many queues.
        queues: u16,
        /// Of so many entries at most.
        queue_size: u16,
    },
    /// The memory for what is in flight; what it says is gone on with.
    SetInflight(Inflight),
    /// Back to the beginning.
    ResetDevice,
    /// The status of the virtio device.
    SetStatus(u8),
}

/// What a daemon answers.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It has done so.
    Done,
    /// It has done so, or not: it was not asked to say.
    Sent,
    /// It says that it cannot, with its number for the error; 0 where there is none.
    Refused(u64),
    /// A number.
    Number(u64),
    /// Where a ring has stopped in its available ring.
    Base(u16),
    /// Bytes of the configuration, as many as were asked for, or none.
    Config(Vec<u8>),
    /// Memory for what is in flight.
    Inflight(Inflight),
}

impl Request {
    /// As the specification calls it.
    pub const fn name(&self) -> &'static str {
        self.id_and_name().1
    }

    pub(crate) const fn id(&self) -> u32 {
        self.id_and_name().0
    }

    const fn id_and_name(&self) -> (u32, &'static str) {
        match self {
            Self::GetFeatures => (id::GET_FEATURES, "GET_FEATURES"),
            Self::SetFeatures(_) => (id::SET_FEATURES, "SET_FEATURES"),
            Self::SetOwner => (id::SET_OWNER, "SET_OWNER"),
            Self::GetProtocolFeatures => (id::GET_PROTOCOL_FEATURES, "GET_PROTOCOL_FEATURES"),
            Self::SetProtocolFeatures(_) => (id::SET_PROTOCOL_FEATURES, "SET_PROTOCOL_FEATURES"),
            Self::GetQueueNum => (id::GET_QUEUE_NUM, "GET_QUEUE_NUM"),
            Self::GetMaxMemSlots => (id::GET_MAX_MEM_SLOTS, "GET_MAX_MEM_SLOTS"),
            Self::SetMemTable(_) => (id::SET_MEM_TABLE, "SET_MEM_TABLE"),
            Self::AddRegion(_) => (id::ADD_MEM_REG, "ADD_MEM_REG"),
            Self::RemoveRegion(_) => (id::REM_MEM_REG, "REM_MEM_REG"),
            Self::SetRingSize { .. } => (id::SET_VRING_NUM, "SET_VRING_NUM"),
            Self::SetRingBase { .. } => (id::SET_VRING_BASE, "SET_VRING_BASE"),
            Self::SetRingAddresses { .. } => (id::SET_VRING_ADDR, "SET_VRING_ADDR"),
            Self::SetRingKick { .. } => (id::SET_VRING_KICK, "SET_VRING_KICK"),
            Self::SetRingCall { .. } => (id::SET_VRING_CALL, "SET_VRING_CALL"),
            Self::SetRingError { .. } => (id::SET_VRING_ERR, "SET_VRING_ERR"),
            Self::EnableRing { .. } => (id::SET_VRING_ENABLE, "SET_VRING_ENABLE"),
            Self::GetRingBase { .. } => (id::GET_VRING_BASE, "GET_VRING_BASE"),
            Self::SetBackendChannel(_) => (id::SET_BACKEND_REQ_FD, "SET_BACKEND_REQ_FD"),
            Self::GetConfig { .. } => (id::GET_CONFIG, "GET_CONFIG"),
            Self::SetConfig { .. } => (id::SET_CONFIG, "SET_CONFIG"),
            Self::GetInflight { .. } => (id::GET_INFLIGHT_FD, "GET_INFLIGHT_FD"),
            Self::SetInflight(_) => (id::SET_INFLIGHT_FD, "SET_INFLIGHT_FD"),
            Self::ResetDevice => (id::RESET_DEVICE, "RESET_DEVICE"),
            Self::SetStatus(_) => (id::SET_STATUS, "SET_STATUS"),
        }
    }

    /// Whether it has an answer of its own.
    pub(crate) const fn is_question(&self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetMaxMemSlots
                | Self::GetRingBase { .. }
                | Self::GetConfig { .. }
                | Self::GetInflight { .. }
        )
    }

    /// The message that asks it, with `flags` beside those that all have.
    pub(crate) fn message(&self, flags: u32) -> Message {
        let mut body = Writer::new(self.id(), flags);
        let mut files = Vec::new();
        match self {
            Self::GetFeatures
            | Self::SetOwner
            | Self::GetProtocolFeatures
            | Self::GetQueueNum
            | Self::GetMaxMemSlots
            | Self::ResetDevice => {}
            Self::SetFeatures(number) | Self::SetProtocolFeatures(number) => {
                body.long(*number);
            }
            Self::SetStatus(status) => {
                body.long((*status).into());
            }
            Self::SetMemTable(regions) => {
                let count = u32::try_from(regions.len()).expect("a few");
                body.word(count).word(0);
                for region in regions {
                    describe(&mut body, region);
                    files.push(Arc::clone(&region.file));
                }
            }
            Self::AddRegion(region) => {
                body.long(0);
                describe(&mut body, region);
                files.push(Arc::clone(&region.file));
            }
            Self::RemoveRegion(region) => {
                body.long(0);
                describe(&mut body, region);
            }
            Self::SetRingSize { queue, size } => {
                body.word((*queue).into()).word((*size).into());
            }
            Self::SetRingBase { queue, base } => {
                body.word((*queue).into()).word((*base).into());
            }
            Self::EnableRing { queue, on } => {
                body.word((*queue).into()).word((*on).into());
            }
            Self::GetRingBase { queue } => {
                body.word((*queue).into()).word(0);
            }
            Self::SetRingAddresses { queue, addresses } => {
                body.word((*queue).into()).word(0);
                body.long(addresses.desc).long(addresses.used);
                body.long(addresses.avail).long(0);
            }
            Self::SetRingKick { queue, file }
            | Self::SetRingCall { queue, file }
            | Self::SetRingError { queue, file } => {
                // The bits above the eighth say that no descriptor comes.
                body.long((*queue & 0xff).into());
                files.push(Arc::clone(file));
            }
            Self::SetBackendChannel(file) => files.push(Arc::clone(file)),
            Self::GetConfig { offset, len } => {
                let room = vec![0; usize::try_from(*len).unwrap_or(0)];
                body.word(*offset).word(*len).word(0).bytes(&room);
            }
            Self::SetConfig { offset, data } => {
                let len = u32::try_from(data.len()).expect("a few bytes");
                body.word(*offset).word(len).word(0).bytes(data);
            }
            Self::GetInflight { queues, queue_size } => {
                body.long(0).long(0).half(*queues).half(*queue_size).word(0);
            }
            Self::SetInflight(inflight) => {
                body.long(inflight.len).long(inflight.offset);
                body.half(inflight.queues).half(inflight.queue_size).word(0);
                files.push(Arc::clone(&inflight.file));
            }
        }
        Message::new(body.finish(), files)
    }

    /// Whether an answer to this may have so many bytes.
    pub(crate) fn fits(&self, len: usize) -> bool {
        match self {
            Self::GetConfig { len: asked, .. } => {
                let asked = usize::try_from(*asked).unwrap_or(0);
                // None, or the fields alone: an error.
                len == 0 || len == CONFIG || len == CONFIG + asked
            }
            Self::GetInflight { .. } => INFLIGHT.contains(&len),
            _ => len == EIGHT,
        }
    }

    /// What an answer to this says. Its length [fits](Self::fits).
    pub(crate) fn read(&self, answer: Incoming) -> Result<Answer, Fault> {
        let nonsense = |why| Fault::Nonsense {
            request: self.name(),
            why,
        };
        let body = &answer.body;
        match self {
            Self::GetRingBase { queue } => {
                if word(body, 0) != u32::from(*queue) {
                    return Err(nonsense("it is about another queue"));
                }
                // Packed rings have more to say, and are not used.
                let base = u16::try_from(word(body, 4));
                base.map(Answer::Base)
                    .map_err(|_| nonsense("no index of a split queue"))
            }
            Self::GetConfig { offset, len } => {
                if body.len() <= CONFIG {
                    return Ok(Answer::Config(Vec::new()));
                }
                if word(body, 0) != *offset || word(body, 4) != *len {
                    return Err(nonsense("it is about other bytes"));
                }
                Ok(Answer::Config(body[CONFIG..].to_vec()))
            }
            Self::GetInflight { queues, queue_size } => {
                let (len, offset) = (long(body, 0), long(body, 8));
                let file = answer.files.into_iter().next();
                let Some(file) = file.filter(|_| len != 0) else {
                    // As daemons say that they have none.
                    return Ok(Answer::Refused(0));
                };
                if offset.checked_add(len).is_none() {
                    return Err(nonsense("no memory"));
                }
                Ok(Answer::Inflight(Inflight {
                    file: Arc::new(file),
                    len,
                    offset,
                    queues: *queues,
                    queue_size: *queue_size,
                }))
            }
            _ => Ok(Answer::Number(long(body, 0))),
        }
    }
}

fn describe(body: &mut Writer, region: &Region) {
    body.long(region.guest).long(region.len);
    body.long(region.user).long(region.offset);
}
