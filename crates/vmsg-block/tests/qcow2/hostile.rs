// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that are made to do harm.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::time::{ClockId, clock_gettime};
use vmsg_block::{Disk, Qcow2Config, Qcow2Disk, Request};

use super::held::{Memory, read, run, write};
use super::tools;

/// Where a header has something, and how much.
const FIELDS: [(u64, usize); 18] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 8),
];

#[derive(Clone, Debug)]
enum Harm {
    Header(usize, u64),
    /// A number of a table: which cluster, which entry.
    Table(u64, u64, u64),
    Cut(u64),
    Byte(u64, u8),
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..8u64,
        any::<u64>(),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..12u64).prop_map(|cluster| cluster << 12),
        (0..12u64).prop_map(|cluster| 1 << 63 | cluster << 12),
        (0..1u64 << 62).prop_map(|offset| 1 << 62 | offset),
        Just(u64::MAX),
    ]
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        2 => (0..FIELDS.len(), number()).prop_map(|(field, number)| Harm::Header(field, number)),
        4 => (0..12u64, prop_oneof![0..16u64, 0..512u64], number())
            .prop_map(|(cluster, entry, number)| Harm::Table(cluster, entry, number)),
        1 => (0..60_000u64).prop_map(Harm::Cut),
        1 => (0..60_000u64, any::<u8>()).prop_map(|(at, byte)| Harm::Byte(at, byte)),
    ]
}

/// Opens and uses a harmed image. That this comes to an end is what is shown.
fn use_image(image: &[u8], harms: &[Harm], read_only: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, image).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for harm in harms {
        match *harm {
            Harm::Header(field, number) => {
                let (at, len) = FIELDS[field];
                file.write_all_at(&number.to_be_bytes()[8 - len..], at)
                    .unwrap();
            }
            Harm::Table(cluster, entry, number) => {
                file.write_all_at(&number.to_be_bytes(), cluster * 4096 + entry * 8)
                    .unwrap();
            }
            Harm::Cut(len) => file.set_len(len).unwrap(),
            Harm::Byte(at, byte) => file.write_all_at(&[byte], at).unwrap(),
        }
    }
    let begun = Instant::now();
    let config = Qcow2Config {
        read_only,
        backing: true,
        patience: Duration::ZERO,
        ..Qcow2Config::new(&path)
    };
    if let Ok(mut disk) = Qcow2Disk::open(&config) {
        let memory = Memory::new(64 << 10);
        let last = disk.facts().size.saturating_sub(4096);
        for offset in [0, 4096, 12_288, last & !511] {
            let _ = read(&mut disk, &memory, offset, 4096);
            let _ = write(&mut disk, &memory, offset, &[9; 4096]);
            let _ = run(&mut disk, Request::Flush, &memory);
            for unmap in [true, false] {
                let zeroes = Request::WriteZeroes {
                    offset,
                    len: 4096,
                    unmap,
                };
                let _ = run(&mut disk, zeroes, &memory);
            }
            let _ = run(&mut disk, Request::Discard { offset, len: 4096 }, &memory);
            let _ = read(&mut disk, &memory, offset, 65_536);
        }
    }
    assert!(
        begun.elapsed() < Duration::from_secs(200),
        "{:?}",
        begun.elapsed()
    );
}

fn image(options: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, options, "8M");
    let commands = [
        "write -P 1 0 16k",
        "write -P 2 3M 8k",
        "write -z 5M 8k",
        "write -c -P 3 6M 4k",
    ];
    let mut arguments = vec!["-f", "qcow2", tools::name(&path)];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    tools::must("qemu-io", &arguments);
    fs::read(&path).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn harmed_images_are_refused_or_come_to_an_end(
        harms in prop::collection::vec(harm(), 1..4),
        read_only: bool,
        dirty: bool,
        old: bool,
    ) {
        if tools::there() {
            static IMAGES: std::sync::OnceLock<[Vec<u8>; 2]> = std::sync::OnceLock::new();
            let images = IMAGES.get_or_init(|| [image("cluster_size=4k"), image("cluster_size=4k,compat=0.10")]);
            let mut harms = harms;
            if dirty {
                harms.push(Harm::Byte(79, 1));
            }
            use_image(&images[usize::from(old)], &harms, read_only);
        }
    }
}

/// A guest that writes tables, in an image whose clusters of data are its tables.
fn write_tables(image: &[u8], links: &[(u64, u64)], writes: &[(u64, Vec<u64>)]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, image).unwrap();
    let file = fs::File::options().read(true).write(true).open(&path);
    let file = file.unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    let mut l2 = [0; 8];
    file.read_exact_at(&mut l2, u64::from_be_bytes(l1)).unwrap();
    let l2 = u64::from_be_bytes(l2) & !(1 << 63);
    for &(entry, cluster) in links {
        let number = 1 << 63 | cluster << 12;
        file.write_all_at(&number.to_be_bytes(), l2 + entry * 8)
            .unwrap();
    }
    let config = Qcow2Config {
        patience: Duration::ZERO,
        ..Qcow2Config::new(&path)
    };
    let begun = Instant::now();
    if let Ok(mut disk) = Qcow2Disk::open(&config) {
        let memory = Memory::new(64 << 10);
        for (cluster, numbers) in writes {
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_be_bytes()).collect();
            bytes.resize(4096, 0);
            let _ = write(&mut disk, &memory, cluster * 4096, &bytes);
            let _ = run(&mut disk, Request::Flush, &memory);
            // Something new has to be found room for.
            for far in 0..8 {
                let offset = (1 << 20) + cluster * 65_536 + far * 8192;
                let _ = write(&mut disk, &memory, offset, &[1; 4096]);
            }
            let offset = cluster * 4096;
            let _ = read(&mut disk, &memory, offset, 65_536);
            let _ = run(&mut disk, Request::Discard { offset, len: 4096 }, &memory);
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(600));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn guests_that_write_tables_of_their_images_come_to_an_end(
        links in prop::collection::vec((0..16u64, 0..16u64), 1..12),
        writes in prop::collection::vec((0..16u64, prop::collection::vec(number(), 0..24)), 1..8),
        old: bool,
    ) {
        if tools::there() {
            static IMAGES: std::sync::OnceLock<[Vec<u8>; 2]> = std::sync::OnceLock::new();
            let images = IMAGES.get_or_init(|| [image("cluster_size=4k"), image("cluster_size=4k,compat=0.10")]);
            write_tables(&images[usize::from(old)], &links, &writes);
        }
    }
}

/// Each of a million blocks of refcounts could count sixteen million clusters, none of which is there.
#[test]
fn refcounts_of_what_no_file_has_are_not_looked_at_one_by_one() {
    if !tools::there() {
        return;
    }
    const CLUSTER: u64 = 2 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "cluster_size=2M,refcount_bits=1", "8M");
    let file = fs::File::options().write(true).open(&path).unwrap();
    let table = 64 * CLUSTER;
    let entries = (0..1 << 20).flat_map(|block: u64| ((1000 + block) * CLUSTER).to_be_bytes());
    file.write_all_at(&entries.collect::<Vec<u8>>(), table)
        .unwrap();
    file.write_all_at(&table.to_be_bytes(), 48).unwrap();
    file.write_all_at(&4u32.to_be_bytes(), 56).unwrap();
    file.write_all_at(&[1], 79).unwrap();
    // Of the processor, as others may have it meanwhile.
    let spent = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let begun = spent();
    let error = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap_err();
    assert!(
        matches!(error, vmsg_block::Qcow2OpenError::Damaged { .. }),
        "{error}"
    );
    let took = spent() - begun;
    assert!(took < Duration::from_secs(20), "{took:?}");
}
