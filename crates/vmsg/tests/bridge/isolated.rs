// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a daemon can see of a guest behind `vmsg proxy --front …,isolate=on`: its process is searched for a secret in the guest's memory.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::daemon::{ALL, Daemon};
use crate::search::{everywhere, in_files, in_mappings};
use crate::station::{Process, Station, has, until};
use crate::vhost_guest::{Guest, RINGS, Ram};

const PAGE: usize = 4096;
const SECTORS: u64 = 65536;
/// What each guest writes over and over.
const WRITTEN: usize = 4096;

fn secret() -> [u8; 32] {
    let mut bytes = [0; 32];
    let mut urandom = std::fs::File::open("/dev/urandom").expect("urandom");
    urandom.read_exact(&mut bytes).expect("random bytes");
    bytes
}

fn proxy(station: &Station, keys: &str) -> Process {
    let bus = format!("unix,path={}", station.path("bus").display());
    let front = station.path("front");
    let front = format!("vhost-user,socket={},dev=disk{keys}", front.display());
    Process::start(
        Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(["proxy", "--bus", &bus, "--front", &front])
            .env("VMSG_LOG", "error")
            .stdout(Stdio::null()),
    )
}

fn plant(guest: &mut Guest, secret: &[u8]) {
    for page in (RINGS..guest.ram.mapping.len()).step_by(PAGE) {
        guest.ram.mapping.ram().write(page + PAGE - 256, secret);
    }
    guest.stale = secret.to_vec();
}

fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// Writes, reads, compares.
fn use_it(guest: &mut Guest, rounds: u64) {
    for round in 0..rounds {
        let data: Vec<u8> = (0..=250u8)
            .cycle()
            .map(|byte| byte ^ round.to_le_bytes()[0])
            .take(WRITTEN)
            .collect();
        let sector = 8 + 8 * (round % 100);
        guest.ask(0, &request(1, sector, &data), 1);
        assert_eq!(guest.answer(0), [0]);
        guest.ask(0, &request(0, sector, &[]), WRITTEN + 1);
        let read = guest.answer(0);
        assert_eq!(read.len(), WRITTEN + 1);
        assert!(read[..WRITTEN] == data && read[WRITTEN] == 0, "{round}");
    }
}

#[test]
fn a_daemon_behind_isolate_sees_nothing_but_the_copies() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let station = Station::new();
    let image = station.image(SECTORS);
    let mut daemon = station.storage(&image, "");
    let serve = station.serve(&station.disk_spec());
    let _proxy = proxy(&station, ",isolate=on,segment=8M");
    let secret = secret();
    let mut guest = Guest::connect(&station.path("front"), Ram::new());
    plant(&mut guest, &secret);
    guest.set_up(1);
    for round in 0..3 {
        let pids = [daemon.pid(), serve.pid()];
        let nowhere = |when: &str| {
            for pid in pids {
                let found = everywhere(pid, &secret);
                assert!(found.is_empty(), "{when}: {found:?}");
            }
        };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    nowhere("during traffic");
                }
            });
            let traffic = scope.spawn(|| use_it(&mut guest, 300));
            let result = traffic.join();
            over.store(true, Ordering::SeqCst);
            result.expect("traffic");
        });
        nowhere("after traffic");
        // It may be followed by another, as without.
        if round < 2 {
            daemon.kill();
            let gone = |log: String| log.matches("the daemon is gone").count() > round;
            until("its end", || gone(station.log()).then_some(()));
            daemon = station.storage(&image, "");
        }
    }
    let image = std::fs::read(image).expect("readable");
    assert!(!crate::search::holds(&image, &secret));
}

/// The same search finds it where it is: without `isolate` the daemon has the guest's memory.
#[test]
fn a_daemon_to_which_memory_is_lent_sees_all_of_it() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let station = Station::new();
    let daemon = station.storage(&station.image(SECTORS), "");
    let _serve = station.serve(&station.disk_spec());
    let _proxy = proxy(&station, "");
    let secret = secret();
    let mut guest = Guest::connect(&station.path("front"), Ram::new());
    plant(&mut guest, &secret);
    guest.set_up(1);
    use_it(&mut guest, 1);
    assert!(!in_mappings(daemon.pid(), &secret).is_empty());
    // A file without a name, which it closes when it has mapped it.
    assert!(in_files(daemon.pid(), &secret).len() <= 1);
}

#[test]
fn what_a_daemon_is_given_behind_isolate_is_one_region_as_long_as_the_segment() {
    for protocol in [ALL, ALL & !(1 << 15), ALL & !(1 << 12)] {
        let station = Station::new();
        let daemon = Daemon::start(&station.path("disk"), protocol, Arc::default());
        let _serve = station.serve(&station.disk_spec());
        let _proxy = proxy(&station, ",isolate=on,segment=8M");
        let mut guest = Guest::connect(&station.path("front"), Ram::new());
        guest.set_up(2);
        use_it(&mut guest, 3);
        let lens: Vec<u64> = {
            let memory = daemon.shared.memory.lock().expect("sound");
            memory.iter().map(|(_, len)| *len).collect()
        };
        assert_eq!(lens, [8 << 20]);
        daemon.hang_up();
        until("the next one", || {
            (daemon.shared.connections.load(Ordering::SeqCst) > 1).then_some(())
        });
        use_it(&mut guest, 3);
        guest.stop();
        guest.set_up(2);
        use_it(&mut guest, 3);
    }
}
