// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices and what they plug into, as their specifications say.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vmsg_bus::unix::BindError;
use vmsg_device::console::{Console, Hub, HubError};
use vmsg_device::device::Device;
use vmsg_device::net::{MAX_PAIRS, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_net::socket::{Dgram, SocketError, Stream};
use vmsg_net::tap::{Tap, TapError};
use vmsg_net::user::{FlowStore, User, UserError};
use vmsg_net::vhost_user::VhostUser;
use vmsg_net::{Backend, Capture, CaptureConfig, Null};

use super::disk::Disks;
use super::kept::DeviceFlows;
use super::late::Awaited;
use super::{disk, late};
use crate::Usage;
use crate::console::Registry;
use crate::control::LinkState;
use crate::keeper::Keeper;
use crate::spec::{BackendKeys, ConsoleSpec, DeviceSpec, Duplex, NetBackend, SocketConfig};

/// What devices make known of themselves.
pub(super) struct Known {
    pub(super) consoles: Registry,
    /// The control socket, which consoles have theirs beside.
    pub(super) control: Option<PathBuf>,
    pub(super) disks: Disks,
    /// Devices that come when their daemons do.
    pub(super) awaited: Awaited,
}

/// Makes the device called `id`, which plugs into `port` if there is one. `flows`: what a process before has left to it.
pub(super) fn make(
    spec: &DeviceSpec,
    id: &str,
    port: Option<Box<dyn Backend>>,
    flows: Option<DeviceFlows>,
    known: &Known,
) -> anyhow::Result<Box<dyn Device>> {
    match spec {
        DeviceSpec::Rng(_) => Ok(Box::new(Rng::new())),
        DeviceSpec::Console(spec) => Ok(Box::new(make_console(spec, id, known)?)),
        DeviceSpec::Blk(spec) => Ok(Box::new(disk::make(spec, id, &known.disks)?)),
        DeviceSpec::VhostUser(spec) => late::connect(spec, id),
        DeviceSpec::Net(spec) => {
            let goes_on = flows.as_ref().is_some_and(|kept| kept.keeper.was_found());
            // A switch records what passes a port itself.
            let pcap = spec.pcap.as_ref().filter(|_| port.is_none());
            let plugged = match port {
                Some(_) => NetBackend::None,
                None => spec.backend.unwrap_or_default(),
            };
            let backend = match port {
                Some(port) => port,
                None => make_backend(&spec.backend_keys(), spec.queues, id, flows)?,
            };
            // An interface has an MTU of its own; the guest need not be told the usual one.
            let mtu = spec.mtu.or_else(|| match plugged {
                NetBackend::Tap => Some(backend.offloads().mtu).filter(|mtu| *mtu != 1500),
                _ => None,
            });
            let queue_pairs = spec.queues.unwrap_or(match plugged {
                NetBackend::Tap => backend.queue_pairs(),
                _ => 1,
            });
            if !(1..=MAX_PAIRS).contains(&queue_pairs) {
                bail!(Usage(format!(
                    "queues={queue_pairs}: 1 to {MAX_PAIRS} are possible"
                )));
            }
            let settings = Settings {
                mtu,
                queue_pairs,
                link_up: spec.link == LinkState::Up,
                speed: spec.line()?,
                half_duplex: spec.duplex == Some(Duplex::Half),
                rss: spec.rss.unwrap_or(true),
                hash_report: spec.hash.unwrap_or(true),
                mac: spec.mac(id)?,
            };
            let backend: Box<dyn Backend> = match pcap {
                Some(path) => Box::new(capture(backend, path, goes_on)?),
                None => backend,
            };
            Ok(Box::new(Net::new(&settings, backend)))
        }
    }
}

/// Makes a console, and what it can be reached by.
fn make_console(spec: &ConsoleSpec, id: &str, known: &Known) -> anyhow::Result<Console> {
    spec.check(id)?;
    let mut hubs = Vec::new();
    for config in spec.hubs(id, known.control.as_deref()) {
        if known.consoles.find(&config.name).is_some() {
            bail!(Usage(format!(
                "there is a console `{}` already; its device needs another id=",
                config.name
            )));
        }
        let hub = Hub::open(&config).map_err(|error| match error {
            HubError::Socket(BindError::PathTooLong { .. }) => Usage(error.to_string()).into(),
            error => anyhow::Error::new(error),
        })?;
        hubs.push(hub);
    }
    let console = Console::new(&spec.settings(), hubs)?;
    for handle in console.handles() {
        known.consoles.add(handle);
    }
    Ok(console)
}

/// Records what passes `backend`; `goes_on` keeps what a killed `serve` has recorded.
fn capture(
    backend: Box<dyn Backend>,
    path: &Path,
    goes_on: bool,
) -> anyhow::Result<Capture<Box<dyn Backend>>> {
    let config = CaptureConfig::default();
    if goes_on {
        Capture::resume(backend, path, config)
    } else {
        Capture::create(backend, path, config)
    }
    .with_context(|| format!("cannot record to {}", path.display()))
}

/// Opens what the device or uplink called `id` plugs into.
pub(super) fn make_backend(
    spec: &BackendKeys,
    queues: Option<u16>,
    id: &str,
    kept: Option<DeviceFlows>,
) -> anyhow::Result<Box<dyn Backend>> {
    spec.check(queues)?;
    match spec.backend.unwrap_or_default() {
        NetBackend::None => Ok(Box::new(Null::default())),
        NetBackend::Tap => {
            let tap = Tap::open(&spec.tap_config(queues)?).map_err(|error| match error {
                TapError::Name(_) | TapError::Queues(_) | TapError::Prefix(..) => {
                    Usage(error.to_string()).into()
                }
                error => anyhow::Error::new(error),
            })?;
            tracing::info!(device = id, interface = tap.name(), "plugged in");
            Ok(Box::new(tap))
        }
        NetBackend::Socket => {
            let opened: Result<Box<dyn Backend>, _> = match spec.socket_config()? {
                SocketConfig::Stream(config) => {
                    Stream::open(&config).map(|stream| Box::new(stream) as _)
                }
                SocketConfig::Dgram(config) => {
                    Dgram::open(&config).map(|dgram| Box::new(dgram) as _)
                }
            };
            opened.map_err(socket_failed)
        }
        NetBackend::VhostUser => {
            let opened = VhostUser::open(&spec.vhost_user_config()?);
            Ok(Box::new(opened.map_err(socket_failed)?))
        }
        NetBackend::User => {
            let mut user = User::new(spec.user_config()?).map_err(|error| match error {
                UserError::Forward { .. } | UserError::Os { .. } => anyhow::Error::new(error),
                mistake => Usage(mistake.to_string()).into(),
            })?;
            if let Some(DeviceFlows { keeper, flows }) = kept {
                let count = flows.len();
                user.set_flow_store(Box::new(Store {
                    keeper: keeper.clone(),
                    device: id.to_owned(),
                }));
                for flow in flows {
                    if let Err(error) = user.restore(&flow.record, flow.fd) {
                        tracing::warn!(device = id, %error, "a connection is lost");
                        keeper.remove(id, flow.key);
                    }
                }
                if count > 0 {
                    tracing::info!(device = id, connections = count, "taken over");
                }
            }
            Ok(Box::new(user))
        }
    }
}

fn socket_failed(error: SocketError) -> anyhow::Error {
    match error {
        SocketError::Addresses(_) => Usage(error.to_string()).into(),
        error => anyhow::Error::new(error),
    }
}

/// Where a device's connections are held.
struct Store {
    keeper: Keeper,
    device: String,
}

impl FlowStore for Store {
    fn put(&mut self, key: u64, record: &[u8], fd: BorrowedFd<'_>) {
        self.keeper.put(&self.device, key, record, fd);
    }

    fn remove(&mut self, key: u64) {
        self.keeper.remove(&self.device, key);
    }
}
