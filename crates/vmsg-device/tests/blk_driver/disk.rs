// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk in memory that takes its time, and looks whether it is used as it may be.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vmsg_block::{Completion, Disk, Facts, Failure, Request, Submitted};
use vmsg_mem::{Held, WindowTable};

const SECTORS: u64 = 64;

enum Work {
    Read(usize, Held),
    Write(usize, Held),
    Fill(usize, usize),
    Nothing,
}

struct State {
    bytes: Vec<u8>,
    facts: Facts,
    /// As it was when somebody last asked.
    told: u64,
    hold: bool,
    room: usize,
    /// Gives up what is under way when it is told to.
    obedient: bool,
    pending: Vec<(u32, Work)>,
    done: Vec<Completion>,
    tags: HashSet<u32>,
    changed: bool,
}

#[derive(Clone)]
pub(super) struct Made(Arc<Mutex<State>>);

impl std::fmt::Debug for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Made")
    }
}

impl Made {
    pub(super) fn new(flags: u8) -> Self {
        let block_size = if flags & 4 == 0 { 512 } else { 4096 };
        let facts = Facts {
            size: SECTORS * 512,
            block_size,
            physical_block_size: 4096,
            alignment_offset: 0,
            optimal_io_size: 0,
            read_only: flags & 0x38 == 0x38,
            discard: flags & 0x40 == 0,
            discard_granularity: 0,
            write_zeroes: flags & 0x80 == 0,
        };
        Self(Arc::new(Mutex::new(State {
            bytes: vec![0; usize::try_from(facts.size).expect("small")],
            told: facts.size,
            facts,
            hold: flags & 2 != 0,
            room: 8,
            obedient: flags & 1 != 0,
            pending: Vec::new(),
            done: Vec::new(),
            tags: HashSet::new(),
            changed: false,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    pub(super) fn set_hold(&self, hold: bool) {
        self.state().hold = hold;
    }

    pub(super) fn set_room(&self, room: usize) {
        self.state().room = room;
    }

    pub(super) fn resize(&self, size: u64) {
        let mut state = self.state();
        let size = size - size % u64::from(state.facts.block_size);
        state.facts.size = size;
        state.bytes.resize(usize::try_from(size).expect("small"), 0);
        state.changed = true;
    }

    pub(super) fn finish(&self, which: usize, fails: bool) {
        let mut state = self.state();
        if which < state.pending.len() {
            let (tag, work) = state.pending.remove(which);
            state.end(tag, work, fails);
        }
    }

    pub(super) fn finish_all(&self) {
        let mut state = self.state();
        for (tag, work) in std::mem::take(&mut state.pending) {
            state.end(tag, work, false);
        }
    }

    /// No request has memory but that of `table`.
    pub(super) fn check_touches_only(&self, table: Option<&Arc<WindowTable>>) {
        for (_, work) in &self.state().pending {
            if let Work::Read(_, held) | Work::Write(_, held) = work {
                let table = table.expect("memory is used that was taken back");
                Held::new(held.pieces(), table).expect("memory is used that was taken back");
            }
        }
    }
}

impl State {
    fn end(&mut self, tag: u32, work: Work, fails: bool) {
        let result = if fails {
            Err(Failure::Io(io::Error::from(io::ErrorKind::Other)))
        } else {
            self.work(work)
        };
        self.done.push(Completion { tag, result });
    }

    /// The disk may have become smaller meanwhile.
    fn work(&mut self, work: Work) -> Result<(), Failure> {
        let gone = || Failure::Io(io::Error::from(io::ErrorKind::UnexpectedEof));
        match work {
            Work::Read(at, to) => {
                let from = self.bytes.get(at..at + to.len()).ok_or_else(gone)?;
                to.pieces().write(from);
            }
            Work::Write(at, from) => {
                let to = self.bytes.get_mut(at..at + from.len());
                from.pieces().read(to.ok_or_else(gone)?);
            }
            Work::Fill(at, len) => {
                self.bytes.get_mut(at..at + len).ok_or_else(gone)?.fill(0);
            }
            Work::Nothing => {}
        }
        Ok(())
    }
}

impl Disk for Made {
    fn facts(&self) -> Facts {
        let mut state = self.state();
        state.told = state.facts.size;
        state.facts
    }

    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted {
        let mut state = self.state();
        let (offset, len, writes) = match request {
            Request::Read { offset, to } => (offset, to.len() as u64, false),
            Request::Write { offset, from } => (offset, from.len() as u64, true),
            Request::Flush => (0, 0, false),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (offset, len, true)
            }
        };
        let facts = state.facts;
        let end = offset.checked_add(len).expect("inside the disk");
        // Parts of a request that is under way are not looked at again when their turn comes.
        let is_part = matches!(
            request,
            Request::Discard { .. } | Request::WriteZeroes { .. }
        );
        assert!(end <= state.told || is_part, "outside the disk");
        if end > facts.size {
            return Submitted::Done(Err(Failure::Unsupported));
        }
        let block = u64::from(facts.block_size);
        assert_eq!((offset % block, len % block), (0, 0), "aligned");
        assert!(!writes || !facts.read_only, "nothing is written");
        if state.pending.len() + state.done.len() >= state.room {
            return Submitted::Full;
        }
        let at = usize::try_from(offset).expect("small");
        let count = usize::try_from(len).expect("small");
        let held = |pieces| Held::new(pieces, memory).expect("memory of the driver's");
        let work = match request {
            Request::Read { to, .. } => Work::Read(at, held(to)),
            Request::Write { from, .. } => Work::Write(at, held(from)),
            Request::Flush | Request::Discard { .. } => Work::Nothing,
            Request::WriteZeroes { .. } => Work::Fill(at, count),
        };
        if !state.hold {
            return Submitted::Done(state.work(work));
        }
        assert!(state.tags.insert(tag), "a tag that is in use");
        state.pending.push((tag, work));
        Submitted::Pending
    }

    fn completed(&mut self, done: &mut Vec<Completion>) {
        let mut state = self.state();
        let all = std::mem::take(&mut state.done);
        for completion in &all {
            assert!(state.tags.remove(&completion.tag), "told once");
        }
        done.extend(all);
    }

    fn poll(&mut self, _now: Instant) -> bool {
        std::mem::take(&mut self.state().changed)
    }

    fn cancel(&mut self) {
        let mut state = self.state();
        if state.obedient {
            for (tag, _) in std::mem::take(&mut state.pending) {
                let result = Err(Failure::Canceled);
                state.done.push(Completion { tag, result });
            }
        }
    }

    fn in_flight(&self) -> usize {
        let state = self.state();
        state.pending.len() + state.done.len()
    }

    fn touching_memory(&self) -> usize {
        let state = self.state();
        let memory = |(_, work): &&(u32, Work)| matches!(work, Work::Read(..) | Work::Write(..));
        state.pending.iter().filter(memory).count()
    }

    fn set_write_back(&mut self, _on: bool) {}
}
