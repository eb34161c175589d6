// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process at its limit of descriptors. Alone in its program: the limit is that of the process.

mod support;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::fd::{AsFd, AsRawFd};
use support::*;
use vmsg_vfio_user::Errno;

#[test]
fn memory_whose_descriptor_was_lost_is_refused_and_not_taken_for_memory_without() {
    let mut pair = Pair::new();
    let memory = file(0x1000);
    let map = dma_map(3, 0, 0x1000, 0x1000);
    let old = getrlimit(Resource::Nofile);
    // The lowest one that is free.
    let next = memory.try_clone().expect("room").as_raw_fd();
    let limit = Rlimit {
        current: Some(u64::try_from(next).expect("not negative")),
        ..old
    };
    setrlimit(Resource::Nofile, limit).expect("lower");
    let refused = pair.ask_with(DMA_MAP, &map, &[memory.as_fd()]).refused();
    assert_eq!(refused, Errno::MFILE);
    assert!(pair.device.calls.is_empty());
    setrlimit(Resource::Nofile, old).expect("as before");
    pair.ask_with(DMA_MAP, &map, &[memory.as_fd()]).ok();
    assert_eq!(pair.device.take_calls(), ["map 0x1000+0x1000 rw fd@0x0"]);
}
