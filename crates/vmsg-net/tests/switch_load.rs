// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch under load: control while traffic runs, and senders that mean harm.

mod switching;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use switching::{Bench, Dice, EVERYBODY, Memory, World, everything, frame, mac, number};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{
    Control, Mirror, Port, PortChange, PortConfig, Reason, Rule, Switch, SwitchConfig, SwitchError,
    SwitchReport, Unknown, Vlans,
};
use vmsg_net::{Backend, Guest, Mac, Offloads, TxFrame, VnetHeader};

fn open() -> SwitchConfig {
    SwitchConfig {
        rules: vec![Rule::allow_all()],
        ..SwitchConfig::new("s0")
    }
}

fn plain(port: usize) -> PortConfig {
    PortConfig::new(format!("p{port}"))
}

/// Over all ports, what was handed out is what arrived and what was dropped there.
fn assert_sums(report: &SwitchReport) {
    let copies: u64 = report.ports.iter().map(|port| port.copies).sum();
    let ends =
        |port: &vmsg_net::switch::PortReport| port.output.total().frames + port.dropped_out.total();
    assert_eq!(copies, report.ports.iter().map(ends).sum::<u64>());
}

#[test]
fn a_thousand_changes_are_answered_while_traffic_runs_and_the_rest_does_not_notice() {
    const CHANGES: usize = 1000;
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut ports: Vec<Port> = Vec::new();
    let mut keys = Vec::new();
    for port in 0..8 {
        let mut port = bench.switch.add_port(plain(port)).unwrap();
        keys.push(bench.bring_up(&mut port, &everything()));
        ports.push(port);
    }
    // Two ports talk all the time; the others are changed in every way.
    let changes = |control: &Control, switch: &Switch, seed: u64| {
        let mut dice = Dice::new(seed);
        let mut extra: Vec<Port> = Vec::new();
        for change in 0..CHANGES / 2 {
            let name = format!("p{}", 2 + dice.below(6));
            let done = match dice.below(8) {
                0 => control
                    .add_rules(Rule::parse(dice.one_in(2), &format!("{name} <> p7")).unwrap()),
                1 => {
                    let rate = dice.one_in(2).then(|| "10M".parse().unwrap());
                    let (rate_in, rate_out) = (Some(rate), Some(rate));
                    control.set_port(
                        &name,
                        PortChange {
                            rate_in,
                            rate_out,
                            ..PortChange::default()
                        },
                    )
                }
                2 => {
                    let link = Some(dice.one_in(2));
                    control.set_port(
                        &name,
                        PortChange {
                            link,
                            ..PortChange::default()
                        },
                    )
                }
                3 => {
                    let vlan = Some([Vlans::Plain, Vlans::Access(7)][dice.below(2)].clone());
                    control.set_port(
                        &name,
                        PortChange {
                            vlan,
                            ..PortChange::default()
                        },
                    )
                }
                4 => control.flush(Some(&name)),
                5 => control.macs().map(|macs| assert!(macs.len() < 100)),
                6 => {
                    let name = format!("x{seed}-{change}");
                    extra.push(switch.add_port(PortConfig::new(name)).unwrap());
                    Ok(())
                }
                _ => match extra.pop() {
                    Some(port) => control.remove_port(port.name()),
                    None => Ok(()),
                },
            };
            done.unwrap();
        }
    };
    let finished = AtomicU64::new(0);
    let mut sent = 0u32;
    let mut longest = Duration::ZERO;
    thread::scope(|scope| {
        for seed in [1, 2] {
            let (control, switch) = (bench.switch.control(), bench.switch.clone());
            let finished = &finished;
            scope.spawn(move || {
                changes(&control, &switch, seed);
                finished.fetch_add(1, Ordering::Release);
            });
        }
        let mut dice = Dice::new(9);
        while finished.load(Ordering::Acquire) < 2 {
            let frames: Vec<Vec<u8>> = (0..32)
                .map(|n| frame(mac(1), mac(0), &[], sent + n, 64))
                .collect();
            let start = Instant::now();
            bench.now = start;
            assert_eq!(bench.send(&mut ports[0], &frames), 32);
            longest = longest.max(start.elapsed());
            sent += 32;
            bench.send(&mut ports[1], &[frame(mac(0), mac(1), &[], sent, 64)]);
            let other = 2 + dice.below(6);
            let noise = [frame(EVERYBODY, mac(other), &[], sent, 64)];
            bench.send(&mut ports[other], &noise);
            if dice.one_in(3) {
                bench.pump();
            }
        }
    });
    bench.pump();
    let got: Vec<u32> = bench
        .got(keys[1])
        .iter()
        .filter(|frame| frame[6..12] == mac(0))
        .map(|frame| number(frame))
        .collect();
    assert_eq!(got, (0..sent).collect::<Vec<u32>>(), "all, in order");
    println!("{sent} frames meanwhile; longest batch {longest:?}");
    let report = bench.control.report();
    assert_sums_but_for_removed(&report);
    assert!(report.changes > 500);
}

/// Ports that are gone have taken what they got with them.
fn assert_sums_but_for_removed(report: &SwitchReport) {
    let copies: u64 = report.ports.iter().map(|port| port.copies).sum();
    let ends: u64 = report
        .ports
        .iter()
        .map(|port| port.output.total().frames + port.dropped_out.total())
        .sum();
    assert!(ends <= copies);
}

#[test]
fn control_that_nobody_answers_gives_up_and_is_done_later() {
    let switch = Switch::new(open()).unwrap();
    let mut bench = Bench::new(switch, 1);
    let _port = bench.switch.add_port(plain(0)).unwrap();
    let control = bench.control.clone();
    let start = Instant::now();
    let refused = control.set_unknown(Unknown::Drop);
    assert!(matches!(refused, Err(SwitchError::NoAnswer)));
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(bench.control.report().changes, 0);
    bench.pump();
    assert_eq!(bench.control.report().changes, 2);
}

#[test]
fn what_was_checked_is_what_arrives_whatever_the_sender_writes_meanwhile() {
    let pinned = PortConfig {
        pin: vec![Mac(mac(0))],
        vlan: Vlans::Access(10),
        ..plain(0)
    };
    let receiver = PortConfig {
        vlan: Vlans::Trunk {
            allowed: "10:20".parse().unwrap(),
            native: None,
        },
        ..plain(1)
    };
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut from = bench.switch.add_port(pinned).unwrap();
    let mut to = bench.switch.add_port(receiver).unwrap();
    bench.bring_up(&mut from, &everything());
    let mut guest = everything();
    let key = bench.bring_up(&mut to, &guest);
    let good = frame(EVERYBODY, mac(0), &[], 1, 200);
    let bad = frame(EVERYBODY, mac(5), &[(0x8100, 20)], 1, 200);
    let memory = Memory::holding(&good);
    let done = AtomicBool::new(false);
    let mut arrived = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                memory.ram().write(0, &bad);
                memory.ram().write(0, &good);
            }
        });
        let pieces = [memory.ram()];
        let start = Instant::now();
        while arrived < 2000 && start.elapsed() < Duration::from_secs(20) {
            guest.heads = !guest.heads;
            to.set_guest(&guest);
            let frames = [TxFrame {
                header: VnetHeader::default(),
                payload: Pieces::new(&pieces).take(200),
            }; 16];
            from.transmit_to(bench.now, 0, &frames, &mut bench.world);
            for frame in bench.got(key) {
                arrived += 1;
                assert_eq!(frame[..6], EVERYBODY);
                assert_eq!(frame[6..12], mac(0), "its own address");
                assert_eq!(frame[12..16], [0x81, 0, 0, 10], "its own VLAN");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(arrived > 0);
}

fn hostile_frame(dice: &mut Dice) -> (VnetHeader, Vec<u8>) {
    let len = match dice.below(10) {
        0 => dice.below(20),
        1 => 65_500 + dice.below(200),
        2 => 3000 + dice.below(30_000),
        3 => 200_000,
        _ => 14 + dice.below(200),
    };
    let mut bytes = match dice.below(3) {
        0 => (0..len).map(|_| dice.byte()).collect(),
        1 => {
            let mut bytes = frame(mac(dice.below(6)), mac(dice.below(6)), &[], 0, len);
            bytes.truncate(len);
            bytes
        }
        _ => {
            let vlan = u16::try_from(dice.below(6)).unwrap();
            let tags = vec![(0x8100, vlan); 1 + dice.below(4)];
            let mut bytes = frame(mac(dice.below(6)), mac(dice.below(6)), &tags, 0, len);
            bytes.truncate(len);
            bytes
        }
    };
    if dice.one_in(3) && bytes.len() > 60 {
        let kind = [[8, 0], [0x86, 0xdd]][dice.below(2)];
        bytes[12..14].copy_from_slice(&kind);
        bytes[14] = [0x45, 0x60, 0x4f][dice.below(3)];
        bytes[23] = [6, 17][dice.below(2)];
    }
    let short = |dice: &mut Dice| match dice.below(4) {
        0 => u16::from(dice.byte()),
        1 => 0xffff,
        2 => 34,
        _ => 0,
    };
    let header = if dice.one_in(2) {
        VnetHeader::default()
    } else {
        VnetHeader {
            flags: dice.byte() & 7,
            gso_type: [0, 1, 3, 4, 5, 0x81, 77][dice.below(7)],
            hdr_len: short(dice),
            gso_size: short(dice),
            csum_start: short(dice),
            csum_offset: short(dice),
        }
    };
    (header, bytes)
}

#[test]
fn nonsense_is_counted_and_hurts_nobody() {
    let rounds: u64 = if cfg!(debug_assertions) { 30 } else { 500 };
    for seed in 1..=rounds {
        let mut dice = Dice::new(seed);
        let mut bench = Bench::new(Switch::new(open()).unwrap(), seed);
        let mut ports = Vec::new();
        let dir = tempfile::tempdir().unwrap();
        for n in 0..6 {
            let mut config = plain(n);
            config.vlan = match n {
                0 | 1 => Vlans::Plain,
                2 | 3 => Vlans::Access(2),
                _ => Vlans::Trunk {
                    allowed: "1-4".parse().unwrap(),
                    native: (n == 4).then_some(2),
                },
            };
            if n == 1 {
                let mut mirror = Mirror::new(dir.path().join("p"));
                mirror.snaplen = 100;
                config.capture = Some(mirror);
            }
            let mut port = bench.switch.add_port(config).unwrap();
            let mut guest = everything();
            guest.heads = dice.one_in(2);
            if dice.one_in(2) {
                guest.offloads = Offloads::NONE;
            }
            bench.bring_up(&mut port, &guest);
            ports.push(port);
        }
        let mut sent = 0;
        for _ in 0..40 {
            let frames: Vec<_> = (0..1 + dice.below(20))
                .map(|_| hostile_frame(&mut dice))
                .collect();
            let from = dice.below(6);
            assert_eq!(bench.send_with(&mut ports[from], &frames), frames.len());
            sent += frames.len() as u64;
            for receiver in bench.world.receivers.values_mut() {
                receiver.got.clear();
            }
        }
        let report = bench.control.report();
        assert_sums(&report);
        let input: u64 = report
            .ports
            .iter()
            .map(|port| port.input.total().frames)
            .sum();
        assert_eq!(input, sent);
        for port in &report.ports {
            assert_eq!(port.dropped_out.get(Reason::NoBuffers), 0);
        }
    }
}

#[test]
fn a_storm_from_all_sides_reaches_all_but_its_senders() {
    const PORTS: usize = 256;
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut ports: Vec<Port> = Vec::new();
    for n in 0..PORTS {
        let mut port = bench.switch.add_port(plain(n)).unwrap();
        bench.bring_up(&mut port, &everything());
        ports.push(port);
    }
    for (n, port) in ports.iter_mut().enumerate() {
        let frames: Vec<Vec<u8>> = (0..4)
            .map(|k| frame(EVERYBODY, mac(n), &[], k, 64))
            .collect();
        bench.send(port, &frames);
    }
    let report = bench.control.report();
    assert_sums(&report);
    assert!(
        report
            .ports
            .iter()
            .all(|port| port.output.broadcast.frames == 4 * 255)
    );
    assert_eq!(report.macs, PORTS);
    // Then each finds each.
    for (n, port) in ports.iter_mut().enumerate() {
        let frames: Vec<Vec<u8>> = (0..PORTS)
            .map(|to| frame(mac(to), mac(n), &[], 0, 64))
            .collect();
        bench.send(port, &frames);
    }
    let report = bench.control.report();
    assert!(
        report
            .ports
            .iter()
            .all(|port| port.output.unicast.frames == 255)
    );
    assert!(
        report
            .ports
            .iter()
            .all(|port| port.dropped_in.get(Reason::SamePort) == 1)
    );
}

#[test]
fn a_device_that_breaks_while_it_is_handed_frames_may_say_so_at_once() {
    /// Another port, whose device is reset in the middle of it all.
    struct Resets<'a>(&'a mut World, &'a mut Port);
    impl vmsg_net::Outlets for Resets<'_> {
        fn fill(
            &mut self,
            key: u64,
            fill: &mut dyn FnMut(&mut dyn vmsg_net::RxSink),
        ) -> Result<(), vmsg_net::Closed> {
            self.1.set_guest(&Guest::NONE);
            self.0.fill(key, fill)
        }
    }
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut ports: Vec<Port> = (0..2)
        .map(|n| bench.switch.add_port(plain(n)).unwrap())
        .collect();
    for port in &mut ports {
        bench.bring_up(port, &everything());
    }
    bench.send(&mut ports[1], &[frame(EVERYBODY, mac(1), &[], 0, 64)]);
    let bytes = frame(EVERYBODY, mac(0), &[], 1, 64);
    let memory = Memory::holding(&bytes);
    let pieces: [RamSlice<'_>; 1] = [memory.ram()];
    let frames = [TxFrame {
        header: VnetHeader::default(),
        payload: Pieces::new(&pieces),
    }];
    let (one, two) = ports.split_at_mut(1);
    let mut resets = Resets(&mut bench.world, &mut two[0]);
    one[0].transmit_to(bench.now, 0, &frames, &mut resets);
    one[0].transmit_to(bench.now, 0, &frames, &mut bench.world);
    let report = bench.control.report();
    assert_eq!(report.ports[1].output.broadcast.frames, 1);
    assert_eq!(report.ports[1].dropped_out.get(Reason::NoDriver), 1);
    assert_eq!(report.ports[1].macs, 0);
}
