// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of vhost-user daemons that are not there yet. What such a device is, only its daemon knows; so it appears on its bus when
//! the daemon has come, with the number that it would have had.

use std::collections::BTreeSet;
use std::time::Duration;

use vmsg_device::bridge::{Bridge, ConnectError, Listener, Settings};
use vmsg_device::device::Device;
use vmsg_device::host::Handle;

use crate::Usage;
use crate::buses::{self, NamedBus};
use crate::spec::{DeviceSpec, VhostUserSpec};

/// The first pause between two attempts to reach a daemon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// There is no device yet.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
struct NotYet {
    error: ConnectError,
    /// With the socket where the daemon is to connect, if it does that.
    settings: Settings,
}

/// The device of a daemon that is there.
pub(super) fn connect(spec: &VhostUserSpec, id: &str) -> anyhow::Result<Box<dyn Device>> {
    connect_within(spec, id, Duration::ZERO)
}

/// The same; one that connects to us may take `time` for that.
pub(super) fn connect_within(
    spec: &VhostUserSpec,
    id: &str,
    time: Duration,
) -> anyhow::Result<Box<dyn Device>> {
    let mut settings = spec.settings(id)?;
    if spec.server {
        let listener = Listener::bind(&settings.socket)?;
        listener.wait(time);
        settings.listener = Some(listener);
    }
    match Bridge::connect(&settings, settings.patience) {
        Ok(bridge) => Ok(Box::new(bridge)),
        Err(error) => Err(NotYet { error, settings }.into()),
    }
}

/// Which numbers devices get, those included that come later.
pub(super) struct Numbers {
    /// For each bus, those that are given out or promised.
    taken: Vec<BTreeSet<u16>>,
}

impl Numbers {
    /// Promises the numbers that the devices ask for.
    pub(super) fn new(buses: &[NamedBus], devices: &[DeviceSpec]) -> Result<Self, Usage> {
        let mut taken = vec![BTreeSet::new(); buses.len()];
        for device in devices {
            let common = device.common();
            taken[buses::find(buses, common.bus)?].extend(common.num);
        }
        Ok(Self { taken })
    }

    /// The number of the next device: the one that it asks for, or the lowest that is free.
    pub(super) fn take(&mut self, bus: usize, num: Option<u16>) -> Option<u16> {
        let taken = &mut self.taken[bus];
        let num = num.or_else(|| (0..=u16::MAX).find(|num| !taken.contains(num)))?;
        taken.insert(num);
        Some(num)
    }
}

/// One device that is to come.
struct Missing {
    id: String,
    settings: Settings,
    bus: usize,
    num: Option<u16>,
    worker: Option<usize>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Late(Vec<Missing>);

impl Late {
    /// Takes in a device that could not be made, if that is because its daemon is not there; `place`: its bus, number and worker.
    pub(super) fn take_in(
        &mut self,
        spec: &DeviceSpec,
        place: (usize, Option<u16>, Option<usize>),
        error: anyhow::Error,
    ) -> anyhow::Result<()> {
        let DeviceSpec::VhostUser(daemon) = spec else {
            return Err(error);
        };
        let NotYet { error, settings } = error.downcast()?;
        if !error.is_temporary() {
            return Err(error.into());
        }
        let id = daemon.id.clone().unwrap_or_default();
        tracing::warn!(
            device = id,
            "{error}; the device comes when the daemon does"
        );
        let (bus, num, worker) = place;
        self.0.push(Missing {
            id,
            settings,
            bus,
            num,
            worker,
        });
        Ok(())
    }

    /// Waits for the daemons, each in a thread of its own, which ends when it has come.
    pub(super) fn start(self, handle: &Handle) {
        for missing in self.0 {
            let handle = handle.clone();
            let id = missing.id.clone();
            let started = std::thread::Builder::new()
                .name("daemon".to_owned())
                .spawn(move || missing.wait(&handle));
            if let Err(error) = started {
                tracing::error!(device = id, %error, "there will be no such device");
            }
        }
    }
}

impl Missing {
    fn wait(self, handle: &Handle) {
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        let bridge = loop {
            match &self.settings.listener {
                Some(listener) => listener.wait(pause),
                None => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(self.settings.reconnect.max(FIRST_PAUSE));
            match Bridge::connect(&self.settings, self.settings.patience) {
                Ok(bridge) => break bridge,
                Err(error) => {
                    // Each reason once, as long as it stays the same; nobody there was said before.
                    let words = error.to_string();
                    let nobody = matches!(error, ConnectError::Nobody { .. });
                    if !nobody && said.as_ref() != Some(&words) {
                        tracing::warn!(device = self.id, "{words}");
                        said = Some(words);
                    }
                }
            }
        };
        let Self {
            id,
            bus,
            num,
            worker,
            ..
        } = self;
        match handle.add_device(bus, &id, num, worker, Box::new(bridge)) {
            Ok(num) => tracing::info!(device = id, number = num.0, "its daemon has come"),
            Err(error) => tracing::error!(device = id, %error, "cannot be added"),
        }
    }
}
