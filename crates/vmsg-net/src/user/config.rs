// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be set about the user-mode stack.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

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
    /// Address of the guest; `None` for [`UserConfig::dhcp_start`].
    pub guest_addr: Option<Ipv4Addr>,
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
    /// UDP and ICMP conversations at a time; the one that rested longest makes way.
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
    /// 768 TCP connections (256 half open), 192 datagram conversations (under the usual limit of
    /// 1024 descriptors), 4 MiB in flight, 64 KiB a turn, 64 neighbours; 2 h 4 min
    /// (RFC 5382 wants no less, so that probes for liveness every two hours help), 5 min, 75 s,
    /// 180 s and 15 s.
    fn default() -> Self {
        Self {
            tcp_flows: 768,
            tcp_half_open: 256,
            datagram_flows: 192,
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
    /// announced by DHCP.
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
        addr: Ipv4Addr,
        /// The network.
        net: Ipv4Addr,
        /// Its prefix length.
        prefix: u8,
    },
    /// Two of `host=`, `dns=` and `dhcpstart=` are the same.
    #[error("host=, dns= and dhcpstart= must be different addresses")]
    SameAddress,
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
}

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
        let this = Self {
            net,
            prefix,
            host: config.host.unwrap_or_else(|| nth(2)),
            dns: config.dns.unwrap_or_else(|| nth(3)),
            dhcp_start: config
                .dhcp_start
                .unwrap_or_else(|| nth(if last >= 15 { 15 } else { 4 })),
        };
        for (key, addr) in [
            ("host", this.host),
            ("dns", this.dns),
            ("dhcpstart", this.dhcp_start),
        ] {
            if !this.is_host(addr) {
                return Err(UserError::OutsideNet {
                    key,
                    addr,
                    net,
                    prefix,
                });
            }
        }
        if this.host == this.dns || this.host == this.dhcp_start || this.dns == this.dhcp_start {
            return Err(UserError::SameAddress);
        }
        if !(576..=65520).contains(&config.mtu) {
            return Err(UserError::Mtu(config.mtu));
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
        if let Some(addr) = config
            .forwards
            .iter()
            .filter_map(|forward| forward.guest_addr)
            .find(|addr| !this.is_guest(*addr))
        {
            return Err(UserError::OutsideNet {
                key: "hostfwd=",
                addr,
                net,
                prefix,
            });
        }
        if config
            .forwards
            .iter()
            .any(|forward| forward.guest_port == 0)
        {
            return Err(UserError::ForwardPort);
        }
        Ok(this)
    }

    pub(super) const fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix))
    }

    pub(super) const fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.net.to_bits() | (u32::MAX >> self.prefix))
    }

    pub(super) const fn contains(&self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & self.mask().to_bits() == self.net.to_bits()
    }

    /// True for addresses in the network that are not the network's own two.
    pub(super) fn is_host(&self, addr: Ipv4Addr) -> bool {
        self.contains(addr) && addr != self.net && addr != self.broadcast()
    }

    /// True for addresses that a guest may have.
    pub(super) fn is_guest(&self, addr: Ipv4Addr) -> bool {
        self.is_host(addr) && addr != self.host && addr != self.dns
    }

    /// The guest's end of a forwarding.
    pub(super) fn forward_guest(&self, forward: &HostForward) -> SocketAddrV4 {
        SocketAddrV4::new(
            forward.guest_addr.unwrap_or(self.dhcp_start),
            forward.guest_port,
        )
    }
}
