// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk whose device host is killed under load and gets copies: each request is answered once, and each write is in the image. In a segment that is
//! lent the session's record says what was in flight; on a bus that lends nothing the copies do.

use super::vhost_guest::{Guest, PATIENCE, Ram};
use super::{Program, random};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

const SECTOR: usize = 512;
const SECTORS: u64 = 4096;
const KILLS: usize = 12;
const DEPTH: usize = 24;
/// Types of requests (virtio 1.3, 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

fn serve(bus: &str, image: &Path) -> Program {
    let device = format!("blk,path={},format=raw,id=disk0", image.display());
    Program::start(
        &["serve", "--bus", bus, "--device", &device, "--keep", "0"],
        1,
    )
}

fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// What is in a sector that was written with this number.
fn contents(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(SECTOR / 8)
}

/// Between 0 and 15 ms.
fn moment() -> Duration {
    let mut bytes = [0; 2];
    random(&mut bytes);
    Duration::from_micros(u64::from(u16::from_le_bytes(bytes)) * 15_000 / 65_536)
}

fn play(bus: &str, dir: &Path, keys: &str) {
    let image = dir.join("disk.img");
    let len = usize::try_from(SECTORS).expect("small") * SECTOR;
    fs::write(&image, vec![0; len]).expect("written");
    let mut host = serve(bus, &image);
    let front = format!(
        "vhost-user,socket={},dev=disk0{keys}",
        dir.join("disk").display()
    );
    let _proxy = Program::start(&["proxy", "--bus", bus, "--front", &front], 1);
    let mut guest = Guest::start(&dir.join("disk"), Ram::new(), 1);
    // By sector: the number that it was written with last, and which sectors have a request under way.
    let mut disk: HashMap<u64, u64> = HashMap::new();
    let mut busy = HashSet::new();
    let mut asked = HashMap::new();
    let (mut number, mut answered, mut killed) = (0_u64, 0_u64, 0);
    let mut due = std::time::Instant::now() + moment();
    while killed < KILLS || guest.outstanding(0) > 0 {
        while killed < KILLS && guest.outstanding(0) < DEPTH {
            number += 1;
            let sector = number * 37 % SECTORS;
            if !busy.insert(sector) {
                continue;
            }
            let (kind, data, room) = match number % 5 {
                0 => (FLUSH, Vec::new(), 1),
                1 => (READ, Vec::new(), SECTOR + 1),
                _ => (WRITE, contents(number), 1),
            };
            let at = if kind == FLUSH { 0 } else { sector };
            let token = guest.offer(0, &request(kind, at, &data), room);
            let before = asked.insert(token, (kind, sector, number));
            assert!(before.is_none(), "an answer for each request");
        }
        guest.publish(0);
        if killed < KILLS && std::time::Instant::now() >= due {
            host.kill();
            killed += 1;
            host = serve(bus, &image);
            due = std::time::Instant::now() + moment();
        }
        let next = guest.next_within(0, PATIENCE);
        let (token, answer) = next.unwrap_or_else(|| {
            panic!("after {killed} kills and {answered} answers: nothing comes back, or a reset is needed")
        });
        let (kind, sector, number) = asked.remove(&token).expect("asked for");
        assert_eq!(answer.last(), Some(&0), "the disk has done it");
        match kind {
            READ => {
                let last = disk.get(&sector).map_or(vec![0; SECTOR], |n| contents(*n));
                assert!(answer[..SECTOR] == last, "sector {sector}");
            }
            WRITE => {
                disk.insert(sector, number);
            }
            _ => {}
        }
        busy.remove(&sector);
        answered += 1;
    }
    let bytes = fs::read(&image).expect("read");
    for (sector, number) in &disk {
        let at = usize::try_from(*sector).expect("small") * SECTOR;
        assert!(
            bytes[at..at + SECTOR] == contents(*number),
            "sector {sector}"
        );
    }
    println!("{answered} requests, {killed} kills");
}

#[test]
fn a_disk_over_a_segment_that_is_lent_goes_on_with_the_next_device_host() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let bus = format!("unix,path={}/bus", dir.path().display());
    play(&bus, dir.path(), ",isolate=on,segment=8M");
}

#[test]
fn a_disk_over_memory_in_common_goes_on_with_the_next_device_host() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let at = dir.path().display();
    for (file, len) in [("messages", 1 << 20), ("common", 8 << 20)] {
        fs::write(dir.path().join(file), vec![0x66; len]).expect("written");
    }
    fs::write(dir.path().join("messages"), vec![0; 1 << 20]).expect("written");
    let bus = format!("ivshmem,file={at}/messages,memory=bounce,ram={at}/common");
    play(&bus, dir.path(), "");
}
