// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a switch is changed and asked while it works.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::config::{Mirror, PortChange, Unknown};
use super::registry::{Known, Registry, number, open_capture};
use super::report::{MacEntry, PortReport, SwitchReport};
use super::rules::Rule;
use super::shared::{Answer, Change, Request, ring};
use super::table::ALL_VLANS;
use super::{Hub, SwitchError};

/// How long the worker has to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Changes a switch and tells about it, from any thread.
///
/// What is asked is checked at once; what is right then waits until the switch's worker has done it, between two batches of
/// frames. No lock is held that the worker needs.
#[derive(Clone)]
pub struct Control {
    pub(super) hub: Arc<Hub>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("switch", &self.hub.name)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Has the worker do what `prepare` comes up with, and waits for it.
    fn ask(
        &self,
        prepare: impl FnOnce(&mut Registry) -> Result<Vec<Change>, SwitchError>,
    ) -> Result<Answer, SwitchError> {
        let (reply, answer) = sync_channel(1);
        {
            let mut registry = self.hub.registry();
            self.hub.reap(&mut registry);
            let changes = prepare(&mut registry)?;
            // Requests are carried out in the order in which they were decided on: the lock is held until it is in.
            self.hub.post(Request {
                changes,
                reply: Some(reply),
            })?;
        }
        answer
            .recv_timeout(PATIENCE)
            .map_err(|_| SwitchError::NoAnswer)
    }

    /// The switch's name.
    pub fn name(&self) -> &str {
        &self.hub.name
    }

    /// Takes a port away. Its device stays, and has no link.
    ///
    /// # Errors
    ///
    /// If there is no such port, or the worker does not answer.
    pub fn remove_port(&self, name: &str) -> Result<(), SwitchError> {
        let answer = self.ask(|registry| {
            let index = registry.find(name)?;
            Ok(registry.take(index))
        })?;
        if let Some(mut port) = answer.port
            && let Some(uplink) = &mut port.uplink
        {
            if let Some(fd) = uplink.backend.event_fd() {
                // Somebody else may hold the same descriptor: closing it would not be enough.
                let _ = rustix::event::epoll::delete(&self.hub.epoll, fd);
            }
            uplink.backend.shutdown();
        }
        Ok(())
    }

    /// Changes a port. With new VLANs or fixed addresses it forgets what it has learned.
    ///
    /// # Errors
    ///
    /// If there is no such port, it cannot be like that, or the worker does not answer.
    pub fn set_port(&self, name: &str, change: PortChange) -> Result<(), SwitchError> {
        let mut shared = None;
        self.ask(|registry| {
            let index = registry.find(name)?;
            let changes = registry.change(index, change)?;
            shared = registry.ports[index]
                .as_ref()
                .map(|port| Arc::clone(&port.shared));
            Ok(changes)
        })?;
        // Its link may have changed, or it may send more.
        if let Some(shared) = shared {
            ring(&shared.event);
        }
        Ok(())
    }

    /// Has these rules in place of all others.
    ///
    /// # Errors
    ///
    /// If there are too many, or the worker does not answer.
    pub fn set_rules(&self, rules: Vec<Rule>) -> Result<(), SwitchError> {
        self.ask(|registry| {
            let old = std::mem::take(&mut registry.rules);
            if let Err(error) = registry.put_rules(rules) {
                registry.rules = old;
                return Err(error);
            }
            Ok(vec![registry.compile()])
        })?;
        Ok(())
    }

    /// Adds rules behind the others. One that is for the same patterns as an older one takes its place, at the end.
    ///
    /// # Errors
    ///
    /// If there are too many, or the worker does not answer.
    pub fn add_rules(&self, rules: Vec<Rule>) -> Result<(), SwitchError> {
        self.ask(|registry| {
            registry.put_rules(rules)?;
            Ok(vec![registry.compile()])
        })?;
        Ok(())
    }

    /// Changes what becomes of frames to unknown addresses.
    ///
    /// # Errors
    ///
    /// If the worker does not answer.
    pub fn set_unknown(&self, unknown: Unknown) -> Result<(), SwitchError> {
        self.ask(|registry| {
            registry.unknown = unknown;
            Ok(vec![registry.compile()])
        })?;
        Ok(())
    }

    /// Forgets what was learned, at one port or at all.
    ///
    /// # Errors
    ///
    /// If there is no such port, or the worker does not answer.
    pub fn flush(&self, port: Option<&str>) -> Result<(), SwitchError> {
        self.ask(|registry| {
            let port = port.map(|name| registry.find(name)).transpose()?;
            Ok(vec![Change::Flush(port.map(number))])
        })?;
        Ok(())
    }

    /// Records the frames of a port, in both directions, from now on; `None`: no more.
    ///
    /// # Errors
    ///
    /// If there is no such port, the file cannot be made, or the worker does not answer.
    pub fn capture(&self, port: &str, mirror: Option<Mirror>) -> Result<(), SwitchError> {
        // A file is not overwritten for a port that is not there; and nobody waits for the file system.
        self.hub.registry().find(port)?;
        let mut writer = mirror.as_ref().map(open_capture).transpose()?;
        self.ask(|registry| {
            let index = registry.find(port)?;
            if let Some(port) = &mut registry.ports[index] {
                port.config.capture = mirror;
            }
            Ok(vec![Change::Capture(number(index), writer.take())])
        })?;
        Ok(())
    }

    /// All addresses that the switch knows, in order.
    ///
    /// # Errors
    ///
    /// If the worker does not answer.
    pub fn macs(&self) -> Result<Vec<MacEntry>, SwitchError> {
        let mut names = Vec::new();
        let answer = self.ask(|registry| {
            names = registry
                .ports
                .iter()
                .map(|port| port.as_ref().map(|port| port.config.name.clone()))
                .collect();
            Ok(vec![Change::List])
        })?;
        let mut macs: Vec<MacEntry> = answer
            .entries
            .into_iter()
            .filter_map(|(entry, age)| {
                let port = names.get(usize::from(entry.port))?.clone()?;
                let vlan = entry.key.vlan();
                Some(MacEntry {
                    mac: entry.key.mac(),
                    vlan: (vlan != ALL_VLANS).then_some(vlan),
                    port,
                    fixed: entry.fixed,
                    age: Duration::from_millis(age.into()),
                })
            })
            .collect();
        macs.sort_by_key(|entry| (entry.vlan, entry.mac));
        Ok(macs)
    }

    /// The switch and its counters now; the worker is not asked.
    pub fn report(&self) -> SwitchReport {
        let mut registry = self.hub.registry();
        self.hub.reap(&mut registry);
        let ports: Vec<PortReport> = registry.ports.iter().flatten().map(report_port).collect();
        let fixed: usize = ports
            .iter()
            .map(|port| port.pin.len() + port.statics.len())
            .sum();
        SwitchReport {
            name: self.hub.name.clone(),
            unknown: registry.unknown.clone(),
            rules: registry.rules.clone(),
            age: self.hub.age,
            table: self.hub.table,
            macs: fixed + ports.iter().map(|port| port.macs).sum::<usize>(),
            changes: self.hub.mailbox.done(),
            ports,
        }
    }
}

fn report_port(known: &Known) -> PortReport {
    let Known {
        config,
        shared,
        uplink,
    } = known;
    let counters = &shared.counters;
    PortReport {
        name: config.name.clone(),
        uplink: *uplink,
        vlan: config.vlan.clone(),
        pin: config.pin.clone(),
        statics: config.statics.clone(),
        link: config.link,
        running: shared.running.load(Ordering::Relaxed),
        capture: config
            .capture
            .clone()
            .filter(|_| shared.capturing.load(Ordering::Relaxed)),
        storm: config.storm,
        rate_in: config.rate_in,
        rate_out: config.rate_out,
        macs: usize::try_from(counters.macs.get()).unwrap_or(usize::MAX),
        macs_limit: config.macs,
        input: counters.input(),
        output: counters.output(),
        copies: counters.copies.get(),
        dropped_in: counters.dropped_in.drops(),
        dropped_out: counters.dropped_out.drops(),
        segmented: counters.segmented.get(),
        segments: counters.segments.get(),
        segments_lost: counters.segments_lost.get(),
        moves: counters.moves.get(),
        not_learned: counters.not_learned.get(),
        waits: counters.waits.get(),
    }
}
