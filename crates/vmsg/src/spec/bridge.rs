// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user daemon as a device.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use virtio_msg::feature::device_name;
use vmsg_device::bridge::{self, Settings};
use vmsg_device::net::Mac;

use super::is_default;
use crate::Usage;

/// Bytes of a file system's tag (virtio 1.3, 5.11.4).
const TAG: usize = 36;
/// VIRTIO_NET_F_MAC.
const NET_F_MAC: u64 = 1 << 5;
/// Types of devices that have names.
const NAMED: std::ops::Range<u32> = 1..64;

/// `vhost-user,…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct VhostUserSpec {
    /// Name of the device; `vhost-user0`, `vhost-user1`, … by default.
    #[serde(skip_serializing_if = "is_default")]
    pub id: Option<String>,
    /// Its number on the bus; the lowest free one by default.
    #[serde(skip_serializing_if = "is_default")]
    pub num: Option<u16>,
    /// The bus it is on; the first by default.
    #[serde(skip_serializing_if = "is_default")]
    pub bus: Option<String>,
    /// Which worker looks after it, counted from 0.
    #[serde(skip_serializing_if = "is_default")]
    pub worker: Option<usize>,
    /// The daemon's socket.
    #[serde(skip_serializing_if = "is_default")]
    pub socket: Option<PathBuf>,
    /// Listen there, and let the daemon connect (`dpdkvhostuserclient`), instead of connecting.
    #[serde(skip_serializing_if = "is_default")]
    pub server: bool,
    /// What it is: a name, as `fs`, or the number that the specification gives it. In TOML tables, whose `type` says that it is
    /// `vhost-user`, this is `device-type`.
    #[serde(
        rename = "type",
        alias = "device-type",
        skip_serializing_if = "is_default",
        deserialize_with = "name_or_number"
    )]
    pub kind: Option<String>,
    /// Virtqueues in all; by default as many as the daemon says, or the type has.
    #[serde(skip_serializing_if = "is_default")]
    pub queues: Option<u16>,
    /// Entries of a queue at most, a power of two; by default what the known daemons of the type take.
    #[serde(skip_serializing_if = "is_default")]
    pub queue_size: Option<u16>,
    /// Bytes of the configuration space, 256 at most; by default those of the type.
    #[serde(skip_serializing_if = "is_default")]
    pub config_size: Option<u32>,
    /// The configuration in hexadecimal digits, instead of what the daemon says.
    #[serde(skip_serializing_if = "is_default")]
    pub config: Option<String>,
    /// `fs`: the tag that it is mounted by, if the daemon has none.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
    /// `vsock`: the guest's address, if the daemon does not say it.
    #[serde(skip_serializing_if = "is_default")]
    pub cid: Option<u64>,
    /// `net`: its MAC address; derived from the id by default.
    #[serde(skip_serializing_if = "is_default")]
    pub mac: Option<String>,
    /// What becomes of requests that were under way when the daemon ended; by default what goes with the type.
    #[serde(skip_serializing_if = "is_default")]
    pub resume: Option<ResumeMode>,
    /// Seconds between two attempts to reach the daemon at most; 1 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub reconnect: Option<u16>,
}

/// What becomes of requests that were under way when the daemon, or `serve`, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResumeMode {
    /// The queues are used in order: what is not used is done again.
    InOrder,
    /// There must be a record of what is in flight, or nothing.
    Record,
    /// The driver has to start over.
    Never,
}

fn name_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    struct Either;
    impl Visitor<'_> for Either {
        type Value = Option<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a type of device, by name or number")
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(text.to_owned()))
        }
        fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
            Ok(Some(number.to_string()))
        }
        fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
            Ok(Some(number.to_string()))
        }
    }
    deserializer.deserialize_any(Either)
}

impl VhostUserSpec {
    /// The virtio id of its type.
    pub(crate) fn device_id(&self) -> Result<u32, Usage> {
        let names = || NAMED.filter_map(|id| Some((id, device_name(id)?)));
        let known = || {
            let names: Vec<&str> = names().map(|(_, name)| name).collect();
            names.join("`, `")
        };
        let Some(kind) = self.kind.as_deref() else {
            return Err(Usage(format!(
                "type= is missing (in a description: device-type), what the daemon is: a number, or one of `{}`",
                known()
            )));
        };
        let kind = match kind {
            "snd" => "sound",
            "block" => "blk",
            kind => kind,
        };
        let number = kind.parse().ok().filter(|id| *id != 0);
        let named = names().find(|(_, name)| *name == kind).map(|(id, _)| id);
        number
            .or(named)
            .ok_or_else(|| Usage(format!("type={kind}: a number, or one of `{}`", known())))
    }

    /// What is wrong with it.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        self.settings("vhost-user0").map(|_| ())
    }

    /// For whom it waits when it is added, and how long.
    pub(crate) fn waits_for(&self) -> Option<(String, Duration)> {
        let socket = self.socket.as_ref()?.display();
        let whom = match self.server {
            true => format!("the daemon to connect to {socket}"),
            false => format!("the daemon at {socket}"),
        };
        Some((whom, Settings::PATIENCE))
    }

    /// Queues and bytes of the configuration space, as far as that is known without the daemon.
    pub(crate) fn shape(&self) -> Option<(u32, u16, u32)> {
        let id = self.device_id().ok()?;
        let (queues, config) = bridge::defaults(id);
        Some((
            id,
            self.queues.unwrap_or(queues),
            self.config_size.unwrap_or(config),
        ))
    }

    /// The same for the device called `id`.
    pub(crate) fn settings(&self, id: &str) -> Result<Settings, Usage> {
        let device_id = self.device_id()?;
        let Some(socket) = &self.socket else {
            return Err(Usage(
                "socket= is missing: the path of the daemon's socket".to_owned(),
            ));
        };
        if device_id == 18 {
            return Err(Usage(
                "type=input: what its configuration says depends on what was written there last, which daemons are too slow for"
                    .to_owned(),
            ));
        }
        let mut settings = Settings::new(socket, device_id);
        settings.name = Some(id.to_owned());
        if let Some(queues) = self.queues
            && !(1..=vmsg_device::bridge::MAX_QUEUES).contains(&queues)
        {
            return Err(Usage(format!(
                "queues={queues}: 1 to {} are possible",
                vmsg_device::bridge::MAX_QUEUES
            )));
        }
        settings.queues = self.queues;
        if let Some(size) = self.queue_size
            && !(size.is_power_of_two() && size <= 1 << 15)
        {
            return Err(Usage(format!(
                "queue-size={size}: a power of two up to 32768"
            )));
        }
        settings.queue_size = self.queue_size;
        if let Some(size) = self.config_size.filter(|size| *size > 256) {
            return Err(Usage(format!("config-size={size}: at most 256")));
        }
        settings.config_size = self.config_size;
        if self.server && self.reconnect.is_some() {
            return Err(Usage("reconnect= cannot be with server=on".to_owned()));
        }
        settings.reconnect = self.reconnect.map_or(Settings::RECONNECT, |seconds| {
            Duration::from_secs(seconds.into())
        });
        settings.resume = self.resume.map(|mode| match mode {
            ResumeMode::InOrder => bridge::Resume::InOrder,
            ResumeMode::Record => bridge::Resume::Record,
            ResumeMode::Never => bridge::Resume::Never,
        });
        self.configure(&mut settings, id)?;
        Ok(settings)
    }

    /// The configuration that is not the daemon's.
    fn configure(&self, settings: &mut Settings, id: &str) -> Result<(), Usage> {
        let only = |key: &str, given: bool, name: &str, is: u32| match given {
            true if settings.device_id != is => {
                Err(Usage(format!("{key}= is for type={name} only")))
            }
            true if self.config.is_some() => Err(Usage(format!(
                "{key}= and config= say the same; leave one out"
            ))),
            _ => Ok(()),
        };
        only("tag", self.tag.is_some(), "fs", 26)?;
        only("cid", self.cid.is_some(), "vsock", 19)?;
        only("mac", self.mac.is_some(), "net", 1)?;
        if let Some(text) = &self.config {
            let config = hex(text).filter(|config| config.len() <= 256);
            let config = config.ok_or_else(|| {
                Usage("config=: two hexadecimal digits for each of at most 256 bytes".to_owned())
            })?;
            settings.config = Some(config);
            return Ok(());
        }
        if let Some(tag) = &self.tag {
            if tag.is_empty() || tag.len() > TAG {
                return Err(Usage(format!("tag={tag}: 1 to {TAG} bytes")));
            }
            let mut config = tag.clone().into_bytes();
            config.resize(TAG, 0);
            let requests = u32::from(self.queues.unwrap_or(2)).saturating_sub(1);
            config.extend(requests.to_le_bytes());
            settings.config = Some(config);
        }
        if let Some(cid) = self.cid {
            if !(3..u64::from(u32::MAX)).contains(&cid) {
                return Err(Usage(format!("cid={cid}: 3 to 4294967294")));
            }
            settings.config = Some(cid.to_le_bytes().to_vec());
        }
        if settings.device_id == 1 {
            let mac = match &self.mac {
                Some(text) => text
                    .parse()
                    .map_err(|error| Usage(format!("mac=: {error}")))?,
                None => Mac::derived(id),
            };
            let mut config = mac.0.to_vec();
            config.resize(12, 0);
            settings.config = Some(config);
            settings.features |= NET_F_MAC;
        }
        Ok(())
    }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(byte).collect()
}

#[cfg(test)]
#[path = "bridge_test.rs"]
mod tests;
