// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be written behind `--device`.
//!
//! One serde structure for each thing that can be configured; `vmsg_bus::keyval`
//! reads it from the command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use vmsg_device::net::Mac;
use vmsg_net::user::{HostForward, Protocol, UserConfig};

use crate::Usage;

/// A device: `net,…` or `rng,…`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceSpec {
    /// A network device.
    Net(NetSpec),
    /// An entropy device.
    Rng(RngSpec),
}

/// `net,…`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct NetSpec {
    /// Name of the device; `net0`, `net1`, … by default.
    pub id: Option<String>,
    /// Its number on the bus; the lowest free one by default.
    pub num: Option<u16>,
    /// The bus it is on; the first by default.
    pub bus: Option<String>,
    /// Which worker serves it, counted from 0.
    pub worker: Option<usize>,
    /// What it plugs into; `user` by default.
    pub backend: NetBackend,
    /// Its MAC address; derived from the id by default.
    pub mac: Option<String>,
    /// The largest IP packet in bytes.
    pub mtu: Option<u16>,
    /// Write all frames to this file, for Wireshark.
    pub pcap: Option<PathBuf>,
    /// `user`: the guest's network, as in `10.0.2.0/24`.
    pub net: Option<String>,
    /// `user`: the gateway, which stands for the host.
    pub host: Option<Ipv4Addr>,
    /// `user`: the first address that DHCP gives.
    pub dhcpstart: Option<Ipv4Addr>,
    /// `user`: the name server as the guest sees it.
    pub dns: Option<Ipv4Addr>,
    /// `user`: whether there is IPv6, too; on by default.
    pub ipv6: Option<bool>,
    /// `user`: the prefix that guests make their addresses from, as in `fd00:10:0:2::/64`.
    pub ipv6_net: Option<String>,
    /// `user`: the gateway in it, which stands for the host.
    pub ipv6_host: Option<Ipv6Addr>,
    /// `user`: the name server in it.
    pub ipv6_dns: Option<Ipv6Addr>,
    /// `user`: TCP connections at a time.
    pub tcp_flows: Option<usize>,
    /// `user`: UDP and ICMP conversations at a time.
    pub udp_flows: Option<usize>,
    /// `user`: name servers of the host to ask, as `ADDRESS` or `ADDRESS:PORT`; those of /etc/resolv.conf by default.
    pub resolver: Vec<String>,
    /// `user`: the name that DHCP gives the guest.
    pub hostname: Option<String>,
    /// `user`: the guest reaches nothing but who came in by `hostfwd`.
    pub restrict: bool,
    /// `user`: whether the gateway's address leads to the host's loopback; on by default.
    pub host_loopback: Option<bool>,
    /// `user`: `tcp:[ADDRESS]:PORT-[GUEST]:PORT`, more than once if need be.
    pub hostfwd: Vec<String>,
}

/// What a network device plugs into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// The user-mode stack: a private network with DHCP, DNS and a way out.
    #[default]
    User,
    /// Nothing: what is sent is dropped.
    None,
}

/// `rng,…`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RngSpec {
    /// Name of the device; `rng0`, `rng1`, … by default.
    pub id: Option<String>,
    /// Its number on the bus; the lowest free one by default.
    pub num: Option<u16>,
    /// The bus it is on; the first by default.
    pub bus: Option<String>,
    /// Which worker serves it, counted from 0.
    pub worker: Option<usize>,
}

/// What every device has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common<'a> {
    pub(crate) kind: &'static str,
    pub(crate) id: Option<&'a str>,
    pub(crate) num: Option<u16>,
    pub(crate) bus: Option<&'a str>,
    pub(crate) worker: Option<usize>,
}

impl DeviceSpec {
    pub(crate) fn common(&self) -> Common<'_> {
        match self {
            Self::Net(NetSpec {
                id,
                num,
                bus,
                worker,
                ..
            }) => Common {
                kind: "net",
                id: id.as_deref(),
                num: *num,
                bus: bus.as_deref(),
                worker: *worker,
            },
            Self::Rng(RngSpec {
                id,
                num,
                bus,
                worker,
            }) => Common {
                kind: "rng",
                id: id.as_deref(),
                num: *num,
                bus: bus.as_deref(),
                worker: *worker,
            },
        }
    }
}

impl NetSpec {
    /// The MAC address that was given, or the one that goes with `id`.
    pub(crate) fn mac(&self, id: &str) -> Result<Mac, Usage> {
        match &self.mac {
            Some(text) => text
                .parse()
                .map_err(|error| Usage(format!("mac=: {error}"))),
            None => Ok(Mac::derived(id)),
        }
    }

    /// The settings of `backend=user`.
    pub(crate) fn user_config(&self) -> Result<UserConfig, Usage> {
        let mut config = UserConfig {
            host: self.host,
            dhcp_start: self.dhcpstart,
            dns: self.dns,
            hostname: self.hostname.clone(),
            restrict: self.restrict,
            ..UserConfig::default()
        };
        if let Some(net) = &self.net {
            config.net = parse_net(net)?;
        }
        config.ipv6 = self.ipv6.unwrap_or(config.ipv6);
        if let Some(net) = &self.ipv6_net {
            config.net6 = parse_net6(net)?;
        }
        config.host6 = self.ipv6_host;
        config.dns6 = self.ipv6_dns;
        let limits = &mut config.limits;
        limits.tcp_flows = self.tcp_flows.unwrap_or(limits.tcp_flows).max(1);
        limits.datagram_flows = self.udp_flows.unwrap_or(limits.datagram_flows).max(1);
        if let Some(loopback) = self.host_loopback {
            config.host_loopback = loopback;
        }
        if let Some(mtu) = self.mtu {
            config.mtu = mtu;
        }
        config.forwards = self
            .hostfwd
            .iter()
            .map(|text| parse_forward(text))
            .collect::<Result<_, _>>()?;
        config.resolvers = self
            .resolver
            .iter()
            .map(|text| parse_resolver(text))
            .collect::<Result<_, _>>()?;
        Ok(config)
    }

    /// Names a key that means nothing without `backend=user`, if one is given.
    pub(crate) fn foreign_key(&self) -> Option<&'static str> {
        let Self {
            net,
            host,
            dhcpstart,
            dns,
            ipv6,
            ipv6_net,
            ipv6_host,
            ipv6_dns,
            tcp_flows,
            udp_flows,
            resolver,
            hostname,
            restrict,
            host_loopback,
            hostfwd,
            ..
        } = self;
        [
            ("net", net.is_some()),
            ("host", host.is_some()),
            ("dhcpstart", dhcpstart.is_some()),
            ("dns", dns.is_some()),
            ("ipv6", ipv6.is_some()),
            ("ipv6-net", ipv6_net.is_some()),
            ("ipv6-host", ipv6_host.is_some()),
            ("ipv6-dns", ipv6_dns.is_some()),
            ("tcp-flows", tcp_flows.is_some()),
            ("udp-flows", udp_flows.is_some()),
            ("resolver", !resolver.is_empty()),
            ("hostname", hostname.is_some()),
            ("restrict", *restrict),
            ("host-loopback", host_loopback.is_some()),
            ("hostfwd", !hostfwd.is_empty()),
        ]
        .into_iter()
        .find_map(|(key, given)| given.then_some(key))
    }
}

fn parse_net(text: &str) -> Result<(Ipv4Addr, u8), Usage> {
    text.split_once('/')
        .and_then(|(addr, prefix)| Some((addr.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| Usage(format!("net={text}: write it as 10.0.2.0/24")))
}

fn parse_net6(text: &str) -> Result<(Ipv6Addr, u8), Usage> {
    text.split_once('/')
        .and_then(|(addr, prefix)| Some((addr.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| Usage(format!("ipv6-net={text}: write it as fd00:10:0:2::/64")))
}

fn parse_resolver(text: &str) -> Result<SocketAddr, Usage> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(|addr| SocketAddr::new(addr, 53)))
        .map_err(|_| {
            Usage(format!(
                "resolver={text}: write an address, or ADDRESS:PORT"
            ))
        })
}

/// `tcp:[ADDRESS]:PORT-[GUEST]:PORT`, as QEMU writes it.
fn parse_forward(text: &str) -> Result<HostForward, Usage> {
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

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
