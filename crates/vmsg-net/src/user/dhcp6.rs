// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stateless DHCPv6 (RFC 8415): the name server, for guests that do not look for it in router
//! advertisements. Addresses are not given away: guests make their own.

use std::net::IpAddr;

use super::ndp::encode_domain;
use super::net::Net;
use super::packet::{IpIn, IpOut, UDP};
use super::udp;

pub(super) const SERVER_PORT: u16 = 547;

const INFORMATION_REQUEST: u8 = 11;
const REPLY: u8 = 7;

const OPTION_CLIENT_ID: u16 = 1;
const OPTION_SERVER_ID: u16 = 2;
const OPTION_DNS: u16 = 23;
const OPTION_DOMAINS: u16 = 24;

/// Longest DUID, without its type (RFC 8415, 11.1).
const MAX_DUID: usize = 130;

/// A UDP payload is looked at up to here; more than a client has to say.
const MAX_MESSAGE: usize = 1232;

fn push(message: &mut Vec<u8>, option: u16, value: &[u8]) {
    let Ok(len) = u16::try_from(value.len()) else {
        return;
    };
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&len.to_be_bytes());
    message.extend_from_slice(value);
}

/// The first option `wanted`; an error if the options make no sense.
fn find(mut options: &[u8], wanted: u16) -> Result<Option<&[u8]>, ()> {
    let mut found = None;
    while !options.is_empty() {
        let header: [u8; 4] = *options.first_chunk().ok_or(())?;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let value = options.get(4..4 + len).ok_or(())?;
        if u16::from_be_bytes([header[0], header[1]]) == wanted && found.is_none() {
            found = Some(value);
        }
        options = &options[4 + len..];
    }
    Ok(found)
}

/// Takes what a guest sent to the server's port.
pub(super) fn receive(net: &mut Net, packet: &IpIn<'_>, datagram: &udp::Datagram<'_>) {
    let mut bytes = [0; MAX_MESSAGE];
    let len = datagram.payload.read(&mut bytes);
    let message = &bytes[..len];
    if len < 4 || datagram.payload.len() > MAX_MESSAGE {
        net.counters.malformed += 1;
        return;
    }
    let options = &message[4..];
    let (Ok(client), Ok(server)) = (
        find(options, OPTION_CLIENT_ID),
        find(options, OPTION_SERVER_ID),
    ) else {
        net.counters.malformed += 1;
        return;
    };
    // A DUID of the hardware address (RFC 8415, 11.4).
    let mut own = vec![0, 3, 0, 1];
    own.extend_from_slice(net.mac.as_bytes());
    let for_us = server.is_none_or(|server| server == own);
    let (Some(v6), INFORMATION_REQUEST, true) = (net.addresses.v6, message[0], for_us) else {
        net.counters.unsupported += 1;
        return;
    };
    let mut reply = vec![0; udp::HEADER];
    reply.push(REPLY);
    reply.extend_from_slice(&message[1..4]);
    if let Some(client) = client {
        if client.len() > MAX_DUID {
            net.counters.malformed += 1;
            return;
        }
        push(&mut reply, OPTION_CLIENT_ID, client);
    }
    push(&mut reply, OPTION_SERVER_ID, &own);
    push(&mut reply, OPTION_DNS, &v6.dns.octets());
    if let Some(name) = net.config.domain.as_deref().and_then(encode_domain) {
        push(&mut reply, OPTION_DOMAINS, &name);
    }
    let from = std::net::SocketAddr::new(v6.link_local.into(), SERVER_PORT);
    udp::seal(&mut reply, from, datagram.guest);
    net.reply_ip(
        IpOut::new(IpAddr::V6(v6.link_local), packet.src, UDP),
        &reply,
    );
}
