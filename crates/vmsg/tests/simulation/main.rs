// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Deterministic simulation: a guest, its session, the bus, the device host
//! and a worker in one thread. A seed decides what happens next: messages are
//! delivered, lost or doubled, the host is killed and comes back, the guest
//! starts over, time passes. Whatever happens, nothing panics, every request
//! of a guest that lives on is answered once and rightly, and all comes to rest.
//!
//! `VMSG_SIM_CASES` sets the number of cases of each kind, `VMSG_SIM_SEED`
//! repeats a single one.

mod disk;
mod echo;
mod guest;
mod line;
mod matrix;
mod process;
mod random;
mod setting;
mod staged;
mod wire;
mod world;

use std::time::Instant;

use guest::Memory;
use line::Bus;
use setting::{Faults, Kind, Outcome, Setting};
use world::World;

const STEPS: usize = 1000;

const WITH_EVENTFDS: Setting = Setting {
    bus: Bus::Unix,
    kind: Kind::Echo,
    eventfds: true,
    keeps_inflight: false,
    iommu: false,
};

fn cases() -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("VMSG_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("VMSG_SIM_CASES").unwrap_or(100)),
    }
}

fn run(name: &str, faults: Faults, setting: Setting) -> Outcome {
    let (first, count) = cases();
    let memory = Memory::of(setting.bus);
    let begin = Instant::now();
    let mut sum = Outcome::default();
    for seed in first..first + count {
        let result =
            std::panic::catch_unwind(|| World::new(seed, faults, setting, &memory).run(STEPS));
        let Ok(outcome) = result else {
            panic!("{name}: seed {seed} fails; repeat it with VMSG_SIM_SEED={seed}");
        };
        sum.completed += outcome.completed;
        sum.kills += outcome.kills;
        sum.replays += outcome.replays;
        sum.dropped += outcome.dropped;
        sum.reboots += outcome.reboots;
        sum.refused += outcome.refused;
        sum.unplugs += outcome.unplugs;
        sum.waits += outcome.waits;
    }
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    println!("{name}: {count} cases, {rate:.0} a second, {sum:?}");
    assert!(
        count == 1 || sum.completed > 0,
        "nothing was ever asked for"
    );
    sum
}

#[test]
fn without_faults_every_request_is_answered() {
    let outcome = run("no faults", Faults::default(), Setting::default());
    assert_eq!((outcome.kills, outcome.dropped), (0, 0));
}

#[test]
fn a_killed_host_is_replaced_under_the_guest() {
    let outcome = run(
        "kills",
        Faults {
            kills: true,
            ..Faults::default()
        },
        Setting::default(),
    );
    assert!(outcome.kills > 0 && outcome.replays > 0);
}

#[test]
fn a_killed_host_is_replaced_under_a_guest_with_eventfds() {
    let outcome = run(
        "kills, eventfds",
        Faults {
            kills: true,
            ..Faults::default()
        },
        WITH_EVENTFDS,
    );
    assert!(outcome.kills > 0 && outcome.replays > 0);
}

#[test]
fn a_guest_can_start_over_at_any_step() {
    let outcome = run(
        "reboots",
        Faults {
            reboots: true,
            ..Faults::default()
        },
        Setting::default(),
    );
    assert!(outcome.reboots > 0);
}

#[test]
fn lost_and_doubled_messages_do_no_harm() {
    let faults = Faults {
        drops: true,
        duplicates: true,
        ..Faults::default()
    };
    let outcome = run("drops and duplicates", faults, WITH_EVENTFDS);
    assert!(outcome.dropped > 0);
}

#[test]
fn everything_at_once() {
    let faults = Faults {
        drops: true,
        duplicates: true,
        kills: true,
        reboots: true,
        ..Faults::default()
    };
    run("everything", faults, WITH_EVENTFDS);
}

#[test]
fn the_same_seed_is_the_same_case() {
    let faults = Faults {
        drops: true,
        kills: true,
        reboots: true,
        ..Faults::default()
    };
    let memory = Memory::of(Bus::Unix);
    let one = World::new(7, faults, Setting::default(), &memory).run(STEPS);
    let two = World::new(7, faults, Setting::default(), &memory).run(STEPS);
    assert_eq!(one, two);
}

const DISK: Setting = Setting {
    kind: Kind::Disk,
    ..WITH_EVENTFDS
};

const KILLS: Faults = Faults {
    drops: false,
    duplicates: false,
    kills: true,
    reboots: false,
    early: false,
    cuts: false,
    hangs: false,
    unplugs: false,
};

#[test]
fn requests_that_overtake_each_other_survive_a_killed_host() {
    for eventfds in [false, true] {
        let setting = Setting { eventfds, ..DISK };
        let outcome = run("kills, out of order", KILLS, setting);
        assert!(outcome.kills > 0 && outcome.replays > 0);
        assert_eq!(outcome.refused, 0, "there is a record");
    }
    let setting = Setting {
        keeps_inflight: true,
        ..DISK
    };
    let outcome = run("kills, out of order, record of the front", KILLS, setting);
    assert_eq!(outcome.refused, 0, "there is a record");
}

#[test]
fn requests_that_overtake_each_other_survive_everything_at_once() {
    let faults = Faults {
        drops: true,
        duplicates: true,
        kills: true,
        reboots: true,
        ..Faults::default()
    };
    run("everything, out of order", faults, DISK);
}

#[test]
fn buses_without_descriptors_go_on_in_order_and_say_so_where_they_cannot() {
    for bus in [Bus::Common, Bus::Bare, Bus::BareR1] {
        let setting = |kind| Setting {
            bus,
            kind,
            eventfds: false,
            keeps_inflight: false,
            iommu: false,
        };
        let outcome = run("bare, kills", KILLS, setting(Kind::Echo));
        assert_eq!(outcome.refused, 0, "the queue says where it stands");
        let outcome = run("bare, kills, out of order", KILLS, setting(Kind::Disk));
        assert!(outcome.refused > 0, "nobody knows what is done");
    }
}

#[test]
fn windows_that_come_and_go_with_each_request_survive_killed_hosts_and_reboots() {
    for kind in [Kind::Echo, Kind::Disk, Kind::Net] {
        for reboots in [false, true] {
            let faults = Faults { reboots, ..KILLS };
            let setting = Setting {
                kind,
                iommu: true,
                ..WITH_EVENTFDS
            };
            let outcome = run("a window for each request, kills", faults, setting);
            assert!(outcome.kills > 0 && outcome.replays > 0);
            assert_eq!(
                outcome.refused, 0,
                "every address was mapped when it was used"
            );
        }
    }
}

/// Requests that outlive calls and connections write to the memory of the guest that has asked for them, and to nobody else's: a guest that begins anew puts
/// its queues there at once.
#[test]
fn memory_of_a_guest_that_has_ended_is_not_written_to_by_requests_that_take_long() {
    for (kills, drops) in [(false, false), (true, false), (true, true)] {
        for keeps_inflight in [false, true] {
            let faults = Faults {
                kills,
                drops,
                reboots: true,
                cuts: true,
                hangs: true,
                ..Faults::default()
            };
            let setting = Setting {
                keeps_inflight,
                ..DISK
            };
            let outcome = run("slow disk, cut off, reboots", faults, setting);
            let single = cases().1 == 1;
            assert!(single || (outcome.reboots > 0 && outcome.waits > 0));
        }
    }
}

/// The guest ends while memory is still to be taken back from a host that is gone.
#[test]
fn a_guest_that_ends_behind_what_is_held_back_leaves_nothing_of_itself() {
    let setting = Setting {
        iommu: true,
        ..DISK
    };
    let faults = Faults {
        reboots: true,
        ..KILLS
    };
    let memory = Memory::of(Bus::Unix);
    let outcome = World::new(184, faults, setting, &memory).run(STEPS);
    assert!(outcome.reboots > 0);
    assert_eq!(outcome.refused, 0, "the next one has its own queues");
}

const VIEWS: Setting = Setting {
    bus: Bus::Common,
    kind: Kind::Echo,
    eventfds: false,
    keeps_inflight: false,
    iommu: false,
};

#[test]
fn memory_in_scattered_places_survives_everything_at_once() {
    for kind in [Kind::Echo, Kind::Net] {
        for iommu in [false, true] {
            let faults = Faults {
                // A kick is a message there.
                drops: false,
                // Buffers that are shown one by one are counted.
                duplicates: !iommu,
                kills: true,
                reboots: true,
                ..Faults::default()
            };
            let setting = Setting {
                kind,
                iommu,
                ..VIEWS
            };
            let outcome = run("views of common memory, everything", faults, setting);
            assert!(outcome.kills > 0 && outcome.replays > 0 && outcome.reboots > 0);
        }
    }
}

#[test]
fn views_of_common_memory_that_come_and_go_with_each_request_survive_killed_hosts() {
    for kind in [Kind::Echo, Kind::Net] {
        let setting = Setting {
            kind,
            iommu: true,
            ..VIEWS
        };
        let outcome = run("a view for each request, kills", KILLS, setting);
        assert_eq!(
            outcome.refused, 0,
            "every address was mapped when it was used"
        );
        let early = Faults {
            early: true,
            ..KILLS
        };
        let outcome = run("views taken away", early, setting);
        assert!(outcome.refused > 0, "nobody has noticed");
    }
}

/// The device either has done its work by then, or finds the address unmapped and needs a reset; it never touches the buffer.
#[test]
fn what_a_guest_has_unmapped_is_never_touched_and_using_it_stops_the_device() {
    for kind in [Kind::Echo, Kind::Disk, Kind::Net] {
        for kills in [false, true] {
            let faults = Faults {
                kills,
                early: true,
                ..Faults::default()
            };
            let setting = Setting {
                kind,
                iommu: true,
                ..WITH_EVENTFDS
            };
            let outcome = run("buffers taken away", faults, setting);
            assert!(outcome.refused > 0, "nobody has noticed");
        }
    }
}

#[test]
fn a_device_is_removed_and_another_one_added_at_any_step() {
    for bus in [Bus::Unix, Bus::Common] {
        for kind in [Kind::Echo, Kind::Disk, Kind::Net] {
            for (kills, reboots) in [(false, false), (false, true), (true, true)] {
                // Without descriptors there is no record of what is in flight in queues that are not used in order.
                if bus == Bus::Common && kind == Kind::Disk {
                    continue;
                }
                let faults = Faults {
                    unplugs: true,
                    kills,
                    reboots,
                    ..Faults::default()
                };
                let setting = Setting {
                    bus,
                    kind,
                    eventfds: bus == Bus::Unix,
                    keeps_inflight: false,
                    iommu: false,
                };
                let outcome = run("unplugged", faults, setting);
                assert!(outcome.unplugs > 0 && outcome.replays > 0);
            }
        }
    }
    let setting = Setting {
        iommu: true,
        ..WITH_EVENTFDS
    };
    let faults = Faults {
        unplugs: true,
        ..KILLS
    };
    run("unplugged, a window for each request", faults, setting);
}
