// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of all kinds.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Failure, Qcow2Config, Qcow2Disk, Qcow2OpenError, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, pattern, read, run, wait, write};
use super::tools;

const SIZE: usize = 8 << 20;

fn config(path: &Path) -> Qcow2Config {
    Qcow2Config {
        // Processes that other tests begin have the locks for a moment.
        patience: Duration::from_secs(5),
        ..Qcow2Config::new(path)
    }
}

fn read_only(path: &Path) -> Qcow2Config {
    Qcow2Config {
        read_only: true,
        ..config(path)
    }
}

fn open(config: &Qcow2Config) -> Qcow2OpenError {
    Qcow2Disk::open(config).unwrap_err()
}

/// A raw file that can be compressed.
fn raw(path: &Path) -> Vec<u8> {
    let bytes: Vec<u8> = (0..SIZE)
        .map(|at| u8::try_from((at >> 9) * 7 % 251).unwrap())
        .collect();
    fs::write(path, &bytes).unwrap();
    bytes
}

fn all(disk: &mut Qcow2Disk, memory: &Memory) -> Vec<u8> {
    let len = usize::try_from(disk.facts().size).unwrap();
    read(disk, memory, 0, len).unwrap()
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, path) = (dir.path().join("raw"), dir.path().join("disk.qcow2"));
    let mut model = raw(&from);
    for options in ["compat=1.1", "compat=0.10,cluster_size=16k"] {
        model.copy_from_slice(&fs::read(&from).unwrap());
        let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        tools::must(
            "qemu-img",
            &[&arguments[..], &[tools::name(&from), tools::name(&path)]].concat(),
        );
        assert!(
            fs::metadata(&path).unwrap().len() < SIZE as u64 / 4,
            "it is compressed"
        );
        let memory = Memory::new(SIZE);
        let mut disk = Qcow2Disk::open(&config(&path)).unwrap();
        assert!(all(&mut disk, &memory) == model);
        for at in [0, 5 * 512, 1 << 20, SIZE - 4096] {
            let bytes = pattern(at as u64, 4096);
            write(&mut disk, &memory, at as u64, &bytes).unwrap();
            model[at..at + 4096].copy_from_slice(&bytes);
        }
        assert!(all(&mut disk, &memory) == model);
        drop(disk);
        tools::check(&path);
        assert!(tools::contents(&path) == model);
    }
}

#[test]
fn a_backing_file_is_opened_when_allowed_and_never_written() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, middle, path) = (
        dir.path().join("base.raw"),
        dir.path().join("middle"),
        dir.path().join("disk"),
    );
    let mut model = raw(&base);
    tools::create(
        &middle,
        "backing_file=base.raw,backing_fmt=raw",
        &SIZE.to_string(),
    );
    tools::create(
        &path,
        "backing_file=middle,backing_fmt=qcow2",
        &SIZE.to_string(),
    );
    let error = open(&config(&path));
    assert!(
        matches!(&error, Qcow2OpenError::BackingNotAllowed { backing, .. } if backing == "middle"),
        "{error}"
    );
    let allowed = Qcow2Config {
        backing: true,
        ..config(&path)
    };
    let memory = Memory::new(SIZE);
    let mut disk = Qcow2Disk::open(&allowed).unwrap();
    assert!(all(&mut disk, &memory) == model);
    let bytes = pattern(1, 3000 * 512);
    write(&mut disk, &memory, 777 * 512, &bytes).unwrap();
    model[777 * 512..3777 * 512].copy_from_slice(&bytes);
    let zeroes = Request::WriteZeroes {
        offset: 512,
        len: 1 << 20,
        unmap: true,
    };
    run(&mut disk, zeroes, &memory).unwrap();
    model[512..512 + (1 << 20)].fill(0);
    assert!(all(&mut disk, &memory) == model);
    // Others may read what is behind, and nobody may write it.
    let second = dir.path().join("second");
    tools::create(
        &second,
        "backing_file=middle,backing_fmt=qcow2",
        &SIZE.to_string(),
    );
    let other = Qcow2Config {
        path: second,
        ..allowed.clone()
    };
    drop(Qcow2Disk::open(&other).unwrap());
    assert!(matches!(open(&config(&path)), Qcow2OpenError::InUse { .. }));
    assert!(matches!(
        open(&Qcow2Config {
            path: middle.clone(),
            ..allowed.clone()
        }),
        Qcow2OpenError::InUse { .. }
    ));
    drop(disk);
    tools::check(&path);
    assert!(tools::contents(&path) == model);
    assert!(fs::read(&base).unwrap() == raw(&dir.path().join("again")));
}

#[test]
fn rings_of_backing_files_and_formats_that_are_not_said_are_refused() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base"), dir.path().join("disk"));
    tools::create(&base, "", "1M");
    tools::create(&path, "backing_file=base,backing_fmt=qcow2", "1M");
    let rebase = |arguments: &[&str]| {
        tools::must(
            "qemu-img",
            &[&["rebase", "-u", "-f", "qcow2"], arguments].concat(),
        );
    };
    rebase(&["-F", "qcow2", "-b", "base", tools::name(&base)]);
    let allowed = |read_only| Qcow2Config {
        backing: true,
        read_only,
        ..config(&path)
    };
    let error = open(&allowed(true));
    assert!(
        matches!(error, Qcow2OpenError::TooManyBackings { .. }),
        "{error}"
    );
    rebase(&["-F", "vmdk", "-b", "base", tools::name(&path)]);
    let error = open(&allowed(false));
    assert!(
        matches!(error, Qcow2OpenError::Unsupported { .. }),
        "{error}"
    );
    // Without the extension that has the format.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut header = vec![0; 4096];
    file.read_exact_at(&mut header, 0).unwrap();
    let at = header
        .windows(4)
        .position(|four| four == 0xe279_2acau32.to_be_bytes())
        .unwrap();
    file.write_all_at(&[0x12; 4], at as u64).unwrap();
    let error = open(&allowed(false));
    assert!(
        matches!(&error, Qcow2OpenError::BackingFormat { backing, .. } if backing == "base"),
        "{error}"
    );
}

#[test]
fn what_is_not_supported_is_named() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for (options, what) in [
        ("extended_l2=on,cluster_size=64k", "subclusters"),
        ("data_file=data", "data file"),
        ("compression_type=zstd", "compression"),
    ] {
        let _ = fs::remove_file(&path);
        let options = options.replace(
            "data_file=data",
            &format!("data_file={}/data", tools::name(dir.path())),
        );
        tools::create(&path, &options, "1M");
        let error = open(&config(&path));
        let Qcow2OpenError::Unsupported { reason, .. } = error else {
            panic!("{error}");
        };
        assert!(reason.contains(what), "{reason}");
    }
    fs::write(&path, pattern(1, 1 << 20)).unwrap();
    assert!(matches!(open(&config(&path)), Qcow2OpenError::NotQcow2(_)));
    fs::write(&path, b"QFI\xfb").unwrap();
    assert!(matches!(open(&config(&path)), Qcow2OpenError::NotQcow2(_)));
    assert!(matches!(
        open(&read_only(dir.path())),
        Qcow2OpenError::File { .. }
    ));
    assert!(matches!(
        open(&config(&dir.path().join("none"))),
        Qcow2OpenError::File { .. }
    ));
}

#[test]
fn an_image_is_written_by_one_only() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "1M");
    let disk = Qcow2Disk::open(&config(&path)).unwrap();
    assert!(matches!(open(&config(&path)), Qcow2OpenError::InUse { .. }));
    assert!(matches!(
        open(&read_only(&path)),
        Qcow2OpenError::InUse { .. }
    ));
    let name = tools::name(&path);
    for command in [
        &["resize", "-q", "-f", "qcow2", name, "2M"][..],
        &["check", "-f", "qcow2", name],
    ] {
        let refused = tools::run("qemu-img", command);
        assert!(!refused.status.success());
        assert!(
            String::from_utf8_lossy(&refused.stderr).contains("lock"),
            "{refused:?}"
        );
    }
    drop(disk);
    let readers = [
        Qcow2Disk::open(&read_only(&path)).unwrap(),
        Qcow2Disk::open(&read_only(&path)).unwrap(),
    ];
    assert!(matches!(open(&config(&path)), Qcow2OpenError::InUse { .. }));
    drop(readers);
    Qcow2Disk::open(&config(&path)).unwrap();
}

#[test]
fn an_image_that_is_only_read_is_not_changed() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "1M");
    let before = fs::read(&path).unwrap();
    let memory = Memory::new(1 << 20);
    for config in [config(&path), read_only(&path)] {
        let mut disk = Qcow2Disk::open(&config).unwrap();
        assert_eq!(disk.facts().read_only, config.read_only);
        assert!(all(&mut disk, &memory).iter().all(|&byte| byte == 0));
        run(&mut disk, Request::Flush, &memory).unwrap();
        if config.read_only {
            let refused = write(&mut disk, &memory, 0, &[1; 512]);
            assert!(matches!(refused, Err(Failure::ReadOnly)));
        }
        drop(disk);
        assert!(fs::read(&path).unwrap() == before);
    }
}

#[test]
fn requests_beside_the_disk_are_refused() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "1M");
    let memory = Memory::new(1 << 20);
    let mut disk = Qcow2Disk::open(&config(&path)).unwrap();
    for (offset, len) in [
        (1 << 20, 512),
        ((1 << 20) - 512, 1024),
        (u64::MAX - 511, 512),
        (3, 512),
        (0, 100),
    ] {
        assert!(write(&mut disk, &memory, offset, &vec![1; len]).is_err());
        assert!(read(&mut disk, &memory, offset, len).is_err());
        let len = len as u64;
        assert!(run(&mut disk, Request::Discard { offset, len }, &memory).is_err());
        let zeroes = Request::WriteZeroes {
            offset,
            len,
            unmap: false,
        };
        assert!(run(&mut disk, zeroes, &memory).is_err());
    }
    assert_eq!(disk.in_flight(), 0);
}

#[test]
fn what_is_canceled_does_not_come_after_what_follows() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "64M");
    let memory = Memory::new(32 << 20);
    let mut disk = Qcow2Disk::open(&config(&path)).unwrap();
    for round in 0..20 {
        memory.fill(0, &pattern(round, 32 << 20));
        for tag in 0..20 {
            let pieces = memory.pieces(0, 16 << 20);
            let request = Request::Write {
                offset: u64::from(tag) % 3 * 4096,
                from: Pieces::new(&pieces),
            };
            assert!(matches!(
                disk.submit(tag, request, &memory.table),
                Submitted::Pending
            ));
        }
        disk.commit();
        disk.cancel();
        assert_eq!(disk.touching_memory(), 0);
        let done = wait(&mut disk, 20);
        assert!(
            done.iter()
                .all(|done| matches!(done.result, Err(Failure::Canceled)))
        );
        assert_eq!(disk.in_flight(), 0);
        let bytes = pattern(1000 + round, 1 << 20);
        write(&mut disk, &memory, 0, &bytes).unwrap();
        run(&mut disk, Request::Flush, &memory).unwrap();
        assert!(read(&mut disk, &memory, 0, 1 << 20).unwrap() == bytes);
    }
    drop(disk);
    tools::check(&path);
}

#[test]
fn an_image_of_qemu_that_was_killed_is_put_in_order() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "lazy_refcounts=on", "64M");
    // qemu-io kills itself.
    let commands = ["write -P 5 0 1M", "write -P 6 20M 1M", "flush", "abort"];
    let mut arguments = vec!["-f", "qcow2", tools::name(&path)];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    assert!(!tools::run("qemu-io", &arguments).status.success());
    assert!(matches!(
        open(&read_only(&path)),
        Qcow2OpenError::NotClosed(_)
    ));
    let memory = Memory::new(1 << 20);
    let mut disk = Qcow2Disk::open(&Qcow2Config::new(&path)).unwrap();
    assert!(
        read(&mut disk, &memory, 0, 1 << 20)
            .unwrap()
            .iter()
            .all(|&byte| byte == 5)
    );
    write(&mut disk, &memory, 40 << 20, &[7; 512]).unwrap();
    assert!(
        read(&mut disk, &memory, 20 << 20, 1 << 20)
            .unwrap()
            .iter()
            .all(|&byte| byte == 6)
    );
    drop(disk);
    tools::check(&path);
    Qcow2Disk::open(&read_only(&path)).unwrap();
}

#[test]
fn snapshots_inside_keep_their_contents() {
    if !tools::there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "1M");
    let memory = Memory::new(1 << 20);
    let (old, new) = (pattern(1, 1 << 20), pattern(2, 1 << 20));
    let mut disk = Qcow2Disk::open(&config(&path)).unwrap();
    write(&mut disk, &memory, 0, &old).unwrap();
    drop(disk);
    tools::must("qemu-img", &["snapshot", "-c", "then", tools::name(&path)]);
    let mut disk = Qcow2Disk::open(&config(&path)).unwrap();
    assert!(all(&mut disk, &memory) == old);
    write(&mut disk, &memory, 0, &new[..1 << 19]).unwrap();
    drop(disk);
    tools::check(&path);
    tools::must("qemu-img", &["snapshot", "-a", "then", tools::name(&path)]);
    assert!(tools::contents(&path) == old);
}

#[test]
fn past_the_page_cache() {
    if !tools::there() {
        return;
    }
    // Not in memory, where there is no cache to go past.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("disk");
    tools::create(&path, "", "4M");
    let direct = Qcow2Config {
        direct: true,
        ..config(&path)
    };
    let mut disk = match Qcow2Disk::open(&direct) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: no O_DIRECT here: {error}");
            return;
        }
    };
    let memory = Memory::new(4 << 20);
    let block = usize::try_from(disk.facts().block_size).unwrap();
    let bytes = pattern(1, 1 << 20);
    write(&mut disk, &memory, 3 * block as u64, &bytes).unwrap();
    assert!(read(&mut disk, &memory, 3 * block as u64, 1 << 20).unwrap() == bytes);
    drop(disk);
    tools::check(&path);
    let begun = Instant::now();
    drop(Qcow2Disk::open(&direct).unwrap());
    assert!(begun.elapsed() < Duration::from_secs(60));
}
