// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keys of what a network device or an uplink plugs into.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmsg_net::socket::{DgramConfig, StreamAddress, StreamConfig};
use vmsg_net::tap::TapConfig;
use vmsg_net::user::UserConfig;
use vmsg_net::vhost_user::VhostUserConfig;

use super::net::BackendKeys;
use super::parse;
use crate::Usage;

/// What a network device plugs into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// The user-mode stack: a private network with DHCP, DNS and a way out.
    #[default]
    User,
    /// An interface of the host.
    Tap,
    /// A socket to another virtual machine, or to passt.
    Socket,
    /// A port of Open vSwitch, or another back end with vhost-user.
    VhostUser,
    /// Nothing: what is sent is dropped.
    None,
}

impl NetBackend {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Tap => "tap",
            Self::Socket => "socket",
            Self::VhostUser => "vhost-user",
            Self::None => "none",
        }
    }
}

/// How frames go through a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketMode {
    /// A length before each frame, as with QEMU's `-netdev stream`; passt.
    #[default]
    Stream,
    /// A frame in each datagram, as with QEMU's `-netdev dgram`.
    Dgram,
}

/// The settings of `backend=socket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SocketConfig {
    Stream(StreamConfig),
    Dgram(DgramConfig),
}

impl BackendKeys {
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

    /// The settings of `backend=tap` with so many pairs of queues.
    pub(crate) fn tap_config(&self, queues: Option<u16>) -> Result<TapConfig, Usage> {
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
        config.queues = queues.unwrap_or(config.queues);
        if let (Some(queues), false) = (queues, config.fds.is_empty())
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

    /// The settings of `backend=vhost-user`.
    pub(crate) fn vhost_user_config(&self) -> Result<VhostUserConfig, Usage> {
        let Some(path) = &self.path else {
            let why = "backend=vhost-user needs path=, the socket where the two meet";
            return Err(Usage(why.to_owned()));
        };
        let mut config = VhostUserConfig::new(path.clone(), self.server);
        match self.reconnect {
            Some(_) if self.server => {
                return Err(Usage("reconnect= cannot be with server=on".to_owned()));
            }
            Some(0) => {
                let why = "reconnect=0: the other side may come late, the least is 1";
                return Err(Usage(why.to_owned()));
            }
            Some(seconds) => config.reconnect = Duration::from_secs(seconds.into()),
            None => {}
        }
        config.offloads = self.offloads.unwrap_or(config.offloads);
        Ok(config)
    }

    fn stream_config(&self) -> Result<StreamConfig, Usage> {
        let address = match (&self.path, &self.host, self.port) {
            (Some(path), None, None) => StreamAddress::Unix(path.clone()),
            (None, Some(host), Some(port)) => StreamAddress::Tcp(host.clone(), port),
            _ => {
                let why =
                    "mode=stream needs either path= for a Unix socket, or host= and port= for TCP";
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

    /// Looks at all that can be known before it is opened, with so many pairs of queues.
    pub(crate) fn check(&self, queues: Option<u16>) -> Result<(), Usage> {
        self.check_keys()?;
        match self.backend.unwrap_or_default() {
            NetBackend::None => Ok(()),
            NetBackend::User => self.user_config().map(|_| ()),
            NetBackend::Tap => self.tap_config(queues).map(|_| ()),
            NetBackend::Socket => self.socket_config().map(|_| ()),
            NetBackend::VhostUser => self.vhost_user_config().map(|_| ()),
        }
    }

    /// Finds a key of any back end, for a device that plugs into a switch.
    pub(crate) fn check_plugless(&self) -> Result<(), Usage> {
        let mut nowhere = self.clone();
        nowhere.backend = Some(NetBackend::None);
        nowhere.check_keys().map_err(|Usage(message)| {
            let key = message.split('=').next().unwrap_or_default();
            Usage(format!(
                "{key}= is for a back end, and contradicts switch=; a switch's way out is an --uplink"
            ))
        })
    }

    /// Finds a key that means nothing with this back end, and says so.
    pub(crate) fn check_keys(&self) -> Result<(), Usage> {
        use NetBackend::{Socket, Tap, User, VhostUser};
        let Self {
            backend,
            mtu: _,
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
        let backend = backend.unwrap_or_default();
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
            ("offloads", &[Tap, VhostUser], offloads.is_some()),
            ("mode", &[Socket], mode.is_some()),
            ("path", &[Socket, VhostUser], path.is_some()),
            ("port", &[Socket], port.is_some()),
            ("server", &[Socket, VhostUser], *server),
            ("reconnect", &[Socket, VhostUser], reconnect.is_some()),
            ("local", &[Socket], local.is_some()),
            ("remote", &[Socket], remote.is_some()),
            ("mcast", &[Socket], mcast.is_some()),
            ("localaddr", &[Socket], localaddr.is_some()),
        ];
        let foreign = keys
            .iter()
            .find(|(_, of, given)| *given && !of.contains(&backend));
        let Some((key, of, _)) = foreign else {
            return Ok(());
        };
        let of: Vec<_> = of
            .iter()
            .map(|backend| format!("backend={}", backend.name()))
            .collect();
        let known: Vec<_> = keys
            .iter()
            .filter(|(_, of, _)| of.contains(&backend))
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
