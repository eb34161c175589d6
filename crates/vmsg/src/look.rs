// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a bus without touching it: `ls` and `ping`.

mod list;
mod ping;

use std::time::Duration;

use anyhow::Context;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::Connector;
use vmsg_driver::{Client, Sleep};

use crate::bus;

pub(crate) use list::ls;
pub(crate) use ping::ping;

type BusClient = Client<DriverBus, Sleep, Vec<u8>>;

/// Connects as somebody who only looks.
fn connect(spec: &str, timeout: u64) -> anyhow::Result<BusClient> {
    let spec = bus::parse(spec)?;
    let timeout = Duration::from_millis(timeout);
    let mut connector = Connector::new(&spec.path, "vmsg").observer().timeout(timeout);
    if let Some(size) = spec.message_size {
        connector = connector.message_size(size);
    }
    let bus = connector.connect().with_context(|| {
        format!("cannot reach a device host at {}", spec.path.display())
    })?;
    let room = 2 * virtio_msg::Channel::max_message_size(&bus);
    let mut client = Client::new(bus, Sleep::new(), vec![0; room])?;
    client.set_timeout(timeout);
    Ok(client)
}
