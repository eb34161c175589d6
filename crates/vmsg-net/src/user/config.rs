// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be set about the user-mode stack.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use smoltcp::wire::EthernetAddress;

use super::packet::link_local;

/// A protocol that ports belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads into the guest: `hostfwd=tcp:[addr]:port-[gaddr]:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens. Port 0 lets the system choose: see
    /// [`User::forward_addresses`](super::User::forward_addresses).
    pub host: SocketAddr,
    /// Address of the guest; `None` for [`UserConfig::dhcp_start`]. `::` is whichever IPv6 address
    /// a guest used last.
    pub guest_addr: Option<IpAddr>,
    /// Port in the guest.
    pub guest_port: u16,
}

/// How much a guest may use of the host, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// TCP connections at a time. Each costs a file descriptor and under 1 KiB here, and what the
    /// kernel's socket buffers hold.
    pub tcp_flows: usize,
    /// TCP connections that are being made, at a time, within `tcp_flows`.
    pub tcp_half_open: usize,
    /// UDP and ICMP conversations at a time, each with a file descriptor; the one that rested
    /// longest makes way.
    pub datagram_flows: usize,
    /// Bytes that a TCP connection may have on the way to the guest, unacknowledged.
    pub tcp_in_flight: u32,
    /// Bytes that one conversation may send to the guest before the next has a turn.
    pub turn_bytes: usize,
    /// Neighbours whose hardware addresses are remembered, and DHCP leases.
    pub neighbours: usize,
    /// An idle TCP connection is closed after this time.
    pub tcp_idle: Duration,
    /// A TCP connection that is closed in one direction and idle is closed after this time.
    pub tcp_half_closed_idle: Duration,
    /// A TCP connection must be made within this time.
    pub tcp_connect: Duration,
    /// An idle UDP conversation is forgotten after this time.
    pub udp_idle: Duration,
    /// DNS questions and echo requests are forgotten after this time.
    pub query_idle: Duration,
}

impl Default for Limits {
    /// 4096 TCP connections (512 half open) and 1024 datagram conversations, which together need
    /// a limit of more than 5120 descriptors (without them, new ones are refused); 4 MiB in
    /// flight, 64 KiB a turn, 64 neighbours; 2 h 4 min
    /// (RFC 5382 wants no less, so that probes for liveness every two hours help), 5 min, 75 s,
    /// 180 s and 15 s.
    fn default() -> Self {
        Self {
            tcp_flows: 4096,
            tcp_half_open: 512,
            datagram_flows: 1024,
            tcp_in_flight: 4 << 20,
            turn_bytes: 64 << 10,
            neighbours: 64,
            tcp_idle: Duration::from_secs(2 * 3600 + 4 * 60),
            tcp_half_closed_idle: Duration::from_secs(300),
            tcp_connect: Duration::from_secs(75),
            udp_idle: Duration::from_secs(180),
            query_idle: Duration::from_secs(15),
        }
    }
}

/// Settings of the user-mode stack. The defaults are those of QEMU's `-netdev user`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// `net=`: the network of the guest, address and prefix length (8 to 29); 10.0.2.0/24.
    pub net: (Ipv4Addr, u8),
    /// `host=`: the gateway, which stands for the host; `None` is the second address, 10.0.2.2.
    pub host: Option<Ipv4Addr>,
    /// `dhcpstart=`: the first address to be leased; `None` is the 15th, 10.0.2.15.
    pub dhcp_start: Option<Ipv4Addr>,
    /// `dns=`: the name server as the guest sees it; `None` is the third address, 10.0.2.3.
    pub dns: Option<Ipv4Addr>,
    /// `ipv6=`: whether there is IPv6, too. Not with an MTU below 1280 (RFC 8200).
    pub ipv6: bool,
    /// `ipv6-net=`: the prefix that guests make their addresses from, and its length, which must
    /// be 64 (RFC 4862); fd00:10:0:2::/64.
    pub net6: (Ipv6Addr, u8),
    /// `ipv6-host=`: the gateway, which stands for the host; `None` is number 2 of the prefix.
    pub host6: Option<Ipv6Addr>,
    /// `ipv6-dns=`: the name server as the guest sees it; `None` is number 3 of the prefix.
    pub dns6: Option<Ipv6Addr>,
    /// `hostname=`: what DHCP calls the guest, up to 255 bytes.
    pub hostname: Option<String>,
    /// `domainname=`: the domain that DHCP tells, up to 255 bytes.
    pub domain: Option<String>,
    /// `restrict=`: the guest reaches nothing but DHCP and who came in through `forwards`.
    pub restrict: bool,
    /// Whether the gateway's address leads to the loopback address of the host.
    pub host_loopback: bool,
    /// `hostfwd=`: ports of the host that lead into the guest.
    pub forwards: Vec<HostForward>,
    /// Name servers to ask; empty: those of /etc/resolv.conf, looked up again when it changes.
    pub resolvers: Vec<SocketAddr>,
    /// Hardware address of the gateway and name server; 52:55:0a:00:02:02.
    pub mac: [u8; 6],
    /// Largest IP packet to and from the guest in bytes, 576 to 65520; 1500. Other values are
    /// announced by DHCP; router advertisements always tell.
    pub mtu: u16,
    /// How much the guest may use.
    pub limits: Limits,
}

impl Default for UserConfig {
    fn default() -> Self {
        Self {
            net: (Ipv4Addr::new(10, 0, 2, 0), 24),
            host: None,
            dhcp_start: None,
            dns: None,
            ipv6: true,
            net6: (Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 0), 64),
            host6: None,
            dns6: None,
            hostname: None,
            domain: None,
            restrict: false,
            host_loopback: true,
            forwards: Vec::new(),
            resolvers: Vec::new(),
            mac: [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02],
            mtu: 1500,
            limits: Limits::default(),
        }
    }
}

/// Why a [`UserConfig`] makes no sense, or cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// The prefix length is not from 8 to 29.
    #[error("net={addr}/{prefix}: the prefix length must be from 8 to 29")]
    Prefix {
        /// The network.
        addr: Ipv4Addr,
        /// The length.
        prefix: u8,
    },
    /// An address is not one of a host in the network.
    #[error("{key}={addr} is not the address of a host in {net}/{prefix}")]
    OutsideNet {
        /// Which setting.
        key: &'static str,
        /// The address.
        addr: IpAddr,
        /// The network.
        net: IpAddr,
        /// Its prefix length.
        prefix: u8,
    },
    /// Two of `host=`, `dns=` and `dhcpstart=` are the same, or `ipv6-host=` and `ipv6-dns=` are.
    #[error("host=, dns= and dhcpstart= must be different addresses, ipv6-host= and ipv6-dns= too")]
    SameAddress,
    /// The IPv6 prefix is not one that guests can make addresses from.
    #[error("ipv6-net={addr}/{prefix}: must be a unicast prefix of 64 bits, not a link-local one")]
    Prefix6 {
        /// The network.
        addr: Ipv6Addr,
        /// The length.
        prefix: u8,
    },
    /// A port leads to an IPv6 address, but there is no IPv6.
    #[error("hostfwd: {0} cannot be reached without IPv6")]
    NoIpv6(IpAddr),
    /// The MTU is not from 576 to 65520.
    #[error("mtu={0}: must be from 576 to 65520")]
    Mtu(u16),
    /// A name is longer than DHCP can say.
    #[error("{0} is longer than 255 bytes or empty")]
    Name(&'static str),
    /// A port of the host is not to be had.
    #[error("hostfwd: cannot listen on {addr}: {source}")]
    Forward {
        /// Where the host should listen.
        addr: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The guest's end of a forwarding has port 0.
    #[error("hostfwd: the guest's port must not be 0")]
    ForwardPort,
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// The addresses of the guest's network, checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) net: Ipv4Addr,
    pub(super) prefix: u8,
    pub(super) host: Ipv4Addr,
    pub(super) dns: Ipv4Addr,
    pub(super) dhcp_start: Ipv4Addr,
    pub(super) v6: Option<Addresses6>,
}

/// The same for IPv6.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses6 {
    pub(super) net: Ipv6Addr,
    pub(super) host: Ipv6Addr,
    pub(super) dns: Ipv6Addr,
    /// The gateway as routers call themselves.
    pub(super) link_local: Ipv6Addr,
}

/// Bits of an IPv6 prefix.
pub(super) const PREFIX6: u8 = 64;

impl Addresses {
    pub(super) fn new(config: &UserConfig) -> Result<Self, UserError> {
        let (addr, prefix) = config.net;
        if !(8..=29).contains(&prefix) {
            return Err(UserError::Prefix { addr, prefix });
        }
        let net = Ipv4Addr::from_bits(addr.to_bits() & (u32::MAX << (32 - prefix)));
        let nth = |n: u32| Ipv4Addr::from_bits(net.to_bits() | n);
        // The 15th address lies outside of small networks: then the last one.
        let last = (u32::MAX >> prefix) - 1;
        if !(576..=65520).contains(&config.mtu) {
            return Err(UserError::Mtu(config.mtu));
        }
        let this = Self {
            net,
            prefix,
            host: config.host.unwrap_or_else(|| nth(2)),
            dns: config.dns.unwrap_or_else(|| nth(3)),
            dhcp_start: config
                .dhcp_start
                .unwrap_or_else(|| nth(if last >= 15 { 15 } else { 4 })),
            v6: (config.ipv6 && config.mtu >= 1280)
                .then(|| Addresses6::new(config))
                .transpose()?,
        };
        for (key, addr) in [
            ("host", this.host),
            ("dns", this.dns),
            ("dhcpstart", this.dhcp_start),
        ] {
            if !this.is_host(addr) {
                return Err(UserError::OutsideNet {
                    key,
                    addr: addr.into(),
                    net: net.into(),
                    prefix,
                });
            }
        }
        if this.host == this.dns || this.host == this.dhcp_start || this.dns == this.dhcp_start {
            return Err(UserError::SameAddress);
        }
        for (key, name) in [
            ("hostname=", &config.hostname),
            ("domainname=", &config.domain),
        ] {
            if name
                .as_ref()
                .is_some_and(|name| name.is_empty() || name.len() > 255)
            {
                return Err(UserError::Name(key));
            }
        }
        for forward in &config.forwards {
            this.check_forward(forward)?;
        }
        Ok(this)
    }

    fn check_forward(&self, forward: &HostForward) -> Result<(), UserError> {
        if forward.guest_port == 0 {
            return Err(UserError::ForwardPort);
        }
        let Some(addr) = forward.guest_addr else {
            return Ok(());
        };
        let (net, prefix) = match (addr, self.v6) {
            (IpAddr::V4(_), _) => (self.net.into(), self.prefix),
            (IpAddr::V6(_), Some(v6)) => (v6.net.into(), PREFIX6),
            (IpAddr::V6(_), None) => return Err(UserError::NoIpv6(addr)),
        };
        let any = addr.is_ipv6() && addr.is_unspecified();
        if any || self.is_guest(addr) {
            return Ok(());
        }
        Err(UserError::OutsideNet {
            key: "hostfwd=",
            addr,
            net,
            prefix,
        })
    }

    pub(super) const fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix))
    }

    pub(super) const fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.net.to_bits() | (u32::MAX >> self.prefix))
    }

    /// True for addresses of the guest's network, whoever has them.
    pub(super) fn contains(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => addr.to_bits() & self.mask().to_bits() == self.net.to_bits(),
            IpAddr::V6(addr) => self.v6.is_some_and(|v6| v6.contains(addr)),
        }
    }

    /// True for IPv4 addresses in the network that are not the network's own two.
    fn is_host(&self, addr: Ipv4Addr) -> bool {
        self.contains(addr.into()) && addr != self.net && addr != self.broadcast()
    }

    /// True for addresses that are the gateway's or the name server's.
    pub(super) fn is_ours(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => addr == self.host || addr == self.dns,
            IpAddr::V6(addr) => self
                .v6
                .is_some_and(|v6| addr == v6.host || addr == v6.dns || addr == v6.link_local),
        }
    }

    /// True for addresses that a guest may have and reach others with.
    pub(super) fn is_guest(&self, addr: IpAddr) -> bool {
        !self.is_ours(addr)
            && match addr {
                IpAddr::V4(addr) => self.is_host(addr),
                IpAddr::V6(addr) => self
                    .v6
                    // The first one stands for any router (RFC 4291, 2.6.1).
                    .is_some_and(|v6| v6.contains(addr) && addr != v6.net),
            }
    }

    /// True for addresses that a guest may have, those that nobody else knows included.
    pub(super) fn is_neighbour(&self, addr: IpAddr) -> bool {
        let local = matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
        self.is_guest(addr) || (local && self.v6.is_some() && !self.is_ours(addr))
    }

    /// The gateway, in the version of `like`.
    pub(super) fn gateway(&self, like: IpAddr) -> IpAddr {
        match (like, self.v6) {
            (IpAddr::V6(_), Some(v6)) => v6.host.into(),
            _ => self.host.into(),
        }
    }

    /// True for the name server.
    pub(super) fn is_dns(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => addr == self.dns,
            IpAddr::V6(addr) => self.v6.is_some_and(|v6| addr == v6.dns),
        }
    }

    /// True for the gateway.
    pub(super) fn is_gateway(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => addr == self.host,
            IpAddr::V6(addr) => self.v6.is_some_and(|v6| addr == v6.host),
        }
    }

    /// The guest's end of a forwarding.
    pub(super) fn forward_guest(&self, forward: &HostForward) -> SocketAddr {
        SocketAddr::new(
            forward.guest_addr.unwrap_or(self.dhcp_start.into()),
            forward.guest_port,
        )
    }
}

impl Addresses6 {
    fn new(config: &UserConfig) -> Result<Self, UserError> {
        let (addr, prefix) = config.net6;
        let net = Ipv6Addr::from_bits(addr.to_bits() & (u128::MAX << 64));
        // Neither what has a meaning of its own (RFC 4291, 2.4) nor what IPv4 addresses hide in.
        let special = addr.is_multicast() || addr.is_unicast_link_local() || addr.octets()[0] == 0;
        if prefix != PREFIX6 || special {
            return Err(UserError::Prefix6 { addr, prefix });
        }
        let nth = |n: u128| Ipv6Addr::from_bits(net.to_bits() | n);
        let this = Self {
            net,
            host: config.host6.unwrap_or_else(|| nth(2)),
            dns: config.dns6.unwrap_or_else(|| nth(3)),
            link_local: link_local(EthernetAddress(config.mac)),
        };
        for (key, addr) in [("ipv6-host", this.host), ("ipv6-dns", this.dns)] {
            if !this.contains(addr) || addr == net {
                return Err(UserError::OutsideNet {
                    key,
                    addr: addr.into(),
                    net: net.into(),
                    prefix,
                });
            }
        }
        if this.host == this.dns {
            return Err(UserError::SameAddress);
        }
        Ok(this)
    }

    const fn contains(&self, addr: Ipv6Addr) -> bool {
        addr.to_bits() >> 64 == self.net.to_bits() >> 64
    }
}
