// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host killed with SIGKILL at random moments under load, while the driver keeps its rings and the record of what is in
//! flight: every request is answered once, and what was told as written is there.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vmsg_driver::blk::{BlkOptions, Completion, Request};
use vmsg_driver::{DmaBuffer, DmaPool, Error, QueueOptions};

use super::stand::{Driver, Host, PATIENCE, Stand, nbd_server, pool, text, tool};

/// Bytes of a block, and how many there are.
const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;
/// The longest request, in blocks.
const MOST: usize = 8;
const QUEUES: u16 = 2;
const UNDER_WAY: usize = 48;
const KILLS: usize = 15;

/// What happens, from a seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("small");
        usize::try_from(self.next() % end).expect("small")
    }
}

/// What is in block `block` after it was written the `version`th time: words that depend on both, so that a part of one write in the place
/// of another is seen. Version 0 is zeroes.
fn contents(block: usize, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let seed = (u64::from(version) << 32 | block as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK / 8)
        .flat_map(|word| {
            let word = (seed ^ word as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (word ^ word >> 31).to_le_bytes()
        })
        .collect()
}

/// What a block that is wrong has in it.
fn describe(bytes: &[u8], block: usize, versions: u32) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeroes".to_owned();
    }
    let old = (1..versions).find(|version| bytes == contents(block, *version));
    old.map_or_else(
        || "what was never there".to_owned(),
        |old| format!("version {old}"),
    )
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// The version that these blocks will have.
    Write(u32),
    Read,
    Zeroes,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    what: What,
    first: usize,
    count: usize,
}

/// What the driver knows of the disk.
struct Book {
    versions: Vec<u32>,
    busy: Vec<bool>,
    next: u32,
}

impl Book {
    fn free(&self, first: usize, count: usize) -> bool {
        self.busy[first..first + count].iter().all(|busy| !busy)
    }

    fn set_busy(&mut self, job: Job, busy: bool) {
        self.busy[job.first..job.first + job.count].fill(busy);
    }
}

/// What the killer and the driver tell each other.
#[derive(Default)]
struct Words {
    /// There is a host.
    go: AtomicBool,
    /// There will be no other one.
    over: AtomicBool,
    /// Rounds of the driver that have had an answer.
    rounds: AtomicUsize,
    /// The driver has ended, one way or the other.
    left: AtomicBool,
}

/// Sets a flag when it goes.
struct Flag<'a>(&'a AtomicBool);

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Kills and starts, until it was killed often enough.
fn killer(stand: &Stand, device: &str, words: &Words) -> Host {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut host = stand.serve(&[device.to_owned()]);
    words.go.store(true, Ordering::SeqCst);
    for kill in 0..KILLS {
        // However slow the machine is, some of them come to work.
        let before = words.rounds.load(Ordering::SeqCst);
        while kill % 3 == 0
            && words.rounds.load(Ordering::SeqCst) == before
            && !words.left.load(Ordering::SeqCst)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Time is what is random here.
        std::thread::sleep(Duration::from_micros(random.next() % 150_000));
        host.kill();
        host = stand.serve(&[device.to_owned()]);
    }
    words.over.store(true, Ordering::SeqCst);
    host
}

struct Load<'p> {
    stand: &'p Stand,
    pool: &'p DmaPool,
    driver: Driver<'p>,
    buffers: Vec<DmaBuffer<'p>>,
    jobs: Vec<Option<Job>>,
    book: Book,
    random: Random,
    /// Requests that were under way when a host ended.
    interrupted: usize,
    resumed: usize,
    answered: usize,
    flushes: usize,
}

impl Load<'_> {
    /// Submits something in a free place.
    fn submit(&mut self, slot: usize) {
        let count = 1 + self.random.below(MOST);
        let first = self.random.below(BLOCKS - count);
        let what = match self.random.below(20) {
            0 => What::Flush,
            1 => What::Zeroes,
            2..=8 => What::Read,
            _ => What::Write(self.book.next),
        };
        let job = Job { what, first, count };
        let is_flush = matches!(what, What::Flush);
        if !is_flush && !self.book.free(first, count) {
            return;
        }
        let buffer = &self.buffers[slot];
        let sector = (first * BLOCK / 512) as u64;
        let bytes = u32::try_from(count * BLOCK).expect("small");
        // In two parts, so that chains have some length.
        let cut = 512 * (1 + u32::try_from(self.random.below(7)).expect("small"));
        let at = buffer.addr();
        let second = vmsg_mem::BusAddr(at.0 + u64::from(cut));
        let parts = [(at, cut), (second, bytes - cut)];
        let request = match what {
            What::Write(version) => {
                for block in 0..count {
                    buffer
                        .ram()
                        .write(block * BLOCK, &contents(first + block, version));
                }
                self.book.next += 1;
                Request::Write {
                    sector,
                    from: &parts,
                }
            }
            What::Read => Request::Read { sector, to: &parts },
            What::Zeroes => Request::WriteZeroes {
                sector,
                sectors: bytes / 512,
                unmap: self.random.below(2) == 0,
            },
            What::Flush => Request::Flush,
        };
        let queue = self.random.below(usize::from(QUEUES));
        let tag = slot as u64;
        if self
            .driver
            .submit(queue, tag, request)
            .expect("a sound request")
        {
            self.jobs[slot] = Some(job);
            if !is_flush {
                self.book.set_busy(job, true);
            }
        }
    }

    fn finish(&mut self, completion: Completion) {
        let slot = usize::try_from(completion.tag).expect("a slot");
        let job = self.jobs[slot].take().expect("answered once");
        assert_eq!(completion.result, Ok(()), "{job:?}");
        self.answered += 1;
        let blocks = job.first..job.first + job.count;
        match job.what {
            What::Flush => {
                self.flushes += 1;
                return;
            }
            What::Write(version) => self.book.versions[blocks].fill(version),
            What::Zeroes => self.book.versions[blocks].fill(0),
            What::Read => {
                let mut bytes = vec![0; job.count * BLOCK];
                self.buffers[slot].ram().read(0, &mut bytes);
                for (block, bytes) in blocks.zip(bytes.chunks(BLOCK)) {
                    let version = self.book.versions[block];
                    let resumed = self.resumed;
                    let what = || describe(bytes, block, self.book.next);
                    assert!(
                        bytes == contents(block, version),
                        "after {resumed} kills {job:?} has for block {block}, version {version}: {}",
                        what()
                    );
                }
            }
        }
        self.book.set_busy(job, false);
    }

    /// Goes on with the next host.
    fn resume(&mut self) {
        self.interrupted += self.driver.in_flight();
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "nobody comes back");
            let Some(mut client) = self.stand.try_connect() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            if self.pool.lend(&mut client, 1).is_ok() {
                match self.driver.resume(client) {
                    Ok(()) => break,
                    Err(Error::Channel(_)) => {}
                    Err(error) => eprintln!("again, after {error}"),
                }
            }
        }
        self.resumed += 1;
    }

    /// One round: fill the queues, wait, take.
    fn round(&mut self, more: bool) {
        for slot in 0..UNDER_WAY {
            if more && self.jobs[slot].is_none() {
                self.submit(slot);
            }
        }
        let mut lost = self.driver.commit().is_err();
        match self.driver.wait(PATIENCE) {
            Ok(there) => assert!(there, "nothing comes back"),
            Err(_) => lost = true,
        }
        let mut done = Vec::new();
        self.driver
            .poll(|completion| done.push(completion))
            .expect("the device keeps to the rules");
        for completion in done {
            self.finish(completion);
        }
        if lost {
            self.resume();
        }
    }

    fn check_by_reading(&mut self) {
        let mut bytes = vec![0; BLOCK];
        for block in 0..BLOCKS {
            let sector = (block * BLOCK / 512) as u64;
            self.driver
                .read(sector, &mut bytes, PATIENCE)
                .expect("read");
            let version = self.book.versions[block];
            assert!(
                bytes == contents(block, version),
                "block {block}, version {version}, has {}",
                describe(&bytes, block, self.book.next)
            );
        }
    }
}

/// Under load while it is killed again and again; gives what must be on the disk.
fn survive(stand: &Stand, device: &str) -> Vec<u32> {
    let pool = pool();
    let words = Words::default();
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| killer(stand, device, &words));
        let _left = Flag(&words.left);
        while !words.go.load(Ordering::SeqCst) {
            assert!(!killer.is_finished(), "it came up");
            std::thread::sleep(Duration::from_millis(1));
        }
        let options = BlkOptions {
            queue: QueueOptions {
                size: 64,
                ..BlkOptions::default().queue
            },
            queues: QUEUES,
            ..BlkOptions::default()
        };
        let driver = open(stand, &pool, &options);
        let mut load = Load {
            stand,
            pool: &pool,
            driver,
            buffers: (0..UNDER_WAY)
                .map(|_| pool.alloc(MOST * BLOCK).expect("room"))
                .collect(),
            jobs: vec![None; UNDER_WAY],
            book: Book {
                versions: vec![0; BLOCKS],
                busy: vec![false; BLOCKS],
                next: 1,
            },
            random: Random(88_172_645_463_325_252),
            interrupted: 0,
            resumed: 0,
            answered: 0,
            flushes: 0,
        };
        let mut last = 0;
        while !words.over.load(Ordering::SeqCst) || last < 50 {
            let answered = load.answered;
            load.round(true);
            if load.answered > answered {
                words.rounds.fetch_add(1, Ordering::SeqCst);
            }
            last += usize::from(words.over.load(Ordering::SeqCst));
        }
        while load.jobs.iter().any(Option::is_some) {
            load.round(false);
        }
        println!(
            "{device}: {} answers, {} of them flushes, {} resumed, {} requests under way then",
            load.answered, load.flushes, load.resumed, load.interrupted
        );
        assert!(load.resumed > 2 && load.flushes > 0);
        load.check_by_reading();
        let versions = load.book.versions.clone();
        drop(load);
        killer.join().expect("served").kill();
        versions
    })
}

/// The first set-up, which may be interrupted as any other.
fn open<'p>(stand: &Stand, pool: &'p DmaPool, options: &BlkOptions) -> Driver<'p> {
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "no device");
        if let Some(mut client) = stand.try_connect()
            && pool.lend(&mut client, 1).is_ok()
        {
            let number = virtio_msg::DevNum(0);
            if let Ok(driver) = Driver::new(client, number, pool, options) {
                return driver;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn check(bytes: &[u8], versions: &[u32]) {
    for (block, bytes) in bytes.chunks(BLOCK).enumerate() {
        assert!(bytes == contents(block, versions[block]), "block {block}");
    }
}

#[test]
fn no_request_is_lost_or_undone_by_kills_with_any_engine() {
    for engine in ["uring", "threads", "inline"] {
        let stand = Stand::new();
        let image = stand.image("disk", (BLOCK * BLOCKS) as u64);
        let device = format!(
            "blk,path={},engine={engine},queues={QUEUES}",
            image.display()
        );
        let versions = survive(&stand, &device);
        check(&std::fs::read(&image).expect("there"), &versions);
    }
}

#[test]
fn no_request_is_lost_or_undone_by_kills_with_a_file_in_memory() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: no file system in memory");
        return;
    };
    let stand = Stand::new();
    let image = dir.path().join("disk");
    let file = std::fs::File::create(&image).expect("a file");
    file.set_len((BLOCK * BLOCKS) as u64).expect("made");
    let device = format!("blk,path={},queues={QUEUES}", image.display());
    let versions = survive(&stand, &device);
    check(&std::fs::read(&image).expect("there"), &versions);
}

#[test]
fn no_request_is_lost_or_undone_by_kills_with_qcow2() {
    // With small clusters nearly every write finds a new place.
    for options in ["cluster_size=64k", "cluster_size=4k"] {
        let stand = Stand::new();
        let image = stand.path("disk.qcow2");
        let size = (BLOCK * BLOCKS).to_string();
        let create = ["create", "-f", "qcow2", "-o", options, text(&image), &size];
        if tool("qemu-img", &create).is_none() {
            return;
        }
        let device = format!("blk,path={},format=qcow2,queues={QUEUES}", image.display());
        let versions = survive(&stand, &device);
        // Clusters that nobody needs any more may be left over; nothing else.
        let checked = tool("qemu-img", &["check", "-f", "qcow2", text(&image)]).expect("there");
        let code = checked.status.code();
        assert!(code == Some(0) || code == Some(3), "{checked:?}");
        let other = stand.path("raw");
        let convert = [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text(&image),
            text(&other),
        ];
        assert!(tool("qemu-img", &convert).expect("there").status.success());
        check(&std::fs::read(&other).expect("there"), &versions);
    }
}

#[test]
fn no_request_is_lost_or_undone_by_kills_with_nbd() {
    let stand = Stand::new();
    let image = stand.image("exported", (BLOCK * BLOCKS) as u64);
    let socket = stand.path("nbd");
    let Some(server) = nbd_server(&image, &socket) else {
        return;
    };
    let device = format!(
        "blk,path=nbd+unix:///?socket={},queues={QUEUES}",
        socket.display()
    );
    let versions = survive(&stand, &device);
    drop(server);
    check(&std::fs::read(&image).expect("there"), &versions);
}
