// SPDX-License-Identifier: Apache-2.0 OR MIT
//! 256 ports of random VLANs and rules, random traffic: each frame is received by a driver, or counted as dropped for the right reason, at
//! the right place.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;

use vmsg_net::switch::{PortConfig, Reason, Rule, SwitchConfig, Unknown, VlanSet, Vlans};

use crate::frames::{self, BROADCAST, Seen};
use crate::random::Random;
use crate::stand::{Stand, Station, counter};

const PORTS: u16 = 256;
const THREADS: usize = 4;
const GROUPS: usize = 6;
/// VLANs are 1 to this; one more is on no port.
const VLANS: usize = 4;
/// Bursts of each thread.
const BURSTS: usize = if cfg!(debug_assertions) { 400 } else { 2000 };

/// A port as the test knows it.
struct Place {
    name: String,
    vlan: Vlans,
    /// The driver wants no frames for others.
    modest: bool,
}

/// A frame as it was sent.
struct Sent {
    from: u16,
    sequence: u32,
    source: [u8; 6],
    to: [u8; 6],
    tag: Option<u16>,
}

struct World {
    places: Vec<Place>,
    /// Whether the port of the first index may send to that of the second.
    may: Vec<Vec<bool>>,
    flood: bool,
}

fn vlan(random: &mut Random) -> u16 {
    u16::try_from(random.below(VLANS) + 1).expect("few")
}

impl World {
    fn new(random: &mut Random) -> (Self, SwitchConfig) {
        let places: Vec<Place> = (0..PORTS)
            .map(|id| Place {
                name: format!("g{}-p{id}", random.below(GROUPS)),
                vlan: match random.below(4) {
                    0 => Vlans::Plain,
                    1 | 2 => Vlans::Access(vlan(random)),
                    _ => {
                        let mut allowed = VlanSet::none();
                        for _ in 0..=random.below(4) {
                            allowed.insert(vlan(random));
                        }
                        let native = random.chance(1, 2).then(|| vlan(random));
                        Vlans::Trunk { allowed, native }
                    }
                },
                modest: random.chance(1, 3),
            })
            .collect();
        let mut config = SwitchConfig::new("s0");
        let flood = random.chance(1, 2);
        config.unknown = if flood { Unknown::Flood } else { Unknown::Drop };
        let mut texts = vec![(true, "*".to_owned(), "*".to_owned())];
        for _ in 0..24 {
            let mut pattern = || match random.below(8) {
                0 => "*".to_owned(),
                1 | 2 => places[random.below(places.len())].name.clone(),
                _ => format!("g{}-*", random.below(GROUPS)),
            };
            let (from, to) = (pattern(), pattern());
            // Not everything for everybody.
            if (&*from, &*to) != ("*", "*") {
                texts.push((random.chance(1, 3), from, to));
            }
        }
        for (allow, from, to) in &texts {
            let rules = Rule::parse(*allow, &format!("{from} > {to}")).expect("a rule");
            for rule in rules {
                config
                    .rules
                    .retain(|old| old.from != rule.from || old.to != rule.to);
                config.rules.push(rule);
            }
        }
        let fits = |pattern: &str, name: &str| match pattern.strip_suffix('*') {
            Some(begin) => name.starts_with(begin),
            None => name == pattern,
        };
        let may = places.iter().map(|from| {
            let to = places.iter().map(|to| {
                let mut rules = texts.iter().rev();
                let rule = rules.find(|rule| fits(&rule.1, &from.name) && fits(&rule.2, &to.name));
                rule.is_some_and(|rule| rule.0)
            });
            to.collect()
        });
        let may = may.collect();
        let world = Self { places, may, flood };
        (world, config)
    }

    fn frame(&self, station: &mut Station, random: &mut Random) -> (Sent, Vec<u8>) {
        let place = &self.places[usize::from(station.id)];
        let other = random.below(usize::from(PORTS));
        let other = frames::mac(u16::try_from(other).expect("few"));
        let to = match random.below(100) {
            0..3 => BROADCAST,
            3..5 => [0x52, 0x54, 0, 0xdd, 0, 1],
            5 => [0x01, 0x80, 0xc2, 0, 0, 0x0e],
            6 => frames::mac(station.id),
            _ => other,
        };
        let tag = match &place.vlan {
            Vlans::Trunk { .. } if random.chance(4, 5) => Some(vlan(random)),
            _ if random.chance(1, 30) => Some(vlan(random)),
            _ => None,
        };
        let own = frames::mac(station.id);
        let source = match random.below(100) {
            0 => [0x53, 0x54, 0, 0, 0, 1],
            // Of another one in the VLAN, for whom it is kept.
            1 if self
                .vlan_of(station.id, tag)
                .is_some_and(|vlan| self.is_at(other, vlan)) =>
            {
                other
            }
            _ => own,
        };
        station.sequence += 1;
        let most = if random.chance(1, 8) { 1470 } else { 100 };
        let len = 40 + random.below(most);
        let sequence = station.sequence;
        let bytes = frames::build(to, source, tag, (station.id, sequence), len);
        let from = station.id;
        let sent = Sent {
            from,
            sequence,
            source,
            to,
            tag,
        };
        (sent, bytes)
    }

    fn vlan_of(&self, port: u16, tag: Option<u16>) -> Option<u16> {
        match (&self.places[usize::from(port)].vlan, tag) {
            (Vlans::Plain, _) => Some(0),
            (Vlans::Access(vlan), None) => Some(*vlan),
            (Vlans::Access(_), Some(_)) => None,
            (Vlans::Trunk { native, .. }, None) => *native,
            (Vlans::Trunk { allowed, native }, Some(vlan)) => {
                (allowed.contains(vlan) || *native == Some(vlan)).then_some(vlan)
            }
        }
    }

    fn has(&self, port: usize, vlan: u16) -> bool {
        match &self.places[port].vlan {
            Vlans::Plain => vlan == 0,
            Vlans::Access(own) => *own == vlan,
            Vlans::Trunk { allowed, native } => allowed.contains(vlan) || *native == Some(vlan),
        }
    }

    /// The port of a known address.
    fn owner(mac: [u8; 6]) -> Option<usize> {
        let id = u16::from_be_bytes([mac[4], mac[5]]);
        (mac == frames::mac(id) && id < PORTS).then_some(usize::from(id))
    }

    fn is_at(&self, mac: [u8; 6], vlan: u16) -> bool {
        Self::owner(mac).is_some_and(|port| self.has(port, vlan))
    }

    /// Where a frame goes, or why it goes nowhere.
    fn route(&self, sent: &Sent) -> Result<Vec<usize>, Reason> {
        let from = usize::from(sent.from);
        if sent.source[0] & 1 != 0 {
            return Err(Reason::BadSource);
        }
        if sent.to[..5] == [0x01, 0x80, 0xc2, 0, 0] {
            return Err(Reason::LinkLocal);
        }
        let vlan = self.vlan_of(sent.from, sent.tag).ok_or(Reason::Vlan)?;
        if sent.source != frames::mac(sent.from) {
            return Err(Reason::Pin);
        }
        if sent.to[0] & 1 == 0 {
            if let Some(to) = Self::owner(sent.to).filter(|to| self.has(*to, vlan)) {
                return match to {
                    to if to == from => Err(Reason::SamePort),
                    to if self.may[from][to] => Ok(vec![to]),
                    _ => Err(Reason::Acl),
                };
            }
            if !self.flood {
                return Err(Reason::Unknown);
            }
        }
        let all = 0..usize::from(PORTS);
        let around: Vec<usize> = all
            .filter(|to| *to != from && self.has(*to, vlan))
            .collect();
        let reached: Vec<usize> = around
            .iter()
            .copied()
            .filter(|to| self.may[from][*to])
            .collect();
        match (around.is_empty(), reached.is_empty()) {
            (true, _) => Err(Reason::NoReceiver),
            (_, true) => Err(Reason::Acl),
            _ => Ok(reached),
        }
    }

    /// The tag with which a frame arrives.
    fn tag_at(&self, to: usize, sent: &Sent) -> Option<u16> {
        let vlan = self.vlan_of(sent.from, sent.tag).expect("it was let in");
        match &self.places[to].vlan {
            Vlans::Plain => sent.tag,
            Vlans::Access(_) => None,
            Vlans::Trunk { native, .. } => (*native != Some(vlan)).then_some(vlan),
        }
    }

    /// Whether the device lets a frame in.
    fn wants(&self, to: usize, sent: &Sent) -> bool {
        let own = frames::mac(u16::try_from(to).expect("few"));
        !self.places[to].modest || sent.to == BROADCAST || sent.to == own
    }
}

/// What one thread has seen.
#[derive(Default)]
struct Log {
    sent: Vec<Sent>,
    /// By receiver.
    seen: BTreeMap<u16, Vec<Seen>>,
}

/// Bursts of random stations of these, and now and then a look at what has come.
fn play(world: &World, stations: &mut [Station], random: &mut Random, barrier: &Barrier) -> Log {
    let mut log = Log::default();
    let take = |station: &mut Station, log: &mut Log| {
        let seen = station.drain();
        log.seen.entry(station.id).or_default().extend(seen);
    };
    for _ in 0..BURSTS {
        let sender = random.below(stations.len());
        let station = &mut stations[sender];
        let burst: Vec<Vec<u8>> = (0..1 + random.below(24))
            .map(|_| {
                let (sent, bytes) = world.frame(station, random);
                log.sent.push(sent);
                bytes
            })
            .collect();
        station.send(&burst);
        for _ in 0..random.below(24) {
            let receiver = random.below(stations.len());
            take(&mut stations[receiver], &mut log);
        }
    }
    stations.iter_mut().for_each(Station::settle);
    // Nobody sends any more.
    barrier.wait();
    for station in stations {
        take(station, &mut log);
    }
    log
}

fn check(stand: &Stand, world: &World, logs: Vec<Log>) {
    let (ports, devices) = (stand.ports(), stand.devices());
    let mut seen = BTreeMap::new();
    let mut sent: Vec<Vec<Sent>> = (0..PORTS).map(|_| Vec::new()).collect();
    for log in logs {
        seen.extend(log.seen);
        for frame in log.sent {
            sent[usize::from(frame.from)].push(frame);
        }
    }
    // What each was to get: by sender, in order.
    let mut expected: Vec<BTreeSet<Seen>> = vec![BTreeSet::new(); usize::from(PORTS)];
    let mut filtered = vec![0_u64; usize::from(PORTS)];
    let (mut delivered, mut reasons) = (0, BTreeSet::new());
    for (from, frames) in sent.iter().enumerate() {
        let port = &ports[&world.places[from].name];
        let mut dropped: BTreeMap<Reason, u64> = BTreeMap::new();
        let mut copies = 0;
        for frame in frames {
            match world.route(frame) {
                Err(reason) => *dropped.entry(reason).or_default() += 1,
                Ok(receivers) => {
                    copies += receivers.len() as u64;
                    for to in receivers {
                        if world.wants(to, frame) {
                            expected[to].insert(Seen {
                                from: frame.from,
                                sequence: frame.sequence,
                                tag: world.tag_at(to, frame),
                            });
                        } else {
                            filtered[to] += 1;
                        }
                    }
                }
            }
        }
        assert_eq!(port.input.total().frames, frames.len() as u64, "{from}");
        let counted: BTreeMap<Reason, u64> = port.dropped_in.iter().collect();
        assert_eq!(counted, dropped, "{}: {:?}", port.name, port.vlan);
        assert_eq!(port.copies, copies, "{}", port.name);
        reasons.extend(dropped.into_keys());
        let device = &devices[&port.name];
        assert_eq!(counter(&device.pairs[0], "tx_frames"), frames.len() as u64);
    }
    for to in 0..PORTS {
        let index = usize::from(to);
        let port = &ports[&world.places[index].name];
        let (device, got) = (&devices[&port.name], &seen[&to]);
        let mut last: BTreeMap<u16, u32> = BTreeMap::new();
        for frame in got {
            assert!(expected[index].contains(frame), "{}: {frame:?}", port.name);
            // Each once, and in the order in which they were sent.
            let before = last.insert(frame.from, frame.sequence);
            assert!(before < Some(frame.sequence), "{}: {frame:?}", port.name);
        }
        // Buffers are looked for before the driver's filter is asked.
        let kept_out = counter(&device.counters, "rx_filtered");
        assert!(kept_out <= filtered[index], "{}", port.name);
        let all = expected[index].len() as u64 + filtered[index];
        let lost = all - got.len() as u64 - kept_out;
        assert_eq!(
            port.dropped_out.get(Reason::NoBuffers),
            lost,
            "{}",
            port.name
        );
        assert_eq!(port.dropped_out.total(), lost, "{:?}", port.dropped_out);
        assert_eq!(counter(&device.pairs[0], "rx_frames"), got.len() as u64);
        assert_eq!(
            port.output.total().frames,
            got.len() as u64 + kept_out,
            "{}",
            port.name
        );
        delivered += got.len();
    }
    assert!(delivered > BURSTS, "there was traffic: {delivered}");
    for reason in [
        Reason::Vlan,
        Reason::Acl,
        Reason::BadSource,
        Reason::Pin,
        Reason::LinkLocal,
    ] {
        assert!(reasons.contains(&reason), "{reason}: {reasons:?}");
    }
}

#[test]
fn of_256_ports_every_frame_is_received_or_counted_with_its_reason() {
    let seeds = std::env::var("VMSG_SWITCH_SEED").ok();
    let seeds: Vec<u64> = match seeds.and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..if cfg!(debug_assertions) { 2 } else { 6 }).collect(),
    };
    for seed in seeds {
        eprintln!("VMSG_SWITCH_SEED={seed}");
        let mut random = Random::new(seed);
        let (world, config) = World::new(&mut random);
        let stand = Stand::new(config);
        let stations = world.places.iter().zip(0..).map(|(place, id)| {
            let port = PortConfig {
                vlan: place.vlan.clone(),
                ..PortConfig::new(&place.name)
            };
            let mut station = stand.plug(port, id);
            if place.modest {
                station.be_modest();
            }
            station
        });
        let mut stations: Vec<Station> = stations.collect();
        let barrier = Barrier::new(THREADS);
        let share = stations.len() / THREADS;
        let logs = std::thread::scope(|scope| {
            let threads: Vec<_> = stations
                .chunks_mut(share)
                .map(|stations| {
                    let mut random = Random::new(random.next());
                    let (world, barrier) = (&world, &barrier);
                    scope.spawn(move || play(world, stations, &mut random, barrier))
                })
                .collect();
            let ends = threads.into_iter().map(|thread| thread.join());
            ends.map(|log| log.expect("no panic")).collect()
        });
        check(&stand, &world, logs);
    }
}
