// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where frames are to go.

use super::Reason;
use super::counters::{Cast, Tally};
use super::fabric::{CHUNK, Fabric, FabricPort, Info, Now};
use super::head::Head;
use super::ports::{Spread, Strangers};
use super::shared::Tagging;
use super::table::{ALL_VLANS, Key};
use crate::TxFrame;

/// Longest frame: an IP packet of 65535 bytes behind an Ethernet header and two VLAN tags.
pub(super) const LONGEST: usize = 65535 + 22;

const BROADCAST: [u8; 6] = [0xff; 6];
/// Addresses for the neighbour on a cable, all but the last four bits (IEEE 802.1Q, table 8-1).
const LINK_LOCAL: [u8; 5] = [0x01, 0x80, 0xc2, 0x00, 0x00];
/// The VLAN in a tag.
const VID: u16 = 0x0fff;

/// Where a frame goes.
enum Goes {
    To(u16),
    /// There for want of a better one.
    Perhaps(u16),
    /// To everybody in its VLAN.
    Everywhere,
    Nowhere(Reason),
}

/// What was found out about the frame before: most are followed by another of the same flow.
struct Memo {
    addresses: [u8; 12],
    tci: Option<u16>,
    vlan: u16,
    to: u16,
}

impl Fabric {
    /// Finds the receivers of the frames of a chunk; what goes nowhere is counted.
    pub(super) fn sort(
        &mut self,
        from: u16,
        port: &mut FabricPort,
        chunk: &[TxFrame<'_>],
        now: Now,
    ) {
        debug_assert!(chunk.len() <= CHUNK, "a bit for each");
        let mut input = Tally::default();
        let mut copies = 0;
        let mut memo: Option<Memo> = None;
        for (index, frame) in chunk.iter().enumerate() {
            let len = frame.payload.len();
            let bit = 1u64 << index;
            let Some(head) = Head::read(frame.payload).filter(|_| len <= LONGEST) else {
                input.note(Cast::Unicast, len);
                port.shared.counters.dropped_in.add(Reason::Malformed, 1);
                continue;
            };
            if let Some(memo) = &memo
                && memo.addresses == head.addresses()
                && memo.tci == head.tci()
            {
                input.note(Cast::Unicast, len);
                self.infos[index] = Info {
                    head,
                    vlan: memo.vlan,
                    cast: Cast::Unicast,
                    len,
                };
                copies += 1;
                self.want(memo.to, bit);
                continue;
            }
            // What follows may change what was found out.
            memo = None;
            let destination = head.destination();
            let cast = match destination {
                BROADCAST => Cast::Broadcast,
                [first, ..] if first & 1 != 0 => Cast::Multicast,
                _ => Cast::Unicast,
            };
            input.note(cast, len);
            let not_learned = port.shared.counters.not_learned.get();
            let (goes, vlan) = match self.admit(from, port, &head, now) {
                Ok(vlan) => (self.find(from, port, destination, cast, vlan, now), vlan),
                Err(reason) => (Goes::Nowhere(reason), 0),
            };
            self.infos[index] = Info {
                head,
                vlan,
                cast,
                len,
            };
            let dropped = match goes {
                Goes::To(to) => {
                    copies += 1;
                    self.want(to, bit);
                    // One whose source is not learned is counted each time.
                    let settled = port.shared.counters.not_learned.get() == not_learned;
                    memo = settled.then(|| Memo {
                        addresses: head.addresses(),
                        tci: head.tci(),
                        vlan,
                        to,
                    });
                    None
                }
                Goes::Perhaps(to) => {
                    copies += 1;
                    self.want(to, bit);
                    None
                }
                Goes::Everywhere => {
                    let Self {
                        tables,
                        wanted,
                        touched,
                        ..
                    } = self;
                    let spread = tables.spread(from, vlan, |to| {
                        copies += 1;
                        want(wanted, touched, to, bit);
                    });
                    match spread {
                        Spread::Some => None,
                        Spread::Barred => Some(Reason::Acl),
                        Spread::Alone => Some(Reason::NoReceiver),
                    }
                }
                Goes::Nowhere(reason) => Some(reason),
            };
            if let Some(reason) = dropped {
                port.shared.counters.dropped_in.add(reason, 1);
            }
        }
        let counters = &port.shared.counters;
        counters.input.add(&input);
        counters.copies.add(copies);
    }

    #[inline]
    fn want(&mut self, to: u16, bit: u64) {
        want(&mut self.wanted, &mut self.touched, to, bit);
    }

    /// Lets a frame in, or not; returns its VLAN. Learns its source.
    #[inline]
    fn admit(
        &mut self,
        from: u16,
        port: &mut FabricPort,
        head: &Head,
        now: Now,
    ) -> Result<u16, Reason> {
        if !port.link {
            return Err(Reason::LinkDown);
        }
        let source = head.source();
        if source[0] & 1 != 0 || source == [0; 6] {
            return Err(Reason::BadSource);
        }
        if let [ours @ .., last] = head.destination()
            && ours == LINK_LOCAL
            && last & 0xf0 == 0
        {
            return Err(Reason::LinkLocal);
        }
        let vlan = self.vlan_of(from, port.tagging, head)?;
        let key = Key::new(vlan, source);
        match self.table.see(key, from, now.ms) {
            Some(entry) if entry.port == from => {
                if port.pinned && !entry.fixed {
                    return Err(Reason::Pin);
                }
            }
            Some(entry) if entry.fixed || port.pinned => return Err(Reason::Pin),
            Some(_) => {
                if self.tables.is_connected(from) {
                    let before = port.macs;
                    self.learn(key, from, port, now);
                    port.shared.counters.moves.add((port.macs - before) as u64);
                }
            }
            None => match self.wide_owner(vlan, source) {
                Some(owner) if owner == from => {}
                Some(_) => return Err(Reason::Pin),
                None if port.pinned => return Err(Reason::Pin),
                None => {
                    if self.tables.is_connected(from) {
                        self.learn(key, from, port, now);
                    }
                }
            },
        }
        Ok(vlan)
    }

    /// The port at which an address is fixed in all VLANs of a trunk, if this one is among them.
    #[inline]
    fn wide_owner(&self, vlan: u16, mac: [u8; 6]) -> Option<u16> {
        if !self.tables.wide {
            return None;
        }
        let entry = self.table.find(Key::new(ALL_VLANS, mac), 0)?;
        self.tables.is_in(entry.port, vlan).then_some(entry.port)
    }

    #[inline]
    fn vlan_of(&self, from: u16, tagging: Tagging, head: &Head) -> Result<u16, Reason> {
        if tagging == Tagging::Plain {
            return Ok(0);
        }
        let vid = match head.tci() {
            Some(tci) => tci & VID,
            // A tag of a kind that is not ours would come out as if it were data.
            None if head.has_inner_tag() => return Err(Reason::Vlan),
            None => 0,
        };
        match (vid, tagging) {
            (0, Tagging::Access(vlan)) => Ok(vlan),
            (0, Tagging::Trunk { native }) => native.ok_or(Reason::Vlan),
            (_, Tagging::Trunk { .. }) if self.tables.is_in(from, vid) => Ok(vid),
            _ => Err(Reason::Vlan),
        }
    }

    /// Where a frame that was let in goes.
    #[inline]
    fn find(
        &self,
        from: u16,
        port: &mut FabricPort,
        destination: [u8; 6],
        cast: Cast,
        vlan: u16,
        now: Now,
    ) -> Goes {
        if cast == Cast::Unicast {
            let known = self
                .table
                .find(Key::new(vlan, destination), now.ms)
                .map(|entry| entry.port)
                .or_else(|| self.wide_owner(vlan, destination));
            if let Some(to) = known {
                return if to == from {
                    Goes::Nowhere(Reason::SamePort)
                } else {
                    self.pass(from, to, vlan, Goes::To)
                };
            }
            match self.tables.strangers {
                Strangers::Nowhere => return Goes::Nowhere(Reason::Unknown),
                Strangers::To(to) if to == from => return Goes::Nowhere(Reason::Unknown),
                Strangers::To(_) | Strangers::Flood => {}
            }
        }
        if let Some(bucket) = &mut port.storm
            && !bucket.take(now.ns, 0)
        {
            return Goes::Nowhere(Reason::Storm);
        }
        match self.tables.strangers {
            Strangers::To(to) if cast == Cast::Unicast => self.pass(from, to, vlan, Goes::Perhaps),
            _ => Goes::Everywhere,
        }
    }

    #[inline]
    fn pass(&self, from: u16, to: u16, vlan: u16, goes: impl Fn(u16) -> Goes) -> Goes {
        if !self.tables.is_in(to, vlan) {
            Goes::Nowhere(Reason::Vlan)
        } else if self.tables.reaches(from, to) {
            goes(to)
        } else {
            Goes::Nowhere(Reason::Acl)
        }
    }
}

/// Notes that a port is to get a frame.
#[inline]
fn want(wanted: &mut [u64], touched: &mut Vec<u16>, to: u16, bit: u64) {
    let place = &mut wanted[usize::from(to)];
    if *place == 0 {
        touched.push(to);
    }
    *place |= bit;
}
