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

/// Brings up one queue of the device behind the front, with the ring at the beginning of `ram`.
pub(crate) fn front_end(socket: &Path, ram: &Ram, index: u16) -> (Frontend, Driver<'static>) {
    let stream = UnixStream::connect(socket).expect("a front");
    let mut vmm = Frontend::from_stream(stream, 2);
    let queue = ram.queue();
    let at = usize::from(index);
    let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (kick, call) = (eventfd(), eventfd());
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
        vmm.set_vring_num(at, SIZE)?;
        vmm.set_vring_base(at, 0)?;
        let config = queue.config();
        let user = |at: BusAddr| at.0 - BASE + USER;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user(config.desc),
            avail_ring_addr: user(config.driver),
            used_ring_addr: user(config.device),
            log_addr: None,
        };
        vmm.set_vring_addr(at, &addresses)?;
        vmm.set_vring_kick(at, &kick)?;
        vmm.set_vring_call(at, &call)?;
        vmm.set_vring_enable(at, true)?;
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
