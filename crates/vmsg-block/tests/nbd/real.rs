// SPDX-License-Identifier: Apache-2.0 OR MIT
//! nbdkit and qemu-nbd.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Failure, NbdConfig, NbdDisk, NbdOpenError, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, has_tool, pattern, read, run, wait, write};
use super::server;

const LONG: Duration = Duration::from_secs(60);
const SIZE: usize = 16 << 20;

/// A server that is killed in the end.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn nbdkit(dir: &Path, arguments: &[&str]) -> Self {
        let socket = dir.join("s");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        command
            .args(["-f", "--exit-with-parent", "-U"])
            .arg(&socket)
            .args(arguments);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Self {
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Self { child, socket }
    }

    fn open(&self) -> NbdDisk {
        NbdDisk::open(&server::config(&self.socket, LONG)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes, zeroes and reads all over the disk.
fn exercise(disk: &mut NbdDisk, seed: u64) {
    let memory = Memory::new(4 << 20);
    assert_eq!(disk.facts().size, SIZE as u64);
    let mut model = vec![0; SIZE];
    for round in 0..24 {
        let dice = pattern(seed << 8 | round, 8);
        let at = usize::from(u16::from_le_bytes([dice[0], dice[1]])) * 512 % SIZE;
        let len = (1 + usize::from(u16::from_le_bytes([dice[2], dice[3]])) % 4096) * 512;
        let len = len.min(SIZE - at);
        let (offset, range) = (at as u64, at..at + len);
        match dice[4] % 4 {
            0 | 1 => {
                let bytes = pattern(seed << 8 | round, len);
                write(disk, &memory, offset, &bytes).unwrap();
                model[range.clone()].copy_from_slice(&bytes);
            }
            2 if disk.facts().write_zeroes => {
                let zeroes = Request::WriteZeroes {
                    offset,
                    len: len as u64,
                    unmap: dice[5] & 1 == 0,
                };
                run(disk, zeroes, &memory).unwrap();
                model[range.clone()].fill(0);
            }
            3 if disk.facts().discard => {
                run(
                    disk,
                    Request::Discard {
                        offset,
                        len: len as u64,
                    },
                    &memory,
                )
                .unwrap();
                let now = read(disk, &memory, offset, len).unwrap();
                model[range.clone()].copy_from_slice(&now);
            }
            _ => run(disk, Request::Flush, &memory).unwrap(),
        }
        assert!(read(disk, &memory, offset, len).unwrap() == model[range]);
    }
    for at in (0..SIZE).step_by(4 << 20) {
        assert!(read(disk, &memory, at as u64, 4 << 20).unwrap() == model[at..at + (4 << 20)]);
    }
    run(disk, Request::Flush, &memory).unwrap();
}

#[test]
fn memory_of_nbdkit() {
    if !has_tool("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (seed, arguments) in [
        &["memory", "16M"][..],
        &["--no-sr", "memory", "16M"],
        &["--filter=nozero", "memory", "16M", "zeromode=none"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "16M",
            "blocksize-minimum=512",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
    ]
    .iter()
    .enumerate()
    {
        let server = Server::nbdkit(dir.path(), arguments);
        exercise(&mut server.open(), seed as u64);
    }
}

#[test]
fn over_tcp_by_name() {
    if !has_tool("nbdkit") {
        return;
    }
    // A port that nobody has at the moment.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut command = Command::new("nbdkit");
    command.args([
        "-f",
        "--exit-with-parent",
        "-i",
        "127.0.0.1",
        "-p",
        &port.to_string(),
        "memory",
        "16M",
    ]);
    let _server = Server::start(command, PathBuf::new());
    for host in ["127.0.0.1", "localhost"] {
        let uri = format!("nbd://{host}:{port}/any").parse().unwrap();
        exercise(&mut NbdDisk::open(&NbdConfig::new(uri)).unwrap(), 7);
        // The same memory again: zeroes first.
        let uri = format!("nbd://{host}:{port}").parse().unwrap();
        let mut disk = NbdDisk::open(&NbdConfig::new(uri)).unwrap();
        let zeroes = Request::WriteZeroes {
            offset: 0,
            len: SIZE as u64,
            unmap: true,
        };
        run(&mut disk, zeroes, &Memory::new(4096)).unwrap();
    }
}

#[test]
fn an_image_of_qemu_nbd() {
    if !has_tool("qemu-nbd") || !has_tool("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("16M")
        .status();
    assert!(status.unwrap().success());
    let socket = dir.path().join("q");
    let mut command = Command::new("qemu-nbd");
    command
        .args([
            "-f",
            "qcow2",
            "-x",
            "vol ume",
            "--discard=unmap",
            "-t",
            "-k",
        ])
        .arg(&socket)
        .arg(&image);
    let server = Server::start(command, socket);
    let mut config = server::config(&server.socket, LONG);
    config.uri.export = "vol ume".to_owned();
    let mut disk = NbdDisk::open(&config).unwrap();
    exercise(&mut disk, 3);
    drop(disk);
    config.uri.export = "other".to_owned();
    let error = NbdDisk::open(&config).unwrap_err();
    assert!(matches!(error, NbdOpenError::Refused { .. }), "{error}");
}

#[test]
fn errors_that_nbdkit_makes() {
    if !has_tool("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trigger = dir.path().join("trigger");
    let file = format!("error-file={}", trigger.display());
    let server = Server::nbdkit(
        dir.path(),
        &[
            "--filter=error",
            "memory",
            "16M",
            "error=ENOSPC",
            "error-pwrite-rate=1",
            &file,
        ],
    );
    let mut disk = server.open();
    let memory = Memory::new(4096);
    write(&mut disk, &memory, 0, &[1; 512]).unwrap();
    std::fs::write(&trigger, "").unwrap();
    let full = write(&mut disk, &memory, 0, &[2; 512]);
    assert!(
        matches!(&full, Err(Failure::Io(error)) if error.kind() == std::io::ErrorKind::StorageFull),
        "{full:?}"
    );
    std::fs::remove_file(&trigger).unwrap();
    assert!(read(&mut disk, &memory, 0, 512).unwrap() == [1; 512]);
}

#[test]
fn many_requests_at_once_with_a_slow_server() {
    if !has_tool("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(
        dir.path(),
        &[
            "--filter=delay",
            "--filter=rate",
            "memory",
            "16M",
            "rdelay=10ms",
            "wdelay=200ms",
            "rate=200M",
        ],
    );
    let mut disk = server.open();
    let memory = Memory::new(64 * 4096);
    let begun = Instant::now();
    for tag in 0..64 {
        let slot = usize::try_from(tag).unwrap() * 4096;
        memory.fill(slot, &pattern(u64::from(tag), 4096));
        let pieces = memory.pieces(slot, 4096);
        let request = Request::Write {
            offset: u64::from(tag) * 4096,
            from: Pieces::new(&pieces),
        };
        assert!(matches!(
            disk.submit(tag, request, &memory.table),
            Submitted::Pending
        ));
    }
    disk.commit();
    let one_by_one = Duration::from_millis(64 * 200);
    assert!(begun.elapsed() < one_by_one / 2, "nobody waits");
    let done = wait(&mut disk, 64);
    assert!(done.iter().all(|done| done.result.is_ok()));
    // Sixteen at the same time, as nbdkit does it.
    assert!(begun.elapsed() < one_by_one / 2, "{:?}", begun.elapsed());
    for tag in 0..64 {
        assert!(read(&mut disk, &memory, tag * 4096, 4096).unwrap() == pattern(tag, 4096));
    }
}

#[test]
fn a_server_that_is_killed_and_started_again() {
    if !has_tool("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, vec![0; SIZE]).unwrap();
    let path = file.display().to_string();
    let mut server = Server::nbdkit(dir.path(), &["file", &path]);
    let mut disk = server.open();
    let memory = Memory::new(32 << 10);
    for round in 0..8u64 {
        for tag in 0..8 {
            let slot = usize::try_from(tag).unwrap() * 4096;
            memory.fill(slot, &pattern(round << 8 | u64::from(tag), 4096));
            let pieces = memory.pieces(slot, 4096);
            let request = Request::Write {
                offset: u64::from(tag) * 4096,
                from: Pieces::new(&pieces),
            };
            assert!(matches!(
                disk.submit(tag, request, &memory.table),
                Submitted::Pending
            ));
        }
        disk.commit();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        server = Server::nbdkit(dir.path(), &["file", &path]);
        for done in wait(&mut disk, 8) {
            done.result.unwrap();
        }
        run(&mut disk, Request::Flush, &memory).unwrap();
        let there = std::fs::read(&file).unwrap();
        for tag in 0..8 {
            assert!(there[tag * 4096..(tag + 1) * 4096] == pattern(round << 8 | tag as u64, 4096));
        }
    }
}

#[test]
fn a_server_that_is_stopped_costs_errors_and_one_that_goes_on_is_used_again() {
    if !has_tool("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::nbdkit(dir.path(), &["memory", "16M"]);
    let timeout = Duration::from_secs(5);
    let mut disk = NbdDisk::open(&server::config(&server.socket, timeout)).unwrap();
    let memory = Memory::new(4096);
    let pid = rustix::process::Pid::from_child(&server.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let stopped = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED);
    assert!(stopped.unwrap().unwrap().1.stopped());
    let failed = write(&mut disk, &memory, 0, &[1; 512]);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let end = Instant::now() + LONG;
    while write(&mut disk, &memory, 0, &[2; 512]).is_err() {
        assert!(Instant::now() < end);
        super::held::turn(&mut disk, Instant::now() + Duration::from_millis(50));
    }
    assert!(read(&mut disk, &memory, 0, 512).unwrap() == [2; 512]);
}
