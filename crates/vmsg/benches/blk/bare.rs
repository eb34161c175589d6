// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file itself, without any device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;
use vmsg_mem::Held;
use vmsg_mem::uring::{Operation, Ring, RingError};

use crate::{Driven, Job, LONGEST, MOST};

/// The file, one way or the other.
pub(crate) enum Bare {
    /// pread and pwrite: what is submitted is done at once.
    OneByOne {
        file: File,
        /// Aligned as direct I/O needs it.
        buffer: Held,
        done: Vec<usize>,
    },
    /// io_uring.
    Uring {
        file: Arc<OwnedFd>,
        ring: Box<Ring>,
        /// The memory of each buffer while nothing is under way in it.
        buffers: Vec<Option<Held>>,
        /// Its length.
        bytes: usize,
    },
}

impl Bare {
    pub(crate) fn one_by_one(file: &Path, direct: bool) -> Self {
        Self::OneByOne {
            file: open(file, direct),
            buffer: Held::buffer(LONGEST, 4096),
            done: Vec::new(),
        }
    }

    pub(crate) fn uring(file: &Path, direct: bool) -> Result<Self, RingError> {
        Ok(Self::Uring {
            file: Arc::new(open(file, direct).into()),
            ring: Box::new(Ring::new(u32::try_from(MOST).expect("few"))?),
            buffers: (0..MOST).map(|_| None).collect(),
            bytes: 0,
        })
    }
}

fn open(file: &Path, direct: bool) -> File {
    let mut options = File::options();
    if direct {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    options.read(true).write(true).open(file).expect("the file")
}

impl Driven for Bare {
    fn submit(&mut self, job: Job) {
        match self {
            Self::OneByOne { file, buffer, done } => {
                let part = buffer.pieces().take(job.load.bytes);
                let count = match job.load.write {
                    true => part.write_to_at(&*file, job.offset),
                    false => part.read_from_at(&*file, job.offset),
                };
                assert_eq!(count.expect("done"), job.load.bytes, "all of it");
                done.push(job.buffer);
            }
            Self::Uring {
                file,
                ring,
                buffers,
                bytes,
            } => {
                if *bytes != job.load.bytes {
                    *bytes = job.load.bytes;
                    for buffer in buffers.iter_mut() {
                        *buffer = Some(Held::buffer(*bytes, 4096));
                    }
                }
                let memory = buffers[job.buffer].take().expect("not under way");
                let offset = job.offset;
                let operation = match job.load.write {
                    true => Operation::Write {
                        offset,
                        from: memory,
                        sync: false,
                    },
                    false => Operation::Read { offset, to: memory },
                };
                let pushed = ring.push(job.buffer as u64, file, operation);
                assert!(pushed.is_ok(), "there is room");
            }
        }
    }

    fn commit(&mut self) {
        if let Self::Uring { ring, .. } = self {
            ring.submit().expect("submitted");
        }
    }

    fn poll(&mut self, done: &mut Vec<usize>) {
        match self {
            Self::OneByOne { done: own, .. } => done.append(own),
            Self::Uring {
                ring,
                buffers,
                bytes,
                ..
            } => {
                while let Some(finished) = ring.pop() {
                    assert_eq!(finished.result.expect("done"), *bytes, "all of it");
                    let buffer = usize::try_from(finished.tag).expect("a buffer");
                    buffers[buffer] = finished.memory;
                    done.push(buffer);
                }
            }
        }
    }
}
