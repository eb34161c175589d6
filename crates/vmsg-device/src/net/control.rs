// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queue (VIRTIO 1.3, 5.1.6.5).

use vmsg_mem::Pieces;

use super::config::{Mac, NetConfig};
use crate::device::{DeviceError, Io, Progress};

const BATCH: usize = 16;
const OK: u8 = 0;
const ERR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;

/// Addresses of one kind that a driver may list; more mean "all of them".
const TABLE_LIMIT: u32 = 1024;

/// Carries out what the driver asks for through the control queue. Receive modes
/// are taken and have no effect: a back end only sends what is for this device.
pub(super) fn process(
    queue: usize,
    config: &mut NetConfig,
    io: &mut Io<'_>,
) -> Result<Progress, DeviceError> {
    let Some(Some(active)) = io.queues.get_mut(queue) else {
        return Ok(Progress::Idle);
    };
    let ring = active.ring();
    let failed = |source| DeviceError::Queue { queue, source };
    let batch = ring.pop(io.space, io.storage, BATCH).map_err(failed)?;
    let count = batch.len();
    let before = config.mac();
    for chain in batch.iter() {
        let ack = command(chain.readable(), config);
        let written = chain.writable().write(&[ack.map_or(ERR, |()| OK)]);
        let written = u32::try_from(written).expect("one byte at most");
        ring.complete(io.space, chain.head(), written)
            .map_err(failed)?;
    }
    if config.mac() != before {
        io.config_changed(0, &config.mac().0);
    }
    io.publish(queue)?;
    Ok(if count == 0 {
        Progress::Idle
    } else {
        Progress::More
    })
}

/// Carries out one command; `None` if it is unknown or malformed.
fn command(command: Pieces<'_>, config: &mut NetConfig) -> Option<()> {
    let [class, code] = command.read_array()?;
    let data = command.skip(2);
    match (class, code) {
        (CLASS_RX, RX_PROMISC | RX_ALLMULTI) => flag(data)?,
        (CLASS_MAC, MAC_TABLE_SET) => {
            let rest = table(data)?;
            table(rest)?;
        }
        (CLASS_MAC, MAC_ADDR_SET) => {
            let mac = Mac(data.read_array()?);
            if !mac.is_unicast() {
                return None;
            }
            config.set_mac(mac);
        }
        _ => return None,
    }
    Some(())
}

/// Checks for a byte that is 0 or 1.
fn flag(data: Pieces<'_>) -> Option<()> {
    matches!(data.read_array()?, [0 | 1]).then_some(())
}

/// Checks one table of addresses (count u32, then 6 bytes each); returns what follows it.
fn table(data: Pieces<'_>) -> Option<Pieces<'_>> {
    let count = u32::from_le_bytes(data.read_array()?);
    let bytes = usize::try_from(count).ok()?.checked_mul(6)?;
    let rest = data.skip(4);
    if count > TABLE_LIMIT || rest.len() < bytes {
        return None;
    }
    Some(rest.skip(bytes))
}
