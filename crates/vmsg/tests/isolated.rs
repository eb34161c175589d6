// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device host can see of a guest behind `vmsg proxy --front vfio-user,isolate=on`: a secret in the guest's memory is looked for in all
//! that the process of `vmsg serve` has mapped and in all files it holds, before, during and after traffic.

#[path = "../../vmsg-proxy/tests/vfio/mod.rs"]
mod vfio;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vfio::client::Client;
use vfio::{Guest, Ram};

/// Bytes looked at in one go.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;

/// A program that is ended when it is not needed any more.
struct Program(Child);

impl Program {
    /// Starts `vmsg` and waits until it says `ready` so many times.
    fn start(args: &[&str], ready: usize) -> Program {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(args)
            .env("VMSG_LOG", "error")
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let out = child.stdout.take().expect("piped");
        let mut lines = BufReader::new(out).lines();
        for _ in 0..ready {
            let line = lines.next().expect("a line").expect("text");
            assert!(line.starts_with("ready"), "{line}");
        }
        // What it says later goes nowhere.
        std::thread::spawn(move || lines.for_each(drop));
        Program(child)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
        let status = self.0.wait().expect("reaped");
        if !std::thread::panicking() {
            assert!(status.success(), "{status}");
        }
    }
}

/// Whether `needle` is in `hay`, of which most pages are empty.
fn holds(hay: &[u8], needle: &[u8]) -> bool {
    const EMPTY: [u8; PAGE] = [0; PAGE];
    let mut from = 0;
    while from < hay.len() {
        let to = hay.len().min(from + PAGE);
        if hay[from..to] != EMPTY[..to - from] {
            // It may begin in a page before that looks empty, and end in one behind.
            let begin = from.saturating_sub(needle.len());
            let end = hay.len().min(to + needle.len());
            if hay[begin..end].windows(needle.len()).any(|w| w == needle) {
                return true;
            }
        }
        from = to;
    }
    false
}

/// Whether `needle` lies between `start` and `end` of what `file` gives. What cannot be read is nobody's.
fn holds_in(file: &File, start: u64, end: u64, needle: &[u8]) -> bool {
    let mut chunk = vec![0; CHUNK + needle.len()];
    let mut at = start;
    while at < end {
        let most = usize::try_from(end - at).map_or(chunk.len(), |left| left.min(chunk.len()));
        let len = file.read_at(&mut chunk[..most], at).unwrap_or(0);
        if holds(&chunk[..len], needle) {
            return true;
        }
        at += if len > needle.len() && len == chunk.len() {
            CHUNK as u64
        } else {
            most as u64
        };
    }
    false
}

/// Where in the mappings of a process `needle` is.
fn in_mappings(pid: u32, needle: &[u8]) -> Vec<String> {
    let mut maps = String::new();
    let mut file = File::open(format!("/proc/{pid}/maps")).expect("its maps");
    file.read_to_string(&mut maps).expect("text");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("its memory");
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (range, rights) = (
            fields.next().expect("a range"),
            fields.next().expect("rights"),
        );
        // Programs and libraries, and what the kernel provides.
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        if holds_in(&memory, number(start), number(end), needle) {
            found.push(line.to_owned());
        }
    }
    found
}

/// Which files that a process holds have `needle` in them.
fn in_files(pid: u32, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("its files") {
        let path = entry.expect("a file").path();
        // It may be closed by now.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if !meta.is_file() {
            continue;
        }
        let name = fs::read_link(&path).unwrap_or_default();
        if File::open(&path).is_ok_and(|file| holds_in(&file, 0, meta.len(), needle)) {
            found.push(name);
        }
    }
    found
}

fn everywhere(pid: u32, needle: &[u8]) -> Vec<String> {
    let mut found = in_mappings(pid, needle);
    let files = in_files(pid, needle);
    found.extend(files.iter().map(|file| file.display().to_string()));
    found
}

fn random(bytes: &mut [u8]) {
    let mut urandom = File::open("/dev/urandom").expect("urandom");
    urandom.read_exact(bytes).expect("random bytes");
}

/// Puts the secret into each page of the guest's memory, and into all that the device is to fill.
fn plant(guest: &mut Guest<Client>, secret: &[u8]) {
    for page in (0..vfio::RAM).step_by(PAGE) {
        // Not where rings are, which are shorter than that.
        let page = usize::try_from(page).expect("small");
        guest.ram.write(page + PAGE - 256, secret);
    }
    guest.stale = secret.to_vec();
}

struct Scene {
    dir: tempfile::TempDir,
    // In this order.
    _proxy: Program,
    serve: Program,
}

impl Scene {
    fn new(keys: &str) -> Scene {
        let dir = tempfile::tempdir().expect("a folder");
        let at = dir.path().display();
        let bus = format!("unix,path={at}/bus");
        let serve = Program::start(
            &[
                "serve",
                "--bus",
                &bus,
                "--device",
                "rng",
                "--device",
                "net,backend=none",
                "--keep",
                "0",
            ],
            1,
        );
        let rng = format!("vfio-user,socket={at}/rng,dev=rng0{keys}");
        let net = format!("vfio-user,socket={at}/net,dev=net0{keys}");
        let proxy = Program::start(
            &["proxy", "--bus", &bus, "--front", &rng, "--front", &net],
            2,
        );
        Scene {
            dir,
            _proxy: proxy,
            serve,
        }
    }

    fn guest(&self, device: &str) -> Guest<Client> {
        let path: &Path = self.dir.path();
        Guest::new(&path.join(device), Ram::shared())
    }
}

/// Traffic of both devices; `sent` goes out with each frame.
fn traffic(rng: &mut Guest<Client>, net: &mut Guest<Client>, sent: &[u8], rounds: usize) {
    for round in 0..rounds {
        rng.ask(0, 64 + round % 512);
        assert!(!rng.answer(0).is_empty());
        let mut frame = vec![0; 12];
        frame.extend(std::iter::repeat_n(sent, 2 + round % 20).flatten());
        net.tell(1, &frame);
        assert!(net.answer(1).is_empty());
    }
}

#[test]
fn a_device_host_behind_isolate_never_sees_what_the_guest_does_not_send() {
    let (mut secret, mut sent) = ([0; 32], [0; 32]);
    random(&mut secret);
    random(&mut sent);
    let scene = Scene::new(",isolate=on,segment=8M");
    let pid = scene.serve.pid();
    let nowhere = |when: &str| {
        let found = everywhere(pid, &secret);
        assert!(found.is_empty(), "{when}: {found:?}");
    };
    let (mut rng, mut net) = (scene.guest("rng"), scene.guest("net"));
    plant(&mut rng, &secret);
    plant(&mut net, &secret);
    nowhere("before the drivers");
    rng.start(1);
    net.start(2);
    plant(&mut rng, &secret);
    plant(&mut net, &secret);
    // Buffers that are never filled, full of the secret.
    for _ in 0..16 {
        net.ask(0, 2048);
    }
    nowhere("before traffic");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                nowhere("during traffic");
            }
        });
        let traffic = scope.spawn(|| {
            for _ in 0..20 {
                traffic(&mut rng, &mut net, &sent, 100);
            }
        });
        let result = traffic.join();
        over.store(true, Ordering::SeqCst);
        result.expect("traffic");
    });
    nowhere("after traffic");
    // What was sent was wiped from the memory that is lent.
    let mut left = in_mappings(pid, &sent);
    left.retain(|line| line.contains(" rw-s "));
    assert!(left.is_empty(), "{left:?}");
    rng.reset();
    net.reset();
    nowhere("after a reset");
    rng.start(1);
    drop(net);
    traffic_of_one(&mut rng);
    nowhere("after the end of a client");
}

fn traffic_of_one(rng: &mut Guest<Client>) {
    rng.ask(0, 64);
    assert!(rng.answer_within(0, Duration::from_secs(20)).is_some());
}

/// The same search finds it where it is: without `isolate`.
#[test]
fn a_device_host_to_which_memory_is_lent_sees_all_of_it() {
    let mut secret = [0; 32];
    random(&mut secret);
    let scene = Scene::new("");
    let mut rng = scene.guest("rng");
    rng.start(1);
    plant(&mut rng, &secret);
    traffic_of_one(&mut rng);
    let pid = scene.serve.pid();
    let found = in_mappings(pid, &secret);
    assert!(
        found.iter().any(|line| line.contains(" rw-s ")),
        "{found:?}"
    );
    // This process holds the guest's memory as a file.
    assert!(!in_files(std::process::id(), &secret).is_empty());
    drop(rng);
}
