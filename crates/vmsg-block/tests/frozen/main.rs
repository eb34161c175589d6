// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that are given up, dropped or killed while their requests are under way: on a file system that is frozen, so that they are.

#[path = "../file/ground.rs"]
mod ground;
#[path = "../held/mod.rs"]
mod held;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ground::{Mounted, open, sparse};
use held::{Memory, wait, write};
use vmsg_block::{
    Completion, Disk, Engine, Failure, FileConfig, FileDisk, Holder, LockError, Purpose, Request,
    Submitted, open_image,
};
use vmsg_mem::Pieces;

const MIB: u64 = 1 << 20;
const WHILE: Duration = Duration::from_secs(60);

/// Begins `count` writes of 4096 bytes; all are under way.
fn begin(disk: &mut FileDisk, memory: &Memory, count: u32) {
    for tag in 0..count {
        let at = tag as usize * 4096;
        let pieces = [memory.piece(at, 4096)];
        let from = Pieces::new(&pieces);
        let offset = at as u64;
        let submitted = disk.submit(tag, Request::Write { offset, from }, &memory.table);
        assert!(matches!(submitted, Submitted::Pending));
    }
    disk.commit();
}

/// Waits until threads of a process, of a disk's or of the kernel's for it, are in the midst of a write that does not end.
fn until_stuck(process: u32) {
    let is_stuck = || {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
        tasks.flatten().any(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let is_ours = stat.contains("(vmsg-disk)") || stat.contains("(iou-wrk");
            is_ours && stat.contains(") D ")
        })
    };
    until("nothing waits for the medium", is_stuck);
}

/// Held by who has frozen a file system: nobody else's threads wait for a medium then.
static FROZEN: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    FROZEN.lock().unwrap_or_else(PoisonError::into_inner)
}

const COUNT: u32 = 32;

/// A disk on a file system on which all writes wait.
fn stuck(engine: Engine, direct: bool) -> Option<(Mounted, FileConfig)> {
    let ext4 = Mounted::ext4(16 * MIB)?;
    let config = FileConfig {
        engine,
        direct,
        patience: Duration::ZERO,
        ..FileConfig::new(sparse(ext4.path(), 4 * MIB))
    };
    // Allocated: what waits is the write itself.
    std::fs::write(&config.path, vec![1; 4 << 20]).expect("written");
    Some((ext4, config))
}

#[test]
fn what_is_canceled_ends_as_soon_as_the_medium_lets_it() {
    for engine in [Engine::Uring, Engine::Threads] {
        for direct in [false, true] {
            let _alone = alone();
            let Some((ext4, config)) = stuck(engine, direct) else {
                return;
            };
            let Some(mut disk) = open(&config) else {
                continue;
            };
            let memory = Memory::new(1 << 20);
            ext4.freeze();
            begin(&mut disk, &memory, COUNT);
            until_stuck(std::process::id());
            let mut done: Vec<Completion> = Vec::new();
            disk.completed(&mut done);
            assert!(done.is_empty());
            assert_eq!(disk.in_flight(), COUNT as usize);
            assert!(disk.touching_memory() > 0);
            disk.cancel();
            disk.completed(&mut done);
            assert!(done.len() < COUNT as usize, "some have been begun");
            ext4.thaw();
            let left = COUNT as usize - done.len();
            done.extend(wait(&mut disk, left));
            let mut tags: Vec<_> = done.iter().map(|completion| completion.tag).collect();
            tags.sort_unstable();
            assert!(tags.into_iter().eq(0..COUNT), "each is told once");
            let canceled = done
                .iter()
                .filter(|completion| matches!(completion.result, Err(Failure::Canceled)));
            // The kernel finds what it has in one worker's list no more.
            assert!(canceled.count() > 0 || engine == Engine::Uring);
            assert_eq!((disk.in_flight(), disk.touching_memory()), (0, 0));
            // As good as before.
            write(&mut disk, &memory, 0, &[3; 512]).expect("written");
        }
    }
}

fn is_locked(path: &Path) -> Option<LockError> {
    match open_image(path, Purpose::Write, Duration::ZERO) {
        Ok(_) => None,
        Err(error @ LockError::Held(_)) => Some(error),
        Err(error) => panic!("{error}"),
    }
}

/// Until `condition`, which no event tells of.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + WHILE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_dropped_with_requests_under_way_keeps_memory_and_lock_until_they_are_done() {
    for engine in [Engine::Uring, Engine::Threads] {
        for direct in [false, true] {
            let _alone = alone();
            let Some((ext4, config)) = stuck(engine, direct) else {
                return;
            };
            let Some(mut disk) = open(&config) else {
                continue;
            };
            let memory = Memory::new(1 << 20);
            let table = Arc::downgrade(&memory.table);
            ext4.freeze();
            begin(&mut disk, &memory, COUNT);
            until_stuck(std::process::id());
            drop(memory);
            let begun = Instant::now();
            assert!(!disk.ends_at_once());
            drop(disk);
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "nobody is held up"
            );
            assert!(
                table.upgrade().is_some(),
                "{engine:?}: the kernel may read there"
            );
            let locked = is_locked(&config.path);
            assert!(locked.is_some(), "{engine:?}: it is still written");
            ext4.thaw();
            until("the lock goes", || is_locked(&config.path).is_none());
            until("the memory goes", || table.upgrade().is_none());
        }
    }
}

/// The part of the next test that is killed: the disk that the environment names, with requests under way.
#[test]
#[ignore = "a part of another test"]
fn writer() {
    let Ok(path) = std::env::var("VMSG_TEST_DISK") else {
        return;
    };
    let engine = match std::env::var("VMSG_TEST_ENGINE").as_deref() {
        Ok("uring") => Engine::Uring,
        _ => Engine::Threads,
    };
    let config = FileConfig {
        engine,
        direct: std::env::var("VMSG_TEST_DIRECT").is_ok(),
        ..FileConfig::new(path)
    };
    let mut disk = FileDisk::open(&config).expect("a disk");
    let memory = Memory::new(1 << 20);
    println!("open");
    std::io::stdin()
        .read_line(&mut String::new())
        .expect("a line");
    begin(&mut disk, &memory, COUNT);
    println!("begun");
    wait(&mut disk, COUNT as usize);
    panic!("nothing ends in a frozen file system");
}

#[test]
fn the_lock_of_a_killed_process_is_held_until_the_kernel_is_done_with_its_requests() {
    for engine in [Engine::Uring, Engine::Threads] {
        for direct in [false, true] {
            let _alone = alone();
            let Some((ext4, config)) = stuck(engine, direct) else {
                return;
            };
            // Whether it can be had at all.
            if open(&config).is_none() {
                continue;
            }
            let mut command = Command::new(std::env::current_exe().expect("this"));
            command
                .args(["--exact", "writer", "--ignored", "--nocapture"])
                .env("VMSG_TEST_DISK", &config.path)
                .env("VMSG_TEST_ENGINE", engine.name())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            if direct {
                command.env("VMSG_TEST_DIRECT", "1");
            }
            let mut child = command.spawn().expect("started");
            let mut said = BufReader::new(child.stdout.take().expect("piped")).lines();
            let mut wait_for = |word| {
                let mut lines = said.by_ref().map_while(Result::ok);
                // The harness has words of its own, on the same line.
                assert!(lines.any(|line| line.ends_with(word)), "no {word}");
            };
            wait_for("open");
            let locked = is_locked(&config.path).expect("it has it");
            let LockError::Held(Holder::Process { pid, .. }) = locked else {
                panic!("{locked}");
            };
            assert_eq!(pid, child.id());
            ext4.freeze();
            writeln!(child.stdin.as_mut().expect("piped"), "go").expect("told");
            wait_for("begun");
            until_stuck(child.id());
            child.kill().expect("killed");
            // Whatever becomes of the process, what it has begun is not done.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(300) {
                assert!(is_locked(&config.path).is_some(), "{engine:?} {direct}");
            }
            // Who waits gets it.
            std::thread::scope(|scope| {
                let next = scope.spawn(|| open_image(&config.path, Purpose::Write, WHILE));
                ext4.thaw();
                next.join().expect("no panic").expect("free now");
            });
            child.wait().expect("ended");
        }
    }
}
