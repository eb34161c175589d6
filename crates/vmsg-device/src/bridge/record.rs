// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The records of what is in flight that a driver lends, as the one in-flight region that a daemon wants.
//!
//! The form of a record is the same. A daemon expects those of all queues one behind the other, each as long as its `queue_size` says,
//! rounded up to 64 bytes (as libvhost-user and DPDK do).

use std::sync::Arc;

use rustix::fs::fstat;
use vmsg_queue::Inflight as Form;
use vmsg_vhost_user::Inflight;

use crate::worker::Record;

/// From one record to the next begins at a multiple of this.
const ALIGN: u64 = 64;

/// From one record to the next, for queues of `size` entries.
fn stride(size: u16) -> u64 {
    (Form::bytes_for(size) as u64).next_multiple_of(ALIGN)
}

/// The size of queues whose records have this distance.
fn size_for(distance: u64) -> Option<u16> {
    let size = u16::try_from(distance.checked_sub(ALIGN)? / 16).ok()?;
    [size, 3]
        .into_iter()
        .find(|size| *size != 0 && stride(*size) == distance)
}

/// The region that `records` are, each with the index and the size of its queue; `None` if they do not lie so.
pub(super) fn region(records: &[(u16, u16, &Record)]) -> Option<Inflight> {
    let place = |record: &Record| {
        let (file, offset) = record.memory.file()?;
        Some((Arc::clone(file), offset))
    };
    let (first, first_size, record) = *records.first()?;
    let (file, offset) = place(record)?;
    let id = |file: &Arc<_>| fstat(file).ok().map(|stat| (stat.st_dev, stat.st_ino));
    let of = id(&file)?;
    let (distance, size) = match records.get(1) {
        None if first == 0 => (stride(first_size), first_size),
        None => return None,
        Some((second, _, record)) => {
            let apart = u64::from(second.checked_sub(first).filter(|apart| *apart != 0)?);
            let distance = place(record)?.1.checked_sub(offset)?;
            if distance % apart != 0 {
                return None;
            }
            (distance / apart, size_for(distance / apart)?)
        }
    };
    let begin = offset.checked_sub(distance.checked_mul(first.into())?)?;
    // It is mapped from there.
    if begin % rustix::param::page_size() as u64 != 0 {
        return None;
    }
    let mut queues = 0;
    for (queue, queue_size, record) in records {
        let (file, offset) = place(record)?;
        let expected = begin.checked_add(distance.checked_mul((*queue).into())?)?;
        if offset != expected || *queue_size > size || id(&file)? != of {
            return None;
        }
        queues = queues.max(queue + 1);
    }
    let len = distance.checked_mul(queues.into())?;
    let page = rustix::param::page_size() as u64;
    let there = u64::try_from(fstat(&file).ok()?.st_size).ok()?;
    // Beyond the file the daemon would find nothing.
    if begin.checked_add(len)? > there.next_multiple_of(page) {
        return None;
    }
    Some(Inflight {
        file,
        len,
        offset: begin,
        queues,
        queue_size: size,
    })
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;
