// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A port of a switch.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};
use vmsg_net::Mac;
use vmsg_net::switch::{Mirror, PortChange, PortConfig, Rate, VlanSet, Vlans};

use super::is_default;
use super::text::{self, Setting};
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
    #[serde(
        deserialize_with = "text::parts",
        serialize_with = "text::write_one",
        skip_serializing_if = "is_default"
    )]
    pub trunk: Option<VlanSet>,
    /// With `trunk`: the VLAN whose frames carry no tag there.
    #[serde(skip_serializing_if = "is_default")]
    pub native: Option<u16>,
    /// Source addresses that it may have, and no others.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub pin: Vec<Pin>,
    /// Addresses that are always found here.
    #[serde(
        deserialize_with = "text::many",
        serialize_with = "text::write_many",
        skip_serializing_if = "is_default"
    )]
    pub mac: Vec<Mac>,
    /// Addresses that are learned here at most; 256 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub macs: Option<usize>,
    /// What it may send, in bits a second: frames beyond this wait.
    #[serde(
        deserialize_with = "text::one",
        serialize_with = "text::write_one",
        skip_serializing_if = "is_default"
    )]
    pub rate_in: Option<Rate>,
    /// What is sent to it, in bits a second: frames beyond this are dropped.
    #[serde(
        deserialize_with = "text::one",
        serialize_with = "text::write_one",
        skip_serializing_if = "is_default"
    )]
    pub rate_out: Option<Rate>,
    /// Frames a second for many receivers (broadcast, multicast, unknown) that it may send.
    #[serde(skip_serializing_if = "is_default")]
    pub storm: Option<u32>,
    /// Write its frames to this file, for Wireshark.
    #[serde(skip_serializing_if = "is_default")]
    pub capture: Option<PathBuf>,
    /// With `capture`: go on with the file that a process before has begun.
    #[serde(skip_serializing_if = "is_default")]
    pub capture_append: bool,
    /// Whether it is connected at first; `up` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub link: LinkState,
}

/// What is to be different at a port; `off` takes a limit away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PortSetSpec {
    /// The port's name.
    #[serde(skip_serializing_if = "is_default")]
    pub port: String,
    /// Its switch; may be left out if only one switch has a port of this name.
    #[serde(skip_serializing_if = "is_default")]
    pub switch: Option<String>,
    /// [`PortSpec::vlan`]; `off`: the port knows of no VLANs.
    #[serde(skip_serializing_if = "is_default")]
    pub vlan: Option<Setting<u16>>,
    /// [`PortSpec::trunk`], likewise.
    #[serde(deserialize_with = "text::parts", skip_serializing_if = "is_default")]
    pub trunk: Option<Setting<VlanSet>>,
    /// [`PortSpec::native`], with `trunk`.
    #[serde(skip_serializing_if = "is_default")]
    pub native: Option<u16>,
    /// [`PortSpec::pin`]; `off`: it may have any.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub pin: Vec<Setting<Pin>>,
    /// [`PortSpec::mac`]; `off`: none.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub mac: Vec<Setting<Mac>>,
    /// [`PortSpec::macs`].
    #[serde(skip_serializing_if = "is_default")]
    pub macs: Option<usize>,
    /// [`PortSpec::rate_in`].
    #[serde(skip_serializing_if = "is_default")]
    pub rate_in: Option<Setting<Rate>>,
    /// [`PortSpec::rate_out`].
    #[serde(skip_serializing_if = "is_default")]
    pub rate_out: Option<Setting<Rate>>,
    /// [`PortSpec::storm`].
    #[serde(skip_serializing_if = "is_default")]
    pub storm: Option<Setting<u32>>,
    /// [`PortSpec::link`].
    #[serde(skip_serializing_if = "is_default")]
    pub link: Option<LinkState>,
}

/// A source address that a port may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// That of its device.
    On,
    /// This one.
    Mac(Mac),
}

impl Pin {
    /// The address, if that of the device is `own`.
    fn address(self, own: Option<Mac>) -> Result<Mac, Usage> {
        match (self, own) {
            (Self::Mac(mac), _) | (Self::On, Some(mac)) => Ok(mac),
            (Self::On, None) => Err(Usage(
                "pin=on is for devices: an uplink has no address of its own; write pin=MAC"
                    .to_owned(),
            )),
        }
    }
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

/// VLANs as their keys say; `None`: nothing is said.
fn vlans(
    vlan: Option<u16>,
    trunk: Option<&VlanSet>,
    native: Option<u16>,
) -> Result<Option<Vlans>, Usage> {
    let refuse = |text: &str| Err(Usage(text.to_owned()));
    for (key, id) in [("vlan", vlan), ("native", native)] {
        if let Some(id) = id.filter(|id| !VlanSet::all().contains(*id)) {
            return Err(Usage(format!(
                "{key}={id}: VLANs have numbers from 1 to 4094"
            )));
        }
    }
    match (vlan, trunk, native) {
        (None, None, None) => Ok(None),
        (Some(vlan), None, None) => Ok(Some(Vlans::Access(vlan))),
        (None, Some(allowed), native) => Ok(Some(Vlans::Trunk {
            allowed: allowed.clone(),
            native,
        })),
        (Some(_), Some(_), _) => refuse(
            "vlan= and trunk= contradict each other: the one is for frames without tags, the other for those with tags",
        ),
        (_, None, Some(_)) => refuse("native= needs trunk=; a port without tags has vlan="),
    }
}

impl PortSpec {
    /// Looks for keys that contradict each other, or that say nothing.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        if self.capture_append && self.capture.is_none() {
            return Err(Usage("capture-append= needs capture=".to_owned()));
        }
        vlans(self.vlan, self.trunk.as_ref(), self.native).map(|_| ())
    }

    /// Is as `set` has it from now on. What cannot be, such as a number that is none of a VLAN, is for [`PortSetSpec::change`] to find.
    pub(crate) fn set(&mut self, set: &PortSetSpec) {
        fn put<T: Clone>(to: &mut Option<T>, setting: Option<&Setting<T>>) {
            if let Some(setting) = setting {
                *to = setting.to().cloned();
            }
        }
        fn list<T: Clone>(to: &mut Vec<T>, settings: &[Setting<T>]) {
            if !settings.is_empty() {
                *to = settings.iter().filter_map(Setting::to).cloned().collect();
            }
        }
        if set.vlan.is_some() || set.trunk.is_some() || set.native.is_some() {
            self.vlan = set.vlan.as_ref().and_then(Setting::to).copied();
            self.trunk = set.trunk.as_ref().and_then(Setting::to).cloned();
            self.native = set.native;
        }
        list(&mut self.pin, &set.pin);
        list(&mut self.mac, &set.mac);
        self.macs = set.macs.or(self.macs);
        put(&mut self.rate_in, set.rate_in.as_ref());
        put(&mut self.rate_out, set.rate_out.as_ref());
        put(&mut self.storm, set.storm.as_ref());
        self.link = set.link.unwrap_or(self.link);
    }

    /// The settings of the port called `name`, whose device has the address `own`.
    pub(crate) fn config(&self, name: &str, own: Option<Mac>) -> Result<PortConfig, Usage> {
        let plain = PortConfig::new(name);
        let pin = self.pin.iter().map(|pin| pin.address(own));
        Ok(PortConfig {
            vlan: vlans(self.vlan, self.trunk.as_ref(), self.native)?.unwrap_or_default(),
            pin: pin.collect::<Result<_, _>>()?,
            statics: self.mac.clone(),
            macs: self.macs.unwrap_or(plain.macs),
            storm: self.storm,
            rate_in: self.rate_in,
            rate_out: self.rate_out,
            capture: self.capture.as_ref().map(|path| Mirror {
                append: self.capture_append,
                ..Mirror::new(path)
            }),
            link: self.link == LinkState::Up,
            ..plain
        })
    }
}

/// A list in which `off` stands alone; `None`: nothing is said.
fn list<T: Copy>(key: &str, settings: &[Setting<T>]) -> Result<Option<Vec<T>>, Usage> {
    match settings {
        [] => Ok(None),
        [Setting::Off] => Ok(Some(Vec::new())),
        settings => settings
            .iter()
            .map(|setting| setting.to().copied())
            .collect::<Option<Vec<T>>>()
            .map(Some)
            .ok_or_else(|| Usage(format!("{key}=off stands alone"))),
    }
}

impl PortSetSpec {
    /// What the port's switch is told, if the port's device has the address `own`.
    pub(crate) fn change(&self, own: Option<Mac>) -> Result<PortChange, Usage> {
        let set = |setting: &Option<Setting<Rate>>| setting.as_ref().map(|s| s.to().copied());
        let off = self.vlan == Some(Setting::Off) || self.trunk == Some(Setting::Off);
        let vlan = self.vlan.as_ref().and_then(Setting::to).copied();
        let trunk = self.trunk.as_ref().and_then(Setting::to);
        let pin = list("pin", &self.pin)?.map(|pins| {
            let pins = pins.into_iter().map(|pin| pin.address(own));
            pins.collect::<Result<Vec<_>, _>>()
        });
        let change = PortChange {
            vlan: vlans(vlan, trunk, self.native)?.or(off.then_some(Vlans::Plain)),
            pin: pin.transpose()?,
            statics: list("mac", &self.mac)?,
            macs: self.macs,
            storm: self.storm.as_ref().map(|storm| storm.to().copied()),
            rate_in: set(&self.rate_in),
            rate_out: set(&self.rate_out),
            link: self.link.map(|link| link == LinkState::Up),
        };
        if change == PortChange::default() {
            return Err(Usage(
                "nothing is to be changed; known: `vlan`, `trunk`, `native`, `pin`, `mac`, `macs`, `rate-in`, `rate-out`, `storm`, `link`".to_owned(),
            ));
        }
        Ok(change)
    }
}
