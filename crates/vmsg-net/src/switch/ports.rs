// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sets of ports, and what is computed of rules and VLANs for every pair of them.
//!
//! Control computes these tables when something changes; the worker gets them whole and only looks.

use super::rules::Rule;
use super::vlan;
use super::{Unknown, Vlans};

/// VLANs that there can be, the network of the plain ports (0) included.
const VLANS: usize = vlan::LAST as usize + 1;

/// Where frames to unknown addresses go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strangers {
    Flood,
    Nowhere,
    To(u16),
}

/// Who reaches whom.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    /// Words of a set.
    stride: usize,
    /// For each port the set of those it may send to.
    reach: Box<[u64]>,
    /// For each VLAN the set of ports in it.
    members: Box<[u64]>,
    /// Ports that rules let send to, or get from, anybody: the addresses of the others are of no use.
    connected: Box<[u64]>,
    pub(super) strangers: Strangers,
    /// There are addresses that are fixed in all VLANs of a trunk.
    pub(super) wide: bool,
}

/// What the rules are about: the names of the ports by their numbers.
pub(super) type Names<'a> = [Option<&'a str>];

impl Tables {
    pub(super) fn new() -> Self {
        Self {
            stride: 1,
            reach: Box::new([0; 64]),
            members: vec![0; VLANS].into(),
            connected: Box::new([0; 1]),
            strangers: Strangers::Flood,
            wide: false,
        }
    }

    /// Ports that there is room for.
    const fn room(&self) -> usize {
        self.stride * 64
    }

    /// Makes room for `ports` ports; [`compile`](Self::compile) is to be called then.
    fn grow(&mut self, ports: usize) {
        if ports <= self.room() {
            return;
        }
        let old = self.stride;
        self.stride = ports.div_ceil(64).next_power_of_two();
        let mut members = vec![0; VLANS * self.stride];
        for (new, old) in members
            .chunks_exact_mut(self.stride)
            .zip(self.members.chunks_exact(old))
        {
            new[..old.len()].copy_from_slice(old);
        }
        self.members = members.into();
    }

    /// Puts a port into its VLANs, or out of all.
    pub(super) fn set_vlans(&mut self, port: usize, vlans: Option<&Vlans>) {
        self.grow(port + 1);
        let bit = 1 << (port % 64);
        let column = self.members[port / 64..].iter_mut().step_by(self.stride);
        for (vlan, word) in (0..).zip(column) {
            if vlans.is_some_and(|vlans| vlans.contains(vlan)) {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }

    /// Computes who reaches whom: of the rules for a pair the last one counts.
    pub(super) fn compile(&mut self, names: &Names<'_>, rules: &[Rule], unknown: &Unknown) {
        self.grow(names.len());
        let stride = self.stride;
        let mut reach = vec![0u64; self.room() * stride];
        let mut to = vec![0u64; stride];
        let named = || {
            names
                .iter()
                .enumerate()
                .filter_map(|(port, name)| Some((port, (*name)?)))
        };
        for rule in rules {
            to.fill(0);
            for (port, name) in named() {
                if rule.to.matches(name) {
                    to[port / 64] |= 1 << (port % 64);
                }
            }
            for (port, name) in named() {
                if rule.from.matches(name) {
                    for (word, to) in reach[port * stride..][..stride].iter_mut().zip(&to) {
                        *word = if rule.allow { *word | to } else { *word & !to };
                    }
                }
            }
        }
        let mut connected = vec![0u64; stride];
        for (port, row) in reach.chunks_exact_mut(stride).enumerate() {
            row[port / 64] &= !(1 << (port % 64));
            if row.iter().any(|word| *word != 0) {
                connected[port / 64] |= 1 << (port % 64);
            }
            for (all, word) in connected.iter_mut().zip(&*row) {
                *all |= *word;
            }
        }
        self.reach = reach.into();
        self.connected = connected.into();
        self.strangers = match unknown {
            Unknown::Flood => Strangers::Flood,
            Unknown::Drop => Strangers::Nowhere,
            Unknown::Uplink(wanted) => named()
                .find(|(_, name)| name == wanted)
                .and_then(|(port, _)| u16::try_from(port).ok())
                .map_or(Strangers::Nowhere, Strangers::To),
        };
    }

    #[inline]
    pub(super) fn reaches(&self, from: u16, to: u16) -> bool {
        has(&self.reach, usize::from(from) * self.stride, to)
    }

    #[inline]
    pub(super) fn is_in(&self, port: u16, vlan: u16) -> bool {
        has(&self.members, usize::from(vlan) * self.stride, port)
    }

    #[inline]
    pub(super) fn is_connected(&self, port: u16) -> bool {
        has(&self.connected, 0, port)
    }

    /// Calls `each` with every port but `from` that is in `vlan` and that `from` reaches. If there is none, tells whether any
    /// other is in `vlan`.
    #[inline]
    pub(super) fn spread(&self, from: u16, vlan: u16, mut each: impl FnMut(u16)) -> Spread {
        let members = self.members[usize::from(vlan) * self.stride..][..self.stride].iter();
        let reach = self.reach[usize::from(from) * self.stride..][..self.stride].iter();
        let mut result = Spread::Alone;
        for (base, (members, reach)) in (0u16..).step_by(64).zip(members.zip(reach)) {
            let mut members = *members;
            if base / 64 == from / 64 {
                members &= !(1 << (from % 64));
            }
            if members != 0 && result == Spread::Alone {
                result = Spread::Barred;
            }
            let mut to = members & reach;
            while to != 0 {
                result = Spread::Some;
                // At most 63.
                each(base + u16::try_from(to.trailing_zeros()).unwrap_or(0));
                to &= to - 1;
            }
        }
        result
    }
}

/// How far a frame for everybody gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// To somebody.
    Some,
    /// There are others, but none that may get it.
    Barred,
    /// There is nobody else.
    Alone,
}

#[inline]
fn has(words: &[u64], at: usize, port: u16) -> bool {
    words
        .get(at + usize::from(port / 64))
        .is_some_and(|word| word >> (port % 64) & 1 != 0)
}

#[cfg(test)]
#[path = "ports_test.rs"]
mod tests;
