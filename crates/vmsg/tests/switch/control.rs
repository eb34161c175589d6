// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The switch is changed all the time, under traffic.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmsg_net::switch::{
    Mirror, PortChange, PortConfig, Rate, Reason, Rule, SwitchConfig, Unknown, Vlans,
};

use crate::frames::BROADCAST;
use crate::random::Random;
use crate::stand::{Stand, Station};

/// Changes of each of the threads.
const CHANGES: u32 = 250;
const THREADS: u32 = 4;

/// One change of a port that is not among those that talk.
fn change(stand: &Stand, random: &mut Random, thread: u32) {
    let name = format!("w{}", random.below(12));
    let control = &stand.control;
    let port = |change: PortChange| control.set_port(&name, change);
    let result = match random.below(10) {
        0 => port(PortChange {
            link: Some(random.chance(1, 2)),
            ..PortChange::default()
        }),
        1 => port(PortChange {
            vlan: Some(match random.below(3) {
                0 => Vlans::Access(7),
                _ => Vlans::Plain,
            }),
            ..PortChange::default()
        }),
        2 => port(PortChange {
            rate_out: Some(Rate::from_bits(8 * random.next().clamp(1, 1 << 20))),
            storm: Some(random.chance(1, 2).then_some(100)),
            ..PortChange::default()
        }),
        3 => port(PortChange {
            macs: Some(random.below(300)),
            ..PortChange::default()
        }),
        4 => {
            let path = std::env::temp_dir()
                .join(format!("vmsg-switch-{}-{thread}.pcap", std::process::id()));
            let on = control.capture(&name, Some(Mirror::new(&path)));
            let _ = std::fs::remove_file(&path);
            on.and_then(|()| control.capture(&name, None))
        }
        5 => control.flush(Some(&name)),
        6 => control.macs().map(|macs| assert!(macs.len() >= 8)),
        7 => control.set_unknown(match random.below(2) {
            0 => Unknown::Flood,
            _ => Unknown::Drop,
        }),
        _ => {
            let allow = random.chance(1, 2);
            let text = format!("{name} <> w{}", random.below(12));
            control.add_rules(Rule::parse(allow, &text).expect("a rule"))
        }
    };
    result.unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn a_thousand_changes_under_traffic_are_all_answered_and_other_ports_lose_nothing() {
    let mut config = SwitchConfig::new("s0");
    config.rules = Rule::parse(true, "t* <> t*").expect("a rule");
    config
        .rules
        .extend(Rule::parse(true, "w* <> w*").expect("a rule"));
    config.unknown = Unknown::Drop;
    let stand = Stand::new(config);
    let mut talkers: Vec<Station> = (0..8)
        .map(|id| stand.plug(PortConfig::new(format!("t{id}")), id))
        .collect();
    let mut wild: Vec<Station> = (8..20)
        .map(|id| stand.plug(PortConfig::new(format!("w{}", id - 8)), id))
        .collect();
    let before = stand.control.report().changes;
    let (busy, answered) = (AtomicBool::new(true), AtomicU32::new(0));
    let rounds = std::thread::scope(|scope| {
        let (stand, busy, answered) = (&stand, &busy, &answered);
        let changing: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut random = Random::new(u64::from(thread));
                    for _ in 0..CHANGES {
                        change(stand, &mut random, thread);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let noise = scope.spawn(move || {
            // Those that are changed are not idle either.
            while busy.load(Ordering::Relaxed) {
                for station in &mut wild {
                    let frames: Vec<Vec<u8>> = (0..4).map(|_| station.frame(BROADCAST)).collect();
                    station.send(&frames);
                    station.drain();
                }
            }
            wild
        });
        let talk = scope.spawn(move || {
            let mut rounds = 0;
            while busy.load(Ordering::Relaxed) || rounds < 10 {
                for pair in talkers.chunks_exact_mut(2) {
                    let [one, two] = pair else { unreachable!() };
                    one.exchange(two, 16);
                    two.exchange(one, 16);
                }
                rounds += 1;
            }
            rounds
        });
        let ends: Vec<_> = changing.into_iter().map(|thread| thread.join()).collect();
        busy.store(false, Ordering::Relaxed);
        let rounds = talk.join().expect("no frame is lost");
        noise.join().expect("a working device");
        ends.into_iter().for_each(|end| end.expect("an answer"));
        rounds
    });
    assert_eq!(answered.into_inner(), THREADS * CHANGES);
    assert!(stand.control.report().changes > before);
    let ports = stand.ports();
    for id in 0..8 {
        let port = &ports[&format!("t{id}")];
        assert_eq!(port.input.total().frames, rounds * 16);
        assert_eq!(port.output.total().frames, rounds * 16);
        assert_eq!(port.dropped_in.total() + port.dropped_out.total(), 0);
    }
    for id in 0..12 {
        let port = &ports[&format!("w{id}")];
        assert_eq!(port.dropped_out.get(Reason::Gone), 0);
    }
}
