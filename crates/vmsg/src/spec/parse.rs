// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Addresses in a specification, and what is said of those that are none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use vmsg_net::user::{HostForward, Protocol};

use crate::Usage;

/// Beyond what 16 bits hold, the limit is still that of frames, not of the field.
pub(super) fn mtu<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let mtu = u64::deserialize(deserializer)?;
    let mtu = u16::try_from(mtu).map_err(|_| D::Error::custom("at most 65520 is possible"))?;
    Ok(Some(mtu))
}

pub(super) fn gateway(text: &str) -> Result<Ipv4Addr, Usage> {
    text.parse().map_err(|_| {
        Usage(format!(
            "host={text}: with backend=user this is an IPv4 address"
        ))
    })
}

pub(super) fn cidr(text: &str) -> Result<(IpAddr, u8), Usage> {
    text.split_once('/')
        .and_then(|(addr, prefix)| Some((addr.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| Usage(format!("addr={text}: write it as 192.168.7.1/24")))
}

pub(super) fn endpoint(key: &str, text: &str) -> Result<SocketAddr, Usage> {
    text.parse().map_err(|_| {
        Usage(format!(
            "{key}={text}: write it as ADDRESS:PORT, or as a path with a `/` in it"
        ))
    })
}

pub(super) fn net(text: &str) -> Result<(Ipv4Addr, u8), Usage> {
    text.split_once('/')
        .and_then(|(addr, prefix)| Some((addr.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| Usage(format!("net={text}: write it as 10.0.2.0/24")))
}

pub(super) fn net6(text: &str) -> Result<(Ipv6Addr, u8), Usage> {
    text.split_once('/')
        .and_then(|(addr, prefix)| Some((addr.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| Usage(format!("ipv6-net={text}: write it as fd00:10:0:2::/64")))
}

pub(super) fn resolver(text: &str) -> Result<SocketAddr, Usage> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(|addr| SocketAddr::new(addr, 53)))
        .map_err(|_| {
            Usage(format!(
                "resolver={text}: write an address, or ADDRESS:PORT"
            ))
        })
}

/// `tcp:[ADDRESS]:PORT-[GUEST]:PORT`, as QEMU writes it.
pub(super) fn forward(text: &str) -> Result<HostForward, Usage> {
    let bad = || {
        Usage(format!(
            "hostfwd={text}: write it as tcp:[ADDRESS]:PORT-[GUEST ADDRESS]:PORT, such as tcp::8080-:80"
        ))
    };
    let (protocol, rest) = text.split_once(':').ok_or_else(bad)?;
    let protocol = match protocol {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(bad()),
    };
    let (host, guest) = rest.split_once('-').ok_or_else(bad)?;
    let (host_addr, host_port) = host.rsplit_once(':').ok_or_else(bad)?;
    let (guest_addr, guest_port) = guest.rsplit_once(':').ok_or_else(bad)?;
    let host_addr = match host_addr {
        // Unlike QEMU: a port open to the whole network is asked for by name.
        "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        addr => addr.trim_matches(['[', ']']).parse().map_err(|_| bad())?,
    };
    let guest_addr = match guest_addr {
        "" => None,
        addr => Some(addr.trim_matches(['[', ']']).parse().map_err(|_| bad())?),
    };
    Ok(HostForward {
        protocol,
        host: SocketAddr::new(host_addr, host_port.parse().map_err(|_| bad())?),
        guest_addr,
        guest_port: guest_port.parse().map_err(|_| bad())?,
    })
}
