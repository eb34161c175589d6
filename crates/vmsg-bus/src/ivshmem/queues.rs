// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queues of a connection that has come about.

use super::geometry::{Geometry, PAGE, other};
use super::machine::Queues;
use crate::link;
use crate::memory::Part;
use std::io;
use vmsg_mem::DeviceSlice;
use vmsg_mem::amp::{self, Side};
use vmsg_mem::spsc::{Consumer, Layout, Producer};

/// Queues in `memory` for the end that is `side`, and the longest message.
pub(super) fn make(
    queues: Queues,
    memory: &DeviceSlice,
    geometry: &Geometry,
    side: Side,
) -> io::Result<(link::Queues, usize)> {
    let broken = |error: vmsg_mem::Error| io::Error::other(error);
    let part = |offset, len| {
        let slice = memory.get(offset, len);
        slice.map(Part::Device).ok_or(io::ErrorKind::UnexpectedEof)
    };
    Ok(match queues {
        Queues::Pages { resumed } => {
            let tx = part(geometry.page(side), PAGE)?;
            let rx = part(geometry.page(other(side)), PAGE)?;
            let (tx, rx) = match resumed {
                true => (
                    Producer::resume(tx, Layout::PLAIN),
                    Consumer::resume(rx, Layout::PLAIN),
                ),
                false => (
                    Producer::new(tx, Layout::PLAIN),
                    Consumer::new(rx, Layout::PLAIN),
                ),
            };
            let (tx, rx) = (tx.map_err(broken)?, rx.map_err(broken)?);
            // QEMU's devices take no longer ones.
            let size = if resumed && side == Side::Driver {
                48
            } else {
                64
            };
            (link::Queues::Shared { tx, rx }, size)
        }
        Queues::Amp { layout, start } => {
            let part = part(geometry.base, layout.len())?;
            let queue = amp::Queue::new(part, &layout, side, start).map_err(broken)?;
            (link::Queues::Amp(queue), usize::from(layout.element_size()))
        }
    })
}
