// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is left of devices that came and went. A program of its own: nobody else opens files meanwhile.

#[path = "switch/frames.rs"]
#[allow(dead_code, reason = "shared with the tests of the switch")]
mod frames;
#[path = "switch/stand.rs"]
#[allow(dead_code, reason = "shared with the tests of the switch")]
mod stand;

use stand::Stand;
use vmsg_net::switch::{PortConfig, Rule, SwitchConfig};

fn open_files() -> usize {
    let files = std::fs::read_dir("/proc/self/fd").expect("Linux");
    files.count()
}

#[test]
fn devices_that_come_and_go_leave_no_descriptors() {
    let mut config = SwitchConfig::new("s0");
    config.rules = vec![Rule::allow_all()];
    let stand = Stand::new(config);
    let mut one = stand.plug(PortConfig::new("one"), 0);
    let mut files = Vec::new();
    for _ in 0..40_u16 {
        let mut guest = stand.plug(PortConfig::new("guest"), 1);
        one.exchange(&mut guest, 16);
        guest.exchange(&mut one, 16);
        drop(guest);
        stand.handle.remove_device(None, "guest").expect("gone");
        files.push(open_files());
    }
    // The memory of each driver of this test stays: one descriptor and no more. A connection may not be buried yet.
    let (first, last) = (files[9], files[39]);
    assert!(last <= first + 30 + 8, "{files:?}");
}
