// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes into a session and what comes out of it.

use super::inflight::InflightMemory;
use super::record::QueueVectors;
use crate::places::PlaceError;
use crate::shadow::Renewal;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use virtio_msg::{DevNum, DeviceInfo, DeviceStatus, FeatureSet, QueueIndex};

/// Which device of the bus a session is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By its number.
    Number(DevNum),
    /// By the name its owner gave it; found with GET_DEVICES and DEVICE_NAME.
    Name(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Number(n) => write!(f, "device {n}"),
            Target::Name(name) => write!(f, "device \"{name}\""),
        }
    }
}

/// Times and bounds of a session.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long one request may stay unanswered.
    pub request_timeout: Duration,
    /// How long an operation may wait for the link or for its turn, and how long all its requests together may take. A VMM stands still
    /// meanwhile, and its guest with it.
    pub operation_timeout: Duration,
    /// The same for an operation that comes while the device is busy ([`OpError::Busy`]).
    pub overdue_timeout: Duration,
    /// How long the first [`Op::Describe`] may wait for a device that was never seen.
    pub first_contact_timeout: Duration,
    /// How long those after it may, until the device was seen: a VMM that connects again and again must not stand still all the time.
    pub second_contact_timeout: Duration,
    /// How long a device held by another driver is asked for again.
    pub claim_patience: Duration,
    /// Operations that may wait at a time.
    pub max_waiting: usize,
    /// The most queues looked at; a device may say it has more.
    pub max_queues: u32,
    /// The most windows that [`Op::SetWindows`] may set.
    pub max_windows: usize,
    /// The most windows there may be after [`Op::ChangeWindows`].
    pub max_views: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            request_timeout: Duration::from_secs(2),
            operation_timeout: Duration::from_secs(2),
            overdue_timeout: Duration::from_secs(2),
            first_contact_timeout: Duration::from_secs(5),
            second_contact_timeout: Duration::from_millis(100),
            claim_patience: Duration::from_secs(5),
            max_waiting: 64,
            max_queues: 256,
            max_windows: 256,
            max_views: 16_384,
        }
    }
}

/// Which file a descriptor stands for: two descriptors with the same id lend the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Number of the file system (`st_dev`).
    pub device: u64,
    /// Number of the file on it (`st_ino`).
    pub inode: u64,
}

impl FileId {
    /// No file: the memory that the bus has in common. A [`Window`] of it begins at its `file_offset` there, and its descriptor is never passed on.
    pub const COMMON: FileId = FileId {
        device: u64::MAX,
        inode: u64::MAX,
    };
}

/// A piece of memory lent to the device host.
#[derive(Clone, Debug)]
pub struct Window {
    /// Bus address of the first byte.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins, bytes.
    pub file_offset: u64,
    /// Whether the device may write.
    pub writable: bool,
    /// The file.
    pub fd: Arc<OwnedFd>,
    /// Which file that is.
    pub file: FileId,
}

impl Window {
    /// Whether both lend the same memory at the same place.
    pub fn is_same(&self, other: &Window) -> bool {
        (
            self.base,
            self.len,
            self.file_offset,
            self.writable,
            self.file,
        ) == (
            other.base,
            other.len,
            other.file_offset,
            other.writable,
            other.file,
        )
    }
}

/// A piece of memory that both sides of a bus have from the start, on a bus that lends none by message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommonMemory {
    /// Bus address of the first byte, which is the guest physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins, bytes.
    pub file_offset: u64,
    /// Which file.
    pub file: FileId,
    /// Its path, for messages to people.
    pub path: Arc<str>,
}

/// How a guest's memory is not what the bus has in common.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OtherMemory {
    /// It lies in another file.
    #[error(
        "the guest's memory at {base:#x} is not in `{path}`, which is all that the device host sees"
    )]
    OtherFile {
        /// The file that it should be.
        path: String,
        /// Bytes of that file that the bus knows.
        size: u64,
        /// Guest physical address.
        base: u64,
    },
    /// The file is not there, or not what it should be.
    #[error("{why}")]
    NoFile {
        /// The file that it should be.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is not in the memory that the bus has in common.
    #[error("the guest's memory at {base:#x} is not in common with the device host: {why}")]
    NoPlace {
        /// Guest physical address.
        base: u64,
        /// Why it is not there.
        why: PlaceError,
    },
    /// It was not said which file it is.
    #[error(
        "the bus lends no memory, and it was not said which file the guest's memory is: ram=FILE of the bus is missing"
    )]
    NotSaid,
    /// It is that file, but at other addresses.
    #[error(
        "the guest has byte {file_offset:#x} of `{path}` at {base:#x}, the bus has it elsewhere: mem-offset=, mem-low-size= and mem-hole= must fit the guest's machine"
    )]
    Misplaced {
        /// The file.
        path: String,
        /// Guest physical address.
        base: u64,
        /// What the guest has there.
        file_offset: u64,
    },
}

/// Where a device begins in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeAt {
    /// At the beginning: the ring is new.
    Start,
    /// At the used index that stands in the ring: all that was not given back is processed again.
    UsedIndex,
    /// As given.
    Explicit {
        /// Next entry of the available ring.
        avail: u16,
        /// Next entry of the used ring.
        used: u16,
    },
}

/// A virtqueue as a front sets it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// Bus address of the descriptor area.
    pub descriptor: u64,
    /// Bus address of the driver area (split: available ring).
    pub driver: u64,
    /// Bus address of the device area (split: used ring).
    pub device: u64,
    /// Where the device begins.
    pub resume: ResumeAt,
}

/// What is known of the device behind a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its number on the bus.
    pub number: DevNum,
    /// What it is.
    pub info: DeviceInfo,
    /// The features it offers.
    pub offered: FeatureSet,
    /// The largest size of each queue; its length is the number of queues.
    pub queue_sizes: Vec<u16>,
}

/// "vmsg" in ASCII, little-endian: the vendor id that this project's device hosts give their devices.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"vmsg");

impl DeviceFacts {
    /// Whether it is a device of one of this project's hosts, by its vendor id.
    pub fn is_ours(&self) -> bool {
        self.info.vendor_id == VENDOR_ID
    }
}

/// Names an operation until it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub(crate) u64);

/// What a front can ask of a session.
#[derive(Clone, Debug)]
pub enum Op {
    /// What is the device? [`Outcome::Device`].
    Describe,
    /// Take hold of the device, against other drivers of the bus.
    Claim,
    /// Lend exactly these windows; those that are lent already stay as they are.
    SetWindows(Vec<Window>),
    /// Change some of the windows lent, in one step that the device sees whole or not at all. Done when the device host has let go of what
    /// is removed. Recorded and answered at once while the device host is away, or was never there; something that is removed while the host
    /// of a lost connection may live, when it does not any more or has answered on the next connection, or with
    /// [`OpError::StillInUse`].
    ///
    /// For memory whose windows come and go (a vIOMMU): where the bus can, each file is mapped by the device host once, and windows are
    /// parts of it that cost no system call there. May be mixed with [`Op::SetWindows`]. Costs O(log n) with n windows here.
    ChangeWindows {
        /// Bus addresses at which windows that are lent now begin; each whole window is taken back. [`OpError::Invalid`] if there is none.
        remove: Vec<u64>,
        /// New windows, which may overlap those that are removed and no others.
        add: Vec<Window>,
    },
    /// Accept these features.
    SetFeatures(FeatureSet),
    /// Write the device status; 0 resets the device and forgets features, queues and notification descriptors. [`Outcome::Status`].
    SetStatus(DeviceStatus),
    /// Set a queue up.
    SetQueue(QueueIndex, QueueSetup),
    /// Reset one queue. Done when the device does not touch it any more.
    StopQueue(QueueIndex),
    /// The eventfds of a queue: the device waits on `kick` and rings `call`.
    SetNotify {
        /// Which queue.
        queue: QueueIndex,
        /// Rung by the driver.
        kick: Option<Arc<OwnedFd>>,
        /// Rung by the device.
        call: Option<Arc<OwnedFd>>,
    },
    /// The front end keeps what is in flight in the queues, there; without, the session does. For queues that are set up later.
    KeepInflight(Option<InflightMemory>),
    /// The queues are copies, and can be begun anew for another device host with the requests that the one before had. On a bus that passes no
    /// descriptors, where no record of these can be lent, they are.
    SetRenewal(Option<Renewal>),
    /// Read configuration space, as last seen while the link is down. [`Outcome::Config`].
    ReadConfig {
        /// First byte.
        offset: u32,
        /// Bytes.
        len: u32,
    },
    /// Write configuration space.
    WriteConfig {
        /// First byte.
        offset: u32,
        /// What to write.
        data: Vec<u8>,
    },
    /// The shared-memory region with this id, with its file. [`Outcome::SharedMemory`]; asked of the device each time, since another device
    /// host has another file ([`Event::Ready`] with `new_host`).
    SharedMemory(u8),
    /// The guest is gone: reset the device, take back all windows, let go of the device. Done when the device host uses nothing of the guest's any
    /// more: by its answer, because its process has ended, or as [`Self::ChangeWindows`]. With [`OpError::Busy`] and
    /// [`OpError::StillInUse`] the guest is forgotten as well, but what it has lent may still be written to; the next [`Self::Claim`] is done
    /// when that is over.
    Release,
}

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// The device status that resulted.
    Status(DeviceStatus),
    /// Bytes of the configuration space, as many as were asked for.
    Config(Vec<u8>),
    /// The device.
    Device(DeviceFacts),
    /// The region, if the device has it and the bus can pass its file on.
    SharedMemory(Option<SharedRegion>),
}

/// A shared-memory region of the device: a part of a file of the device host. That file is the device host's: it can be truncated under
/// whoever maps it, which then gets SIGBUS unless it is ready for that (`vmsg_mem::fault`).
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// Bytes; not zero.
    pub len: u64,
    /// Where in the file it begins, bytes; `file_offset + len` does not overflow.
    pub file_offset: u64,
    /// The file.
    pub fd: Arc<OwnedFd>,
}

impl PartialEq for SharedRegion {
    fn eq(&self, other: &Self) -> bool {
        (self.len, self.file_offset) == (other.len, other.file_offset)
            && Arc::ptr_eq(&self.fd, &other.fd)
    }
}

impl Eq for SharedRegion {}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OpError {
    /// No answer, or no link, in time.
    #[error("no answer in time")]
    TimedOut,
    /// The device has not let go of its queues yet, though its host lives and has asked it to: it may use the guest's memory still. To be tried
    /// again.
    #[error("the device has requests under way that do not end, and cannot be stopped")]
    Busy,
    /// The device host of a lost connection may still use memory that was taken back: it is not known to have ended. Recorded all the same: no
    /// device host gets that memory again.
    #[error("a device host whose connection was lost may still use the memory")]
    StillInUse,
    /// The link went away before the operation was done, and it could not be recorded.
    #[error("the device host went away")]
    LinkLost,
    /// The device host said no.
    #[error("{what} refused with status {code}")]
    Refused {
        /// Which message.
        what: &'static str,
        /// The status in the answer.
        code: u32,
    },
    /// These features are not offered by the device.
    #[error("features not offered: {0}")]
    NotOffered(FeatureSet),
    /// The device must be reset first.
    #[error("the device needs a reset: {0}")]
    NeedsReset(ResetReason),
    /// Another driver holds the device.
    #[error("held by {0}")]
    Held(String),
    /// There is no such device on the bus.
    #[error("no such device")]
    NoDevice,
    /// The device host broke the protocol.
    #[error("bad answer: {0}")]
    BadAnswer(&'static str),
    /// The operation makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// The bus cannot do this.
    #[error("the bus cannot {0}")]
    BusCannot(&'static str),
    /// The guest's memory is not what the bus has in common.
    #[error(transparent)]
    OtherMemory(OtherMemory),
    /// Too many operations wait.
    #[error("too many operations wait")]
    TooMany,
    /// The session has ended.
    #[error("the session has ended")]
    Ended,
}

/// Why a device needs a reset before it can be used again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ResetReason {
    /// The device host says so.
    #[error("the device reported an error")]
    DeviceReported,
    /// It is not on the bus any more.
    #[error("the device was removed")]
    Removed,
    /// Negotiated features are not offered any more.
    #[error("the device host no longer offers features {0}")]
    FeaturesMissing(FeatureSet),
    /// The device host did not take the negotiated features.
    #[error("the device host refused the negotiated features")]
    FeaturesRefused,
    /// Another kind of device.
    #[error("the device has virtio id {is}, was {was}")]
    DeviceIdChanged {
        /// What the guest knows.
        was: u32,
        /// What is there.
        is: u32,
    },
    /// Another number of queues.
    #[error("the device has {is} queues, had {was}")]
    QueuesChanged {
        /// What the guest knows.
        was: u32,
        /// What is there.
        is: u32,
    },
    /// A queue in use is larger than the device allows now.
    #[error("queue {queue} has {size} entries, the device allows {max}")]
    QueueTooLarge {
        /// Which queue.
        queue: u32,
        /// Its size.
        size: u16,
        /// What is allowed.
        max: u16,
    },
    /// Another size of the configuration space.
    #[error("the configuration space has {is} bytes, had {was}")]
    ConfigSizeChanged {
        /// What the guest knows.
        was: u32,
        /// What is there.
        is: u32,
    },
    /// A packed queue was live; where to resume is not known.
    #[error("packed queues cannot be resumed")]
    PackedLive,
    /// Something of the replay was refused.
    #[error("{what} refused with status {code} in the replay")]
    ReplayRefused {
        /// Which message.
        what: &'static str,
        /// The status in the answer.
        code: u32,
    },
    /// Another driver has taken the device.
    #[error("the device is held by {0}")]
    Held(String),
    /// A guest that is in the middle of a queue, and a device host that begins every queue at its beginning, or that has no record of what
    /// is in flight in one whose requests overtake each other.
    #[error(
        "the device host cannot go on in the middle of queue {queue}; the guest's driver must be started anew"
    )]
    CannotResume {
        /// Which queue.
        queue: u32,
    },
    /// The guest's memory is not what the bus that came back has in common.
    #[error(transparent)]
    OtherMemory(OtherMemory),
    /// The bus that came back cannot do what the guest needs.
    #[error("the bus cannot {0}")]
    BusCannot(&'static str),
}

/// The device is not there any more.
pub(super) const REMOVED: &str = "the device was removed";
/// The driver has reset a device that could not be replayed.
pub(super) const STARTS_OVER: &str = "the device starts over after a failed replay";

/// Reasons of an [`Event::LinkFault`] that are nobody's fault.
pub(crate) const FAULTLESS: [&str; 2] = [REMOVED, STARTS_OVER];

/// News for the front.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An operation is done.
    Done {
        /// Which.
        id: OpId,
        /// What it came to.
        result: Result<Outcome, OpError>,
    },
    /// The configuration space has changed; it can be read without delay.
    ConfigChanged,
    /// The device has used buffers; only for queues without call eventfd, or on a bus without such.
    QueueUsed(QueueIndex),
    /// The guest's device is out of order until it is reset.
    NeedsReset(ResetReason),
    /// The device is there and has all that was negotiated. `replayed`: a guest's state was set up again.
    Ready {
        /// Whether a guest's state was replayed.
        replayed: bool,
        /// Whether the device host is another one, or has restarted, since the last time.
        new_host: bool,
    },
    /// Memory of the guest that the device cannot reach.
    LeftOut {
        /// Guest physical address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// The bus is connected, but has no such device. Attaching goes on when one appears.
    DeviceAbsent,
    /// The other side is of no use on this connection: close it and connect again.
    LinkFault(&'static str),
}

/// The eventfds of a queue, where the bus does not pass them on.
#[derive(Clone, Copy, Debug)]
pub struct Bell<'a> {
    /// Which queue.
    pub queue: QueueIndex,
    /// Rung by the driver.
    pub kick: Option<&'a Arc<OwnedFd>>,
    /// To be rung when the device has used buffers.
    pub call: Option<&'a Arc<OwnedFd>>,
    /// The doorbells of the bus that stand for both, where it has some and the device knows: then kicks and calls are no messages.
    pub vectors: QueueVectors,
}

/// A message for the bus.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The message.
    pub bytes: Vec<u8>,
    /// Descriptors that go with it, at most two.
    pub fds: Vec<Arc<OwnedFd>>,
}

/// What has happened to a session so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests without an answer in time.
    pub timeouts: u64,
    /// Responses to nothing that is outstanding: late, repeated or made up.
    pub late: u64,
    /// Messages that could not be decoded.
    pub malformed: u64,
    /// Answers that do not fit their request.
    pub bad_answers: u64,
    /// Messages that a device host does not send, or about other devices.
    pub unexpected: u64,
    /// Replays that ended well.
    pub replays: u64,
    /// Times the connection had to be given up.
    pub link_faults: u64,
    /// Times a device did not let go of its queues in time.
    pub overdue: u64,
}
