// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Neighbour discovery (RFC 4861): the gateway tells of itself, and who has which address.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use smoltcp::wire::EthernetAddress;

use super::config::PREFIX6;
use super::icmp;
use super::net::{Net, Source};
use super::packet::{ICMP6, IpIn, IpOut, multicast_mac, solicited_node};

/// Hop limit of all these messages: nobody but a neighbour can have sent them.
const HOPS: u8 = 255;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

mod kind {
    pub(super) const ROUTER_SOLICITATION: u8 = 133;
    pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(super) const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub(super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub(super) const REDIRECT: u8 = 137;
}

mod option {
    pub(super) const SOURCE_ADDRESS: u8 = 1;
    pub(super) const TARGET_ADDRESS: u8 = 2;
    pub(super) const PREFIX: u8 = 3;
    pub(super) const MTU: u8 = 5;
    pub(super) const RDNSS: u8 = 25;
    pub(super) const DNSSL: u8 = 31;
}

/// How often the gateway tells of itself without being asked, and for how long guests believe it.
const INTERVAL: Duration = Duration::from_secs(300);
const ROUTER_SECONDS: u16 = 1800;
const PREFERRED_SECONDS: u32 = 14400;
const VALID_SECONDS: u32 = 86400;
/// To everybody, no more often than this (RFC 4861, 6.2.6).
const PAUSE: Duration = Duration::from_secs(3);

/// When the gateway tells of itself. It begins when there is a guest, or with its first packet.
#[derive(Debug, Default)]
pub(super) struct Router {
    timer: Option<Instant>,
    /// When everybody was told last.
    told: Option<Instant>,
}

/// What a neighbour discovery message has to do with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// A guest is there that may have been looked for.
    Neighbour(IpAddr),
}

/// True for the messages of neighbour discovery.
pub(super) fn is_for(message: &[u8]) -> bool {
    matches!(
        message.first(),
        Some(kind::ROUTER_SOLICITATION..=kind::REDIRECT)
    )
}

/// The link-layer address in the first option `wanted`; an error if the options make no sense.
fn link_layer(mut options: &[u8], wanted: u8) -> Result<Option<EthernetAddress>, ()> {
    let mut found = None;
    while let [kind, words, ..] = *options {
        let len = 8 * usize::from(words);
        let option = options.get(..len).ok_or(())?;
        // An option of no length would have no end.
        let value = option.get(2..8).ok_or(())?;
        if kind == wanted && found.is_none() {
            found = Some(EthernetAddress::from_bytes(value));
        }
        options = &options[len..];
    }
    options.is_empty().then_some(found).ok_or(())
}

fn target(message: &[u8]) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = message.get(8..24)?.try_into().ok()?;
    let target = Ipv6Addr::from_octets(octets);
    (!target.is_multicast()).then_some(target)
}

impl Router {
    /// A guest is there, or speaks IPv6.
    pub(super) fn wake(&mut self, net: &mut Net, now: Instant) {
        if self.timer.is_none() && net.addresses.v6.is_some() {
            net.timers
                .set(Source::Router, &mut self.timer, now + INTERVAL);
        }
    }

    pub(super) fn expire(&mut self, net: &mut Net, now: Instant) {
        self.timer = None;
        // A guest that takes nothing shall not find hundreds of them one day.
        if net.first_reply().is_none() {
            self.told = Some(now);
            advertise(net, None);
        }
        self.wake(net, now);
    }

    /// Nothing is told any more.
    pub(super) fn shutdown(&mut self, net: &mut Net) {
        net.timers.clear(Source::Router, &mut self.timer);
    }

    /// Takes a message of a guest, whose checksum is right; `mac` is where the frame came from.
    pub(super) fn receive(
        &mut self,
        net: &mut Net,
        now: Instant,
        packet: &IpIn<'_>,
        message: &[u8],
        mac: EthernetAddress,
    ) -> Found {
        let IpAddr::V6(src) = packet.src else {
            return Found::Nothing;
        };
        let result = if packet.hop_limit != HOPS || message.len() < 8 || message[1] != 0 {
            Err(())
        } else {
            match message[0] {
                kind::ROUTER_SOLICITATION => self.solicited(net, now, src, message, mac),
                kind::NEIGHBOUR_SOLICITATION => asked(net, packet, src, message, mac),
                kind::NEIGHBOUR_ADVERTISEMENT => told(net, message, mac),
                // There is one router only, and that is here.
                _ => {
                    net.counters.refused += 1;
                    Ok(Found::Nothing)
                }
            }
        };
        result.unwrap_or_else(|()| {
            net.counters.malformed += 1;
            Found::Nothing
        })
    }

    fn solicited(
        &mut self,
        net: &mut Net,
        now: Instant,
        src: Ipv6Addr,
        message: &[u8],
        mac: EthernetAddress,
    ) -> Result<Found, ()> {
        let told = link_layer(&message[8..], option::SOURCE_ADDRESS)?;
        if src.is_unspecified() {
            if told.is_some() {
                return Err(());
            }
            // Whoever asks without an address is told with everybody else.
            let pause = self
                .told
                .is_some_and(|told| now.saturating_duration_since(told) < PAUSE);
            if !pause {
                self.told = Some(now);
            }
            // Meanwhile, by its hardware address.
            advertise(net, pause.then_some((ALL_NODES, mac)));
        } else {
            net.learn(src.into(), told.unwrap_or(mac));
            advertise(net, Some((src, told.unwrap_or(mac))));
        }
        Ok(Found::Nothing)
    }
}

/// Somebody asks who has an address.
fn asked(
    net: &mut Net,
    packet: &IpIn<'_>,
    src: Ipv6Addr,
    message: &[u8],
    mac: EthernetAddress,
) -> Result<Found, ()> {
    let target = target(message).ok_or(())?;
    let told = link_layer(&message[24..], option::SOURCE_ADDRESS)?;
    // Whether an address is taken is asked without having one (RFC 4862).
    let probe = src.is_unspecified();
    if probe && (told.is_some() || packet.dst != IpAddr::V6(solicited_node(target))) {
        return Err(());
    }
    if !probe {
        net.learn(src.into(), told.unwrap_or(mac));
    }
    if net.addresses.is_ours(target.into()) {
        if probe {
            answer(net, target, ALL_NODES, multicast_mac(ALL_NODES), false);
        } else {
            answer(net, target, src, told.unwrap_or(mac), true);
        }
    }
    Ok(Found::Nothing)
}

/// A guest says that it has an address.
fn told(net: &mut Net, message: &[u8], mac: EthernetAddress) -> Result<Found, ()> {
    let target = IpAddr::V6(target(message).ok_or(())?);
    let told = link_layer(&message[24..], option::TARGET_ADDRESS)?;
    net.learn(target, told.unwrap_or(mac));
    Ok(Found::Neighbour(target))
}

/// Says that the gateway has `addr`.
fn answer(net: &mut Net, addr: Ipv6Addr, dst: Ipv6Addr, mac: EthernetAddress, solicited: bool) {
    const ROUTER: u8 = 0x80;
    const SOLICITED: u8 = 0x40;
    const OVERRIDE: u8 = 0x20;
    let mut message = vec![kind::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0];
    let flags = if solicited { SOLICITED } else { 0 };
    message.extend_from_slice(&[ROUTER | OVERRIDE | flags, 0, 0, 0]);
    message.extend_from_slice(&addr.octets());
    push_link_layer(&mut message, option::TARGET_ADDRESS, net.mac);
    send(net, addr, dst, mac, message);
}

/// Asks who has `addr`.
pub(super) fn ask(net: &mut Net, addr: Ipv6Addr) {
    let Some(v6) = net.addresses.v6 else { return };
    let mut message = vec![kind::NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&addr.octets());
    push_link_layer(&mut message, option::SOURCE_ADDRESS, net.mac);
    let group = solicited_node(addr);
    send(net, v6.link_local, group, multicast_mac(group), message);
}

fn push_link_layer(message: &mut Vec<u8>, kind: u8, mac: EthernetAddress) {
    message.extend_from_slice(&[kind, 1]);
    message.extend_from_slice(mac.as_bytes());
}

/// Tells of the gateway, somebody or all.
fn advertise(net: &mut Net, to: Option<(Ipv6Addr, EthernetAddress)>) {
    /// Other settings are to be had by DHCPv6 (RFC 4861, 4.2).
    const OTHER: u8 = 0x40;
    /// The prefix is on this wire, and addresses are made from it.
    const ON_LINK_AUTONOMOUS: u8 = 0xc0;
    let Some(v6) = net.addresses.v6 else { return };
    let router = if net.config.restrict {
        0
    } else {
        ROUTER_SECONDS
    };
    let mut message = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, OTHER];
    message.extend_from_slice(&router.to_be_bytes());
    // Reachable and retransmission times are left to the guest.
    message.extend_from_slice(&[0; 8]);
    push_link_layer(&mut message, option::SOURCE_ADDRESS, net.mac);
    message.extend_from_slice(&[option::MTU, 1, 0, 0]);
    message.extend_from_slice(&u32::from(net.config.mtu).to_be_bytes());
    message.extend_from_slice(&[option::PREFIX, 4, PREFIX6, ON_LINK_AUTONOMOUS]);
    message.extend_from_slice(&VALID_SECONDS.to_be_bytes());
    message.extend_from_slice(&PREFERRED_SECONDS.to_be_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&v6.net.octets());
    message.extend_from_slice(&[option::RDNSS, 3, 0, 0]);
    message.extend_from_slice(&u32::from(ROUTER_SECONDS).to_be_bytes());
    message.extend_from_slice(&v6.dns.octets());
    if let Some(mut name) = net.config.domain.as_deref().and_then(encode_domain) {
        name.resize(name.len().next_multiple_of(8), 0);
        let words = u8::try_from(1 + name.len() / 8).unwrap_or(u8::MAX);
        message.extend_from_slice(&[option::DNSSL, words, 0, 0]);
        message.extend_from_slice(&u32::from(ROUTER_SECONDS).to_be_bytes());
        message.extend_from_slice(&name);
    }
    let (dst, mac) = to.unwrap_or((ALL_NODES, multicast_mac(ALL_NODES)));
    send(net, v6.link_local, dst, mac, message);
}

/// A domain name as DNS writes it (RFC 1035, 3.1), unless it is none.
pub(super) fn encode_domain(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.trim_end_matches('.').split('.') {
        let len = u8::try_from(label.len()).ok()?;
        if len == 0 || len > 63 {
            return None;
        }
        bytes.push(len);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    (bytes.len() <= 255).then_some(bytes)
}

fn send(net: &mut Net, src: Ipv6Addr, dst: Ipv6Addr, mac: EthernetAddress, mut message: Vec<u8>) {
    icmp::seal(src.into(), dst.into(), &mut message);
    let ip = IpOut {
        hop_limit: HOPS,
        ..IpOut::new(src.into(), dst.into(), ICMP6)
    };
    net.reply_ip_to(mac, ip, &message);
}
