// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of our own buses as lines of a trace.

use super::{COMMON_BACKING, Request, Response, Resume, Status, id};
use std::fmt;

/// What the message `id` is called; the same for request and response.
pub const fn name(id: u8) -> Option<&'static str> {
    Some(match id {
        id::WINDOW_ADD => "WINDOW_ADD",
        id::WINDOW_REMOVE => "WINDOW_REMOVE",
        id::QUEUE_NOTIFY => "QUEUE_NOTIFY",
        id::QUEUE_RESUME => "QUEUE_RESUME",
        id::CLAIM => "CLAIM",
        id::DEVICE_NAME => "DEVICE_NAME",
        id::QUEUE_INFLIGHT => "QUEUE_INFLIGHT",
        id::BACKING_ADD => "BACKING_ADD",
        id::BACKING_REMOVE => "BACKING_REMOVE",
        id::VIEW_ADD => "VIEW_ADD",
        id::SHARED_MEMORY => "SHARED_MEMORY",
        id::QUEUE_VECTORS => "QUEUE_VECTORS",
        _ => return None,
    })
}

fn flag(f: &mut fmt::Formatter<'_>, set: bool, text: &str) -> fmt::Result {
    if set { write!(f, ", {text}") } else { Ok(()) }
}

/// The fields without the name: `device 3, queue 1, kick, call`.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::WindowAdd(w) => {
                write!(
                    f,
                    "window {}, {:#x} bytes at {:#x}, file offset {:#x}",
                    w.id, w.len, w.base.0, w.file_offset
                )?;
                flag(f, w.writable, "writable")?;
                flag(f, w.more, "more")
            }
            Request::WindowRemove { id, more } => {
                write!(f, "window {id}")?;
                flag(f, *more, "more")
            }
            Request::QueueNotify(n) => {
                write!(f, "device {}, queue {}", n.dev, n.queue)?;
                flag(f, n.kick, "kick")?;
                flag(f, n.call, "call")
            }
            Request::QueueResume { dev, queue, from } => {
                write!(f, "device {dev}, queue {queue}")?;
                match from {
                    Resume::At {
                        avail_idx,
                        used_idx,
                    } => write!(f, ", avail {avail_idx}, used {used_idx}"),
                    Resume::UsedInRing => f.write_str(", used index of the ring"),
                }
            }
            Request::Claim { dev, release } => {
                write!(f, "device {dev}")?;
                flag(f, *release, "release")
            }
            Request::DeviceName(dev) => write!(f, "device {dev}"),
            Request::QueueInflight(i) => {
                write!(
                    f,
                    "device {}, queue {}, {:#x} bytes at file offset {:#x}",
                    i.dev, i.queue, i.len, i.offset
                )?;
                flag(f, i.resume, "resume")
            }
            Request::BackingAdd(b) => {
                write!(
                    f,
                    "backing {}, {:#x} bytes at file offset {:#x}",
                    b.id, b.len, b.file_offset
                )?;
                flag(f, b.writable, "writable")
            }
            Request::BackingRemove { id } => write!(f, "backing {id}"),
            Request::ViewAdd(v) => {
                write!(
                    f,
                    "window {}, {:#x} bytes at {:#x}, offset {:#x} of ",
                    v.id, v.len, v.base.0, v.offset
                )?;
                if v.backing == COMMON_BACKING {
                    f.write_str("the common memory")?;
                } else {
                    write!(f, "backing {}", v.backing)?;
                }
                flag(f, v.writable, "writable")?;
                flag(f, v.more, "more")
            }
            Request::SharedMemory { dev, id } => write!(f, "device {dev}, region {id}"),
            Request::QueueVectors(v) => {
                write!(f, "device {}, queue {}", v.dev, v.queue)?;
                match v.kick {
                    Some(vector) => write!(f, ", kick vector {vector}")?,
                    None => f.write_str(", kicks by message")?,
                }
                match v.call {
                    Some(vector) => write!(f, ", call vector {vector}"),
                    None => f.write_str(", calls by message"),
                }
            }
        }
    }
}

/// How it ended, and the name or the region: `held by another driver: "vmsg proxy net0"`.
impl fmt::Display for Response<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(memory) = &self.memory {
            return write!(
                f,
                "{:#x} bytes at file offset {:#x}",
                memory.len, memory.file_offset
            );
        }
        match (self.status, self.name) {
            (status, "") => status.fmt(f),
            (Status::OK, name) => write!(f, "{name:?}"),
            (status, name) => write!(f, "{status}: {name:?}"),
        }
    }
}
