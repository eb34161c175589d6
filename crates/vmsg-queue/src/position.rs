// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far the device's side of a queue has come.

use crate::config::check_size;
use crate::{QueueConfig, QueueError, QueueFeatures};

/// What the device's side of a queue knows by itself. What the driver could change in the rings is never read back.
#[derive(Debug)]
pub(crate) struct Position {
    pub(crate) config: QueueConfig,
    pub(crate) features: QueueFeatures,
    /// Index of the next entry to take from the available ring.
    pub(crate) next_avail: u16,
    /// Index of the next used element.
    pub(crate) next_used: u16,
    /// What the driver was last shown as the used index.
    pub(crate) published: u16,
    /// Chains of the last batch that can still be given back with `rewind`.
    pub(crate) rewindable: u16,
    pub(crate) broken: bool,
}

impl Position {
    /// A queue that goes on with the available entry `avail` and the used element `used`.
    pub(crate) fn new(
        config: QueueConfig,
        features: QueueFeatures,
        avail: u16,
        used: u16,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        check_size(size)?;
        if avail.wrapping_sub(used) > size {
            return Err(QueueError::BadResume { avail, used, size });
        }
        Ok(Self {
            config,
            features,
            next_avail: avail,
            next_used: used,
            published: used,
            rewindable: 0,
            broken: false,
        })
    }

    /// Chains that were taken and are not yet shown to the driver as used.
    #[inline]
    pub(crate) const fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.published)
    }

    #[inline]
    pub(crate) fn check(&self) -> Result<(), QueueError> {
        if self.broken {
            Err(QueueError::Broken)
        } else {
            Ok(())
        }
    }

    #[cold]
    pub(crate) fn fail(&mut self, error: QueueError) -> QueueError {
        self.broken = true;
        error
    }

    /// Number of new entries, if the driver's index can be right: a driver
    /// never has more chains in flight than there are descriptors.
    #[inline]
    pub(crate) fn check_avail_index(&self, avail: u16) -> Result<u16, QueueError> {
        let ready = avail.wrapping_sub(self.next_avail);
        let size = self.config.size;
        if u32::from(ready) + u32::from(self.in_flight()) > u32::from(size) {
            return Err(QueueError::BadAvailIndex {
                avail,
                next: self.next_avail,
                in_flight: self.in_flight(),
                size,
            });
        }
        Ok(ready)
    }

    /// These were taken, in one batch.
    #[inline]
    pub(crate) fn take(&mut self, chains: u16) {
        self.next_avail = self.next_avail.wrapping_add(chains);
        self.rewindable = chains;
    }

    /// The last `n` chains of the last batch were not taken after all. Does nothing to a broken queue.
    ///
    /// # Panics
    ///
    /// If it had fewer, or fewer are not completed.
    pub(crate) fn rewind(&mut self, n: usize) {
        if self.broken {
            return;
        }
        let most = self
            .rewindable
            .min(self.next_avail.wrapping_sub(self.next_used));
        let n = u16::try_from(n)
            .ok()
            .filter(|&n| n <= most)
            .expect("only chains of the last pop can be given back");
        self.rewindable -= n;
        self.next_avail = self.next_avail.wrapping_sub(n);
    }
}
