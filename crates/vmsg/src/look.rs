// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a bus without touching it: `ls` and `ping`.

mod list;
mod ping;

use std::time::Duration;

use anyhow::Context;
use vmsg_bus::DriverBus;
use vmsg_driver::{Client, Sleep};

use crate::buses;

pub(crate) use list::ls;
pub(crate) use ping::ping;

type BusClient = Client<DriverBus, Sleep, Vec<u8>>;

/// Connects as somebody who only looks.
fn connect(spec: &str, timeout: u64) -> anyhow::Result<BusClient> {
    let unix = buses::parse(spec)?;
    let timeout = Duration::from_millis(timeout);
    let bus = unix
        .connector("vmsg")
        .observer()
        .timeout(timeout)
        .connect()
        .with_context(|| {
            format!(
                "cannot reach a device host at {} (start one with `vmsg serve`)",
                unix.path.display()
            )
        })?;
    let room = 2 * virtio_msg::Channel::max_message_size(&bus);
    let mut client = Client::new(bus, Sleep::new(), vec![0; room])?;
    client.set_timeout(timeout);
    Ok(client)
}
