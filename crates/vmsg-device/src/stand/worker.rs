// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device in a worker without a thread, and what is told to it and by it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;

use super::NoFds;
use crate::device::{Device, Monitor, Operation};
use crate::worker::{Command, Core, Notice, Reply, Slot};

const SLOT: Slot = Slot(0);

pub(crate) struct Stand {
    pub(crate) core: Core,
    pub(crate) monitor: Option<Arc<dyn Monitor>>,
    pub(crate) offered: FeatureSet,
    /// What the driver has negotiated.
    pub(crate) features: FeatureSet,
    tickets: u64,
    /// Commands that were not answered yet.
    open: BTreeSet<u64>,
    answers: BTreeMap<u64, Result<(), String>>,
    pub(crate) notices: Vec<Notice>,
}

impl Stand {
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        let mut stand = Self {
            core: Core::new(),
            monitor: None,
            offered: FeatureSet::EMPTY,
            features: FeatureSet::EMPTY,
            tickets: 0,
            open: BTreeSet::new(),
            answers: BTreeMap::new(),
            notices: Vec::new(),
        };
        stand.add_device(device);
        stand
    }

    /// Puts a device where none is.
    pub(crate) fn add_device(&mut self, device: Box<dyn Device>) {
        self.monitor = device.monitor();
        self.offered = device.features();
        self.core.command(SLOT, 0, Command::Add(device), &mut NoFds);
    }

    /// The driver chooses `features`.
    pub(crate) fn negotiate(&mut self, features: &[u32]) -> Result<(), String> {
        self.features = FeatureSet::from_bits(features);
        assert!(
            self.features.is_subset(&self.offered),
            "offered: {}",
            self.offered
        );
        self.tell(Command::CheckFeatures(self.features))
    }

    pub(crate) fn driver_ok(&mut self) {
        self.tell(Command::DriverOk(self.features))
            .expect("running");
        self.run();
    }

    /// Begins a command; its ticket.
    pub(crate) fn begin(&mut self, command: Command) -> u64 {
        self.tickets += 1;
        self.open.insert(self.tickets);
        self.core.command(SLOT, self.tickets, command, &mut NoFds);
        self.collect();
        self.tickets
    }

    /// What came of a command, as soon as it is carried out.
    pub(crate) fn answer(&self, ticket: u64) -> Option<Result<(), String>> {
        self.answers.get(&ticket).cloned()
    }

    /// A command that is carried out at once.
    pub(crate) fn tell(&mut self, command: Command) -> Result<(), String> {
        let ticket = self.begin(command);
        self.answer(ticket).expect("every command is answered")
    }

    pub(crate) fn operate(&mut self, operation: Operation) -> Result<(), String> {
        let result = self.tell(Command::Operate(operation));
        self.run();
        result
    }

    fn collect(&mut self) {
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done { ticket, result } => {
                    assert!(self.open.remove(&ticket), "nobody has asked: {ticket}");
                    self.answers.insert(ticket, result);
                }
                Reply::Notice(slot, notice) => {
                    assert_eq!(slot, SLOT, "{notice:?}");
                    self.notices.push(notice);
                }
            }
        }
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        self.run();
    }

    /// The device's descriptor is readable.
    pub(crate) fn poll(&mut self) {
        self.poll_at(Instant::now());
    }

    pub(crate) fn poll_at(&mut self, now: Instant) {
        self.core.poll_device(SLOT, now);
        self.run();
    }

    pub(crate) fn run(&mut self) {
        self.core.carry_on(&mut NoFds);
        // A device that never ends is as bad as one that does nothing.
        for _ in 0..100_000 {
            if !self.core.step(Instant::now()) {
                break;
            }
        }
        assert!(!self.core.has_work(), "the device is busy for ever");
        self.collect();
    }

    /// What the device has said since the last look.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Why the device has asked for a reset, since the last look at notices.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.notices.iter().find_map(|notice| match notice {
            Notice::Broken { why, .. } => Some(why.as_str()),
            _ => None,
        })
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken().is_some()
    }

    /// The last configuration bytes at `offset` that the driver was told of.
    pub(crate) fn config_notice(&mut self, offset: usize) -> Option<Vec<u8>> {
        let mut last = None;
        for notice in self.notices.drain(..) {
            if let Notice::Config { offset: at, data } = notice
                && at == offset
            {
                last = Some(data);
            }
        }
        last
    }

    /// A counter of the device.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let monitor = self.monitor.as_ref().expect("counters");
        counter(&monitor.snapshot().counters, name)
    }
}

/// The counter of that name.
pub(crate) fn counter(counters: &[(&str, u64)], name: &str) -> u64 {
    let counter = counters.iter().find(|(other, _)| *other == name);
    counter.expect("a counter of that name").1
}
