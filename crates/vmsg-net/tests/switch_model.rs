// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random networks and random traffic on a switch, and a second opinion on every frame.
//!
//! The model is as plain as can be: lists that are searched, rules that are asked one by one for each pair. It shares nothing with
//! the switch but the meaning of the settings.

mod switching;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use switching::{Bench, Dice, EVERYBODY, Mood, everything, frame, mac, number};
use vmsg_net::switch::{
    Port, PortChange, PortConfig, Reason, Rule, Switch, SwitchConfig, Unknown, VlanSet, Vlans,
};
use vmsg_net::{Backend, Closed, Guest, Mac};

const NS: i128 = 1_000_000_000;

/// A bucket of tokens, counted in thousand-millionths.
#[derive(Clone, Debug)]
struct Tokens {
    level: i128,
    most: i128,
    each_second: i128,
    /// What must be there, and what goes for a frame or for each bit of it.
    least: i128,
    per_frame: bool,
    filled: i128,
}

impl Tokens {
    fn frames(each_second: u32) -> Self {
        let each_second = i128::from(each_second);
        Self {
            level: each_second * NS,
            most: each_second * NS,
            each_second,
            least: NS,
            per_frame: true,
            filled: 0,
        }
    }

    fn bits(each_second: u64) -> Self {
        let burst = 524_288.max(i128::from(each_second) / 100);
        Self {
            level: burst * NS,
            most: burst * NS,
            each_second: i128::from(each_second),
            least: 0,
            per_frame: false,
            filled: 0,
        }
    }

    fn take(&mut self, now: i128, len: usize) -> bool {
        self.level = self
            .most
            .min(self.level + (now - self.filled) * self.each_second);
        self.filled = now;
        let enough = self.level >= self.least;
        if enough {
            self.level -= if self.per_frame {
                NS
            } else {
                len as i128 * 8 * NS
            };
        }
        enough
    }
}

struct Known {
    config: PortConfig,
    guest: Guest,
    mood: Mood,
    storm: Option<Tokens>,
    rate_out: Option<Tokens>,
    input: u64,
    copies: u64,
    output: u64,
    dropped_in: BTreeMap<Reason, u64>,
    dropped_out: BTreeMap<Reason, u64>,
    not_learned: u64,
    moves: u64,
}

#[derive(Default)]
struct Model {
    ports: Vec<Option<Known>>,
    rules: Vec<(bool, String, String)>,
    unknown: Unknown,
    learned: Vec<(u16, [u8; 6], usize)>,
}

fn matches(pattern: &str, name: &str) -> bool {
    // Stars only stand at the end here.
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

impl Model {
    fn reaches(&self, from: usize, to: usize) -> bool {
        let name = |port: usize| self.ports[port].as_ref().unwrap().config.name.as_str();
        let (from, to) = (name(from), name(to));
        self.rules
            .iter()
            .rev()
            .find(|(_, a, b)| matches(a, from) && matches(b, to))
            .is_some_and(|(allow, ..)| *allow)
    }

    fn others(&self, port: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.ports.len()).filter(move |other| *other != port && self.ports[*other].is_some())
    }

    fn known(&self, port: usize) -> &Known {
        self.ports[port].as_ref().unwrap()
    }

    fn known_mut(&mut self, port: usize) -> &mut Known {
        self.ports[port].as_mut().unwrap()
    }

    /// The port at which an address is fixed in a VLAN.
    fn owner(&self, vlan: u16, mac: [u8; 6]) -> Option<usize> {
        (0..self.ports.len()).find(|port| {
            self.ports[*port].as_ref().is_some_and(|known| {
                let config = &known.config;
                config.vlan.contains(vlan)
                    && config
                        .pin
                        .iter()
                        .chain(&config.statics)
                        .any(|own| own.0 == mac)
            })
        })
    }

    fn vlan(&self, port: usize, frame: &[u8]) -> Option<u16> {
        let kind = u16::from_be_bytes([frame[12], frame[13]]);
        let vid = (kind == 0x8100).then(|| u16::from_be_bytes([frame[14], frame[15]]) & 0xfff);
        match (&self.known(port).config.vlan, vid) {
            (Vlans::Plain, _) => Some(0),
            (_, None) if [0x88a8, 0x9100, 0x9200].contains(&kind) => None,
            (Vlans::Access(vlan), None | Some(0)) => Some(*vlan),
            (Vlans::Access(_), Some(_)) => None,
            (Vlans::Trunk { native, .. }, None | Some(0)) => *native,
            (Vlans::Trunk { allowed, native }, Some(vid)) => {
                (allowed.contains(vid) || *native == Some(vid)).then_some(vid)
            }
        }
    }

    /// The frame as it leaves by a port.
    fn leaving(&self, port: usize, vlan: u16, frame: &[u8]) -> Option<Vec<u8>> {
        let tagged = match &self.known(port).config.vlan {
            Vlans::Plain => return Some(frame.to_vec()),
            Vlans::Access(_) => false,
            Vlans::Trunk { native, .. } => *native != Some(vlan),
        };
        let has = frame[12..14] == [0x81, 0];
        let priority = if has { frame[14] & 0xf0 } else { 0 };
        let rest = if has { &frame[16..] } else { &frame[12..] };
        let [high, low] = vlan.to_be_bytes();
        if tagged {
            return Some([&frame[..12], &[0x81, 0, high | priority, low], rest].concat());
        }
        let next = u16::from_be_bytes([rest[0], rest[1]]);
        let hidden = has && [0x8100, 0x88a8, 0x9100, 0x9200].contains(&next);
        (!hidden).then(|| [&frame[..12], rest].concat())
    }

    /// Why a frame is not let in; else its VLAN. Learns.
    fn admit(&mut self, from: usize, frame: &[u8]) -> Result<u16, Reason> {
        let source: [u8; 6] = frame[6..12].try_into().unwrap();
        if !self.known(from).config.link {
            return Err(Reason::LinkDown);
        }
        if source[0] & 1 == 1 || source == [0; 6] {
            return Err(Reason::BadSource);
        }
        if frame[..5] == [1, 0x80, 0xc2, 0, 0] && frame[5] < 16 {
            return Err(Reason::LinkLocal);
        }
        let vlan = self.vlan(from, frame).ok_or(Reason::Vlan)?;
        match self.owner(vlan, source) {
            Some(owner) if owner == from => return Ok(vlan),
            Some(_) => return Err(Reason::Pin),
            None if !self.known(from).config.pin.is_empty() => return Err(Reason::Pin),
            None => {}
        }
        let connected = self
            .others(from)
            .any(|other| self.reaches(from, other) || self.reaches(other, from));
        let entry = self
            .learned
            .iter()
            .position(|(v, mac, _)| (*v, *mac) == (vlan, source));
        if entry.is_some_and(|entry| self.learned[entry].2 == from) || !connected {
            return Ok(vlan);
        }
        let count = self
            .learned
            .iter()
            .filter(|(.., port)| *port == from)
            .count();
        if count >= self.known(from).config.macs {
            self.known_mut(from).not_learned += 1;
            return Ok(vlan);
        }
        match entry {
            Some(entry) => {
                self.learned[entry].2 = from;
                self.known_mut(from).moves += 1;
            }
            None => self.learned.push((vlan, source, from)),
        }
        Ok(vlan)
    }

    /// Who is to get a frame.
    fn receivers(
        &mut self,
        from: usize,
        frame: &[u8],
        vlan: u16,
        now: i128,
    ) -> Result<Vec<usize>, Reason> {
        let destination: [u8; 6] = frame[..6].try_into().unwrap();
        let group = destination[0] & 1 == 1;
        let one = |model: &Self, to: usize| {
            if !model.known(to).config.vlan.contains(vlan) {
                Err(Reason::Vlan)
            } else if model.reaches(from, to) {
                Ok(vec![to])
            } else {
                Err(Reason::Acl)
            }
        };
        let mut uplink = None;
        if !group {
            let learned = self
                .learned
                .iter()
                .find(|(v, mac, _)| (*v, *mac) == (vlan, destination))
                .map(|(.., port)| *port);
            match self.owner(vlan, destination).or(learned) {
                Some(to) if to == from => return Err(Reason::SamePort),
                Some(to) => return one(self, to),
                None => {}
            }
            match self.unknown.clone() {
                Unknown::Flood => {}
                Unknown::Drop => return Err(Reason::Unknown),
                Unknown::Uplink(name) => {
                    let port = (0..self.ports.len()).find(|port| {
                        self.ports[*port]
                            .as_ref()
                            .is_some_and(|known| known.config.name == name)
                    });
                    uplink = Some(port.filter(|port| *port != from).ok_or(Reason::Unknown)?);
                }
            }
        }
        if let Some(storm) = &mut self.known_mut(from).storm
            && !storm.take(now, 0)
        {
            return Err(Reason::Storm);
        }
        if let Some(to) = uplink {
            return one(self, to);
        }
        let near: Vec<usize> = self
            .others(from)
            .filter(|other| self.known(*other).config.vlan.contains(vlan))
            .collect();
        if near.is_empty() {
            return Err(Reason::NoReceiver);
        }
        let near: Vec<usize> = near
            .into_iter()
            .filter(|other| self.reaches(from, *other))
            .collect();
        if near.is_empty() {
            Err(Reason::Acl)
        } else {
            Ok(near)
        }
    }

    /// What a receiver gets of a frame.
    fn deliver(
        &mut self,
        to: usize,
        frame: &[u8],
        vlan: u16,
        now: i128,
    ) -> Result<Vec<u8>, Reason> {
        let leaving = self.leaving(to, vlan, frame);
        let known = self.known_mut(to);
        if !known.config.link {
            return Err(Reason::LinkDown);
        }
        if !known.guest.running {
            return Err(Reason::NoDriver);
        }
        if let Some(rate) = &mut known.rate_out
            && !rate.take(now, frame.len())
        {
            return Err(Reason::RateOut);
        }
        match known.mood {
            Mood::Closed(Closed::Gone) => return Err(Reason::Gone),
            Mood::Closed(Closed::NoDriver) => return Err(Reason::NoDriver),
            Mood::Closed(Closed::LinkDown) => return Err(Reason::LinkDown),
            Mood::Closed(Closed::Broken) | Mood::Breaks => return Err(Reason::Broken),
            Mood::Buffers(_) => {}
        }
        let leaving = leaving.ok_or(Reason::Vlan)?;
        let mut network = 14;
        for _ in 0..3 {
            let kind = &leaving[network - 2..network];
            if kind == [0x81, 0] || kind == [0x88, 0xa8] {
                network += 4;
            }
        }
        if leaving.len() - network > usize::from(known.guest.offloads.mtu) {
            return Err(Reason::TooLarge);
        }
        match &mut known.mood {
            Mood::Buffers(0) => Err(Reason::NoBuffers),
            Mood::Buffers(left) => {
                *left -= 1;
                Ok(leaving)
            }
            _ => unreachable!("looked at above"),
        }
    }

    /// A port sends; what each receiver gets.
    fn send(
        &mut self,
        from: usize,
        frames: &[Vec<u8>],
        now: i128,
    ) -> BTreeMap<usize, Vec<Vec<u8>>> {
        let mut got: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
        for frame in frames {
            self.known_mut(from).input += 1;
            let admitted = self.admit(from, frame);
            let receivers =
                admitted.and_then(|vlan| Ok((vlan, self.receivers(from, frame, vlan, now)?)));
            match receivers {
                Err(reason) => {
                    *self.known_mut(from).dropped_in.entry(reason).or_default() += 1;
                }
                Ok((vlan, receivers)) => {
                    self.known_mut(from).copies += receivers.len() as u64;
                    for to in receivers {
                        match self.deliver(to, frame, vlan, now) {
                            Ok(bytes) => {
                                self.known_mut(to).output += 1;
                                got.entry(to).or_default().push(bytes);
                            }
                            Err(reason) => {
                                let known = self.known_mut(to);
                                *known.dropped_out.entry(reason).or_default() += 1;
                            }
                        }
                    }
                }
            }
        }
        got
    }

    fn forget(&mut self, port: usize) {
        self.learned.retain(|(.., at)| *at != port);
    }
}

/// The model and the switch side by side.
struct Both {
    bench: Bench,
    model: Model,
    ports: Vec<Option<Port>>,
    keys: Vec<u64>,
    dice: Dice,
    sent: u32,
    start: std::time::Instant,
    /// Numbers of frames by receiver and sender, to see that they come in order.
    last: BTreeMap<(usize, usize), u32>,
    removed: bool,
}

/// Some VLANs, so that ports meet.
fn some_vlans(dice: &mut Dice) -> Vlans {
    let vlan = |dice: &mut Dice| u16::try_from(1 + dice.below(4)).unwrap();
    match dice.below(8) {
        0..3 => Vlans::Plain,
        3..6 => Vlans::Access(vlan(dice)),
        _ => {
            let mut allowed = if dice.one_in(3) {
                VlanSet::all()
            } else {
                VlanSet::none()
            };
            allowed.insert(vlan(dice));
            allowed.insert(vlan(dice));
            let native = dice.one_in(2).then(|| vlan(dice));
            Vlans::Trunk { allowed, native }
        }
    }
}

fn some_guest(dice: &mut Dice) -> Guest {
    let mut guest = everything();
    if dice.one_in(3) {
        guest.offloads.mtu = 1000;
    }
    if dice.one_in(4) {
        guest.pairs = 2;
    }
    guest.heads = dice.one_in(6);
    guest
}

impl Both {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let switch = Switch::new(SwitchConfig::new("s0")).unwrap();
        let bench = Bench::new(switch, seed);
        let start = bench.now;
        let mut both = Self {
            bench,
            model: Model::default(),
            ports: Vec::new(),
            keys: Vec::new(),
            dice: dice.clone(),
            sent: 0,
            start,
            last: BTreeMap::new(),
            removed: false,
        };
        let count = match dice.below(4) {
            0 => 2 + dice.below(3),
            1 => 250 + dice.below(7),
            _ => 4 + dice.below(40),
        };
        for port in 0..count {
            both.add(port);
        }
        both.bench.pump();
        both.change_rules();
        both
    }

    fn now(&self) -> i128 {
        i128::try_from((self.bench.now - self.start).as_nanos()).unwrap()
    }

    fn some_macs(&mut self, port: usize, own: usize) -> Vec<Mac> {
        (0..own).map(|n| Mac(mac(port * 8 + n))).collect()
    }

    fn add(&mut self, port: usize) {
        let vlan = some_vlans(&mut self.dice);
        let pin = if self.dice.one_in(6) { 2 } else { 0 };
        let statics = if self.dice.one_in(6) { 3 } else { 0 };
        let letter = ["a", "b", "c"][port % 3];
        let config = PortConfig {
            vlan,
            pin: self.some_macs(port, pin),
            statics: self.some_macs(port, statics),
            macs: if self.dice.one_in(4) { 2 } else { 256 },
            storm: self.dice.one_in(5).then_some(20),
            rate_out: self.dice.one_in(5).then(|| "8M".parse().unwrap()),
            link: !self.dice.one_in(12),
            ..PortConfig::new(format!("{letter}{port}"))
        };
        let mut new = self.bench.switch.add_port(config.clone()).unwrap();
        let guest = some_guest(&mut self.dice);
        let key = self.bench.bring_up(&mut new, &guest);
        let receiver = self.bench.world.receivers.get_mut(&key).unwrap();
        receiver.turn = [1, 5, 96][self.dice.below(3)];
        let known = Known {
            storm: config.storm.map(Tokens::frames),
            rate_out: config.rate_out.map(|rate| Tokens::bits(rate.bits())),
            config,
            guest,
            mood: Mood::Buffers(usize::MAX),
            input: 0,
            copies: 0,
            output: 0,
            dropped_in: BTreeMap::new(),
            dropped_out: BTreeMap::new(),
            not_learned: 0,
            moves: 0,
        };
        if self.ports.len() <= port {
            self.ports.resize_with(port + 1, || None);
            self.model.ports.resize_with(port + 1, || None);
            self.keys.resize(port + 1, 0);
        }
        self.ports[port] = Some(new);
        self.model.ports[port] = Some(known);
        self.keys[port] = key;
        // Addresses that are fixed now are not learned any more.
        let model = &mut self.model;
        let mut learned = std::mem::take(&mut model.learned);
        learned.retain(|(vlan, mac, _)| model.owner(*vlan, *mac).is_none());
        model.learned = learned;
    }

    fn somebody(&mut self) -> usize {
        loop {
            let port = self.dice.below(self.ports.len());
            if self.ports[port].is_some() {
                return port;
            }
        }
    }

    fn change_rules(&mut self) {
        let mut texts = Vec::new();
        let pattern = |both: &mut Self| match both.dice.below(5) {
            0 => "*".to_owned(),
            1 => "a*".to_owned(),
            2 => "b*".to_owned(),
            3 => "nobody".to_owned(),
            _ => {
                let port = both.somebody();
                both.model.known(port).config.name.clone()
            }
        };
        if !self.dice.one_in(4) {
            texts.push((true, "*".to_owned(), "*".to_owned()));
        }
        for _ in 0..self.dice.below(6) {
            texts.push((self.dice.one_in(2), pattern(self), pattern(self)));
        }
        let rules: Vec<Rule> = texts
            .iter()
            .flat_map(|(allow, from, to)| Rule::parse(*allow, &format!("{from} > {to}")).unwrap())
            .collect();
        self.bench
            .ask(|control| control.set_rules(rules))
            .expect("rules");
        // Of two for the same patterns the first one is as if it were not there.
        self.model.rules = texts;
    }

    fn some_frame(&mut self, from: usize) -> Vec<u8> {
        let dice = &mut self.dice;
        let count = self.ports.len();
        let somewhere = |dice: &mut Dice| mac(dice.below(count) * 8 + dice.below(4));
        let to = match dice.below(12) {
            0 => EVERYBODY,
            1 => [1, 0, 0x5e, 0, 0, dice.byte()],
            2 => [1, 0x80, 0xc2, 0, 0, dice.byte() % 32],
            _ => somewhere(dice),
        };
        let source = match dice.below(40) {
            0 => EVERYBODY,
            1 => [0; 6],
            2 => somewhere(dice),
            _ => mac(from * 8 + dice.below(4)),
        };
        let mut tags = Vec::new();
        let tag = |dice: &mut Dice| {
            let vlan = u16::try_from(dice.below(6)).unwrap();
            (0x8100, vlan | u16::from(dice.byte() & 0xf0) << 8)
        };
        let aware = self.model.known(from).config.vlan != Vlans::Plain;
        if dice.one_in(if aware { 2 } else { 8 }) {
            tags.push(tag(dice));
            if dice.one_in(8) {
                tags.push(tag(dice));
            }
        } else if dice.one_in(20) {
            tags.push((0x88a8, 3));
        }
        let len = match dice.below(6) {
            0 => 990 + dice.below(50),
            1 => 1500,
            _ => 60 + dice.below(10),
        };
        self.sent += 1;
        frame(to, source, &tags, self.sent, len)
    }

    fn send(&mut self) {
        let from = self.somebody();
        let mut frames = Vec::new();
        for _ in 0..1 + self.dice.below(90) {
            // Many in a row are of the same flow.
            match frames.last() {
                Some(last) if self.dice.one_in(2) => {
                    let mut next = Vec::clone(last);
                    let at = (12..)
                        .step_by(4)
                        .find(|at| next[*at..*at + 2] == [0x88, 0xb5]);
                    let at = at.expect("a frame of ours") + 2;
                    self.sent += 1;
                    next[at..at + 4].copy_from_slice(&self.sent.to_be_bytes());
                    frames.push(next);
                }
                _ => frames.push(self.some_frame(from)),
            }
        }
        let port = self.ports[from].as_mut().unwrap();
        let taken = self.bench.send(port, &frames);
        assert_eq!(taken, frames.len());
        let now = self.now();
        let mut wanted = self.model.send(from, &frames, now);
        for to in 0..self.ports.len() {
            if self.ports[to].is_none() {
                continue;
            }
            let got = self.bench.got(self.keys[to]);
            let wanted = wanted.remove(&to).unwrap_or_default();
            assert_eq!(got.len(), wanted.len(), "from {from} to {to}");
            for (got, wanted) in got.iter().zip(&wanted) {
                assert_eq!(got, wanted, "from {from} to {to}");
                let last = self.last.insert((to, from), number(got)).unwrap_or(0);
                assert!(last < number(got), "in order");
            }
        }
    }

    fn change(&mut self) {
        let port = self.somebody();
        let name = self.model.known(port).config.name.clone();
        match self.dice.below(12) {
            0 => self.change_rules(),
            1 => {
                let up = self.model.known(port).config.name.clone();
                let unknown = [Unknown::Flood, Unknown::Drop, Unknown::Uplink(up)]
                    [self.dice.below(3)]
                .clone();
                self.model.unknown = unknown.clone();
                self.bench
                    .ask(|control| control.set_unknown(unknown))
                    .unwrap();
            }
            2 => {
                let all = self.dice.one_in(2);
                let name = (!all).then_some(name.as_str());
                self.bench.ask(|control| control.flush(name)).unwrap();
                if all {
                    self.model.learned.clear();
                } else {
                    self.model.forget(port);
                }
            }
            3 => {
                let vlan = some_vlans(&mut self.dice);
                self.set(
                    port,
                    PortChange {
                        vlan: Some(vlan),
                        ..PortChange::default()
                    },
                );
            }
            4 => {
                let count = self.dice.below(3);
                let pin = Some(self.some_macs(port, count));
                self.set(
                    port,
                    PortChange {
                        pin,
                        ..PortChange::default()
                    },
                );
            }
            5 => {
                let count = self.dice.below(3);
                let statics = Some(self.some_macs(port, count));
                self.set(
                    port,
                    PortChange {
                        statics,
                        ..PortChange::default()
                    },
                );
            }
            6 => {
                let link = Some(self.dice.one_in(2));
                self.set(
                    port,
                    PortChange {
                        link,
                        ..PortChange::default()
                    },
                );
            }
            7 => {
                let storm = Some(self.dice.one_in(2).then_some(50));
                let rate_out = Some(self.dice.one_in(2).then(|| "16M".parse().unwrap()));
                let macs = Some(1 + self.dice.below(5));
                self.set(
                    port,
                    PortChange {
                        storm,
                        rate_out,
                        macs,
                        ..PortChange::default()
                    },
                );
            }
            8 => {
                let guest = if self.dice.one_in(3) {
                    Guest::NONE
                } else {
                    some_guest(&mut self.dice)
                };
                self.ports[port].as_mut().unwrap().set_guest(&guest);
                if self.model.known(port).guest.running && !guest.running {
                    self.model.forget(port);
                }
                self.model.known_mut(port).guest = guest;
            }
            9 => {
                let mood = match self.dice.below(8) {
                    0 => Mood::Closed(Closed::Gone),
                    1 => Mood::Closed(Closed::NoDriver),
                    2 => Mood::Closed(Closed::LinkDown),
                    3 => Mood::Breaks,
                    4 | 5 => Mood::Buffers(self.dice.below(40)),
                    _ => Mood::Buffers(usize::MAX),
                };
                let receiver = self.bench.world.receivers.get_mut(&self.keys[port]);
                receiver.unwrap().mood = mood;
                self.model.known_mut(port).mood = mood;
            }
            10 if self.ports.iter().flatten().count() > 2 => {
                self.check();
                self.bench
                    .ask(|control| control.remove_port(&name))
                    .unwrap();
                self.removed = true;
                self.ports[port] = None;
                self.model.ports[port] = None;
                self.model.forget(port);
            }
            _ => {
                if let Some(free) = self.ports.iter().position(Option::is_none) {
                    self.add(free);
                }
            }
        }
    }

    fn set(&mut self, port: usize, change: PortChange) {
        let known = self.model.known_mut(port);
        let config = &mut known.config;
        let name = config.name.clone();
        let moved = change.vlan.is_some() || change.pin.is_some() || change.statics.is_some();
        config.vlan = change.vlan.clone().unwrap_or(config.vlan.clone());
        config.pin = change.pin.clone().unwrap_or(config.pin.clone());
        config.statics = change.statics.clone().unwrap_or(config.statics.clone());
        config.macs = change.macs.unwrap_or(config.macs);
        config.link = change.link.unwrap_or(config.link);
        let down = !config.link;
        if let Some(storm) = change.storm {
            known.storm = storm.map(Tokens::frames);
        }
        if let Some(rate) = change.rate_out {
            known.rate_out = rate.map(|rate| Tokens::bits(rate.bits()));
        }
        if moved || down {
            self.model.forget(port);
        }
        self.bench
            .ask(|control| control.set_port(&name, change))
            .unwrap();
        let model = &mut self.model;
        let mut learned = std::mem::take(&mut model.learned);
        learned.retain(|(vlan, mac, _)| model.owner(*vlan, *mac).is_none());
        model.learned = learned;
    }

    /// Every frame is accounted for, on both sides in the same way.
    fn check(&mut self) {
        let report = self.bench.control.report();
        let (mut copies, mut ends) = (0, 0);
        for port in &report.ports {
            let known = self.model.ports.iter().flatten();
            let known = known
                .clone()
                .find(|known| known.config.name == port.name)
                .unwrap();
            let drops = |drops: &BTreeMap<Reason, u64>| -> Vec<(Reason, u64)> {
                drops.iter().map(|(reason, n)| (*reason, *n)).collect()
            };
            let name = &port.name;
            assert_eq!(
                port.dropped_in.iter().collect::<Vec<_>>(),
                drops(&known.dropped_in),
                "{name}"
            );
            assert_eq!(
                port.dropped_out.iter().collect::<Vec<_>>(),
                drops(&known.dropped_out),
                "{name}"
            );
            assert_eq!(port.input.total().frames, known.input, "{name}");
            assert_eq!(port.output.total().frames, known.output, "{name}");
            assert_eq!(port.copies, known.copies, "{name}");
            assert_eq!(port.not_learned, known.not_learned, "{name}");
            assert_eq!(port.moves, known.moves, "{name}");
            copies += port.copies;
            ends += port.output.total().frames + port.dropped_out.total();
        }
        let learned = report.ports.iter().map(|port| port.macs).sum::<usize>();
        assert_eq!(learned, self.model.learned.len());
        // What those have sent and got that are not there any more stands on one side only.
        if !self.removed {
            assert_eq!(copies, ends);
        }
    }
}

#[test]
fn every_frame_goes_where_a_second_opinion_says_and_is_accounted_for() {
    let cases: u64 = if cfg!(debug_assertions) { 40 } else { 400 };
    let mut seen: BTreeSet<Reason> = BTreeSet::new();
    let mut moves = 0;
    for seed in 1..=cases {
        let mut both = Both::new(seed);
        println!("seed {seed}: {} ports", both.ports.len());
        for _ in 0..60 {
            both.bench
                .pass(Duration::from_micros(both.dice.next() % 40_000));
            if both.dice.one_in(4) {
                both.change();
            }
            both.send();
        }
        both.check();
        for known in both.model.ports.iter().flatten() {
            seen.extend(known.dropped_in.keys());
            seen.extend(known.dropped_out.keys());
            moves += known.moves;
        }
    }
    // It was a test of all of it, but for what needs other frames and an uplink.
    let missing = Reason::ALL
        .into_iter()
        .filter(|reason| !seen.contains(reason));
    assert_eq!(
        missing.collect::<Vec<_>>(),
        [Reason::Malformed, Reason::UplinkFull]
    );
    assert!(moves > 0);
}
