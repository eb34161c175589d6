// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a device machine.

use super::machine::{ConfigChange, Op, Reply, Stage};
use super::queues::QueueSlot;
use super::{DeviceMachine, Handled};
use crate::message::ConfigData;
use crate::status::DeviceStatus;
use crate::types::{Generation, Token};

impl<Q, C> DeviceMachine<Q, C>
where
    Q: AsRef<[QueueSlot]> + AsMut<[QueueSlot]>,
    C: AsRef<[u8]> + AsMut<[u8]> + Clone,
{
    pub(super) fn write_config(&mut self, token: Token, data: &ConfigData<'_>) -> Handled {
        self.accept();
        let stale = self.options.reject_stale_config && data.generation != self.generation;
        let range = self
            .config_range(data.offset, data.len)
            .filter(|range| range.len() == data.data.len());
        match range {
            // Nothing to write, and length 0 reads as rejected in any case.
            Some(range) if range.is_empty() => self.answer(
                token,
                Reply::ConfigSet {
                    offset: data.offset,
                    len: 0,
                },
            ),
            Some(range) if !stale => {
                if let Some(staged) = self.staged.as_mut().get_mut(range) {
                    staged.copy_from_slice(data.data);
                }
                self.act(
                    token,
                    Op::WriteConfig {
                        offset: data.offset,
                        len: data.len,
                    },
                );
            }
            _ => self.reject_config(token, data.offset),
        }
        Handled::Request
    }

    pub(super) fn reject_config(&mut self, token: Token, offset: u32) {
        self.counters.rejected_config_writes = self.counters.rejected_config_writes.wrapping_add(1);
        self.answer(token, Reply::ConfigSet { offset, len: 0 });
    }

    pub(super) fn apply_config(&mut self, offset: u32, len: u32) {
        let Some(range) = self.config_range(offset, len) else {
            return;
        };
        let (Some(now), Some(new)) = (
            self.config.as_mut().get_mut(range.clone()),
            self.staged.as_ref().get(range),
        ) else {
            return;
        };
        if now != new {
            now.copy_from_slice(new);
            self.generation = self.generation.next();
        }
    }

    pub(super) fn config_range(&self, offset: u32, len: u32) -> Option<core::ops::Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        (end <= self.config.as_ref().len()).then_some(start..end)
    }

    /// The bytes of the write that [`Action::WriteConfig`](super::Action::WriteConfig) is about; empty at other times.
    pub fn pending_config(&self) -> &[u8] {
        match self.stage {
            Stage::Acting {
                op: Op::WriteConfig { offset, len },
                ..
            } => self
                .config_range(offset, len)
                .and_then(|range| self.staged.as_ref().get(range))
                .unwrap_or(&[]),
            _ => &[],
        }
    }

    /// The same bytes, for a device that lets the driver see something else than it wrote.
    pub fn pending_config_mut(&mut self) -> &mut [u8] {
        match self.stage {
            Stage::Acting {
                op: Op::WriteConfig { offset, len },
                ..
            } => match self.config_range(offset, len) {
                Some(range) => self.staged.as_mut().get_mut(range).unwrap_or(&mut []),
                None => &mut [],
            },
            _ => &mut [],
        }
    }

    /// Changes the configuration space and tells the driver, if it has come so far as to have read it. Bytes outside the space are
    /// left out. Gives the new generation, which is the old one if nothing has changed.
    pub fn update_config(&mut self, offset: u32, data: &[u8]) -> Generation {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(space) = self.config.as_mut().get_mut(start..) else {
            return self.generation;
        };
        let len = data.len().min(space.len());
        let (space, data) = (&mut space[..len], &data[..len]);
        if space == data {
            return self.generation;
        }
        space.copy_from_slice(data);
        self.generation = self.generation.next();
        if self.status.contains(DeviceStatus::FEATURES_OK) {
            let end = offset.saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
            self.config_event = match self.config_event {
                ConfigChange::Bytes { start, end: before } => ConfigChange::Bytes {
                    start: start.min(offset),
                    end: before.max(end),
                },
                _ => ConfigChange::Bytes { start: offset, end },
            };
        }
        self.generation
    }

    /// The configuration space as the driver sees it.
    pub fn config(&self) -> &[u8] {
        self.config.as_ref()
    }

    /// The generation of the configuration space.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}
