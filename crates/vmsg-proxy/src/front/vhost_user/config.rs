// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space, as far as vhost-user passes it.

use super::guest::{Guest, GuestError, op};
use crate::session::{Op, Outcome};

impl Guest {
    /// Offset, size, flags, data; size 0 tells of an error.
    pub(super) fn get_config(&self, offset: u32, size: u32, flags: u32) -> Vec<u8> {
        let available = self.facts.info.config_size.saturating_sub(offset).min(size);
        let read = Op::ReadConfig {
            offset: offset.min(self.facts.info.config_size),
            len: available,
        };
        let (size, data) = match self.session.call(read) {
            Ok(Outcome::Config(mut data)) => {
                // Front ends ask for the whole structure they know; what the device does not have reads 0.
                data.resize(usize::try_from(size).unwrap_or(0), 0);
                (size, data)
            }
            Ok(_) => (0, Vec::new()),
            Err(error) => {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(offset, size, %error, unsaid, "reading the configuration");
                }
                (0, Vec::new())
            }
        };
        let mut bytes = Vec::with_capacity(12 + data.len());
        for field in [offset, size, flags] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(&data);
        bytes
    }

    pub(super) fn set_config(
        &mut self,
        offset: u32,
        flags: u32,
        mut data: Vec<u8>,
    ) -> Result<(), GuestError> {
        const LIVE_MIGRATION: u32 = 2;
        if flags & LIVE_MIGRATION != 0 {
            return Err(GuestError::Invalid("migration is not offered"));
        }
        let available = self.facts.info.config_size.saturating_sub(offset);
        data.truncate(usize::try_from(available).unwrap_or(usize::MAX));
        if data.is_empty() {
            return Err(GuestError::Invalid(
                "a write outside of the configuration space",
            ));
        }
        self.claim()?;
        let write = Op::WriteConfig {
            offset,
            data: data.clone(),
        };
        self.session
            .call(write)
            .map_err(op("writing the configuration"))?;
        self.write_cache.written(offset, &data);
        Ok(())
    }
}
