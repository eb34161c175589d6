// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a bus without touching it: `ls` and `ping`.

mod list;
mod ping;

use std::time::Duration;

use vmsg_bus::linux_user::Revision;
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::{Client, Error, Sleep};

pub(crate) use list::ls;
pub(crate) use ping::ping;

pub(crate) type BusClient = Client<DriverBus, Sleep, Vec<u8>>;

/// What may be the matter when nobody answers, if that is not all there is to say.
pub(crate) fn silence(spec: &BusSpec) -> Option<&'static str> {
    match spec {
        BusSpec::LinuxUser(bus) if bus.revision == Revision::R1 => {
            Some("the other end may speak another revision: try revision=1")
        }
        BusSpec::LinuxUser(_) => Some("the other end may speak another revision: try revision=r1"),
        _ => None,
    }
}

/// `error`, with what may be the matter if it is that nobody answers.
pub(crate) fn explain(error: Error, spec: &BusSpec) -> anyhow::Error {
    match (&error, silence(spec)) {
        (Error::Timeout { .. } | Error::BadAnswer { .. }, Some(hint)) => {
            anyhow::anyhow!("{error}; {hint}")
        }
        _ => error.into(),
    }
}

/// How long an answer may take, if that is not said.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long it may take to come to a bus that has one driver. Where one was killed it takes 1.6 s until it is known that it
/// does not live, and some more until the device host lets go of it.
const PATIENCE_FOR_A_PLACE: Duration = Duration::from_secs(5);

/// Connects as somebody who only looks. `timeout` is how long each answer may take, the first one included.
pub(crate) fn connect(spec: &BusSpec, timeout: Option<Duration>) -> anyhow::Result<BusClient> {
    let coming = timeout.unwrap_or(match spec {
        BusSpec::Ivshmem(_) => PATIENCE_FOR_A_PLACE,
        _ => PATIENCE,
    });
    let connector = spec.connector("vmsg").observer().timeout(coming);
    connector.open_trace()?;
    let bus = connector.connect().map_err(|error| {
        // Who is in the way is another matter than nobody being there.
        let hint = match &error {
            vmsg_bus::unix::ConnectError::NoServer { .. } => "",
            error if error.is_not_there() => " (start one with `vmsg serve`)",
            _ => "",
        };
        let place = connector.path().display().to_string();
        anyhow::Error::new(error).context(format!("cannot reach a device host at {place}{hint}"))
    })?;
    let room = 2 * virtio_msg::Channel::max_message_size(&bus);
    let mut client = Client::new(bus, Sleep::new(), vec![0; room])?;
    client.set_timeout(timeout.unwrap_or(PATIENCE));
    Ok(client)
}
