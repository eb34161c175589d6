// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A proxy: several fronts on one bus, built from plain configuration.

use crate::front::qemu::{self, QemuDevice};
use crate::front::vfio_user::{VfioUserFront, VfioUserOptions};
use crate::front::vhost_user::{VhostUserFront, VhostUserOptions};
use crate::front::{BindError, FrontStats};
use crate::link::{Link, SessionHandle, Source};
use crate::session::{DeviceFacts, Options, Session, Target};
use crate::shadow::{self, Parts};
use serde::Deserialize;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use virtio_msg::DevNum;
use vmsg_bus::ivshmem::{MemoryMode, Ram};
use vmsg_bus::{BusSpec, CommonMode, CommonRam};

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

/// A bus as a user names it: by its position among the buses, from 0, or by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusRef {
    /// Its position.
    Index(usize),
    /// Its name; what that is, is up to whoever reads the buses.
    Name(String),
}

impl Default for BusRef {
    /// The first one.
    fn default() -> Self {
        BusRef::Index(0)
    }
}

impl fmt::Display for BusRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BusRef::Index(index) => write!(f, "{index}"),
            BusRef::Name(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for BusRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = BusRef;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a bus, or its position from 0")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<BusRef, E> {
                if text.is_empty() {
                    return Err(E::custom("the name of a bus is missing"));
                }
                Ok(text
                    .parse()
                    .map_or_else(|_| BusRef::Name(text.to_owned()), BusRef::Index))
            }
            fn visit_u64<E: serde::de::Error>(self, index: u64) -> Result<BusRef, E> {
                usize::try_from(index)
                    .map(BusRef::Index)
                    .map_err(|_| E::custom("there are not so many buses"))
            }
            fn visit_i64<E: serde::de::Error>(self, index: i64) -> Result<BusRef, E> {
                self.visit_u64(
                    u64::try_from(index).map_err(|_| E::custom("buses are counted from 0"))?,
                )
            }
        }
        deserializer.deserialize_any(Visitor)
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
    /// [`vfio_user`](crate::front::vfio_user).
    VfioUser,
}

impl fmt::Display for FrontKind {
    /// As in a [`FrontSpec`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FrontKind::VhostUser => "vhost-user",
            FrontKind::VfioUser => "vfio-user",
        })
    }
}

/// A front: `vhost-user,socket=net.sock,dev=net0` or `vfio-user,socket=net.sock,dev=net0,isolate=on`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FrontSpec {
    /// Which kind.
    pub kind: FrontKind,
    /// The socket it listens on.
    pub socket: PathBuf,
    /// The device behind it.
    pub dev: DeviceRef,
    /// Which of the proxy's buses the device is on; otherwise the first one.
    #[serde(default)]
    pub bus: BusRef,
    /// vhost-user: whether configuration space is offered; otherwise yes, except for network devices, SCSI and file systems, whose configuration
    /// QEMU keeps itself.
    #[serde(default)]
    pub config: Option<bool>,
    /// Whether the guest's memory is kept from the device host, which gets copies instead; otherwise no, but for buses with `memory=bounce`.
    #[serde(default)]
    pub isolate: Option<bool>,
    /// Bytes of memory for these copies; otherwise 64 MiB, or with `memory=bounce` a share of what other fronts leave.
    #[serde(default)]
    pub segment: Option<u64>,
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

    /// Whether all that is set fits the kind of front and each other.
    ///
    /// # Errors
    /// [`SpecError`], which names what does not.
    pub fn check(&self) -> Result<(), SpecError> {
        let vhost = self.kind == FrontKind::VhostUser;
        let senseless = [("config", self.config.is_some() && !vhost)];
        for (key, is) in senseless {
            if is {
                let kind = self.kind;
                return Err(SpecError::NotForKind { key, kind });
            }
        }
        match self.segment {
            Some(bytes) if !SEGMENT.contains(&bytes) || !bytes.is_multiple_of(PAGE) => {
                Err(SpecError::Segment(bytes))
            }
            _ => Ok(()),
        }
    }

    /// Where its segments lie on a bus that lends memory.
    fn segment(&self) -> shadow::Source {
        match self.segment {
            Some(size) => shadow::Source::Own { size },
            None => shadow::Source::default(),
        }
    }

    /// Whether the front can do its work on `bus`.
    fn check_bus(&self, bus: &BusSpec) -> Result<(), SpecError> {
        let copies = match (bounces(bus), self.isolate) {
            (true, Some(false)) => return Err(SpecError::MustIsolate),
            (true, _) => true,
            (false, Some(true)) if matches!(bus, BusSpec::LinuxUser(_)) => {
                return Err(SpecError::CannotIsolate);
            }
            (false, Some(true)) if matches!(bus, BusSpec::Ivshmem(_)) => {
                return Err(SpecError::NotBounced);
            }
            (false, isolate) => isolate == Some(true) || self.kind == FrontKind::VfioUser,
        };
        if self.segment.is_some() && !copies {
            return Err(SpecError::NoCopies);
        }
        Ok(())
    }
}

/// Whether the bus has memory in common that is for copies, and lends none.
fn bounces(bus: &BusSpec) -> bool {
    match bus {
        BusSpec::Ivshmem(spec) => spec.memory == Some(MemoryMode::Bounce),
        _ => false,
    }
}

/// The parts of fronts in the memory of such a bus. If it is a file, it is there already, and with it what fronts of before have left: that is
/// wiped now. Otherwise when the bus is connected.
fn divide(
    bus: &BusSpec,
    wanted: Vec<Option<u64>>,
) -> Result<Option<Arc<Parts>>, shadow::ProvideError> {
    let BusSpec::Ivshmem(spec) = bus else {
        return Ok(None);
    };
    if spec.memory != Some(MemoryMode::Bounce) {
        return Ok(None);
    }
    let parts = Arc::new(Parts::new(wanted));
    // The memory of a PCI function is not to be touched before somebody has seen to it that it is one.
    if let Some(Ram::File(path)) = &spec.ram
        && !path.starts_with("/sys")
    {
        let offset = spec.ram_offset.unwrap_or(0);
        match CommonRam::map(CommonMode::Bounce, path, offset, spec.ram_size) {
            Ok(ram) => parts.provide_ram(&ram)?,
            // The bus says so when it is connected.
            Err(error) => tracing::debug!(%error, "the memory in common is not there yet"),
        }
    }
    Ok(Some(parts))
}

/// Memory for copies: the least that lets a few requests be under way, and what nobody needs more of.
const SEGMENT: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 34;
const PAGE: u64 = 4096;

/// What is wrong with a [`FrontSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Something was set that this kind of front does not have.
    #[error("a {kind} front has no {key}=; {} has", other(*kind))]
    NotForKind {
        /// What.
        key: &'static str,
        /// The kind.
        kind: FrontKind,
    },
    /// No segment can be so large or so small.
    #[error("segment={0}: must be a multiple of 4096 between 1M and 16G")]
    Segment(u64),
    /// Memory for copies, and nothing is copied.
    #[error("segment= is memory for copies, which a vhost-user front makes with isolate=on only")]
    NoCopies,
    /// The bus has nothing but memory for copies.
    #[error("isolate=off: nothing but copies goes over a bus with memory=bounce")]
    MustIsolate,
    /// The bus shows the guest's memory to the device host.
    #[error(
        "isolate=on: over this ivshmem bus the device host sees the guest's memory in place; use memory=bounce, with which nothing of it is shown"
    )]
    NotBounced,
    /// The bus has the guest's memory in common with the device host, from the start.
    #[error(
        "isolate=on: on a linux-user bus the device host has all of the guest's memory from the start (ram=); \
use a unix bus, where memory is lent at run time"
    )]
    CannotIsolate,
}

/// The kind of front that has what this one has not.
fn other(kind: FrontKind) -> FrontKind {
    match kind {
        FrontKind::VhostUser => FrontKind::VfioUser,
        FrontKind::VfioUser => FrontKind::VhostUser,
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
    /// A front cannot be as it is described.
    #[error("front {front}: {source}")]
    Spec {
        /// Which.
        front: String,
        /// Why.
        source: SpecError,
    },
    /// A front names a bus that is not there.
    #[error("front {front}: there is no bus {bus}")]
    NoSuchBus {
        /// Which.
        front: String,
        /// The bus it names.
        bus: BusRef,
    },
    /// Two fronts are to listen on one socket.
    #[error("two fronts have the socket `{}`", .0.display())]
    SameSocket(PathBuf),
    /// The fronts of a bus have no memory for copies.
    #[error(transparent)]
    Copies(#[from] shadow::ProvideError),
    /// The messages of a bus cannot be recorded.
    #[error(transparent)]
    Trace(#[from] vmsg_bus::trace::OpenError),
    /// The system said no.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl ProxyError {
    /// Whether it is the specifications that cannot be, wherever they are tried.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Spec { .. } | Self::NoSuchBus { .. } | Self::SameSocket(_)
        )
    }
}

#[derive(Debug)]
struct Running {
    spec: FrontSpec,
    session: SessionHandle,
    front: Front,
}

#[derive(Debug)]
enum Front {
    VhostUser(VhostUserFront),
    VfioUser(VfioUserFront),
}

impl Front {
    fn start(
        spec: &FrontSpec,
        session: SessionHandle,
        segment: shadow::Source,
    ) -> Result<Front, BindError> {
        let (name, socket) = (spec.name(), spec.socket.clone());
        let mode = spec.mode.map_or(0o600, |mode| mode.0);
        let isolate = segment.is_common() || spec.isolate == Some(true);
        match spec.kind {
            FrontKind::VhostUser => {
                let mut options = VhostUserOptions::new(socket);
                options.mode = mode;
                options.config = spec.config;
                options.isolate = isolate;
                options.segment = segment;
                VhostUserFront::start(&name, session, options).map(Front::VhostUser)
            }
            FrontKind::VfioUser => {
                let mut options = VfioUserOptions::new(socket);
                options.mode = mode;
                options.isolate = isolate;
                options.segment = segment;
                VfioUserFront::start(&name, session, options).map(Front::VfioUser)
            }
        }
    }

    fn stats(&self) -> FrontStats {
        match self {
            Front::VhostUser(front) => front.stats(),
            Front::VfioUser(front) => front.stats(),
        }
    }
}

/// Fronts that run, each with a session of its own, and on buses with room for many drivers with a connection of its own: every guest has
/// its own windows. Dropping it stops them all, and the device hosts reset their devices.
#[derive(Debug)]
pub struct Proxy {
    // The links go first: the fronts' threads may wait for them.
    links: Vec<Link>,
    fronts: Vec<Running>,
}

impl Proxy {
    /// Starts all fronts. `ready` is called for each, once VMMs can connect to all of them. The device hosts need not be there yet.
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
        let mut places: Vec<PathBuf> = Vec::new();
        let mut of_bus: Vec<Vec<usize>> = vec![Vec::new(); buses.len()];
        for (front, spec) in specs.iter().enumerate() {
            let place = place_of(&spec.socket);
            if places.contains(&place) {
                return Err(ProxyError::SameSocket(spec.socket.clone()));
            }
            places.push(place);
            let bad = |source| ProxyError::Spec {
                front: spec.name(),
                source,
            };
            spec.check().map_err(bad)?;
            match &spec.bus {
                BusRef::Index(bus) if *bus < buses.len() => {
                    spec.check_bus(&buses[*bus]).map_err(bad)?;
                    of_bus[*bus].push(front);
                }
                other => {
                    return Err(ProxyError::NoSuchBus {
                        front: spec.name(),
                        bus: other.clone(),
                    });
                }
            }
        }
        let mut links = Vec::new();
        let mut handles: Vec<Option<(SessionHandle, shadow::Source)>> = vec![None; specs.len()];
        for (bus, fronts) in buses.iter().zip(of_bus) {
            let groups: Vec<Vec<usize>> = match bus {
                // Room for one driver.
                BusSpec::LinuxUser(_) | BusSpec::Ivshmem(_) if !fronts.is_empty() => vec![fronts],
                _ => fronts.into_iter().map(|front| vec![front]).collect(),
            };
            for group in groups {
                let sessions: Vec<(String, Session)> = group
                    .iter()
                    .map(|&front| {
                        let spec = &specs[front];
                        let options = match spec.kind {
                            FrontKind::VhostUser => Options::default(),
                            FrontKind::VfioUser => crate::front::vfio_user::session_options(),
                        };
                        let mut session = Session::new(spec.dev.0.clone(), options);
                        if let BusSpec::Ivshmem(bus) = bus
                            && let Some(places) = crate::places::of_bus(bus)
                        {
                            session.set_places(places);
                        }
                        (spec.name(), session)
                    })
                    .collect();
                let names: Vec<&str> = sessions.iter().map(|(name, _)| name.as_str()).collect();
                let name = names.join("+");
                let connector = bus.connector(&format!("vmsg proxy {name}"));
                connector.open_trace()?;
                let source = Source::Bus(connector);
                let wanted = group.iter().map(|&front| specs[front].segment).collect();
                let parts = divide(bus, wanted)?;
                let link = Link::start_dividing(&name, sessions, source, parts.clone());
                let link = link.map_err(|source| ProxyError::Os {
                    what: "starting a link",
                    source,
                })?;
                for (seat, (front, handle)) in group.into_iter().zip(link.handles()).enumerate() {
                    let segment = match &parts {
                        Some(parts) => shadow::Source::Common {
                            parts: parts.clone(),
                            front: seat,
                        },
                        None => specs[front].segment(),
                    };
                    handles[front] = Some((handle.clone(), segment));
                }
                links.push(link);
            }
        }
        let mut proxy = Proxy {
            links,
            fronts: Vec::new(),
        };
        for (spec, (session, segment)) in specs.iter().zip(handles.into_iter().flatten()) {
            let name = spec.name();
            let front = Front::start(spec, session.clone(), segment).map_err(|source| {
                ProxyError::Bind {
                    front: name,
                    source,
                }
            })?;
            proxy.fronts.push(Running {
                spec: spec.clone(),
                session,
                front,
            });
        }
        for spec in specs {
            ready(spec);
        }
        Ok(proxy)
    }

    /// How many connections to buses there are, or would be.
    pub fn connections(&self) -> usize {
        self.links.len()
    }

    /// The fronts, with what went through each.
    pub fn fronts(&self) -> impl Iterator<Item = (&FrontSpec, SessionHandle, FrontStats)> {
        self.fronts.iter().map(|running| {
            (
                &running.spec,
                running.session.clone(),
                running.front.stats(),
            )
        })
    }
}

/// One name for a file however its path is written.
fn place_of(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent(), absolute.file_name()) {
        (Some(folder), Some(name)) => match folder.canonicalize() {
            Ok(folder) => folder.join(name),
            Err(_) => absolute,
        },
        _ => absolute,
    }
}

/// The QEMU arguments for one front, options and their values in turn, without those of the machine
/// ([`machine_args`](crate::front::qemu::machine_args)). `facts` and `config`, the first [`CONFIG_BYTES`](crate::front::qemu::CONFIG_BYTES) of
/// it, are what the device host says of the device.
pub fn print_qemu(
    spec: &FrontSpec,
    facts: &DeviceFacts,
    config: &[u8],
    machine: &qemu::Machine,
) -> Vec<String> {
    if spec.kind == FrontKind::VfioUser {
        return qemu::vfio_user_args(&spec.socket, None);
    }
    let name = spec.name();
    let device = QemuDevice::of(&name, &spec.socket, facts, config);
    qemu::device_args(&device, machine)
}

#[cfg(test)]
#[path = "proxy_test.rs"]
mod tests;
