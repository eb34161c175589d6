// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What control knows of the switch: it checks what is asked, and computes what the worker needs.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;

use super::bucket::Bucket;
use super::config::{Mirror, PortChange, PortConfig, Unknown, Vlans};
use super::ports::Tables;
use super::rules::{self, Rule};
use super::shared::{Change, Limits, PortShared, Tagging};
use super::table::{ALL_VLANS, Key};
use super::{MAX_PORTS, MAX_RULES, SwitchError, vlan};
use crate::capture::PcapWriter;
use crate::{CaptureConfig, Mac};

/// A port, as control knows it.
pub(super) struct Known {
    pub(super) config: PortConfig,
    pub(super) shared: Arc<PortShared>,
    pub(super) uplink: bool,
}

/// All that control knows.
pub(super) struct Registry {
    pub(super) ports: Vec<Option<Known>>,
    pub(super) rules: Vec<Rule>,
    pub(super) unknown: Unknown,
    pub(super) generation: u32,
    tables: Arc<Tables>,
    /// Addresses that the table has room for.
    table: usize,
}

impl Registry {
    pub(super) fn new(
        table: usize,
        rules: Vec<Rule>,
        unknown: Unknown,
    ) -> Result<Self, SwitchError> {
        let mut registry = Self {
            ports: Vec::new(),
            rules: Vec::new(),
            unknown,
            generation: 0,
            tables: Arc::new(Tables::new()),
            table,
        };
        registry.put_rules(rules)?;
        Ok(registry)
    }

    pub(super) fn tables(&self) -> Arc<Tables> {
        Arc::clone(&self.tables)
    }

    pub(super) fn find(&self, name: &str) -> Result<usize, SwitchError> {
        self.ports
            .iter()
            .position(|port| port.as_ref().is_some_and(|port| port.config.name == name))
            .ok_or_else(|| SwitchError::NoSuchPort(name.to_owned()))
    }

    /// Computes anew who reaches whom, and what becomes of strangers.
    pub(super) fn compile(&mut self) -> Change {
        let names: Vec<Option<&str>> = self
            .ports
            .iter()
            .map(|port| port.as_ref().map(|port| port.config.name.as_str()))
            .collect();
        let tables = Arc::make_mut(&mut self.tables);
        tables.compile(&names, &self.rules, &self.unknown);
        tables.wide = self.ports.iter().flatten().any(|port| {
            matches!(port.config.vlan, Vlans::Trunk { .. }) && fixed(&port.config).next().is_some()
        });
        Change::Tables(Arc::clone(&self.tables))
    }

    /// Puts rules behind those there are.
    pub(super) fn put_rules(&mut self, new: Vec<Rule>) -> Result<(), SwitchError> {
        let mut all = self.rules.clone();
        for rule in new {
            rules::put(&mut all, rule);
        }
        if all.len() > MAX_RULES {
            let reason = format!("{} of them, {MAX_RULES} can be", all.len());
            return Err(SwitchError::setting("rules", reason));
        }
        self.rules = all;
        Ok(())
    }

    /// Checks a new port; returns its number.
    pub(super) fn admit(&self, config: &PortConfig) -> Result<u16, SwitchError> {
        if !rules::is_name(&config.name) {
            let reason = format!("`{}` is no name for a port", config.name);
            return Err(SwitchError::setting("name", reason));
        }
        if self.find(&config.name).is_ok() {
            return Err(SwitchError::NameTaken(config.name.clone()));
        }
        self.check(config, None)?;
        let free = self.ports.iter().position(Option::is_none);
        let index = free.unwrap_or(self.ports.len());
        if index >= MAX_PORTS {
            return Err(SwitchError::TooManyPorts);
        }
        u16::try_from(index).map_err(|_| SwitchError::TooManyPorts)
    }

    /// Checks the settings of the port `index`, or of a new one.
    fn check(&self, config: &PortConfig, index: Option<usize>) -> Result<(), SwitchError> {
        let vlan = |key, vlan: u16| {
            if (1..=vlan::LAST).contains(&vlan) {
                return Ok(());
            }
            let reason = format!("{vlan} is not a VLAN from 1 to 4094");
            Err(SwitchError::setting(key, reason))
        };
        match &config.vlan {
            Vlans::Plain => {}
            Vlans::Access(number) => vlan("vlan", *number)?,
            Vlans::Trunk { allowed, native } => {
                if let Some(number) = native {
                    vlan("native", *number)?;
                } else if allowed.is_empty() {
                    return Err(SwitchError::setting("trunk", "it carries no VLAN"));
                }
            }
        }
        for mac in fixed(config) {
            if !mac.is_unicast() {
                let reason = format!("{mac} is not the address of a single interface");
                return Err(SwitchError::setting("mac", reason));
            }
        }
        let mut all = fixed(config).count();
        for (other, port) in self.ports.iter().enumerate() {
            let Some(port) = port else { continue };
            if Some(other) == index {
                continue;
            }
            all += fixed(&port.config).count();
            let taken = fixed(&port.config).find(|mac| fixed(config).any(|own| own == *mac));
            if let Some(mac) = taken
                && meet(&config.vlan, &port.config.vlan)
            {
                return Err(SwitchError::MacTaken {
                    mac,
                    port: port.config.name.clone(),
                });
            }
        }
        if all > self.table {
            return Err(SwitchError::TableFull);
        }
        Ok(())
    }

    /// Puts in a port that was admitted; returns what the worker is to do.
    pub(super) fn put(&mut self, index: u16, known: Known) -> Vec<Change> {
        let index = usize::from(index);
        if self.ports.len() <= index {
            self.ports.resize_with(index + 1, || None);
        }
        Arc::make_mut(&mut self.tables).set_vlans(index, Some(&known.config.vlan));
        let addresses = addresses(index, &known.config);
        self.ports[index] = Some(known);
        vec![self.compile(), addresses]
    }

    /// Takes out a port; returns what the worker is to do.
    pub(super) fn take(&mut self, index: usize) -> Vec<Change> {
        if let Some(port) = self.ports[index].take() {
            port.shared.gone.store(true, Ordering::Relaxed);
            super::shared::ring(&port.shared.event);
        }
        Arc::make_mut(&mut self.tables).set_vlans(index, None);
        vec![Change::RemovePort(number(index)), self.compile()]
    }

    /// Ports whose devices are gone.
    pub(super) fn orphans(&self) -> Vec<usize> {
        let orphan = |port: &Option<Known>| {
            port.as_ref()
                .is_some_and(|port| port.shared.gone.load(Ordering::Relaxed))
        };
        self.ports
            .iter()
            .enumerate()
            .filter(|(_, port)| orphan(port))
            .map(|(index, _)| index)
            .collect()
    }

    /// Changes a port; returns what the worker is to do.
    pub(super) fn change(
        &mut self,
        index: usize,
        change: PortChange,
    ) -> Result<Vec<Change>, SwitchError> {
        let Some(port) = &self.ports[index] else {
            return Ok(Vec::new());
        };
        let mut config = port.config.clone();
        let PortChange {
            vlan,
            pin,
            statics,
            macs,
            storm,
            rate_in,
            rate_out,
            link,
        } = change;
        let revlan = vlan.is_some();
        let readdress = revlan || pin.is_some() || statics.is_some();
        config.vlan = vlan.unwrap_or(config.vlan);
        config.pin = pin.unwrap_or(config.pin);
        config.statics = statics.unwrap_or(config.statics);
        config.macs = macs.unwrap_or(config.macs);
        config.storm = storm.unwrap_or(config.storm);
        config.rate_in = rate_in.unwrap_or(config.rate_in);
        config.rate_out = rate_out.unwrap_or(config.rate_out);
        config.link = link.unwrap_or(config.link);
        self.check(&config, Some(index))?;
        let mut changes = Vec::new();
        if revlan {
            Arc::make_mut(&mut self.tables).set_vlans(index, Some(&config.vlan));
        }
        let limits = Limits {
            macs: config.macs,
            storm: storm.map(|storm| storm.map(Bucket::frames)),
            rate_in: rate_in.map(|rate| rate.map(Bucket::bytes)),
            rate_out: rate_out.map(|rate| rate.map(Bucket::bytes)),
            link: config.link,
        };
        if readdress {
            changes.push(addresses(index, &config));
        }
        changes.push(Change::Limits(number(index), limits));
        if let Some(port) = &mut self.ports[index] {
            port.shared.link.store(config.link, Ordering::Relaxed);
            port.config = config;
        }
        if readdress {
            changes.push(self.compile());
        }
        Ok(changes)
    }
}

/// Ports have numbers up to [`MAX_PORTS`].
pub(super) fn number(index: usize) -> u16 {
    u16::try_from(index).expect("a port's number")
}

/// All addresses that are fixed at a port.
fn fixed(config: &PortConfig) -> impl Iterator<Item = Mac> {
    config.pin.iter().chain(&config.statics).copied()
}

/// True if there is a VLAN on both sides.
fn meet(one: &Vlans, other: &Vlans) -> bool {
    (0..=vlan::LAST).any(|vlan| one.contains(vlan) && other.contains(vlan))
}

/// The worker's view of a port's VLANs and addresses.
fn addresses(index: usize, config: &PortConfig) -> Change {
    let (tagging, vlan) = match config.vlan {
        Vlans::Plain => (Tagging::Plain, 0),
        Vlans::Access(vlan) => (Tagging::Access(vlan), vlan),
        Vlans::Trunk { native, .. } => (Tagging::Trunk { native }, ALL_VLANS),
    };
    let keys = fixed(config).map(|mac| Key::new(vlan, mac.0)).collect();
    Change::Addresses(number(index), tagging, !config.pin.is_empty(), keys)
}

/// Begins a capture file, or goes on with one.
pub(super) fn open_capture(mirror: &Mirror) -> Result<Box<PcapWriter<File>>, SwitchError> {
    let failed = |source| SwitchError::Capture {
        path: mirror.path.clone(),
        source,
    };
    // What is no file, such as a pipe, must not make the worker wait: when it is full the capture ends.
    let flags = i32::from_ne_bytes(OFlags::NONBLOCK.bits().to_ne_bytes());
    let config = CaptureConfig {
        snaplen: mirror.snaplen,
        ..CaptureConfig::default()
    };
    let mut options = OpenOptions::new();
    options.custom_flags(flags);
    // Who reads from a pipe wants a beginning.
    let is_file = std::fs::metadata(&mirror.path).is_ok_and(|found| found.is_file());
    let opened = if mirror.append && is_file {
        let file = options.read(true).append(true).open(&mirror.path);
        file.and_then(|file| PcapWriter::resume(file, config))
    } else {
        let file = options.write(true).create(true).truncate(true);
        let file = file.open(&mirror.path);
        file.and_then(|file| PcapWriter::new(file, config))
    };
    opened.map(Box::new).map_err(failed)
}
