// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What QEMU does with a vhost-user front.

use crate::guest::{BASE, BUFFERS, Driver, LEN, Ram, SIZE};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmsg_mem::BusAddr;

/// Where a VMM has its guest's memory.
const USER: u64 = 0x5555_0000_0000;

/// Where the ring of other queues is; there is one of them at most.
const OTHERS: u64 = 0x1_0000;

/// Brings up so many queues of the device behind the front; gives a driver of the one with this `index`, whose ring is at the beginning of
/// `ram`. The others stay empty.
pub(crate) fn front_end(
    socket: &Path,
    ram: &Ram,
    index: usize,
    queues: usize,
) -> (Frontend, Driver<'static>) {
    let stream = UnixStream::connect(socket).expect("a front");
    let mut vmm = Frontend::from_stream(stream, queues as u64);
    let queue = ram.queue();
    let empty = ram.queue_at(OTHERS);
    let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (kick, call, others) = (eventfd(), eventfd(), eventfd());
    let mut set_up = || -> Result<(), Box<dyn std::error::Error>> {
        vmm.get_features()?;
        vmm.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        vmm.set_protocol_features(wanted)?;
        vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vmm.set_owner()?;
        // VERSION_1, EVENT_IDX, VHOST_USER_F_PROTOCOL_FEATURES.
        vmm.set_features(1 << 32 | 1 << 29 | 1 << 30)?;
        vmm.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: LEN,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: ram.file.as_raw_fd(),
        }])?;
        let user = |at: BusAddr| at.0 - BASE + USER;
        for at in 0..queues {
            let config = match at == index {
                true => queue.config(),
                false => empty.config(),
            };
            let addresses = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: user(config.desc),
                avail_ring_addr: user(config.driver),
                used_ring_addr: user(config.device),
                log_addr: None,
            };
            vmm.set_vring_num(at, SIZE)?;
            vmm.set_vring_base(at, 0)?;
            vmm.set_vring_addr(at, &addresses)?;
            let own = [&kick, &call];
            let [kick, call] = if at == index { own } else { [&others, &others] };
            vmm.set_vring_kick(at, kick)?;
            vmm.set_vring_call(at, call)?;
        }
        for at in 0..queues {
            vmm.set_vring_enable(at, true)?;
        }
        Ok(())
    };
    set_up().expect("a front end's set-up");
    // That crate has a type of its own for eventfds.
    let own = pidfd_open(getpid(), PidfdFlags::empty()).expect("this process");
    let call = pidfd_getfd(&own, call.as_raw_fd(), PidfdGetfdFlags::empty());
    let call = call.expect("a descriptor of this process");
    let driver = Driver {
        queue,
        kick: Box::new(move || kick.write(1).expect("an eventfd")),
        call,
        buffers: BASE + BUFFERS,
    };
    (vmm, driver)
}
