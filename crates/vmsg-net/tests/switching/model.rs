// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a switch is to do, as plain as can be: lists that are searched, rules that are asked one by one for each pair. It shares
//! nothing with the switch but the meaning of the settings.

use std::collections::BTreeMap;

use vmsg_net::switch::{PortConfig, Reason, Unknown, Vlans};
use vmsg_net::{Closed, Guest};

use super::switching::Mood;

const NS: i128 = 1_000_000_000;

/// A bucket of tokens, counted in thousand-millionths.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    pub(crate) level: i128,
    pub(crate) most: i128,
    pub(crate) each_second: i128,
    /// What must be there, and what goes for a frame or for each bit of it.
    pub(crate) least: i128,
    pub(crate) per_frame: bool,
    pub(crate) filled: i128,
}

impl Tokens {
    pub(crate) fn frames(each_second: u32) -> Self {
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

    pub(crate) fn bits(each_second: u64) -> Self {
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

    pub(crate) fn take(&mut self, now: i128, len: usize) -> bool {
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

pub(crate) struct Known {
    pub(crate) config: PortConfig,
    pub(crate) guest: Guest,
    pub(crate) mood: Mood,
    pub(crate) storm: Option<Tokens>,
    pub(crate) rate_out: Option<Tokens>,
    pub(crate) input: u64,
    pub(crate) copies: u64,
    pub(crate) output: u64,
    pub(crate) dropped_in: BTreeMap<Reason, u64>,
    pub(crate) dropped_out: BTreeMap<Reason, u64>,
    pub(crate) not_learned: u64,
    pub(crate) moves: u64,
}

#[derive(Default)]
pub(crate) struct Model {
    pub(crate) ports: Vec<Option<Known>>,
    pub(crate) rules: Vec<(bool, String, String)>,
    pub(crate) unknown: Unknown,
    pub(crate) learned: Vec<(u16, [u8; 6], usize)>,
}

fn matches(pattern: &str, name: &str) -> bool {
    // Stars only stand at the end here.
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

impl Model {
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        let name = |port: usize| self.ports[port].as_ref().unwrap().config.name.as_str();
        let (from, to) = (name(from), name(to));
        self.rules
            .iter()
            .rev()
            .find(|(_, a, b)| matches(a, from) && matches(b, to))
            .is_some_and(|(allow, ..)| *allow)
    }

    pub(crate) fn others(&self, port: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.ports.len()).filter(move |other| *other != port && self.ports[*other].is_some())
    }

    pub(crate) fn known(&self, port: usize) -> &Known {
        self.ports[port].as_ref().unwrap()
    }

    pub(crate) fn known_mut(&mut self, port: usize) -> &mut Known {
        self.ports[port].as_mut().unwrap()
    }

    /// The port at which an address is fixed in a VLAN.
    pub(crate) fn owner(&self, vlan: u16, mac: [u8; 6]) -> Option<usize> {
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

    pub(crate) fn vlan(&self, port: usize, frame: &[u8]) -> Option<u16> {
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
    pub(crate) fn leaving(&self, port: usize, vlan: u16, frame: &[u8]) -> Option<Vec<u8>> {
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
    pub(crate) fn admit(&mut self, from: usize, frame: &[u8]) -> Result<u16, Reason> {
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
    pub(crate) fn receivers(
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
    pub(crate) fn deliver(
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
    pub(crate) fn send(
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

    pub(crate) fn forget(&mut self, port: usize) {
        self.learned.retain(|(.., at)| *at != port);
    }
}
