// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy: several fronts on one bus, built from plain configuration.

use crate::front::qemu::{QemuDevice, mac_of};
use crate::front::vhost_user::{BindError, FrontStats, VhostUserFront, VhostUserOptions};
use crate::link::{Link, SessionHandle, Source};
use crate::session::{Op, OpError, Options, Outcome, Session, Target};
use serde::Deserialize;
use std::fmt;
use std::io;
use std::path::PathBuf;
use thiserror::Error;
use virtio_msg::DevNum;
use vmsg_bus::BusSpec;

/// A device as a user names it: by number or by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRef(pub Target);

impl<'de> Deserialize<'de> for DeviceRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = DeviceRef;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the number or the name of a device")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<DeviceRef, E> {
                if text.is_empty() {
                    return Err(E::custom("the name of a device is missing"));
                }
                if text.bytes().all(|b| b.is_ascii_digit()) {
                    let number = text
                        .parse()
                        .map_err(|_| E::custom(format!("device numbers end at {}", u16::MAX)))?;
                    return Ok(DeviceRef(Target::Number(DevNum(number))));
                }
                Ok(DeviceRef(Target::Name(text.to_owned())))
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<DeviceRef, E> {
                let number = u16::try_from(number)
                    .map_err(|_| E::custom(format!("device numbers end at {}", u16::MAX)))?;
                Ok(DeviceRef(Target::Number(DevNum(number))))
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<DeviceRef, E> {
                self.visit_u64(
                    u64::try_from(number)
                        .map_err(|_| E::custom("device numbers are not negative"))?,
                )
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// What kinds of front there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FrontKind {
    /// [`vhost_user`](crate::front::vhost_user).
    #[default]
    VhostUser,
}

/// A front: `vhost-user,socket=net.sock,dev=net0`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FrontSpec {
    /// Which kind.
    pub kind: FrontKind,
    /// The socket it listens on.
    pub socket: PathBuf,
    /// The device behind it.
    pub dev: DeviceRef,
    /// Which of the proxy's buses the device is on: its position among them, from 0.
    #[serde(default)]
    pub bus: usize,
    /// Whether configuration space is offered; otherwise yes, except for network devices, whose configuration QEMU keeps itself.
    #[serde(default)]
    pub config: Option<bool>,
    /// Permissions of the socket, octal; otherwise 0600.
    #[serde(default)]
    pub mode: Option<vmsg_bus::Mode>,
}

impl FrontSpec {
    /// What the front is called in logs: its socket's name.
    pub fn name(&self) -> String {
        self.socket.file_stem().map_or_else(
            || "front".into(),
            |stem| stem.to_string_lossy().into_owned(),
        )
    }
}

/// Why a proxy does not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// A front cannot listen.
    #[error("front {front}: {source}")]
    Bind {
        /// Which.
        front: String,
        /// Why.
        source: BindError,
    },
    /// A front names a bus that is not there.
    #[error("front {front}: there is no bus {bus}")]
    NoSuchBus {
        /// Which.
        front: String,
        /// The bus it names.
        bus: usize,
    },
    /// A kind of bus that a proxy cannot use.
    #[error("a proxy cannot use the bus {0}")]
    Bus(String),
    /// The system said no.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

#[derive(Debug)]
struct Running {
    spec: FrontSpec,
    // The link goes first: the front's thread may wait for it.
    link: Link,
    front: VhostUserFront,
}

/// Fronts that run, each with a session and a connection to its bus of its own: every guest has its own windows. Dropping it stops
/// them all, and the device hosts reset their devices.
#[derive(Debug)]
pub struct Proxy {
    fronts: Vec<Running>,
}

impl Proxy {
    /// Starts all fronts. `ready` is called for each as soon as VMMs can connect to it. The device host need not be there yet.
    ///
    /// # Errors
    /// [`ProxyError`]; then nothing runs any more.
    pub fn start(
        buses: &[BusSpec],
        specs: &[FrontSpec],
        mut ready: impl FnMut(&FrontSpec),
    ) -> Result<Proxy, ProxyError> {
        // The guests' memory files are theirs: they may truncate them under our eyes.
        vmsg_mem::fault::install().map_err(|source| ProxyError::Os {
            what: "SIGBUS handler",
            source,
        })?;
        let mut fronts = Vec::new();
        for spec in specs {
            let name = spec.name();
            let bus = buses.get(spec.bus).ok_or_else(|| ProxyError::NoSuchBus {
                front: name.clone(),
                bus: spec.bus,
            })?;
            let source = match bus {
                BusSpec::Unix(unix) => Source::Unix(unix.connector(&format!("vmsg proxy {name}"))),
                other => return Err(ProxyError::Bus(other.to_string())),
            };
            let session = Session::new(spec.dev.0.clone(), Options::default());
            let link = Link::start(&name, session, source).map_err(|source| ProxyError::Os {
                what: "starting a link",
                source,
            })?;
            let options = VhostUserOptions {
                socket: spec.socket.clone(),
                mode: spec.mode.map_or(0o600, |mode| mode.0),
                config: spec.config,
            };
            let front = VhostUserFront::start(&name, link.handle(), options).map_err(|source| {
                ProxyError::Bind {
                    front: name.clone(),
                    source,
                }
            })?;
            ready(spec);
            fronts.push(Running {
                spec: spec.clone(),
                link,
                front,
            });
        }
        Ok(Proxy { fronts })
    }

    /// The fronts, with what went through each.
    pub fn fronts(&self) -> impl Iterator<Item = (&FrontSpec, SessionHandle, FrontStats)> {
        self.fronts
            .iter()
            .map(|running| (&running.spec, running.link.handle(), running.front.stats()))
    }
}

/// The QEMU arguments for one front, as text for a shell, without those of the machine
/// ([`machine_args`](crate::front::qemu::machine_args)). Asks the device host what the device is.
///
/// # Errors
/// [`OpError`] if the device host does not say.
pub fn print_qemu(
    spec: &FrontSpec,
    session: &SessionHandle,
    machine: &crate::front::qemu::Machine,
) -> Result<String, OpError> {
    let Outcome::Device(facts) = session.call(Op::Describe)? else {
        return Err(OpError::NoDevice);
    };
    let len = facts.info.config_size.min(6);
    let mac = match session.call(Op::ReadConfig { offset: 0, len })? {
        Outcome::Config(config) if facts.info.device_id == 1 => mac_of(&facts.offered, &config),
        _ => None,
    };
    let name = spec.name();
    let device = QemuDevice {
        id: &name,
        socket: &spec.socket,
        device_id: facts.info.device_id,
        queues: facts.queue_sizes.len(),
        config_size: facts.info.config_size,
        mac,
    };
    Ok(crate::front::qemu::to_shell(
        &crate::front::qemu::device_args(&device, machine),
    ))
}

/// A session with a device of a bus, without a front: to ask what the device is.
///
/// # Errors
/// [`ProxyError`].
pub fn connect(bus: &BusSpec, device: &DeviceRef, name: &str) -> Result<Link, ProxyError> {
    let source = match bus {
        BusSpec::Unix(unix) => Source::Unix(unix.connector(name).observer()),
        other => return Err(ProxyError::Bus(other.to_string())),
    };
    let session = Session::new(device.0.clone(), Options::default());
    Link::start(name, session, source).map_err(|source| ProxyError::Os {
        what: "starting a link",
        source,
    })
}

#[cfg(test)]
#[path = "proxy_test.rs"]
mod tests;
