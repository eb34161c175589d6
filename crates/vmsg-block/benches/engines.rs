// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a disk in a file costs above the file itself, without queues, drivers and other threads.
//!
//! `cargo bench -p vmsg-block --bench engines` prints a Markdown table: for each engine, on a file in memory, on one in the page cache,
//! and on the same past it, the processor time of a request (all threads of the process, the kernel's for it too) and the time that
//! passes, and both against preadv(2) or pwritev(2) of the same file one after another, and against a bare io_uring with as many under
//! way. Every repetition measures floor, subject, floor; it counts if the floor moved by less than 30 %. Only ratios within one run mean
//! anything, and on a machine that has other work only those of processor time.
//!
//! With `-- --test` everything runs once, for no figures; `-- --only=TEXT` is for files whose names begin so.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "a program")]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use vmsg_block::{Completion, Disk, Engine, FileConfig, FileDisk, Request, Submitted};
use vmsg_mem::uring::{Operation, Ring};
use vmsg_mem::{Access, BusAddr, Held, Mapping, Pieces, RamSlice, TableEntry, WindowTable};

/// Bytes of the disk: larger than the CPU's caches.
const DISK: u64 = 256 << 20;
const LONGEST: usize = 128 << 10;
const MOST: usize = 32;
/// How long one row may take on a restless machine.
const ROW: Duration = Duration::from_secs(10);

struct Plan {
    /// About how long one measurement takes.
    time: Duration,
    /// Repetitions that must count.
    enough: usize,
}

#[derive(Clone, Copy)]
struct Load {
    write: bool,
    bytes: usize,
    depth: usize,
}

/// Something that reads and writes blocks. Each buffer is used by one request at a time.
trait Blocks {
    fn submit(&mut self, buffer: usize, offset: u64, load: Load, done: &mut Vec<usize>);
    fn commit(&mut self) {}
    /// Waits until something is done, and tells what.
    fn wait(&mut self, done: &mut Vec<usize>);
}

/// The file itself, one request after another.
struct Plain {
    file: File,
    buffer: Held,
}

impl Blocks for Plain {
    fn submit(&mut self, buffer: usize, offset: u64, load: Load, done: &mut Vec<usize>) {
        let part = self.buffer.pieces().skip(buffer * LONGEST).take(load.bytes);
        let count = match load.write {
            true => part.write_to_at(&self.file, offset),
            false => part.read_from_at(&self.file, offset),
        };
        assert_eq!(count.expect("done"), load.bytes, "all of it");
        done.push(buffer);
    }

    fn wait(&mut self, _: &mut Vec<usize>) {}
}

/// The file itself, by io_uring.
struct Bare {
    file: Arc<OwnedFd>,
    ring: Ring,
    /// The memory of each buffer while nothing is under way in it.
    buffers: Vec<Option<Held>>,
    bytes: usize,
}

impl Blocks for Bare {
    fn submit(&mut self, buffer: usize, offset: u64, load: Load, _: &mut Vec<usize>) {
        if self.bytes != load.bytes {
            self.bytes = load.bytes;
            for buffer in &mut self.buffers {
                *buffer = Some(Held::buffer(load.bytes, 4096));
            }
        }
        let memory = self.buffers[buffer].take().expect("not under way");
        let operation = match load.write {
            true => Operation::Write {
                offset,
                from: memory,
                sync: false,
            },
            false => Operation::Read { offset, to: memory },
        };
        let pushed = self.ring.push(buffer as u64, &self.file, operation);
        assert!(pushed.is_ok(), "there is room");
    }

    fn commit(&mut self) {
        self.ring.submit().expect("submitted");
    }

    fn wait(&mut self, done: &mut Vec<usize>) {
        loop {
            while let Some(finished) = self.ring.pop() {
                assert_eq!(finished.result.expect("done"), self.bytes, "all of it");
                let buffer = usize::try_from(finished.tag).expect("a buffer");
                self.buffers[buffer] = finished.memory;
                done.push(buffer);
            }
            if !done.is_empty() {
                return;
            }
            sleep(self.ring.event_fd());
        }
    }
}

/// Our disk, as a worker uses it.
struct Ours {
    disk: FileDisk,
    mapping: Arc<Mapping>,
    table: Arc<WindowTable>,
    completions: Vec<Completion>,
}

impl Ours {
    fn new(path: &Path, engine: Engine, direct: bool) -> Self {
        let config = FileConfig {
            engine,
            direct,
            ..FileConfig::new(path)
        };
        let disk = FileDisk::open(&config).expect("a disk");
        let len = MOST * LONGEST;
        let (mapping, _fd) = Mapping::memfd("guest", len as u64, true).expect("memory");
        mapping.ram().fill(1);
        let mapping = Arc::new(mapping);
        let entry = TableEntry {
            base: BusAddr(0),
            mapping: Arc::clone(&mapping),
            offset: 0,
            len,
            access: Access::ReadWrite,
        };
        let table = Arc::new(WindowTable::new(vec![entry]).expect("a window"));
        Self {
            disk,
            mapping,
            table,
            completions: Vec::new(),
        }
    }
}

impl Blocks for Ours {
    fn submit(&mut self, buffer: usize, offset: u64, load: Load, done: &mut Vec<usize>) {
        let ram = self.mapping.ram();
        let part: RamSlice<'_> = ram.get(buffer * LONGEST, load.bytes).expect("inside");
        let pieces = [part];
        let memory = Pieces::new(&pieces);
        let request = match load.write {
            true => Request::Write {
                offset,
                from: memory,
            },
            false => Request::Read { offset, to: memory },
        };
        let tag = u32::try_from(buffer).expect("few");
        match self.disk.submit(tag, request, &self.table) {
            Submitted::Done(result) => {
                result.expect("done");
                done.push(buffer);
            }
            Submitted::Pending => {}
            Submitted::Full => panic!("there is room"),
        }
    }

    fn commit(&mut self) {
        self.disk.commit();
    }

    fn wait(&mut self, done: &mut Vec<usize>) {
        if !done.is_empty() {
            return;
        }
        loop {
            self.disk.completed(&mut self.completions);
            for completion in self.completions.drain(..) {
                completion.result.expect("done");
                done.push(completion.tag as usize);
            }
            if !done.is_empty() {
                return;
            }
            sleep(self.disk.event_fd().expect("something to wait for"));
        }
    }
}

fn sleep(fd: BorrowedFd<'_>) {
    let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], None);
}

/// Nanoseconds for one request.
#[derive(Clone, Copy)]
struct Time {
    cpu: f64,
    wall: f64,
}

fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn run(blocks: &mut dyn Blocks, load: Load, count: u64) -> Time {
    let places = DISK / load.bytes as u64;
    let mut free: Vec<usize> = (0..load.depth).collect();
    let mut done = Vec::new();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut begun, mut ended) = (0, 0);
    let (start, before) = (Instant::now(), cpu());
    while ended < count {
        while begun < count {
            let Some(buffer) = free.pop() else { break };
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let offset = random % places * load.bytes as u64;
            blocks.submit(buffer, offset, load, &mut done);
            begun += 1;
        }
        blocks.commit();
        blocks.wait(&mut done);
        ended += done.len() as u64;
        free.append(&mut done);
    }
    Time {
        cpu: (cpu() - before) / count as f64,
        wall: start.elapsed().as_secs_f64() * 1e9 / count as f64,
    }
}

fn measure(blocks: &mut dyn Blocks, load: Load, plan: &Plan) -> Time {
    let trial = run(blocks, load, 2 * load.depth as u64);
    let one = Duration::from_secs_f64(trial.wall / 1e9).as_nanos().max(1);
    let count = u64::try_from(plan.time.as_nanos() / one).unwrap_or(u64::MAX);
    run(blocks, load, count.clamp(8, 1 << 20))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(plan: &Plan, name: &str, load: Load, ours: &mut Ours, plain: &mut Plain, bare: &mut Bare) {
    let mut samples: Vec<[Time; 3]> = Vec::new();
    let (mut tried, start) = (0, Instant::now());
    while samples.len() < plan.enough && (start.elapsed() < ROW || samples.is_empty()) {
        tried += 1;
        let before = measure(plain, load, plan);
        let ours = measure(ours, load, plan);
        let uring = measure(bare, load, plan);
        let after = measure(plain, load, plan);
        let moved = before.cpu.max(after.cpu) > before.cpu.min(after.cpu) * 1.3;
        if plan.enough == 1 || !moved || (samples.is_empty() && start.elapsed() > ROW) {
            let plain = Time {
                cpu: f64::midpoint(before.cpu, after.cpu),
                wall: f64::midpoint(before.wall, after.wall),
            };
            samples.push([ours, plain, uring]);
        }
    }
    let of = |value: &dyn Fn(&[Time; 3]) -> f64| median(samples.iter().map(value));
    println!(
        "| {name} | {} {} KiB | {} | {:.2} µs | {:.2} µs | {:.2} | {:.2} | {:.2} | {:.2} | {} of {tried} |",
        if load.write { "write" } else { "read" },
        load.bytes >> 10,
        load.depth,
        of(&|[ours, ..]| ours.cpu / 1e3),
        of(&|[ours, ..]| ours.wall / 1e3),
        of(&|[ours, plain, _]| ours.cpu / plain.cpu),
        of(&|[ours, plain, _]| ours.wall / plain.wall),
        of(&|[ours, _, uring]| ours.cpu / uring.cpu),
        of(&|[ours, _, uring]| ours.wall / uring.wall),
        samples.len(),
    );
}

fn open(file: &Path, direct: bool) -> File {
    let mut options = File::options();
    if direct {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    options.read(true).write(true).open(file).expect("the file")
}

/// Makes a file without holes.
fn fill(file: &Path) {
    let block = vec![0x11; 1 << 20];
    let mut out = File::create(file).expect("a file");
    for _ in 0..DISK >> 20 {
        out.write_all(&block).expect("room for the disk");
    }
    out.sync_all().expect("written");
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let quick = arguments.iter().any(|argument| argument == "--test");
    let only = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--only="));
    let plan = Plan {
        time: Duration::from_millis(if quick { 1 } else { 20 }),
        enough: if quick { 1 } else { 15 },
    };
    println!(
        "| file, engine | request | under way | processor time | time | ÷ plain, processor | ÷ plain, time | ÷ bare io_uring, processor | ÷ bare io_uring, time | of |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let temporary = std::env::temp_dir();
    let memory = PathBuf::from("/dev/shm");
    for (name, place, direct, engines) in [
        (
            "tmpfs",
            &memory,
            false,
            &[Engine::Auto, Engine::Uring] as &[_],
        ),
        (
            "file, cached",
            &temporary,
            false,
            &[Engine::Auto, Engine::Inline, Engine::Uring, Engine::Threads],
        ),
        (
            "file, direct",
            &temporary,
            true,
            &[Engine::Auto, Engine::Threads],
        ),
    ] {
        if only.is_some_and(|only| !name.starts_with(only)) {
            continue;
        }
        let dir = tempfile::tempdir_in(place).expect("a folder");
        let file = dir.path().join("disk.img");
        fill(&file);
        let mut plain = Plain {
            file: open(&file, direct),
            buffer: Held::buffer(MOST * LONGEST, 4096),
        };
        let mut bare = Bare {
            file: Arc::new(open(&file, direct).into()),
            ring: Ring::new(u32::try_from(MOST).expect("few")).expect("io_uring"),
            buffers: (0..MOST).map(|_| None).collect(),
            bytes: 0,
        };
        for &engine in engines {
            let mut ours = Ours::new(&file, engine, direct);
            let name = format!("{name}, {engine:?}").to_lowercase();
            for bytes in [4096, LONGEST] {
                for write in [false, true] {
                    for depth in [1, MOST] {
                        let load = Load {
                            write,
                            bytes,
                            depth,
                        };
                        row(&plan, &name, load, &mut ours, &mut plain, &mut bare);
                    }
                }
            }
        }
    }
}
