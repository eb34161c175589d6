// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same behind vhost-user, with a segment of its own and with one in memory that the proxy and the device side have in common: all of
//! that is searched, too, also after one of them was killed.

use super::search::{everywhere, holds, in_mappings};
use super::vhost_guest::{self, Guest, Ram};
use super::{PAGE, Program, Scene, random, serve};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_mem::{Access, Mapping};
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Options, Session, Target};
use vmsg_proxy::shadow::{self, Common, Parts};

const COMMON: u64 = 8 << 20;
/// Where a process finds its folder, which is to be the proxy.
const FOLDER: &str = "VMSG_TEST_PROXY";

/// Puts the secret into each page of the guest's memory but those of rings, and into all that the device is to fill.
fn plant(guest: &mut Guest, secret: &[u8]) {
    let rings = 8 * vhost_guest::RINGS;
    for page in (rings..guest.ram.mapping.len()).step_by(PAGE) {
        guest.ram.mapping.ram().write(page + PAGE - 256, secret);
    }
    guest.stale = secret.to_vec();
}

fn traffic(rng: &mut Guest, net: &mut Guest, sent: &[u8], rounds: usize) {
    for round in 0..rounds {
        rng.ask(0, &[], 64 + round % 512);
        assert!(!rng.answer(0).is_empty());
        let mut frame = vec![0; 12];
        frame.extend(std::iter::repeat_n(sent, 2 + round % 20).flatten());
        net.ask(1, &frame, 0);
        assert!(net.answer(1).is_empty());
    }
}

fn secrets() -> ([u8; 32], [u8; 32]) {
    let (mut secret, mut sent) = ([0; 32], [0; 32]);
    random(&mut secret);
    random(&mut sent);
    (secret, sent)
}

/// Traffic, while and after which `nowhere` is asked.
fn search_during(dir: &Path, secret: &[u8], sent: &[u8], nowhere: impl Fn(&str) + Sync) {
    let mut rng = Guest::connect(&dir.join("rng"), Ram::new());
    let mut net = Guest::connect(&dir.join("net"), Ram::new());
    plant(&mut rng, secret);
    plant(&mut net, secret);
    nowhere("before the drivers");
    rng.set_up(1);
    net.set_up(2);
    // Buffers that are never filled, full of the secret.
    for _ in 0..16 {
        net.ask(0, &[], 2048);
    }
    nowhere("before traffic");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                nowhere("during traffic");
            }
        });
        let traffic = scope.spawn(|| traffic(&mut rng, &mut net, sent, 1000));
        let result = traffic.join();
        over.store(true, Ordering::SeqCst);
        result.expect("traffic");
    });
    nowhere("after traffic");
    rng.stop();
    net.stop();
    nowhere("after a reset");
    rng.set_up(1);
    drop(net);
    rng.ask(0, &[], 64);
    rng.answer(0);
    nowhere("after the end of a front end");
}

#[test]
fn a_device_host_never_sees_what_a_guest_behind_vhost_user_does_not_send() {
    let (secret, sent) = secrets();
    let scene = Scene::new("vhost-user", ",isolate=on,segment=8M");
    let pid = scene.serve.pid();
    search_during(scene.dir.path(), &secret, &sent, |when| {
        let found = everywhere(pid, &secret);
        assert!(found.is_empty(), "{when}: {found:?}");
    });
    let mut left = in_mappings(pid, &sent);
    left.retain(|line| line.contains(" rw-s "));
    assert!(left.is_empty(), "{left:?}");
}

/// Without `isolate` the same search finds it.
#[test]
fn a_device_host_to_which_vhost_user_lends_memory_sees_all_of_it() {
    let (secret, _) = secrets();
    let scene = Scene::new("vhost-user", "");
    let mut rng = Guest::connect(&scene.dir.path().join("rng"), Ram::new());
    plant(&mut rng, &secret);
    rng.set_up(1);
    rng.ask(0, &[], 64);
    rng.answer(0);
    assert!(!in_mappings(scene.serve.pid(), &secret).is_empty());
}

/// This program as a proxy in a process of its own, whose fronts have their segments in the memory in common.
#[test]
#[ignore = "run by others, as another process"]
fn be_a_proxy() {
    let Some(dir) = std::env::var_os(FOLDER) else {
        return;
    };
    let dir = Path::new(&dir);
    let file = File::options()
        .read(true)
        .write(true)
        .open(dir.join("common"))
        .expect("memory in common");
    let mapping = Mapping::of_fd(file.as_fd(), 0, COMMON, Access::ReadWrite).expect("mapped");
    let common = Common::new(Arc::new(mapping), Arc::new(file.into()), 0, 1 << 32);
    let parts = Arc::new(Parts::new(vec![Some(3 << 20), None]));
    let common = Arc::new(common.expect("memory"));
    parts.provide(&common, 0..COMMON).expect("room");
    let bus = BusSpec::Unix(UnixSpec::new(dir.join("bus")));
    let mut running = Vec::new();
    for (front, name) in ["rng", "net"].into_iter().enumerate() {
        let session = Session::new(Target::Name(format!("{name}0")), Options::default());
        let source = Source::Bus(bus.connector("test"));
        let link = Link::start(name, session, source).expect("a link");
        let mut options = VhostUserOptions::new(dir.join(name));
        options.isolate = true;
        options.segment = shadow::Source::Common {
            parts: parts.clone(),
            front,
        };
        let front = VhostUserFront::start(name, link.handle(), options).expect("a front");
        running.push((link, front));
    }
    println!("\nready");
    // Until it is killed.
    loop {
        std::thread::park();
    }
}

/// Memory in common, as somebody before has left it.
fn fill_common(dir: &Path) {
    let len = usize::try_from(COMMON).expect("small");
    fs::write(dir.join("common"), vec![0x66; len]).expect("written");
}

fn unix(dir: &Path) -> String {
    format!("unix,path={}/bus", dir.display())
}

struct Bounce {
    dir: tempfile::TempDir,
    serve: Program,
    proxy: Program,
}

fn proxy(dir: &Path) -> Program {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["--exact", "bounce::be_a_proxy", "--ignored", "--nocapture"])
        .env(FOLDER, dir);
    Program::of(command, 1)
}

impl Bounce {
    fn new() -> Bounce {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
        fill_common(dir.path());
        Bounce {
            serve: serve(&unix(dir.path())),
            proxy: proxy(dir.path()),
            dir,
        }
    }

    fn guest(&self, device: &str) -> Guest {
        Guest::connect(&self.dir.path().join(device), Ram::new())
    }

    /// Whether it is in the memory in common.
    fn has(&self, needle: &[u8]) -> bool {
        let bytes = fs::read(self.dir.path().join("common")).expect("read");
        holds(&bytes, needle)
    }

    #[track_caller]
    fn until(&self, what: &str, so: impl Fn() -> bool) {
        for _ in 0..4000 {
            if so() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{what}");
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.proxy.kill();
    }
}

#[test]
fn the_memory_in_common_never_has_what_the_guest_does_not_send() {
    let (secret, sent) = secrets();
    let scene = Bounce::new();
    let pid = scene.serve.pid();
    search_during(scene.dir.path(), &secret, &sent, |when| {
        let found = everywhere(pid, &secret);
        assert!(found.is_empty(), "{when}: {found:?}");
        assert!(!scene.has(&secret), "{when}: in the memory in common");
    });
    assert!(!scene.has(&sent), "what was sent was not wiped");
}

#[test]
fn what_was_sent_is_wiped_though_the_device_host_or_the_proxy_is_killed_in_the_middle() {
    let (secret, sent) = secrets();
    let mut scene = Bounce::new();
    let frame: Vec<u8> = [0; 12].into_iter().chain(sent.repeat(40)).collect();
    let mut net = scene.guest("net");
    plant(&mut net, &secret);
    net.set_up(2);
    net.ask(1, &frame, 0);
    net.answer(1);
    for round in 0..3 {
        // The device host, and the driver gives up.
        scene.serve.kill();
        net.ask(1, &frame, 0);
        scene.until("it is on its way", || scene.has(&sent));
        net.stop();
        assert!(!scene.has(&sent), "{round}: wiped with the reset");
        // The same, and another device host does it.
        net.set_up(2);
        net.ask(1, &frame, 0);
        scene.until("it is on its way", || scene.has(&sent));
        scene.serve = serve(&unix(scene.dir.path()));
        assert!(net.answer(1).is_empty());
        assert!(!scene.has(&sent), "{round}: wiped when it was done");
        // The proxy: what it leaves stays until there is another one.
        scene.serve.kill();
        net.ask(1, &frame, 0);
        scene.until("it is on its way", || scene.has(&sent));
        scene.proxy.kill();
        assert!(scene.has(&sent));
        scene.proxy = proxy(scene.dir.path());
        assert!(!scene.has(&sent), "{round}: wiped before anything else");
        scene.serve = serve(&unix(scene.dir.path()));
        net = scene.guest("net");
        plant(&mut net, &secret);
        net.set_up(2);
        net.ask(1, &frame, 0);
        assert!(net.answer(1).is_empty());
        assert!(!scene.has(&secret) && !scene.has(&sent));
    }
}

/// The same with the programs as they are, on a bus that has nothing but memory.
#[test]
fn nothing_of_a_guest_is_in_the_memory_of_an_ivshmem_bus_with_bounce() {
    for kind in ["vhost-user", "vfio-user"] {
        let (secret, sent) = secrets();
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let at = dir.path().to_owned();
        let messages = at.join("messages");
        fs::write(&messages, vec![0; 1 << 20]).expect("written");
        fill_common(&at);
        let bus = format!(
            "ivshmem,file={},memory=bounce,ram={}",
            messages.display(),
            at.join("common").display()
        );
        let scene = Scene::on(dir, &bus, kind, "");
        let pid = scene.serve.pid();
        let nowhere = |when: &str| {
            let found = everywhere(pid, &secret);
            assert!(found.is_empty(), "{kind}, {when}: {found:?}");
            for file in ["common", "messages"] {
                let bytes = fs::read(at.join(file)).expect("read");
                assert!(!holds(&bytes, &secret), "{kind}, {when}: in {file}");
            }
        };
        if kind == "vhost-user" {
            search_during(&at, &secret, &sent, nowhere);
        } else {
            let mut rng = scene.guest("rng");
            let mut net = scene.guest("net");
            super::plant(&mut rng, &secret);
            super::plant(&mut net, &secret);
            rng.start(1);
            net.start(2);
            super::plant(&mut rng, &secret);
            super::plant(&mut net, &secret);
            nowhere("before traffic");
            super::traffic(&mut rng, &mut net, &sent, 200);
            nowhere("after traffic");
        }
        let bytes = fs::read(at.join("common")).expect("read");
        assert!(!holds(&bytes, &sent), "{kind}: what was sent was not wiped");
    }
}
