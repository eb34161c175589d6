// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of vhost-user daemons that are not there yet. What such a device is, only its daemon knows; so it appears on its bus when
//! the daemon has come, with the number that it would have had.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmsg_device::bridge::{Bridge, ConnectError, Listener, Settings};
use vmsg_device::device::Device;
use vmsg_device::host::Handle;
use vmsg_mem::Doorbell;

use crate::Usage;
use crate::buses::{self, NamedBus};
use crate::spec::{DeviceSpec, VhostUserSpec};

/// The first pause between two attempts to reach a daemon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long the end of the threads that wait may take when the process ends.
const ENDING: Duration = Duration::from_secs(1);

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
#[derive(Debug)]
struct Missing {
    place: Place,
    settings: Settings,
    why: String,
}

/// What is known of such a device before its daemon is.
#[derive(Clone, Debug)]
struct Place {
    id: String,
    bus: usize,
    num: Option<u16>,
    worker: Option<usize>,
    device_id: u32,
}

/// All of them, until they are waited for.
#[derive(Debug, Default)]
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
            place: Place {
                id,
                bus,
                num,
                worker,
                device_id: settings.device_id,
            },
            settings,
            why: error.to_string(),
        });
        Ok(())
    }

    /// Waits for the daemons, each in a thread of its own, which ends when it has come.
    pub(super) fn start(self, handle: &Handle, awaited: &Awaited) {
        for missing in self.0 {
            awaited.wait_for(missing, handle);
        }
    }
}

/// A device that is not there, as operators see it.
#[derive(Clone, Debug)]
pub(super) struct Absent {
    pub(super) id: String,
    /// The index of its bus.
    pub(super) bus: usize,
    /// The number that is kept for it.
    pub(super) number: u16,
    /// Which worker is to serve it, if that was said.
    pub(super) worker: usize,
    /// What it is to be.
    pub(super) device_id: u32,
    /// Why it is not there.
    pub(super) state: String,
}

/// The devices that are waited for.
#[derive(Clone, Debug, Default)]
pub(super) struct Awaited(Arc<Mutex<Vec<Entry>>>);

/// One of them.
#[derive(Debug)]
struct Entry {
    place: Place,
    state: String,
    end: Arc<Doorbell>,
    /// Tells whether the device is on its bus.
    thread: JoinHandle<bool>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Entry {
    fn is(&self, bus: usize, id: &str) -> bool {
        self.place.bus == bus && self.place.id == id
    }
}

impl Awaited {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Entries are put in and taken out whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self, missing: Missing, handle: &Handle) {
        let place = missing.place.clone();
        let mut entries = self.lock();
        let started = Doorbell::new().map(Arc::new).and_then(|end| {
            let (this, handle, bell) = (self.clone(), handle.clone(), Arc::clone(&end));
            let state = format!("waiting: {}", missing.why);
            let (alive, ended) = mpsc::channel();
            let thread = std::thread::Builder::new()
                .name("daemon".to_owned())
                .spawn(move || {
                    let _alive: Sender<()> = alive;
                    this.bring(missing, &handle, &bell)
                })?;
            Ok(Entry {
                place: place.clone(),
                state,
                end,
                thread,
                ended,
            })
        });
        match started {
            Ok(entry) => entries.push(entry),
            Err(error) => {
                tracing::error!(device = place.id, %error, "there will be no such device");
            }
        }
    }

    /// All that are not there now.
    pub(super) fn absent(&self) -> Vec<Absent> {
        let entries = self.lock();
        let absent = |entry: &Entry| Absent {
            id: entry.place.id.clone(),
            bus: entry.place.bus,
            number: entry.place.num.unwrap_or_default(),
            worker: entry.place.worker.unwrap_or_default(),
            device_id: entry.place.device_id,
            state: entry.state.clone(),
        };
        entries.iter().map(absent).collect()
    }

    /// Why the device `id` is not there, if it is waited for; on the bus with this index, if that is given.
    pub(super) fn state(&self, bus: Option<usize>, id: &str) -> Option<String> {
        let entries = self.lock();
        let mut found = entries.iter().filter(|entry| entry.place.id == id);
        let entry = found.find(|entry| bus.is_none_or(|bus| bus == entry.place.bus))?;
        Some(entry.state.clone())
    }

    /// Waits for a device no more: true if it was waited for, and will not come. Its socket, if it has one, is free then.
    pub(super) fn give_up(&self, bus: usize, id: &str) -> bool {
        let mut entries = self.lock();
        let Some(index) = entries.iter().position(|entry| entry.is(bus, id)) else {
            return false;
        };
        let entry = entries.remove(index);
        drop(entries);
        // Full: then it has been rung.
        let _ = entry.end.ring();
        let joined = entry.thread.join();
        !joined.expect("a thread that waits for a daemon does not panic")
    }

    /// Waits for nothing any more: sockets of ours are removed, unless a daemon is just being asked.
    pub(super) fn end(&self) {
        let entries = std::mem::take(&mut *self.lock());
        for entry in &entries {
            let _ = entry.end.ring();
        }
        let until = Instant::now() + ENDING;
        for entry in &entries {
            let left = until.saturating_duration_since(Instant::now());
            let _ = entry.ended.recv_timeout(left);
        }
    }

    fn note(&self, place: &Place, state: String) {
        let mut entries = self.lock();
        let entry = entries.iter_mut().find(|e| e.is(place.bus, &place.id));
        if let Some(entry) = entry {
            entry.state = state;
        }
    }

    /// Waits for the daemon, and puts its device on the bus; true if it is there.
    fn bring(&self, missing: Missing, handle: &Handle, end: &Doorbell) -> bool {
        let Missing {
            place, settings, ..
        } = missing;
        let waited = wait(&settings, end, |error| {
            let again = format!("waiting: {error}");
            let is_new = self.state(Some(place.bus), &place.id).as_ref() != Some(&again);
            // Each reason once, as long as it stays the same; nobody there was said before.
            if is_new && !matches!(error, ConnectError::Nobody { .. }) {
                tracing::warn!(device = place.id, "{error}");
            }
            self.note(&place, again);
        });
        let Some(bridge) = waited else {
            return false;
        };
        let Place {
            id,
            bus,
            num,
            worker,
            ..
        } = &place;
        match handle.add_device(*bus, id, *num, *worker, Box::new(bridge)) {
            Ok(num) => {
                tracing::info!(device = id, number = num.0, "its daemon has come");
                self.lock().retain(|entry| !entry.is(*bus, id));
                true
            }
            Err(error) => {
                tracing::error!(device = id, %error, "cannot be added");
                self.note(&place, format!("failed: {error}"));
                false
            }
        }
    }
}

/// Waits until there is a daemon, or `end` was rung. `say` is told of each attempt that has failed.
fn wait(settings: &Settings, end: &Doorbell, say: impl Fn(&ConnectError)) -> Option<Bridge> {
    let mut pause = FIRST_PAUSE;
    let mut listens = true;
    loop {
        if is_over(end, settings.listener.as_ref().filter(|_| listens), pause) {
            return None;
        }
        pause = (pause * 2).min(settings.reconnect.max(FIRST_PAUSE));
        match Bridge::connect(settings, settings.patience) {
            // Whoever has rung meanwhile does not want it any more.
            Ok(bridge) => return (!is_over(end, None, Duration::ZERO)).then_some(bridge),
            Err(error) => {
                // Who comes after one that was of no use waits as it would if it were called.
                listens = matches!(error, ConnectError::Nobody { .. });
                say(&error);
            }
        }
    }
}

/// Waits so long, or until somebody connects; true if `end` was rung.
fn is_over(end: &Doorbell, listener: Option<&Listener>, time: Duration) -> bool {
    let end_fd = end.as_fd();
    let mut fds = vec![PollFd::from_borrowed_fd(end_fd, PollFlags::IN)];
    fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
    // However it ends, it is looked at what there is.
    let _ = poll(&mut fds, Timespec::try_from(time).ok().as_ref());
    !fds[0].revents().is_empty()
}

#[cfg(test)]
#[path = "late_test.rs"]
mod tests;
