// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Traces, as `vmsg trace` and Wireshark show them.

mod command;
mod golden;
mod older;
#[path = "../program/mod.rs"]
mod program;
mod samples;
mod tshark;
mod wireshark;

use std::path::Path;

use vmsg_bus::tap::Direction;
use vmsg_bus::trace::{Interface, Layout, Side, Writer};
use vmsg_bus::{Capabilities, Peer};

/// A trace with one interface at a driver's end.
fn interface(path: &Path, layout: Layout) -> Interface {
    let writer = Writer::open(path).expect("a trace");
    let peer = Peer::named("host");
    let mut interface = writer.interface("b0", Side::Driver, &peer, &Capabilities::all(320));
    interface.set_layout(layout);
    interface
}

/// As the driver's end sees it.
fn direction(to_device: bool) -> Direction {
    if to_device {
        Direction::Sent
    } else {
        Direction::Received
    }
}
