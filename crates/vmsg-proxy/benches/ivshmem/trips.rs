// SPDX-License-Identifier: Apache-2.0 OR MIT
//! There and back.

use crate::measure::{Case, Places, Plan, compare, run_on, time};
use crate::other::{BACK, Other, POLL, Ringer, THERE, WORDS, shared};
use crate::{PATIENCE, Site, connect_to, file};
use std::sync::atomic::Ordering;
use std::time::Duration;
use vmsg_bus::DriverBus;
use vmsg_driver::{Client, Sleep};

type Connected = Client<DriverBus, Sleep, Vec<u8>>;

/// Who asks. Its bus is not looked at while others are measured: on a busy machine that takes so long that it is taken for dead, and comes
/// anew.
struct Driver {
    client: Connected,
    bus: String,
    spin: Duration,
}

fn client(bus: &str, spin: Duration) -> Connected {
    let bus = connect_to(bus);
    let room = 2 * bus.capabilities().max_message_size;
    let client = Client::new(bus, Sleep::spinning(spin), vec![0; room]);
    let mut client = client.expect("room");
    client.set_timeout(PATIENCE);
    client
}

/// Somebody who answers, and the client who asks.
fn pair(places: &Places, bus: &str, kind: &str, spin: Duration) -> (Other, Driver) {
    let micros = spin.as_micros().to_string();
    let what = [kind, bus, &micros];
    // A device host sleeps as it likes.
    let what = if kind == "host" { &what[..2] } else { &what };
    let other = Other::start(&places.there, &places.here, what);
    let driver = Driver {
        client: client(bus, spin),
        bus: bus.to_owned(),
        spin,
    };
    (other, driver)
}

fn ping(driver: &mut Driver, rounds: u32) -> f64 {
    // The first wakes who has fallen asleep.
    if driver.client.ping(0).is_err() {
        driver.client = client(&driver.bus, driver.spin);
        driver.client.ping(0).expect("answered");
    }
    let mut number = 0;
    time(rounds, || {
        number += 1;
        driver.client.ping(number).expect("answered");
    })
}

/// Everybody sleeps until woken.
pub(crate) fn asleep(plan: Plan, places: &Places, site: &Site) {
    run_on(&places.here);
    let rounds = plan.round_trips;
    let (_bells, there, back) = Other::bells(&places.there, &places.here);
    let mut ringer = Ringer::new(&site.socket());
    let id = ringer.id().0.to_string();
    let socket = site.socket();
    let what = ["doorbells", socket.to_str().expect("a path"), &id];
    let _doorbells = Other::start(&places.there, &places.here, &what);
    let peer = ringer.other();
    ringer.wait();
    let never = Duration::ZERO;
    let name = |kind: &str| format!("{kind}-{}", places.name.replace(' ', "-"));
    let one = |bus: &str, kind| pair(places, bus, kind, never);
    let (_a, mut unix) = one(&site.unix(&name("echo")), "echo");
    let (_b, mut amp) = one(&site.ivshmem("amp", 0x1_0000), "echo");
    let (_c, mut spsc) = one(&site.ivshmem("spsc", 0x2_0000), "echo");
    let (_d, mut unix_host) = one(&site.unix(&name("host")), "host");
    let (_e, mut amp_host) = one(&site.ivshmem("amp", 0x3_0000), "host");
    let cases = vec![
        Case::new("bare eventfds, read(2)", || {
            time(rounds, || {
                rustix::io::write(&there, &1u64.to_ne_bytes()).expect("an eventfd");
                rustix::io::read(&back, &mut [0; 8]).expect("an eventfd");
            })
        }),
        Case::new("doorbells of ivshmem", || {
            time(rounds, || {
                ringer.ring(peer);
                ringer.wait();
            })
        }),
        Case::new("PING and answer, unix", || ping(&mut unix, rounds)),
        Case::new("PING and answer, ivshmem amp", || ping(&mut amp, rounds)),
        Case::new("PING and answer, ivshmem spsc", || ping(&mut spsc, rounds)),
        Case::new("PING of a device host, unix", || {
            ping(&mut unix_host, rounds)
        }),
        Case::new("PING of a device host, ivshmem amp", || {
            ping(&mut amp_host, rounds)
        }),
    ];
    compare(plan, places.name, cases);
}

/// Nobody sleeps, on two CPUs.
pub(crate) fn polling(plan: Plan, places: &Places, site: &Site) {
    run_on(&places.here);
    let rounds = plan.requests / 10;
    let path = site.path("words");
    file(&path, WORDS);
    let what = ["words", path.to_str().expect("a path")];
    let _words = Other::start(&places.there, &places.here, &what);
    let memory = shared(&path);
    let word = |at| memory.ram().atomic_u32(at).expect("a word inside");
    let (there, back) = (word(THERE), word(BACK));
    let mut number = 0u32;
    let mut trip = || {
        number = number.wrapping_add(1);
        there.store(number, Ordering::Release);
        while back.load(Ordering::Acquire) != number {
            std::hint::spin_loop();
        }
    };
    let one = |bus: &str| pair(places, bus, "echo", POLL);
    let (_a, mut unix) = one(&site.unix("polling"));
    let (_b, mut amp) = one(&site.ivshmem("amp", 0x4_0000));
    let (_c, mut spsc) = one(&site.ivshmem("spsc", 0x5_0000));
    // Those who polled last are to be asleep when the next ones begin.
    let rest = || std::thread::sleep(POLL + Duration::from_millis(2));
    let cases = vec![
        Case::new("a word in memory", || {
            rest();
            trip();
            time(rounds, &mut trip)
        }),
        Case::new("PING and answer, unix", || {
            rest();
            ping(&mut unix, rounds)
        }),
        Case::new("PING and answer, ivshmem amp", || {
            rest();
            ping(&mut amp, rounds)
        }),
        Case::new("PING and answer, ivshmem spsc", || {
            rest();
            ping(&mut spsc, rounds)
        }),
    ];
    compare(plan, places.name, cases);
}
