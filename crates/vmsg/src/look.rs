// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a bus without touching it: `ls` and `ping`.

mod list;
mod ping;

use std::time::Duration;

use vmsg_bus::linux_user::Revision;
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::{Client, Sleep};

use crate::buses;

pub(crate) use list::ls;
pub(crate) use ping::ping;

type BusClient = Client<DriverBus, Sleep, Vec<u8>>;

/// Whether the bus carries the messages of February 2025, which say less.
fn is_r1(spec: &str) -> bool {
    matches!(buses::parse(spec), Ok(BusSpec::LinuxUser(bus)) if bus.revision == Revision::R1)
}

/// Connects as somebody who only looks.
fn connect(spec: &str, timeout: u64) -> anyhow::Result<BusClient> {
    let spec = buses::parse(spec)?;
    let timeout = Duration::from_millis(timeout);
    let connector = spec.connector("vmsg").observer().timeout(timeout);
    connector.open_trace()?;
    let bus = connector.connect().map_err(|error| {
        // Who is in the way is another matter than nobody being there.
        let hint = match &error {
            error if error.is_not_there() => " (start one with `vmsg serve`)",
            _ => "",
        };
        let place = connector.path().display().to_string();
        anyhow::Error::new(error).context(format!("cannot reach a device host at {place}{hint}"))
    })?;
    let room = 2 * virtio_msg::Channel::max_message_size(&bus);
    let mut client = Client::new(bus, Sleep::new(), vec![0; room])?;
    client.set_timeout(timeout);
    Ok(client)
}
