// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our disk, `qemu-storage-daemon`'s, and the bare file, driven from the host by the same code.
//!
//! * **ours**: `vmsg serve`, or a host with a null disk, in a process of its own; a driver on its bus `unix`.
//! * **qemu-storage-daemon**: its vhost-user-blk export of the same file, in an iothread that polls; the same rings and requests
//!   ([`Requests`](vmsg_driver::blk::Requests)), set up by a vhost-user front end. With `aio=io_uring`, and with `aio=threads`, its default.
//! * **bare**: the file itself, by pread(2) and pwrite(2), one after another, and by io_uring with as many under way.
//!
//! Also past the page cache (`cache=none`), a qcow2 image, and an export of nbdkit: there the daemon reads and writes the same image, or is
//! a client of the same server, and nothing is bare.
//!
//! Prints a Markdown table. The driver has one CPU and polls, the other process has the other. Only ratios within one run mean anything: each
//! repetition measures the daemon, ours, all others, and the daemon again, and counts only if the daemon's two figures are within 30 %.
//!
//! `cargo bench -p vmsg --bench blk`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

mod bare;
mod host;
mod stage;
mod vhost_user;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{Request, SECTOR};
use vmsg_mem::BusAddr;

use self::bare::Bare;
use self::host::Ours;
use self::stage::{Medium, Stage};
use self::vhost_user::Theirs;

/// Bytes of the disk: in the page cache after it was written once, and larger than the CPU's caches.
const DISK: u64 = 256 << 20;
/// Most requests under way.
const MOST: usize = 32;
/// Bytes of the longest request.
const LONGEST: usize = 128 << 10;
/// Memory for the driver's rings and buffers.
const POOL: usize = MOST * LONGEST + (4 << 20);
const BASE: BusAddr = BusAddr(0x1_0000_0000);
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one row may take on a restless machine.
const ROW: Duration = Duration::from_secs(30);

/// How much is measured.
struct Plan {
    /// About how long one measurement takes.
    time: Duration,
    /// Repetitions that must count.
    enough: usize,
}

/// One load.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    bytes: usize,
    depth: usize,
}

/// A request: which buffer, where on the disk (bytes), and how long.
#[derive(Clone, Copy)]
struct Job {
    buffer: usize,
    offset: u64,
    load: Load,
}

/// Something with blocks, driven from here.
trait Driven {
    /// Adds a request; there is room.
    fn submit(&mut self, job: Job);
    /// Has everything begun that was added.
    fn commit(&mut self);
    /// Puts the buffers of the requests that are done into `done`.
    fn poll(&mut self, done: &mut Vec<usize>);
    /// Requests that it has under way at most.
    fn depth(&self) -> usize {
        MOST
    }
}

/// Buffers for requests in a pool that a device sees.
struct Buffers(Vec<(BusAddr, u32)>);

impl Buffers {
    fn new(pool: &'static DmaPool) -> Self {
        let one = || {
            // Never given back: the device may use it as long as it lives.
            let buffer: &'static _ = Box::leak(Box::new(pool.alloc(LONGEST).expect("memory")));
            buffer.ram().fill(0x5a);
            (buffer.addr(), u32::try_from(LONGEST).expect("short"))
        };
        Self((0..MOST).map(|_| one()).collect())
    }

    /// The request that `job` is, through its buffer in `room`.
    fn request<'r>(&self, job: Job, room: &'r mut [(BusAddr, u32); 1]) -> Request<'r> {
        room[0] = (
            self.0[job.buffer].0,
            u32::try_from(job.load.bytes).expect("short"),
        );
        let sector = job.offset / SECTOR;
        match job.load.write {
            true => Request::Write { sector, from: room },
            false => Request::Read { sector, to: room },
        }
    }
}

fn pool() -> &'static DmaPool {
    let pool = DmaPool::new("benchmark", BASE, POOL).expect("memory");
    Box::leak(Box::new(pool))
}

/// Nanoseconds for each of `count` requests, always as many under way as the load says.
fn run(driven: &mut dyn Driven, load: Load, count: u64) -> f64 {
    let depth = load.depth.min(driven.depth());
    let places = DISK / load.bytes as u64;
    let mut free: Vec<usize> = (0..depth).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut begun, mut ended) = (0, 0);
    let start = Instant::now();
    while ended < count {
        let before = begun;
        while begun < count {
            let Some(buffer) = free.pop() else { break };
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let offset = random % places * load.bytes as u64;
            driven.submit(Job {
                buffer,
                offset,
                load,
            });
            begun += 1;
        }
        if begun > before {
            driven.commit();
        }
        let waiting = free.len();
        driven.poll(&mut free);
        ended += (free.len() - waiting) as u64;
        if free.len() == waiting {
            std::hint::spin_loop();
        }
    }
    start.elapsed().as_secs_f64() * 1e9 / count as f64
}

/// As [`run`], for about as long as the plan says.
fn measure(driven: &mut dyn Driven, load: Load, plan: &Plan) -> f64 {
    let trial = run(driven, load, 4 * load.depth as u64);
    let one = Duration::from_secs_f64(trial / 1e9).as_nanos().max(1);
    let count = u64::try_from(plan.time.as_nanos() / one).unwrap_or(u64::MAX);
    run(driven, load, count.clamp(8, 1 << 22))
}

/// A process that is ended with the value.
struct Ended(Child);

impl Ended {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().expect("the program starts"))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < PATIENCE, "no {}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// From now on this thread, and processes it starts, run on this CPU only.
fn run_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("a CPU that this process may use");
}

/// This process's side, and the other one's.
fn cpus() -> (usize, usize) {
    let allowed = sched_getaffinity(None).expect("of this process");
    let mut own = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let first = own.next().expect("a CPU");
    (first, own.next().unwrap_or(first))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn moved(one: f64, two: f64) -> bool {
    one.max(two) > one.min(two) * 1.3
}

/// What one repetition has measured, in nanoseconds for a request; NaN for what is not there.
#[derive(Clone, Copy)]
struct Sample {
    ours: f64,
    daemon: f64,
    threads: f64,
    one_by_one: f64,
    uring: f64,
    other: f64,
}

/// Whatever ours is measured beside.
struct Beside {
    /// The daemon with io_uring, or without a file.
    daemon: Option<Theirs>,
    /// With threads.
    threads: Option<Theirs>,
    one_by_one: Option<Bare>,
    uring: Option<Bare>,
}

impl Beside {
    fn new(stage: &Stage) -> Self {
        let daemon = |aio| stage.theirs(aio);
        let bare = stage.bare();
        Self {
            daemon: daemon("io_uring"),
            threads: stage.has_threads().then(|| daemon("threads")).flatten(),
            one_by_one: bare.map(|(file, direct)| Bare::one_by_one(file, direct)),
            uring: bare.map(|(file, direct)| {
                Bare::uring(file, direct).expect("io_uring for the bare file")
            }),
        }
    }
}

/// Measures and prints one row.
fn row(
    plan: &Plan,
    name: &str,
    load: Load,
    (ours, other): (&mut Ours, &mut Option<Ours>),
    beside: &mut Beside,
) {
    fn maybe(driven: &mut Option<impl Driven>, load: Load, plan: &Plan) -> f64 {
        match driven {
            Some(driven) => measure(driven, load, plan),
            None => f64::NAN,
        }
    }
    let mut samples: Vec<Sample> = Vec::new();
    let (mut tried, start) = (0, Instant::now());
    while samples.len() < plan.enough && start.elapsed() < ROW {
        tried += 1;
        let before = maybe(&mut beside.daemon, load, plan);
        let sample = Sample {
            ours: measure(ours, load, plan),
            threads: maybe(&mut beside.threads, load, plan),
            one_by_one: maybe(&mut beside.one_by_one, load, plan),
            uring: maybe(&mut beside.uring, load, plan),
            other: maybe(other, load, plan),
            daemon: before,
        };
        let after = maybe(&mut beside.daemon, load, plan);
        if plan.enough == 1 || !moved(before, after) {
            samples.push(Sample {
                daemon: f64::midpoint(before, after),
                ..sample
            });
        }
    }
    let op = if load.write { "write" } else { "read" };
    let head = format!("| {name} | {op} {} KiB | {} ", load.bytes >> 10, load.depth);
    if samples.is_empty() {
        println!(
            "{head}| – | – | – | – | – | – | – | – | 0 of {tried}: the machine is too restless |"
        );
        return;
    }
    let pick = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
    let figure = |value: &dyn Fn(&Sample) -> f64| match pick(value) {
        value if value.is_nan() => "–".to_owned(),
        value => format!("{:.2} µs ({:.0} k/s)", value / 1e3, 1e6 / value),
    };
    let ratio = |value: &dyn Fn(&Sample) -> f64| match pick(value) {
        value if value.is_nan() => "–".to_owned(),
        value => format!("{value:.2}"),
    };
    let compared = match other {
        Some(_) => format!(" {} |", ratio(&|s| s.other / s.ours)),
        None => String::new(),
    };
    println!(
        "{head}| {} | {} | {} | {} | {} | **{}** | {} | {} | {} of {tried} |{compared}",
        figure(&|s| s.ours),
        figure(&|s| s.daemon),
        figure(&|s| s.threads),
        figure(&|s| s.one_by_one),
        figure(&|s| s.uring),
        ratio(&|s| s.daemon / s.ours),
        ratio(&|s| s.threads / s.ours),
        ratio(&|s| s.one_by_one.min(s.uring) / s.ours),
        samples.len(),
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, socket] = arguments.as_slice()
        && flag == host::NULL_HOST
    {
        host::serve_null(Path::new(socket));
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--test");
    let only = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--only="));
    // For whoever changes something: another build of `vmsg`, in one more column.
    let other = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--beside="));
    let plan = match quick {
        true => Plan {
            time: Duration::from_millis(2),
            enough: 1,
        },
        false => Plan {
            time: Duration::from_millis(40),
            enough: 15,
        },
    };
    let cpus = cpus();
    println!(
        "| disk, our engine | request | under way | ours | daemon (io_uring) | daemon (threads) | bare, one by one | bare, io_uring | ours ÷ daemon (io_uring) | ours ÷ daemon (threads) | ours ÷ the better bare one | of |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for medium in Medium::ALL {
        let name = medium.name();
        if only.is_some_and(|only| !name.starts_with(only)) {
            continue;
        }
        let Some(stage) = Stage::new(medium, cpus) else {
            continue;
        };
        let mut beside = Beside::new(&stage);
        for engine in medium.engines() {
            let mut ours = stage.ours(engine, None);
            let mut other = other.map(|program| stage.ours(engine, Some(program)));
            let name = match engine {
                &"" => name.to_owned(),
                engine => format!("{name}, {engine}"),
            };
            for bytes in [4096, LONGEST] {
                for write in [false, true] {
                    for depth in [1, MOST] {
                        let load = Load {
                            write,
                            bytes,
                            depth,
                        };
                        let both = (&mut ours, &mut other);
                        row(&plan, &name, load, both, &mut beside);
                    }
                }
            }
        }
    }
}
