// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Other daemons, as far as they are installed: virtiofsd, those of the vhost-device project.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use virtio_msg::{DevNum, QueueIndex};
use vmsg_driver::rng::RngDriver;
use vmsg_driver::{BusClient, Device, DmaPool, Queue, QueueOptions, Wanted};

use crate::station::{BASE, PATIENCE, Process, Station, until};

const DEVICE: DevNum = DevNum(0);

fn pool() -> DmaPool {
    DmaPool::new("test", BASE, 4 << 20).expect("memory")
}

/// The first of these programs that is there.
fn find(names: &[&str]) -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.push("/usr/libexec".into());
    dirs.push("/usr/lib/qemu".into());
    dirs.push(home.join(".cache/vmsg/vhost-device/bin"));
    let all = names
        .iter()
        .flat_map(|name| dirs.iter().map(move |dir| dir.join(name)));
    let found = all.into_iter().find(|path| path.exists());
    if found.is_none() {
        eprintln!("{names:?}: not installed, not tried");
    }
    found
}

fn daemon(station: &Station, command: &mut Command, socket: &str) -> Process {
    let process = Process::start(
        command
            .current_dir(station.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(station.path("daemon.log")).expect("a log")),
    );
    let path = station.path(socket);
    until("the daemon's socket", || path.exists().then_some(()));
    process
}

#[test]
fn random_bytes_come_from_vhost_device_rng() {
    let Some(program) = find(&["vhost-device-rng"]) else {
        return;
    };
    let station = Station::new();
    let _daemon = daemon(&station, Command::new(&program).args(["-s", "rng"]), "rng0");
    let socket = station.path("rng0");
    let _serve = station.serve(&format!("vhost-user,type=rng,socket={}", socket.display()));
    for doorbells in [true, false] {
        let pool = pool();
        let options = QueueOptions {
            doorbells,
            ..QueueOptions::default()
        };
        let mut rng = RngDriver::new(station.client(&pool), DEVICE, &pool, &options).expect("rng");
        for _ in 0..3 {
            let mut bytes = vec![0; 20_000];
            rng.fill(&mut bytes, PATIENCE).expect("filled");
            let kinds = (0..=255u8).filter(|value| bytes.contains(value)).count();
            assert_eq!(kinds, 256);
        }
    }
}

/// A request of FUSE: its header (linux/fuse.h, fuse_in_header) and `body`.
fn fuse(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).expect("short");
    let mut bytes = Vec::new();
    bytes.extend(len.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Asks, and returns the error and what follows the header of the answer.
fn ask(
    station: &Station,
    client: &mut BusClient,
    queue: &mut Queue<'_>,
    pool: &DmaPool,
    request: &[u8],
) -> (i32, Vec<u8>) {
    let from = pool.alloc(request.len()).expect("room");
    from.ram().write(0, request);
    let to = pool.alloc(4096).expect("room");
    let len = u32::try_from(request.len()).expect("short");
    let added = queue
        .ring()
        .add(&[(from.addr(), len)], &[(to.addr(), 4096)]);
    added.expect("room");
    queue.publish(client).expect("kicked");
    let end = Instant::now() + PATIENCE;
    let used = loop {
        if let Some(used) = queue.ring().pop_used().expect("sound") {
            break used;
        }
        if Instant::now() >= end {
            for name in ["daemon.log", "serve.log"] {
                let log = std::fs::read_to_string(station.path(name));
                eprintln!("{name}: {}", log.unwrap_or_default());
            }
            panic!("no answer");
        }
        std::thread::yield_now();
    };
    let mut bytes = vec![0; used.written as usize];
    to.ram().read(0, &mut bytes);
    let error = i32::from_le_bytes(bytes[4..8].try_into().expect("four"));
    (error, bytes.split_off(16))
}

#[test]
fn a_folder_is_shared_by_virtiofsd() {
    let Some(program) = find(&["virtiofsd"]) else {
        return;
    };
    let is_root = rustix::process::geteuid().is_root();
    let is_old = program.starts_with("/usr/lib/qemu");
    if is_old && !is_root {
        eprintln!("the old virtiofsd wants root, not tried");
        return;
    }
    let station = Station::new();
    std::fs::create_dir(station.path("share")).expect("made");
    std::fs::write(station.path("share/file"), "in it").expect("written");
    let mut command = Command::new(&program);
    command.arg("--socket-path=fs");
    if is_old {
        let source = station.path("share");
        command.args(["-f", "-d", "-o", "sandbox=chroot", "-o"]);
        command.arg(format!("source={}", source.display()));
    } else {
        command.args(["--shared-dir", "share", "--sandbox", "none"]);
    }
    let mut process = daemon(&station, &mut command, "fs");
    let socket = station.path("fs");
    let _serve = station.serve(&format!(
        "vhost-user,type=fs,tag=share,socket={}",
        socket.display()
    ));
    // Two drivers, one after the other: the daemon would end with its connection.
    for _ in 0..2 {
        let pool = pool();
        let mut client = station.client(&pool);
        let info = client.device_info(DEVICE).expect("there");
        assert_eq!((info.device_id, info.max_queues), (26, 2));
        let mut tag = [0; 6];
        client.read_config(DEVICE, 0, &mut tag).expect("read");
        assert_eq!(&tag, b"share\0");
        let mut device = Device::open(&mut client, DEVICE, &Wanted::default()).expect("opened");
        let options = QueueOptions::default();
        let queues = [0, 1].map(|index| {
            let index = QueueIndex(index);
            Queue::create(&mut client, &mut device, &pool, index, &options).expect("a queue")
        });
        device.start(&mut client).expect("started");
        let [_high, mut queue] = queues;
        // FUSE_INIT: version 7.31, no flags.
        let mut init = Vec::new();
        for word in [7, 31, 4096, 0] {
            init.extend(u32::to_le_bytes(word));
        }
        let (error, answer) = ask(
            &station,
            &mut client,
            &mut queue,
            &pool,
            &fuse(26, 2, 0, &init),
        );
        assert_eq!((error, answer[0]), (0, 7));
        // FUSE_LOOKUP in the root.
        let (error, answer) = ask(
            &station,
            &mut client,
            &mut queue,
            &pool,
            &fuse(1, 4, 1, b"file\0"),
        );
        assert_eq!(error, 0);
        assert!(answer.len() >= 128);
        let (error, _) = ask(
            &station,
            &mut client,
            &mut queue,
            &pool,
            &fuse(1, 6, 1, b"none\0"),
        );
        assert_eq!(error, -2);
        device.reset(&mut client).expect("reset");
    }
    process.kill();
    until("the end of the daemon", || {
        station.log().contains("the daemon is gone").then_some(())
    });
}
