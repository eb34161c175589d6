// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the two sides agree on with VERSION: limits, told in a JSON object.

use crate::Options;
use crate::json::{JsonError, Reader};
use crate::wire::Malformed;
use std::ffi::CStr;
use std::fmt::Write as _;

/// The longest version data that is read. QEMU's are some 200 bytes.
const MAX_DATA: usize = 4096;
/// What a client that does not say can receive.
const DEFAULT_MAX_MSG_FDS: u32 = 1;
/// What a client that does not say can take.
const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;

/// What a client told of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Negotiated {
    /// The minor version both speak; the major one is 0.
    pub minor: u16,
    /// How many descriptors the client can receive with a message.
    pub max_msg_fds: u32,
    /// The most bytes of data a DMA message to the client may have.
    pub max_data_xfer_size: u32,
}

/// What a client proposed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proposal {
    /// Whether there was any version data.
    present: bool,
    max_msg_fds: Option<u32>,
    max_data_xfer_size: Option<u32>,
    max_dma_maps: Option<u32>,
    write_multiple: Option<bool>,
}

impl Proposal {
    /// Reads version data: nothing, or JSON and a NUL.
    pub(crate) fn parse(data: &[u8]) -> Result<Proposal, Malformed> {
        let mut proposal = Proposal::default();
        if data.is_empty() {
            return Ok(proposal);
        }
        if data.len() > MAX_DATA {
            return Err(Malformed::Long(
                u32::try_from(data.len()).unwrap_or(u32::MAX),
            ));
        }
        let text = CStr::from_bytes_with_nul(data).map_err(|_| Malformed::Nul)?;
        let text = text
            .to_str()
            .map_err(|error| JsonError::Syntax(error.valid_up_to()))?;
        proposal.present = true;
        let mut reader = Reader::new(text);
        reader.object(|reader, key| match key {
            "capabilities" => reader.object(|reader, key| proposal.entry(reader, key)),
            _ => reader.skip(),
        })?;
        reader.end()?;
        if proposal.max_data_xfer_size == Some(0) {
            return Err(Malformed::Capability);
        }
        Ok(proposal)
    }

    fn entry(&mut self, reader: &mut Reader<'_>, key: &str) -> Result<(), JsonError> {
        let field = match key {
            "max_msg_fds" => &mut self.max_msg_fds,
            "max_data_xfer_size" => &mut self.max_data_xfer_size,
            "max_dma_maps" => &mut self.max_dma_maps,
            "write_multiple" => {
                self.write_multiple = Some(reader.boolean()?);
                return Ok(());
            }
            _ => return reader.skip(),
        };
        *field = Some(u32::try_from(reader.unsigned()?).unwrap_or(u32::MAX));
        Ok(())
    }

    pub(crate) fn negotiated(&self, minor: u16) -> Negotiated {
        Negotiated {
            minor,
            max_msg_fds: self.max_msg_fds.unwrap_or(DEFAULT_MAX_MSG_FDS),
            max_data_xfer_size: self
                .max_data_xfer_size
                .unwrap_or(DEFAULT_MAX_DATA_XFER_SIZE),
        }
    }

    /// The version data of the answer: what was proposed and means something here, with our values. Never longer than the proposal of a client like QEMU, whose buffer for the answer is
    /// that of its proposal.
    pub(crate) fn answer(&self, options: &Options, out: &mut Vec<u8>) {
        if !self.present {
            return;
        }
        let mut text = String::from("{\"capabilities\":{");
        let mut put = |name: &str, value: u64| {
            let comma = if text.ends_with('{') { "" } else { "," };
            write!(text, "{comma}\"{name}\":{value}").expect("a String takes it");
        };
        if self.max_msg_fds.is_some() {
            put("max_msg_fds", options.max_msg_fds.into());
        }
        if self.max_data_xfer_size.is_some() {
            put("max_data_xfer_size", options.max_data_xfer_size.into());
        }
        if let Some(theirs) = self.max_dma_maps {
            put("max_dma_maps", options.max_dma_maps.min(theirs).into());
        }
        if self.write_multiple == Some(true) {
            let comma = if text.ends_with('{') { "" } else { "," };
            write!(text, "{comma}\"write_multiple\":true").expect("a String takes it");
        }
        text.push_str("}}");
        out.extend_from_slice(text.as_bytes());
        out.push(0);
    }
}

#[cfg(test)]
#[path = "capabilities_test.rs"]
mod tests;
