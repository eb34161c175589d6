// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a running description is meant to be: as it was described, and what was changed since.

use std::collections::BTreeMap;

use super::host::Host;
use super::plan::{BusPlan, Machine, Plugged};

/// The device host and the guests as they are meant to be.
#[derive(Clone, Debug)]
pub(super) struct Desired {
    pub(super) host: Host,
    pub(super) buses: Vec<BusPlan>,
    /// Guests by name.
    pub(super) guests: BTreeMap<String, GuestState>,
}

/// A guest with what was added to it.
#[derive(Clone, Debug)]
pub(super) struct GuestState {
    pub(super) machine: Machine,
    /// The buses of its devices, by the description's names; the first is that of devices to come.
    pub(super) buses: Vec<String>,
    pub(super) plugged: Vec<Plugged>,
}

impl Desired {
    /// A number on this bus that nobody ever had.
    pub(super) fn next_number(&self, bus: &BusPlan) -> Option<u16> {
        match bus.numbers.last() {
            None => Some(0),
            Some(last) => last.checked_add(1),
        }
    }
}
