// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon of the tests does with a queue: the requests of a disk.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, TableEntry, WindowTable};
use vmsg_queue::{ChainStorage, Inflight, QueueConfig, QueueFeatures, RecordedQueue};

use super::Shared;

/// Memory: guest address, length, offset, file.
pub(super) type Region = (u64, u64, u64, Arc<OwnedFd>);

#[derive(Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) base: u16,
    pub(super) addresses: [u64; 3],
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<Doorbell>,
    pub(super) enabled: bool,
    pub(super) queue: Option<(RecordedQueue, Mapping)>,
}

pub(super) fn stride(size: u16) -> u64 {
    (Inflight::bytes_for(size) as u64).next_multiple_of(64)
}

/// Works on a ring as it is now.
pub(super) fn process(
    ring: &mut Ring,
    regions: &[Region],
    inflight: Option<&(Arc<OwnedFd>, u64, u16)>,
    index: u64,
    shared: &Shared,
) {
    let entries = regions.iter().map(|(guest, len, offset, file)| {
        let mapping = Mapping::of_fd(file.as_fd(), *offset, *len, Access::ReadWrite);
        TableEntry {
            base: BusAddr(*guest),
            mapping: Arc::new(mapping.expect("mapped")),
            offset: 0,
            len: usize::try_from(*len).expect("64 bits"),
            access: Access::ReadWrite,
        }
    });
    let table = WindowTable::new(entries.collect()).expect("windows");
    let space = table.space();
    if ring.queue.is_none() {
        let config = QueueConfig {
            size: ring.size,
            desc: BusAddr(ring.addresses[0]),
            driver: BusAddr(ring.addresses[1]),
            device: BusAddr(ring.addresses[2]),
        };
        let len = Inflight::bytes_for(ring.size) as u64;
        let features = QueueFeatures::from_bits(1 << 29);
        let queue = match inflight {
            Some((file, offset, size)) => {
                let at = offset + index * stride(*size);
                let record = Mapping::of_fd(file.as_fd(), at, len, Access::ReadWrite);
                let record = record.expect("a record");
                let queue = RecordedQueue::resume(config, features, space, record.ram());
                (queue.expect("a queue"), record)
            }
            None => {
                let (record, _) = Mapping::memfd("test", len, false).expect("memory");
                let used = vmsg_queue::DeviceQueue::read_used_index(config, space).expect("there");
                assert_eq!(used, ring.base, "where it is to begin");
                // Nothing is in flight, as nothing was before.
                Inflight::resume(record.ram(), ring.size, used).expect("a record");
                let queue = RecordedQueue::resume(config, features, space, record.ram());
                (queue.expect("a queue"), record)
            }
        };
        ring.queue = Some(queue);
    }
    let Some((queue, record)) = &mut ring.queue else {
        return;
    };
    let mut storage = ChainStorage::with_capacity(1024);
    loop {
        let batch = queue
            .pop(space, record.ram(), &mut storage, 16)
            .expect("sound");
        if batch.is_empty() {
            if queue.queue().enable_notifications(space).expect("sound") {
                continue;
            }
            return;
        }
        for chain in batch.iter() {
            shared.taken.fetch_add(1, Ordering::SeqCst);
            if shared.hold.load(Ordering::SeqCst) {
                continue;
            }
            let written = execute(chain.readable(), chain.writable(), shared);
            let head = chain.head();
            queue
                .complete(space, record.ram(), head, written)
                .expect("sound");
        }
        if queue.publish(space, record.ram()).expect("sound")
            && let Some(call) = &ring.call
        {
            let _ = call.ring();
        }
    }
}

/// One request of a disk; how many bytes were written.
fn execute(from: vmsg_mem::Pieces<'_>, to: vmsg_mem::Pieces<'_>, shared: &Shared) -> u32 {
    shared.executed.fetch_add(1, Ordering::SeqCst);
    let head: [u8; 16] = from.read_array().expect("a header");
    let kind = u32::from_le_bytes(head[..4].try_into().expect("four"));
    let sector = u64::from_le_bytes(head[8..].try_into().expect("eight"));
    let at = usize::try_from(sector).expect("small") * 512;
    let mut disk = shared.disk.lock().expect("sound");
    let len = to.len() - 1;
    match kind {
        0 => {
            to.write(&disk[at..at + len]);
        }
        1 => {
            let data = from.skip(16);
            let len = data.len();
            data.read(&mut disk[at..at + len]);
        }
        _ => {}
    }
    to.skip(len).write(&[0]);
    u32::try_from(len + 1).expect("small")
}
