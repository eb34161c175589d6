// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network device, and a switch's way out: what they plug into has the same keys.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmsg_device::net::Mac;

use super::backend::{NetBackend, SocketMode};
use super::parse;
use crate::Usage;
use crate::control::LinkState;

/// Defines two structures with keys of their own, the keys they have in common, and a structure of these alone.
macro_rules! with_backend {
    (
        $(#[$a_meta:meta])* pub struct $a:ident { $($(#[$a_doc:meta])* pub $a_key:ident: $a_type:ty,)* }
        $(#[$b_meta:meta])* pub struct $b:ident { $($(#[$b_doc:meta])* pub $b_key:ident: $b_type:ty,)* }
        $(#[$c_meta:meta])* pub struct $c:ident { $($(#[$doc:meta])* pub $key:ident: $type:ty,)* }
    ) => {
        $(#[$a_meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct $a {
            $($(#[$a_doc])* #[serde(skip_serializing_if = "super::is_default")] pub $a_key: $a_type,)*
            $($(#[$doc])* #[serde(skip_serializing_if = "super::is_default")] pub $key: $type,)*
        }

        $(#[$b_meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct $b {
            $($(#[$b_doc])* #[serde(skip_serializing_if = "super::is_default")] pub $b_key: $b_type,)*
            $($(#[$doc])* #[serde(skip_serializing_if = "super::is_default")] pub $key: $type,)*
        }

        $(#[$c_meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct $c {
            $($(#[$doc])* #[serde(skip_serializing_if = "super::is_default")] pub $key: $type,)*
        }

        impl $a {
            /// The keys of what it plugs into.
            pub(crate) fn backend_keys(&self) -> $c {
                $c { $($key: self.$key.clone(),)* }
            }
        }

        impl $b {
            /// The keys of what it plugs into.
            pub(crate) fn backend_keys(&self) -> $c {
                $c { $($key: self.$key.clone(),)* }
            }
        }
    };
}

with_backend! {
    /// `net,…`.
    pub struct NetSpec {
        /// Name of the device; `net0`, `net1`, … by default.
        pub id: Option<String>,
        /// Its number on the bus; the lowest free one by default.
        pub num: Option<u16>,
        /// The bus it is on; the first by default.
        pub bus: Option<String>,
        /// Which worker serves it, counted from 0.
        pub worker: Option<usize>,
        /// Its MAC address; derived from the id by default.
        pub mac: Option<String>,
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
        /// The switch it plugs into, instead of a back end; its port has the device's name.
        pub switch: Option<String>,
    }

    /// A switch's way out: a back end without a device.
    pub struct UplinkSpec {
        /// Its name, which is that of its port.
        pub id: Option<String>,
        /// The switch.
        pub switch: Option<String>,
    }

    /// What is plugged into.
    pub struct BackendKeys {
        /// What it plugs into; `user` by default.
        pub backend: Option<NetBackend>,
        /// The largest IP packet in bytes.
        #[serde(deserialize_with = "parse::mtu")]
        pub mtu: Option<u16>,
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
        /// `tap`, `vhost-user`: whether frames may be large and lack checksums; on by default.
        pub offloads: Option<bool>,
        /// `socket`: how frames are told apart; `stream` by default.
        pub mode: Option<SocketMode>,
        /// `socket`, `stream`, and `vhost-user`: the path of a Unix socket.
        pub path: Option<PathBuf>,
        /// `socket`, `stream`: a TCP port.
        pub port: Option<u16>,
        /// `socket`, `stream`, and `vhost-user`: listen instead of connecting.
        pub server: bool,
        /// `socket`, `stream`, and `vhost-user`: seconds between attempts to connect at most, 1 by default; `stream`, 0: the peer must be there,
        /// and its end is the end.
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
}

/// How many directions a line carries at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Duplex {
    /// Both.
    Full,
    /// One.
    Half,
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
}
