// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be written behind `--device`.
//!
//! One serde structure for each thing that can be configured; `vmsg_bus::keyval`
//! reads it from the command line.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use vmsg_device::net::Mac;
use vmsg_net::socket::{DgramConfig, StreamAddress, StreamConfig};
use vmsg_net::tap::TapConfig;
use vmsg_net::user::UserConfig;

use crate::Usage;
use crate::control::LinkState;

mod parse;

/// A device: `net,…` or `rng,…`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceSpec {
    /// A network device.
    Net(Box<NetSpec>),
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
    #[serde(deserialize_with = "parse::mtu")]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 256; one by default, with `fds` as many as these.
    pub queues: Option<u16>,
    /// Whether the cable is in at first; `up` by default.
    pub link: LinkState,
    /// What the guest is told about the line, in Mbit/s; nothing by default.
    pub speed: Option<u32>,
    /// With `speed`: whether both directions go at a time; `full` by default.
    pub duplex: Option<Duplex>,
    /// Offer the guest to choose queues by its own table, if there are several; on by default.
    pub rss: Option<bool>,
    /// Offer the guest to report the hash of each frame; on by default.
    pub hash: Option<bool>,
    /// Write all frames to this file, for Wireshark.
    pub pcap: Option<PathBuf>,
    /// `user`: the guest's network, as in `10.0.2.0/24`.
    pub net: Option<String>,
    /// `user`: the gateway, which stands for the host. `socket`: name or address of the peer, or where to listen.
    pub host: Option<String>,
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
    /// `tap`: the interface, which is created if it is not there; `tap%d` by default: the first number that is free.
    pub ifname: Option<String>,
    /// `tap`: a descriptor of an interface that this process was started with.
    pub fd: Option<RawFd>,
    /// `tap`: several of them, one for each pair of queues, as in `3:4`.
    pub fds: Option<String>,
    /// `tap`: addresses of the host's side, as in `192.168.7.1/24`.
    pub addr: Vec<String>,
    /// `tap`: whether the interface is set up; by default if it is created here.
    pub up: Option<bool>,
    /// `tap`: whether frames may be large and lack checksums; on by default.
    pub offloads: Option<bool>,
    /// `socket`: how frames are told apart; `stream` by default.
    pub mode: Option<SocketMode>,
    /// `socket`, `stream`: the path of a Unix socket.
    pub path: Option<PathBuf>,
    /// `socket`, `stream`: a TCP port.
    pub port: Option<u16>,
    /// `socket`, `stream`: listen instead of connecting.
    pub server: bool,
    /// `socket`, `stream`: seconds between attempts to connect at most, 1 by default; 0: the peer must be there, and its end is the end.
    pub reconnect: Option<u16>,
    /// `socket`, `dgram`: where to receive: a path with a `/` in it, or `ADDRESS:PORT`.
    pub local: Option<String>,
    /// `socket`, `dgram`: where the peer receives, likewise.
    pub remote: Option<String>,
    /// `socket`, `dgram`: a multicast group and a port, as in `230.0.0.1:1234`, instead of `local` and `remote`.
    pub mcast: Option<SocketAddrV4>,
    /// `socket`, `dgram`: with `mcast`, the address of the interface to use.
    pub localaddr: Option<Ipv4Addr>,
}

/// How frames go through a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketMode {
    /// A length before each frame, as with QEMU's `-netdev stream`; passt.
    #[default]
    Stream,
    /// A frame in each datagram, as with QEMU's `-netdev dgram`.
    Dgram,
}

/// How many directions a line carries at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Duplex {
    /// Both.
    Full,
    /// One.
    Half,
}

/// What a network device plugs into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// The user-mode stack: a private network with DHCP, DNS and a way out.
    #[default]
    User,
    /// An interface of the host.
    Tap,
    /// A socket to another virtual machine, or to passt.
    Socket,
    /// Nothing: what is sent is dropped.
    None,
}

impl NetBackend {
    const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Tap => "tap",
            Self::Socket => "socket",
            Self::None => "none",
        }
    }
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
            Self::Net(net) => Common {
                kind: "net",
                id: net.id.as_deref(),
                num: net.num,
                bus: net.bus.as_deref(),
                worker: net.worker,
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
            host: self.host.as_deref().map(parse::gateway).transpose()?,
            dhcp_start: self.dhcpstart,
            dns: self.dns,
            hostname: self.hostname.clone(),
            restrict: self.restrict,
            ..UserConfig::default()
        };
        if let Some(net) = &self.net {
            config.net = parse::net(net)?;
        }
        config.ipv6 = self.ipv6.unwrap_or(config.ipv6);
        if let Some(net) = &self.ipv6_net {
            config.net6 = parse::net6(net)?;
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
            .map(|text| parse::forward(text))
            .collect::<Result<_, _>>()?;
        config.resolvers = self
            .resolver
            .iter()
            .map(|text| parse::resolver(text))
            .collect::<Result<_, _>>()?;
        Ok(config)
    }

    /// The settings of `backend=tap`.
    pub(crate) fn tap_config(&self) -> Result<TapConfig, Usage> {
        let mut config = TapConfig::default();
        if self.fd.is_some() && self.fds.is_some() {
            return Err(Usage("fd= and fds= cannot both be".to_owned()));
        }
        config.fds.extend(self.fd);
        if let Some(text) = &self.fds {
            config.fds = text
                .split(':')
                .map(str::parse)
                .collect::<Result<_, _>>()
                .map_err(|_| Usage(format!("fds={text}: write it as 3:4")))?;
        }
        if let Some(name) = &self.ifname {
            if !config.fds.is_empty() {
                let why = "ifname= cannot be with fd= or fds=, which have an interface already";
                return Err(Usage(why.to_owned()));
            }
            config.ifname.clone_from(name);
        }
        config.queues = self.queues.unwrap_or(config.queues);
        if let (Some(queues), false) = (self.queues, config.fds.is_empty())
            && usize::from(queues) != config.fds.len()
        {
            let count = config.fds.len();
            return Err(Usage(format!(
                "queues={queues}: each needs a descriptor, there are {count}"
            )));
        }
        config.addresses = self
            .addr
            .iter()
            .map(|text| parse::cidr(text))
            .collect::<Result<_, _>>()?;
        config.up = self.up;
        config.mtu = self.mtu;
        config.offloads = self.offloads.unwrap_or(config.offloads);
        Ok(config)
    }

    /// The settings of `backend=socket`.
    pub(crate) fn socket_config(&self) -> Result<SocketConfig, Usage> {
        let mode = self.mode.unwrap_or_default();
        let stream = [
            ("path", self.path.is_some()),
            ("host", self.host.is_some()),
            ("port", self.port.is_some()),
            ("server", self.server),
            ("reconnect", self.reconnect.is_some()),
        ];
        let dgram = [
            ("local", self.local.is_some()),
            ("remote", self.remote.is_some()),
            ("mcast", self.mcast.is_some()),
            ("localaddr", self.localaddr.is_some()),
        ];
        let given = |keys: &[(&'static str, bool)]| {
            keys.iter().find_map(|(key, given)| given.then_some(*key))
        };
        let list = |keys: &[(&'static str, bool)]| {
            let keys: Vec<_> = keys.iter().map(|(key, _)| format!("`{key}`")).collect();
            keys.join(", ")
        };
        match mode {
            SocketMode::Stream => match given(&dgram) {
                Some(key) => {
                    let known = list(&stream);
                    Err(Usage(format!(
                        "{key}= needs mode=dgram; mode=stream knows {known}"
                    )))
                }
                None => Ok(SocketConfig::Stream(self.stream_config()?)),
            },
            SocketMode::Dgram => match given(&stream) {
                Some(key) => {
                    let known = list(&dgram);
                    Err(Usage(format!(
                        "{key}= needs mode=stream; mode=dgram knows {known}"
                    )))
                }
                None => Ok(SocketConfig::Dgram(self.dgram_config()?)),
            },
        }
    }

    fn stream_config(&self) -> Result<StreamConfig, Usage> {
        let address = match (&self.path, &self.host, self.port) {
            (Some(path), None, None) => StreamAddress::Unix(path.clone()),
            (None, Some(host), Some(port)) => StreamAddress::Tcp(host.clone(), port),
            _ => {
                let why = "mode=stream needs path= for a Unix socket, or host= and port= for TCP";
                return Err(Usage(why.to_owned()));
            }
        };
        if self.server {
            if self.reconnect.is_some() {
                return Err(Usage("reconnect= cannot be with server=on".to_owned()));
            }
            return Ok(StreamConfig::server(address));
        }
        let mut config = StreamConfig::client(address);
        if let Some(seconds) = self.reconnect {
            config.reconnect = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
        }
        Ok(config)
    }

    fn dgram_config(&self) -> Result<DgramConfig, Usage> {
        if let (Some(group), None, None) = (self.mcast, &self.local, &self.remote) {
            return Ok(DgramConfig::Multicast {
                group,
                interface: self.localaddr,
            });
        }
        if self.localaddr.is_some() {
            return Err(Usage("localaddr= needs mcast=".to_owned()));
        }
        let (None, Some(local), Some(remote)) = (self.mcast, &self.local, &self.remote) else {
            let why = "mode=dgram needs local= and remote=, or mcast=";
            return Err(Usage(why.to_owned()));
        };
        match (local.contains('/'), remote.contains('/')) {
            (true, true) => Ok(DgramConfig::Unix {
                local: local.into(),
                remote: remote.into(),
            }),
            (false, false) => Ok(DgramConfig::Udp {
                local: parse::endpoint("local", local)?,
                remote: parse::endpoint("remote", remote)?,
            }),
            _ => {
                let why = "local= and remote= must both be paths with a `/`, or both ADDRESS:PORT";
                Err(Usage(why.to_owned()))
            }
        }
    }

    /// What the guest is told about the line, in Mbit/s.
    pub(crate) fn line(&self) -> Result<Option<u32>, Usage> {
        match (self.speed, self.duplex) {
            (None, Some(_)) => Err(Usage("duplex= needs speed=".to_owned())),
            // More is how the device says that it does not know.
            (Some(speed), _) if speed > 0x7fff_ffff => {
                Err(Usage(format!("speed={speed}: at most 2147483647")))
            }
            (speed, _) => Ok(speed),
        }
    }

    /// Finds a key that means nothing with this back end, and says so.
    pub(crate) fn check_keys(&self) -> Result<(), Usage> {
        use NetBackend::{Socket, Tap, User};
        let Self {
            id: _,
            num: _,
            bus: _,
            worker: _,
            backend,
            mac: _,
            mtu: _,
            queues: _,
            link: _,
            speed: _,
            duplex: _,
            rss: _,
            hash: _,
            pcap: _,
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
            ifname,
            fd,
            fds,
            addr,
            up,
            offloads,
            mode,
            path,
            port,
            server,
            reconnect,
            local,
            remote,
            mcast,
            localaddr,
        } = self;
        let keys = [
            ("net", &[User][..], net.is_some()),
            ("host", &[User, Socket], host.is_some()),
            ("dhcpstart", &[User], dhcpstart.is_some()),
            ("dns", &[User], dns.is_some()),
            ("ipv6", &[User], ipv6.is_some()),
            ("ipv6-net", &[User], ipv6_net.is_some()),
            ("ipv6-host", &[User], ipv6_host.is_some()),
            ("ipv6-dns", &[User], ipv6_dns.is_some()),
            ("tcp-flows", &[User], tcp_flows.is_some()),
            ("udp-flows", &[User], udp_flows.is_some()),
            ("resolver", &[User], !resolver.is_empty()),
            ("hostname", &[User], hostname.is_some()),
            ("restrict", &[User], *restrict),
            ("host-loopback", &[User], host_loopback.is_some()),
            ("hostfwd", &[User], !hostfwd.is_empty()),
            ("ifname", &[Tap], ifname.is_some()),
            ("fd", &[Tap], fd.is_some()),
            ("fds", &[Tap], fds.is_some()),
            ("addr", &[Tap], !addr.is_empty()),
            ("up", &[Tap], up.is_some()),
            ("offloads", &[Tap], offloads.is_some()),
            ("mode", &[Socket], mode.is_some()),
            ("path", &[Socket], path.is_some()),
            ("port", &[Socket], port.is_some()),
            ("server", &[Socket], *server),
            ("reconnect", &[Socket], reconnect.is_some()),
            ("local", &[Socket], local.is_some()),
            ("remote", &[Socket], remote.is_some()),
            ("mcast", &[Socket], mcast.is_some()),
            ("localaddr", &[Socket], localaddr.is_some()),
        ];
        let foreign = keys
            .iter()
            .find(|(_, of, given)| *given && !of.contains(backend));
        let Some((key, of, _)) = foreign else {
            return Ok(());
        };
        let of: Vec<_> = of
            .iter()
            .map(|backend| format!("backend={}", backend.name()))
            .collect();
        let known: Vec<_> = keys
            .iter()
            .filter(|(_, of, _)| of.contains(backend))
            .map(|(key, ..)| format!("`{key}`"))
            .collect();
        let known = match known.as_slice() {
            [] => "no keys of its own".to_owned(),
            known => known.join(", "),
        };
        Err(Usage(format!(
            "{key}= needs {}; backend={} knows {known}",
            of.join(" or "),
            backend.name()
        )))
    }
}

/// The settings of `backend=socket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SocketConfig {
    Stream(StreamConfig),
    Dgram(DgramConfig),
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
