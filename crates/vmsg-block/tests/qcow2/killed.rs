// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process that writes an image is killed.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use vmsg_block::{Disk, Qcow2Config, Qcow2Disk, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, pattern, read, run, wait, write};
use super::tools;

const BLOCK: usize = 8192;
const BLOCKS: u64 = 4096;
/// The variable that makes this test the process that is killed.
const ROLE: &str = "VMSG_BLOCK_TEST_WRITES";

/// Writes blocks for ever, and says when they are told as done.
#[test]
fn writer() {
    let Some(path) = std::env::var_os(ROLE) else {
        return;
    };
    let seed: u64 = std::env::var("SEED").unwrap().parse().unwrap();
    let mut disk = Qcow2Disk::open(&Qcow2Config::new(Path::new(&path))).unwrap();
    let memory = Memory::new(16 * BLOCK);
    let mut stdout = std::io::stdout().lock();
    // The name of this test stands there.
    writeln!(stdout).unwrap();
    let dice = pattern(seed, 1 << 16);
    for (round, dice) in dice.chunks_exact(64).cycle().enumerate() {
        let mut written = Vec::new();
        for (slot, two) in dice
            .chunks_exact(2)
            .take(1 + usize::from(dice[63] & 15))
            .enumerate()
        {
            let block = u64::from(u16::from_le_bytes([two[0], two[1]])) % BLOCKS;
            if written.iter().any(|&(other, _)| other == block) {
                continue;
            }
            let content = seed << 32 | (round as u64) << 8 | slot as u64;
            memory.fill(slot * BLOCK, &pattern(content, BLOCK));
            let pieces = memory.pieces(slot * BLOCK, BLOCK);
            let request = Request::Write {
                offset: block * BLOCK as u64,
                from: Pieces::new(&pieces),
            };
            let tag = u32::try_from(slot).unwrap();
            // It is written, whether or not that is known.
            writeln!(stdout, "begun {block} {content}").unwrap();
            assert!(matches!(
                disk.submit(tag, request, &memory.table),
                Submitted::Pending
            ));
            written.push((block, content));
        }
        disk.commit();
        for done in wait(&mut disk, written.len()) {
            done.result.unwrap();
        }
        writeln!(stdout, "done").unwrap();
        if round % 5 == 4 {
            let (offset, len) = (u64::from(dice[0]) * BLOCK as u64, BLOCK as u64 * 3);
            for block in 0..3 {
                writeln!(stdout, "begun {} 0", u64::from(dice[0]) + block).unwrap();
            }
            let unmap = dice[1] & 1 == 0;
            run(
                &mut disk,
                Request::WriteZeroes { offset, len, unmap },
                &memory,
            )
            .unwrap();
            writeln!(stdout, "done").unwrap();
        }
        if round % 3 == 2 {
            run(&mut disk, Request::Flush, &memory).unwrap();
            writeln!(stdout, "done").unwrap();
            stdout.flush().unwrap();
        }
    }
}

/// What a block may hold: 0 is zeroes.
type May = HashMap<u64, Vec<u64>>;

fn round(path: &Path, seed: u64, lines: usize, may: &mut May) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["killed::writer", "--exact", "--nocapture"])
        .env(ROLE, path)
        .env("SEED", seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    let mut done = 0;
    let mut follow = |line: &str, may: &mut May| {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("begun") => {
                let block = words.next().unwrap().parse().unwrap();
                let Some(content) = words.next().and_then(|content| content.parse().ok()) else {
                    return;
                };
                may.entry(block).or_insert_with(|| vec![0]).push(content);
            }
            // All that was begun before is told as done, flushed or not, and a guest lives on with that: the last one of each counts.
            Some("done") => {
                done += 1;
                for contents in may.values_mut() {
                    let last = *contents.last().unwrap();
                    *contents = vec![last];
                }
            }
            _ => {}
        }
    };
    for _ in 0..lines {
        line.clear();
        assert!(
            output.read_line(&mut line).unwrap() > 0,
            "the writer ends by itself"
        );
        follow(&line, may);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it said before it died is true, too. A line that is cut off may name a write that was begun.
    loop {
        line.clear();
        if output.read_line(&mut line).unwrap() == 0 {
            break;
        }
        if line.ends_with('\n') {
            follow(&line, may);
        }
    }
    println!("killed after {done} rounds");
}

fn killed_again_and_again(options: &str, rounds: u64) {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    tools::create(&path, options, &(BLOCKS * BLOCK as u64).to_string());
    let memory = Memory::new(BLOCK);
    let mut may = May::new();
    for seed in 1..=rounds {
        let lines = 20 + usize::from(pattern(seed, 8)[5]) * 4;
        round(&path, seed, lines, &mut may);
        // QEMU can put it in order, too.
        let copy = dir.path().join("copy.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        tools::must(
            "qemu-img",
            &[
                "check",
                "-q",
                "-f",
                "qcow2",
                "-r",
                "all",
                tools::name(&copy),
            ],
        );
        tools::check(&copy);
        let mut disk = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap();
        for (&block, contents) in &mut may {
            let got = read(&mut disk, &memory, block * BLOCK as u64, BLOCK).unwrap();
            let is = |content: u64| match content {
                0 => got.iter().all(|&byte| byte == 0),
                content => got == pattern(content, BLOCK),
            };
            let found = contents.iter().copied().find(|&content| is(content));
            *contents =
                vec![found.unwrap_or_else(|| {
                    panic!("seed {seed}: block {block} is none of {contents:?}")
                })];
        }
        drop(disk);
        tools::check(&path);
    }
}

#[test]
fn what_was_told_as_done_survives_and_the_image_is_in_order() {
    killed_again_and_again("", 6);
}

#[test]
fn what_was_told_as_done_survives_with_many_small_tables() {
    killed_again_and_again("cluster_size=512", 6);
}

#[test]
fn what_was_told_as_done_survives_in_version_2() {
    killed_again_and_again("compat=0.10,cluster_size=4k", 6);
}

/// A pointer to a table is in the file, its refcount is not yet: the next writer must not take the table for free space.
#[test]
fn tables_without_refcounts_are_not_written_over() {
    if !tools::there() {
        return;
    }
    for (options, dirty) in [
        ("cluster_size=4k", true),
        ("cluster_size=4k,compat=0.10", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        tools::create(&path, options, &(BLOCKS * BLOCK as u64).to_string());
        let memory = Memory::new(BLOCK);
        let mut disk = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap();
        write(&mut disk, &memory, 0, &pattern(1, BLOCK)).unwrap();
        drop(disk);
        // As a kill at the wrong moment leaves it: the first table (16 bits for each cluster, in the third one) is not counted.
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let number = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        let (l1, reftable) = (number(40), number(48));
        let table = number(l1) & 0x00ff_ffff_ffff_fe00;
        file.write_all_at(&[0, 0], number(reftable) + table / 4096 * 2)
            .unwrap();
        if dirty {
            file.write_all_at(&[1], 79).unwrap();
        }
        let found = tools::run("qemu-img", &["check", "-f", "qcow2", tools::name(&path)]);
        assert_eq!(found.status.code(), Some(2), "{found:?}");

        let mut disk = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap();
        let places: Vec<u64> = (0..BLOCKS).step_by(100).collect();
        for &block in &places[1..] {
            write(
                &mut disk,
                &memory,
                block * BLOCK as u64,
                &pattern(block + 1, BLOCK),
            )
            .unwrap();
        }
        for &block in &places {
            let got = read(&mut disk, &memory, block * BLOCK as u64, BLOCK).unwrap();
            assert!(got == pattern(block + 1, BLOCK), "block {block}");
        }
        drop(disk);
        tools::check(&path);
    }
}
