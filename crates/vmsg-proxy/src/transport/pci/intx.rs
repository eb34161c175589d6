// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupt line of a function, told by an eventfd.

use super::super::trigger::Trigger;

/// Rings once for a level and then is masked until it is unmasked: VFIO's automasked interrupt.
#[derive(Debug, Default)]
pub(super) struct Intx {
    trigger: Option<Trigger>,
    masked: bool,
}

impl Intx {
    /// A new eventfd begins unmasked.
    pub(super) fn set_trigger(&mut self, trigger: Option<Trigger>) {
        self.trigger = trigger;
        self.masked = false;
    }

    pub(super) fn set_masked(&mut self, masked: bool) {
        self.masked = masked;
    }

    /// The line has this level.
    pub(super) fn level(&mut self, raised: bool) {
        if let Some(trigger) = &self.trigger
            && raised
            && !self.masked
        {
            trigger.ring();
            self.masked = true;
        }
    }

    pub(super) fn ring(&self) {
        if let Some(trigger) = &self.trigger {
            trigger.ring();
        }
    }
}
