// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk that does what a test tells it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vmsg_block::{Completion, Disk, Facts, Failure, Request, Submitted};
use vmsg_mem::{Access, BusAddr, Held, WindowTable};

/// What a request was, without its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Op {
    Read(u64, usize),
    Write(u64, usize),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

enum Work {
    Read(usize, Held),
    Write(usize, Held),
    Flush,
    Fill(usize, usize, u8),
}

pub(super) struct State {
    pub(super) bytes: Vec<u8>,
    pub(super) facts: Facts,
    /// Requests wait until [`Scripted::finish`].
    pub(super) hold: bool,
    /// Requests that there is room for.
    pub(super) room: usize,
    pub(super) pending: Vec<(u32, Op)>,
    work: Vec<(u32, Work)>,
    done: Vec<Completion>,
    /// All requests that were taken.
    pub(super) seen: Vec<Op>,
    /// This and all later requests fail like this.
    pub(super) fail: Option<fn() -> Failure>,
    pub(super) write_back: bool,
    pub(super) commits: usize,
    pub(super) uncommitted: usize,
    pub(super) cancels: usize,
    /// What is under way ends at [`Disk::cancel`].
    pub(super) obedient: bool,
    /// A half word in the driver's memory.
    pub(super) watched: Option<BusAddr>,
    /// What stood there when each request was submitted.
    pub(super) stood: Vec<u16>,
    changed: bool,
}

#[derive(Clone)]
pub(super) struct Scripted(Arc<Mutex<State>>);

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

pub(super) const fn facts(size: u64) -> Facts {
    Facts {
        size,
        block_size: 512,
        physical_block_size: 4096,
        alignment_offset: 0,
        optimal_io_size: 65536,
        read_only: false,
        discard: true,
        discard_granularity: 4096,
        write_zeroes: true,
    }
}

impl Scripted {
    pub(super) fn new(facts: Facts) -> Self {
        let size = usize::try_from(facts.size).expect("small");
        Self(Arc::new(Mutex::new(State {
            bytes: vec![0; size],
            facts,
            hold: false,
            room: usize::MAX,
            pending: Vec::new(),
            work: Vec::new(),
            done: Vec::new(),
            seen: Vec::new(),
            fail: None,
            write_back: true,
            commits: 0,
            uncommitted: 0,
            cancels: 0,
            obedient: true,
            watched: None,
            stood: Vec::new(),
            changed: false,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics here")
    }

    /// Ends the waiting request at `index`, counted from the oldest.
    pub(super) fn finish(&self, index: usize) {
        self.state().finish(index, None);
    }

    pub(super) fn finish_all(&self) {
        let mut state = self.state();
        while !state.pending.is_empty() {
            state.finish(0, None);
        }
    }

    pub(super) fn resize(&self, size: u64) {
        let mut state = self.state();
        state.facts.size = size;
        state.bytes.resize(usize::try_from(size).expect("small"), 0);
        state.changed = true;
    }
}

impl State {
    fn finish(&mut self, index: usize, failure: Option<Failure>) {
        let (tag, _) = self.pending.remove(index);
        let (_, work) = self.work.remove(index);
        let result = match (failure, self.fail) {
            (Some(failure), _) => Err(failure),
            (None, Some(fail)) => Err(fail()),
            (None, None) => self.work(&work),
        };
        self.done.push(Completion { tag, result });
    }

    fn work(&mut self, work: &Work) -> Result<(), Failure> {
        let beyond = || Failure::Io(io::Error::from(io::ErrorKind::UnexpectedEof));
        match work {
            Work::Read(at, to) => {
                let from = self.bytes.get(*at..at + to.len()).ok_or_else(beyond)?;
                to.pieces().write(from);
            }
            Work::Write(at, from) => {
                let to = self.bytes.get_mut(*at..at + from.len());
                from.pieces().read(to.ok_or_else(beyond)?);
            }
            Work::Flush => {}
            Work::Fill(at, len, byte) => {
                let to = self.bytes.get_mut(*at..at + len).ok_or_else(beyond)?;
                to.fill(*byte);
            }
        }
        Ok(())
    }
}

impl Disk for Scripted {
    fn facts(&self) -> Facts {
        self.state().facts
    }

    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted {
        let mut state = self.state();
        if state.pending.len() >= state.room {
            return Submitted::Full;
        }
        let at = |offset: u64| usize::try_from(offset).expect("the device has looked");
        let held = |pieces| Held::new(pieces, memory).expect("the driver's memory");
        let size = state.facts.size;
        let inside = |offset: u64, len: u64| {
            assert!(offset + len <= size, "{offset} + {len} behind the end");
            let aligned = offset.is_multiple_of(512) && len.is_multiple_of(512);
            assert!(aligned, "{offset} + {len}");
        };
        let (op, work) = match request {
            Request::Read { offset, to } => {
                inside(offset, to.len() as u64);
                (Op::Read(offset, to.len()), Work::Read(at(offset), held(to)))
            }
            Request::Write { offset, from } => {
                inside(offset, from.len() as u64);
                let op = Op::Write(offset, from.len());
                (op, Work::Write(at(offset), held(from)))
            }
            Request::Flush => (Op::Flush, Work::Flush),
            Request::Discard { offset, len } => {
                inside(offset, len);
                let op = Op::Discard(offset, len);
                (op, Work::Fill(at(offset), at(len), 0xdd))
            }
            Request::WriteZeroes { offset, len, unmap } => {
                inside(offset, len);
                let op = Op::WriteZeroes(offset, len, unmap);
                (op, Work::Fill(at(offset), at(len), 0))
            }
        };
        assert!(
            !state.pending.iter().any(|(other, _)| *other == tag),
            "a tag twice"
        );
        state.seen.push(op);
        if let Some(addr) = state.watched {
            let word = memory.space().get(addr, 2, Access::Read).expect("there");
            state
                .stood
                .push(u16::from_le_bytes(word.read_array(0).expect("two bytes")));
        }
        if state.hold {
            state.pending.push((tag, op));
            state.work.push((tag, work));
            state.uncommitted += 1;
            return Submitted::Pending;
        }
        Submitted::Done(match state.fail {
            Some(fail) => Err(fail()),
            None => state.work(&work),
        })
    }

    fn commit(&mut self) {
        let mut state = self.state();
        if std::mem::take(&mut state.uncommitted) > 0 {
            state.commits += 1;
        }
    }

    fn completed(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.state().done);
    }

    fn poll(&mut self, _: Instant) -> bool {
        std::mem::take(&mut self.state().changed)
    }

    fn cancel(&mut self) {
        let mut state = self.state();
        state.cancels += 1;
        while state.obedient && !state.pending.is_empty() {
            state.finish(0, Some(Failure::Canceled));
        }
    }

    fn in_flight(&self) -> usize {
        let state = self.state();
        state.pending.len() + state.done.len()
    }

    fn set_write_back(&mut self, on: bool) {
        self.state().write_back = on;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("scripted", 7)]
    }
}
