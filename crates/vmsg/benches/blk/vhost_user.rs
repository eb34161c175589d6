// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `qemu-storage-daemon`'s vhost-user-blk export, and a front end for it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmsg_driver::DmaPool;
use vmsg_driver::blk::{CELL, Pending, Requests};
use vmsg_mem::BusAddr;
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

use crate::{Buffers, Driven, Ended, Job, pool};

/// Where a VMM has its guest's memory.
const USER: u64 = 0x5555_0000_0000;
/// Entries of the queue.
const SIZE: u16 = 256;
/// Entries of an indirect table, as in our driver.
const INDIRECT: u16 = 16;

/// Feature bits: indirect descriptors, EVENT_IDX, vhost-user's protocol features, VERSION_1.
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// The daemon, with the disk `node`, whose name is `disk`; `None` if it is not installed.
pub(crate) fn start(socket: &Path, node: &str) -> Option<Ended> {
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1,iothread=thread",
        socket.display()
    );
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(["--object", "iothread,id=thread,poll-max-ns=32768"])
        .args(["--blockdev", node, "--export", &export])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    match command.spawn() {
        Ok(child) => Some(Ended(child)),
        Err(error) => {
            eprintln!("qemu-storage-daemon: {error}");
            None
        }
    }
}

/// The daemon's disk, and its driver.
pub(crate) struct Theirs {
    ring: DriverQueue<'static, Vec<DriverSlot>>,
    requests: Requests<'static, Vec<Pending>>,
    buffers: Buffers,
    kick: EventFd,
    /// Never looked at: the driver polls.
    _call: EventFd,
    _front_end: Frontend,
    _process: Ended,
}

impl Theirs {
    pub(crate) fn new(socket: &Path, process: Ended) -> Self {
        let stream = UnixStream::connect(socket).expect("the daemon");
        let mut front_end = Frontend::from_stream(stream, 1);
        let pool = pool();
        let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let (kick, call) = (eventfd(), eventfd());
        let set_up = set_up(&mut front_end, pool, &kick, &call);
        let mut ring = set_up.expect("a front end's set-up");
        let memory = pool.alloc(CELL * usize::from(SIZE)).expect("memory");
        // The device may use it as long as it lives.
        let memory: &'static _ = Box::leak(Box::new(memory));
        let pending = vec![Pending::default(); usize::from(SIZE)];
        let requests =
            Requests::new(SIZE, (memory.ram(), memory.addr()), pending).expect("memory enough");
        ring.disable_notifications().expect("a sound queue");
        Self {
            ring,
            requests,
            buffers: Buffers::new(pool),
            kick,
            _call: call,
            _front_end: front_end,
            _process: process,
        }
    }
}

fn set_up(
    vmm: &mut Frontend,
    pool: &'static DmaPool,
    kick: &EventFd,
    call: &EventFd,
) -> Result<DriverQueue<'static, Vec<DriverSlot>>, Box<dyn std::error::Error>> {
    let offered = vmm.get_features()?;
    let protocol = vmm.get_protocol_features()?;
    let wanted = VhostUserProtocolFeatures::REPLY_ACK;
    vmm.set_protocol_features(wanted & protocol)?;
    if protocol.contains(wanted) {
        vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    vmm.set_owner()?;
    let features = offered & (INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1);
    vmm.set_features(features)?;
    vmm.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: pool.base().0,
        memory_size: pool.len() as u64,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: pool.fd().ok_or("lent")?.as_raw_fd(),
    }])?;
    let layout = Layout::new(SIZE, INDIRECT)?;
    // The device may use it as long as it lives.
    let memory: &'static _ = Box::leak(Box::new(pool.alloc(layout.total_len())?));
    let ring = DriverQueue::new(
        layout,
        QueueFeatures::from_bits(features),
        memory.ram(),
        memory.addr(),
        vec![DriverSlot::default(); usize::from(SIZE)],
    )?;
    let config = ring.config();
    let user = |at: BusAddr| at.0 - pool.base().0 + USER;
    vmm.set_vring_num(0, SIZE)?;
    vmm.set_vring_base(0, 0)?;
    vmm.set_vring_addr(
        0,
        &VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user(config.desc),
            avail_ring_addr: user(config.driver),
            used_ring_addr: user(config.device),
            log_addr: None,
        },
    )?;
    vmm.set_vring_kick(0, kick)?;
    vmm.set_vring_call(0, call)?;
    vmm.set_vring_enable(0, true)?;
    Ok(ring)
}

impl Driven for Theirs {
    fn submit(&mut self, job: Job) {
        let mut room = Default::default();
        let request = self.buffers.request(job, &mut room);
        let added = self
            .requests
            .add(&mut self.ring, job.buffer as u64, request);
        added.expect("there is room");
    }

    fn commit(&mut self) {
        if self.ring.publish().expect("a sound queue") {
            self.kick.write(1).expect("an eventfd");
        }
    }

    fn poll(&mut self, done: &mut Vec<usize>) {
        while let Some(completion) = self.requests.pop(&mut self.ring).expect("a sound queue") {
            completion.result.expect("done");
            done.push(usize::try_from(completion.tag).expect("a buffer"));
        }
    }
}
