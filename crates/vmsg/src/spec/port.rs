// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A port of a switch.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};
use vmsg_device::net::Mac;

use super::vlans::{self, Vlans};
use super::{is_default, rate::Rate, text};
use crate::Usage;
use crate::control::LinkState;

/// `--port id=…,…`: what a port of a switch lets pass. A device or an uplink plugs into the port of its name; without a
/// `PortSpec` all is as by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PortSpec {
    /// Its name: that of the device or uplink that plugs in.
    #[serde(skip_serializing_if = "is_default")]
    pub id: Option<String>,
    /// Its switch; may be left out if the device or uplink says it.
    #[serde(skip_serializing_if = "is_default")]
    pub switch: Option<String>,
    /// The one VLAN that it is in; its frames carry no tag.
    #[serde(skip_serializing_if = "is_default")]
    pub vlan: Option<u16>,
    /// The VLANs that it carries, with tags.
    #[serde(skip_serializing_if = "is_default")]
    pub trunk: Option<Vlans>,
    /// With `trunk`: the VLAN whose frames carry no tag there.
    #[serde(skip_serializing_if = "is_default")]
    pub native: Option<u16>,
    /// Source addresses that it may have, and no others.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "Vec::is_empty")]
    pub pin: Vec<Pin>,
    /// Addresses that are always found here.
    #[serde(
        rename = "mac",
        deserialize_with = "text::many",
        serialize_with = "macs",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub statics: Vec<Mac>,
    /// Addresses that are learned here at most; 256 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub macs: Option<usize>,
    /// What it may send: frames beyond this wait.
    #[serde(skip_serializing_if = "is_default")]
    pub rate_in: Option<Rate>,
    /// What is sent to it: frames beyond this are dropped.
    #[serde(skip_serializing_if = "is_default")]
    pub rate_out: Option<Rate>,
    /// Frames a second to many receivers (broadcast, multicast, unknown) that it may send.
    #[serde(skip_serializing_if = "is_default")]
    pub storm: Option<u32>,
    /// Write its frames to this file, for Wireshark.
    #[serde(skip_serializing_if = "is_default")]
    pub capture: Option<PathBuf>,
    /// Whether it is connected at first; `up` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub link: LinkState,
}

/// A source address that a port may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// That of its device.
    On,
    /// This one.
    Mac(Mac),
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Mac(mac) => mac.fmt(f),
        }
    }
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self::On),
            text => text
                .parse()
                .map(Self::Mac)
                .map_err(|_| format!("expected `on` or a unicast MAC address, not `{text}`")),
        }
    }
}

impl Serialize for Pin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn macs<S: Serializer>(macs: &[Mac], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(macs.iter().map(ToString::to_string))
}

impl PortSpec {
    /// Looks for keys that contradict each other, or that say nothing.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        let refuse = |text: String| Err(Usage(text));
        for (key, id) in [("vlan", self.vlan), ("native", self.native)] {
            if let Some(id) = id.filter(|id| !vlans::is_id(*id)) {
                return refuse(format!("{key}={id}: VLANs have numbers from 1 to 4094"));
            }
        }
        if self.vlan.is_some() && self.trunk.is_some() {
            return refuse("vlan= and trunk= contradict each other: the one is for frames without tags, the other for those with tags".to_owned());
        }
        match (self.native, &self.trunk) {
            (Some(_), None) => {
                return refuse("native= needs trunk=; alone it is vlan=".to_owned());
            }
            (Some(native), Some(trunk)) if !trunk.contains(native) => {
                return refuse(format!("native={native} is not in trunk={trunk}"));
            }
            _ => {}
        }
        if self.macs == Some(0) && self.statics.is_empty() {
            return refuse(
                "macs=0: then nothing is learned here, and mac= must say who is here".to_owned(),
            );
        }
        if self.storm == Some(0) {
            return refuse(
                "storm=0: without any broadcast nobody finds anybody; the least is 1".to_owned(),
            );
        }
        Ok(())
    }
}
