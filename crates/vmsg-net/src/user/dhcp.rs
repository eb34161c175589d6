// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A DHCP server for the few guests behind one device (RFC 2131).

use std::net::{Ipv4Addr, SocketAddr};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use super::net::Net;
use super::packet::{IpOut, UDP, count};
use super::udp;

pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// A day, as QEMU's.
const LEASE_SECONDS: u32 = 86400;

const OPTION_DNS: u8 = 6;
const OPTION_HOSTNAME: u8 = 12;
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;
const OPTION_CLIENT_ID: u8 = 61;

/// Where the options of a message begin: behind the fixed part and the magic number.
const OPTIONS: usize = 240;

/// Takes the client identifier out of a message and leaves padding in its place. It may be
/// anything (RFC 2132, 9.14; RFC 4361), is not looked at here, and must be in the answer
/// (RFC 6842).
fn take_client_id(message: &mut [u8]) -> Option<Vec<u8>> {
    let options = message.get_mut(OPTIONS..)?;
    let mut at = 0;
    loop {
        match *options.get(at)? {
            0 => at += 1,
            255 => return None,
            kind => {
                let end = at + 2 + usize::from(*options.get(at + 1)?);
                let option = options.get_mut(at..end)?;
                if kind == OPTION_CLIENT_ID {
                    let id = option[2..].to_vec();
                    option.fill(0);
                    return Some(id);
                }
                at = end;
            }
        }
    }
}

/// Who has which address. The server has as many addresses as neighbours are remembered; when
/// they are used up, the lease that was asked for the longest time ago is given away.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// In the order of their last use.
    leases: Vec<(EthernetAddress, Ipv4Addr)>,
}

impl Leases {
    /// The address for `mac`: the one it had, the one it wishes, or the first free one.
    fn give(
        &mut self,
        net: &Net,
        mac: EthernetAddress,
        wish: Option<Ipv4Addr>,
    ) -> Option<Ipv4Addr> {
        let known = self.leases.iter().position(|(owner, _)| *owner == mac);
        if let Some(index) = known {
            let lease = self.leases.remove(index);
            self.leases.push(lease);
            return Some(lease.1);
        }
        let limit = net.config.limits.neighbours.clamp(1, 1 << 20);
        if self.leases.len() >= limit {
            self.leases.remove(0);
        }
        let start = net.addresses.dhcp_start.to_bits();
        let free = |addr: &Ipv4Addr| {
            net.addresses.is_guest((*addr).into())
                && !self.leases.iter().any(|(_, taken)| taken == addr)
        };
        let in_pool = |addr: &Ipv4Addr| {
            addr.to_bits()
                .checked_sub(start)
                .is_some_and(|n| n <= count(limit))
        };
        // One address more than leases: the gateway or name server may lie in between.
        let addr = wish.filter(in_pool).filter(free).or_else(|| {
            (start..=start.saturating_add(count(limit)))
                .map(Ipv4Addr::from_bits)
                .find(free)
        })?;
        self.leases.push((mac, addr));
        Some(addr)
    }

    /// Takes the UDP payload of what a guest sent to the server's port.
    pub(super) fn receive(&mut self, net: &mut Net, mut payload: Vec<u8>) {
        let client_id = take_client_id(&mut payload);
        let Ok(packet) = DhcpPacket::new_checked(&payload[..]) else {
            net.counters.malformed += 1;
            return;
        };
        let Ok(request) = DhcpRepr::parse(&packet) else {
            net.counters.malformed += 1;
            return;
        };
        let client_id = client_id.as_deref();
        let mac = request.client_hardware_address;
        if !mac.is_unicast() {
            net.counters.spoofed += 1;
            return;
        }
        let server = net.addresses.host;
        let wish = request
            .requested_ip
            .or((!request.client_ip.is_unspecified()).then_some(request.client_ip));
        match request.message_type {
            DhcpMessageType::Discover => {
                if let Some(addr) = self.give(net, mac, wish) {
                    answer(net, &request, client_id, DhcpMessageType::Offer, addr);
                }
            }
            DhcpMessageType::Request => {
                if request
                    .server_identifier
                    .is_some_and(|chosen| chosen != server)
                {
                    // The guest has chosen another server.
                    self.leases.retain(|(owner, _)| *owner != mac);
                    return;
                }
                let addr = self.give(net, mac, wish);
                match (addr, wish) {
                    (Some(addr), Some(wish)) if addr == wish => {
                        net.learn(addr.into(), mac);
                        answer(net, &request, client_id, DhcpMessageType::Ack, addr);
                    }
                    _ => answer(
                        net,
                        &request,
                        client_id,
                        DhcpMessageType::Nak,
                        Ipv4Addr::UNSPECIFIED,
                    ),
                }
            }
            DhcpMessageType::Inform => {
                answer(
                    net,
                    &request,
                    client_id,
                    DhcpMessageType::Ack,
                    Ipv4Addr::UNSPECIFIED,
                );
            }
            DhcpMessageType::Release => self.leases.retain(|(owner, _)| *owner != mac),
            // Nobody else is on this wire who could have the address: the guest gets it again.
            DhcpMessageType::Decline => {}
            _ => net.counters.unsupported += 1,
        }
    }
}

fn answer(
    net: &mut Net,
    request: &DhcpRepr<'_>,
    client_id: Option<&[u8]>,
    kind: DhcpMessageType,
    addr: Ipv4Addr,
) {
    let refusal = kind == DhcpMessageType::Nak;
    let lease = !refusal && !addr.is_unspecified();
    let dns = net.addresses.dns.octets();
    let mtu = net.config.mtu.to_be_bytes();
    let mut options = Vec::new();
    if let Some(data) = client_id {
        options.push(DhcpOption {
            kind: OPTION_CLIENT_ID,
            data,
        });
    }
    if !refusal {
        options.push(DhcpOption {
            kind: OPTION_DNS,
            data: &dns,
        });
        for (kind, name) in [
            (OPTION_HOSTNAME, &net.config.hostname),
            (OPTION_DOMAIN, &net.config.domain),
        ] {
            if let Some(name) = name {
                options.push(DhcpOption {
                    kind,
                    data: name.as_bytes(),
                });
            }
        }
        if net.config.mtu != 1500 {
            options.push(DhcpOption {
                kind: OPTION_MTU,
                data: &mtu,
            });
        }
    }
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if refusal {
            Ipv4Addr::UNSPECIFIED
        } else {
            request.client_ip
        },
        your_ip: addr,
        server_ip: net.addresses.host,
        router: (!refusal && !net.config.restrict).then_some(net.addresses.host),
        subnet_mask: (!refusal).then(|| net.addresses.mask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(net.addresses.host),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: lease.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    // Clients may expect the 300 bytes that BOOTP had (RFC 1542, 2.1).
    let len = reply.buffer_len().max(300);
    let mut message = vec![0; udp::HEADER + len];
    if reply
        .emit(&mut DhcpPacket::new_unchecked(&mut message[udp::HEADER..]))
        .is_err()
    {
        net.counters.limited += 1;
        return;
    }
    // A guest that has no address yet takes nothing that is not broadcast, except by its
    // hardware address: broadcast for all, as only guests are on this wire.
    let (dst, mac) = if request.client_ip.is_unspecified() || refusal {
        (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST)
    } else {
        (request.client_ip, request.client_hardware_address)
    };
    let src = net.addresses.host.into();
    let dst = dst.into();
    udp::seal(
        &mut message,
        SocketAddr::new(src, SERVER_PORT),
        SocketAddr::new(dst, CLIENT_PORT),
    );
    net.reply_ip_to(mac, IpOut::new(src, dst, UDP), &message);
}
