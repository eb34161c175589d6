// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device host can see of a guest behind `vmsg proxy --front …,isolate=on`: a secret in the guest's memory is looked for in all
//! that the process of `vmsg serve` has mapped and in all files it holds, before, during and after traffic.

mod bounce;
mod killed_disk;
mod search;
#[path = "../../../vmsg-proxy/tests/vfio/mod.rs"]
mod vfio;
#[path = "../../../vmsg-proxy/tests/vhost/mod.rs"]
mod vhost_guest;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use search::{everywhere, in_files, in_mappings};
use vfio::client::Client;
use vfio::{Guest, Ram};

/// A program that is ended when it is not needed any more.
struct Program(Child);

const PAGE: usize = 4096;

impl Program {
    /// Starts `vmsg` and waits until it says `ready` so many times.
    fn start(args: &[&str], ready: usize) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command.args(args).env("VMSG_LOG", "error");
        Program::of(command, ready)
    }

    /// Another program that says so.
    fn of(mut command: Command, ready: usize) -> Program {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("started");
        let out = child.stdout.take().expect("piped");
        let mut lines = BufReader::new(out).lines();
        for _ in 0..ready {
            // A test program says other things before.
            let mut lines = lines.by_ref().map(|line| line.expect("text"));
            lines.find(|line| line.starts_with("ready")).expect("ready");
        }
        // What it says later goes nowhere.
        std::thread::spawn(move || lines.for_each(drop));
        Program(child)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    /// SIGKILL.
    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.0.try_wait().expect("a child").is_some() {
            return;
        }
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
        let status = self.0.wait().expect("reaped");
        if !std::thread::panicking() {
            assert!(status.success(), "{status}");
        }
    }
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

/// A device host with `rng0` and `net0`.
fn serve(bus: &str) -> Program {
    let args = ["serve", "--bus", bus, "--device", "rng"];
    let more = ["--device", "net,backend=none", "--keep", "0"];
    Program::start(&[&args[..], &more].concat(), 1)
}

impl Scene {
    fn new(kind: &str, keys: &str) -> Scene {
        let dir = tempfile::tempdir().expect("a folder");
        let at = dir.path().display();
        let bus = format!("unix,path={at}/bus");
        Scene::on(dir, &bus, kind, keys)
    }

    /// On a bus in that folder.
    fn on(dir: tempfile::TempDir, bus: &str, kind: &str, keys: &str) -> Scene {
        let at = dir.path().display();
        let serve = serve(bus);
        let rng = format!("{kind},socket={at}/rng,dev=rng0{keys}");
        let net = format!("{kind},socket={at}/net,dev=net0{keys}");
        let proxy = Program::start(
            &["proxy", "--bus", bus, "--front", &rng, "--front", &net],
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
    let scene = Scene::new("vfio-user", ",isolate=on,segment=8M");
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
    let scene = Scene::new("vfio-user", "");
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
