// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queue (VIRTIO 1.3, 5.1.6.5).

use vmsg_mem::Pieces;

use super::Net;
use super::bits;
use super::filter::{Mode, TABLE_LIMIT, Table};
use super::hash::{Hasher, KEY_LEN, SUPPORTED};
use super::session::{GUEST_OFFLOADS, Session};
use super::steering::{Indirection, Steering};
use crate::device::{DeviceError, Io, Progress};
use vmsg_net::Mac;

const BATCH: usize = 16;
const OK: u8 = 0;
const ERR: u8 = 1;

/// Classes of commands, and the commands of each.
mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
    pub(super) const GUEST_OFFLOADS: u8 = 5;
}

const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_PAIRS_SET: u8 = 0;
const MQ_RSS_CONFIG: u8 = 1;
const MQ_HASH_CONFIG: u8 = 2;
const GUEST_OFFLOADS_SET: u8 = 0;

/// What a command has changed, beside the driver's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// Nothing.
    Session,
    /// What the back end goes by.
    Guest,
    /// The driver's address.
    Address(Mac),
    /// The driver has announced itself.
    Announced,
}

impl Net {
    /// Carries out what the driver asks for through the control queue.
    pub(super) fn control(
        &mut self,
        queue: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring.pop(io.space, io.storage, BATCH).map_err(failed)?;
        let count = batch.len();
        for chain in batch.iter() {
            let done = command(chain.readable(), &mut self.session, self.pairs);
            let counters = &self.counters.device;
            counters.control_commands.add(1);
            let changed = match done {
                Some(Done::Guest) => {
                    self.apply_session();
                    None
                }
                Some(Done::Address(mac)) => {
                    self.config.set_mac(mac);
                    Some((0, mac.0.to_vec()))
                }
                Some(Done::Announced) => self
                    .config
                    .set_announce(false)
                    .map(|(offset, status)| (offset, status.to_vec())),
                Some(Done::Session) => None,
                None => {
                    counters.control_refused.add(1);
                    None
                }
            };
            if let Some((offset, data)) = changed {
                io.notices
                    .push(crate::worker::Notice::Config { offset, data });
            }
            let ack = if done.is_some() { OK } else { ERR };
            let written = chain.writable().write(&[ack]);
            let written = u32::try_from(written).expect("one byte at most");
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
        }
        io.publish(queue)?;
        Ok(if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}

/// Carries out one command of a device with `pairs` queue pairs. `None` if it is unknown,
/// malformed, or of a feature that was not negotiated: then nothing has changed.
fn command(command: Pieces<'_>, session: &mut Session, pairs: u16) -> Option<Done> {
    let [class, code] = command.read_array()?;
    let data = command.skip(2);
    let needs = |bit| session.has(bit).then_some(());
    match (class, code) {
        (class::RX, code) => {
            let mode = mode(code)?;
            needs(match mode {
                Mode::Promiscuous | Mode::AllMulticast => bits::CTRL_RX,
                _ => bits::CTRL_RX_EXTRA,
            })?;
            let on = flag(data)?;
            session.filter.set_mode(mode, on);
            Some(Done::Session)
        }
        (class::MAC, MAC_TABLE_SET) => {
            needs(bits::CTRL_RX)?;
            let (unicast, rest) = table(data)?;
            let (multicast, _) = table(rest)?;
            session.filter.set_tables(unicast, multicast);
            Some(Done::Session)
        }
        (class::MAC, MAC_ADDR_SET) => {
            needs(bits::CTRL_MAC_ADDR)?;
            let mac = Mac(data.read_array()?);
            if !mac.is_unicast() {
                return None;
            }
            Some(Done::Address(mac))
        }
        (class::VLAN, VLAN_ADD | VLAN_DEL) => {
            let vlan = u16::from_le_bytes(data.read_array()?);
            let known = session.filter.set_vlan(vlan, code == VLAN_ADD);
            known.then_some(Done::Session)
        }
        (class::ANNOUNCE, ANNOUNCE_ACK) => {
            needs(bits::GUEST_ANNOUNCE)?;
            Some(Done::Announced)
        }
        (class::MQ, MQ_PAIRS_SET) => {
            needs(bits::MQ)?;
            let wanted = u16::from_le_bytes(data.read_array()?);
            if wanted == 0 || wanted > pairs {
                return None;
            }
            session.steer(Steering::default());
            session.set_pairs(wanted);
            Some(Done::Guest)
        }
        (class::MQ, MQ_RSS_CONFIG) => {
            needs(bits::RSS)?;
            let config = RssConfig::read(data, pairs)?;
            session.hasher = config.hasher;
            session.set_pairs(config.transmit);
            session.steer(Steering::Rss(config.indirection));
            Some(Done::Guest)
        }
        (class::MQ, MQ_HASH_CONFIG) => {
            needs(bits::HASH_REPORT)?;
            let types = u32::from_le_bytes(data.read_array()?);
            // Eight bytes are reserved; Linux leaves in them what RSS has there.
            session.hasher = hasher(types, data.skip(12))?;
            session.steer(Steering::default());
            Some(Done::Guest)
        }
        (class::GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
            needs(bits::CTRL_GUEST_OFFLOADS)?;
            let wanted = u64::from_le_bytes(data.read_array()?);
            let known = GUEST_OFFLOADS
                .into_iter()
                .filter(|bit| session.has(*bit))
                .fold(0, |all, bit| all | 1_u64 << bit);
            if wanted & !known != 0 {
                return None;
            }
            session.guest_offloads = wanted;
            Some(Done::Guest)
        }
        _ => None,
    }
}

fn mode(code: u8) -> Option<Mode> {
    Some(match code {
        0 => Mode::Promiscuous,
        1 => Mode::AllMulticast,
        2 => Mode::AllUnicast,
        3 => Mode::NoMulticast,
        4 => Mode::NoUnicast,
        5 => Mode::NoBroadcast,
        _ => return None,
    })
}

/// A byte that is 0 or 1.
fn flag(data: Pieces<'_>) -> Option<bool> {
    match data.read_array()? {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// A table of addresses (count u32, then 6 bytes each), and what follows it.
fn table(data: Pieces<'_>) -> Option<(Table, Pieces<'_>)> {
    let count = usize::try_from(u32::from_le_bytes(data.read_array()?)).ok()?;
    let bytes = count.checked_mul(6)?;
    let entries = data.skip(4);
    if entries.len() < bytes {
        return None;
    }
    let mut kept = vec![0; count.min(TABLE_LIMIT) * 6];
    entries.read(&mut kept);
    let table = Table {
        addresses: kept
            .chunks_exact(6)
            .map(|mac| mac.try_into().expect("six bytes"))
            .collect(),
        overflow: count > TABLE_LIMIT,
    };
    Some((table, entries.skip(bytes)))
}

/// `struct virtio_net_rss_config`, checked.
struct RssConfig {
    hasher: Option<Hasher>,
    indirection: Indirection,
    /// Transmit queues that the driver may use.
    transmit: u16,
}

impl RssConfig {
    fn read(data: Pieces<'_>, pairs: u16) -> Option<Self> {
        let [a, b, c, d, mask_low, mask_high, queue_low, queue_high] = data.read_array()?;
        let types = u32::from_le_bytes([a, b, c, d]);
        let mask = u16::from_le_bytes([mask_low, mask_high]);
        let unclassified = u16::from_le_bytes([queue_low, queue_high]);
        let len = mask.checked_add(1)?;
        if !len.is_power_of_two() || len > Indirection::LONGEST || unclassified >= pairs {
            return None;
        }
        let mut entries = vec![0; usize::from(len) * 2];
        let data = data.skip(8);
        if data.read(&mut entries) < entries.len() {
            return None;
        }
        // Receive queues are numbered as their pairs are: bits 1 to 16 of the queue's index.
        let table: Box<[u16]> = entries
            .chunks_exact(2)
            .map(|entry| u16::from_le_bytes([entry[0], entry[1]]))
            .collect();
        let data = data.skip(entries.len());
        let transmit = u16::from_le_bytes(data.read_array()?);
        if table.iter().any(|pair| *pair >= pairs) || transmit == 0 || transmit > pairs {
            return None;
        }
        Some(Self {
            hasher: hasher(types, data.skip(2))?,
            indirection: Indirection {
                table,
                unclassified,
            },
            transmit,
        })
    }
}

/// Hash types with the key that follows its length in `data`. `None` if that makes no sense;
/// `Some(None)` if nothing is to be hashed.
#[expect(
    clippy::option_option,
    reason = "malformed, none, and one are three things"
)]
fn hasher(types: u32, data: Pieces<'_>) -> Option<Option<Hasher>> {
    let [len] = data.read_array()?;
    let len = usize::from(len);
    if types & !SUPPORTED != 0 || len > KEY_LEN || (len == 0 && types != 0) {
        return None;
    }
    let mut key = vec![0; len];
    if data.skip(1).read(&mut key) < len {
        return None;
    }
    Some(Hasher::new(types, &key))
}
