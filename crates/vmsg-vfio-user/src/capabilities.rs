// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the two sides agree on with VERSION: limits, told in a JSON object.

use crate::Options;
use crate::wire::Malformed;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::ffi::CStr;

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
pub(crate) struct Proposal(
    /// `None`: there was no version data.
    Option<Capabilities>,
);

/// The object `capabilities` of the version data; what else it may have means nothing here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Capabilities {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_msg_fds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_data_xfer_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_dma_maps: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    write_multiple: bool,
}

/// The version data of an answer.
#[derive(Serialize)]
struct VersionData {
    capabilities: Capabilities,
}

impl Proposal {
    /// Reads version data: nothing, or JSON and a NUL.
    pub(crate) fn parse(data: &[u8]) -> Result<Proposal, Malformed> {
        if data.is_empty() {
            return Ok(Proposal(None));
        }
        if data.len() > MAX_DATA {
            return Err(Malformed::Long(
                u32::try_from(data.len()).unwrap_or(u32::MAX),
            ));
        }
        let text = CStr::from_bytes_with_nul(data).map_err(|_| Malformed::Nul)?;
        // By way of maps: where serde wants a structure, it takes an array as well.
        let data: Map<String, Value> = serde_json::from_slice(text.to_bytes())?;
        let capabilities = data.get("capabilities").map(Map::deserialize).transpose()?;
        let capabilities =
            Capabilities::deserialize(Value::Object(capabilities.unwrap_or_default()))?;
        if capabilities.max_data_xfer_size == Some(0) {
            return Err(Malformed::Capability);
        }
        Ok(Proposal(Some(capabilities)))
    }

    pub(crate) fn negotiated(&self, minor: u16) -> Negotiated {
        let theirs = self.0.unwrap_or_default();
        let or = |value: Option<u64>, default: u32| {
            value.map_or(default, |value| u32::try_from(value).unwrap_or(u32::MAX))
        };
        Negotiated {
            minor,
            max_msg_fds: or(theirs.max_msg_fds, DEFAULT_MAX_MSG_FDS),
            max_data_xfer_size: or(theirs.max_data_xfer_size, DEFAULT_MAX_DATA_XFER_SIZE),
        }
    }

    /// The version data of the answer: what was proposed and means something here, with our values. Never longer than the proposal of a client like QEMU, whose buffer for the answer is
    /// that of its proposal.
    pub(crate) fn answer(&self, options: &Options, out: &mut Vec<u8>) {
        let Some(theirs) = self.0 else {
            return;
        };
        let ours = VersionData {
            capabilities: Capabilities {
                max_msg_fds: theirs.max_msg_fds.map(|_| options.max_msg_fds.into()),
                max_data_xfer_size: theirs
                    .max_data_xfer_size
                    .map(|_| options.max_data_xfer_size.into()),
                max_dma_maps: theirs
                    .max_dma_maps
                    .map(|theirs| theirs.min(options.max_dma_maps.into())),
                write_multiple: theirs.write_multiple,
            },
        };
        serde_json::to_writer(&mut *out, &ours).expect("numbers and a Vec");
        out.push(0);
    }
}

#[cfg(test)]
#[path = "capabilities_test.rs"]
mod tests;
