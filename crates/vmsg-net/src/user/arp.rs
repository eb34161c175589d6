// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ARP: who has the gateway's address, and which addresses the guests have.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};
use vmsg_mem::Pieces;

use super::ndp;
use super::net::Net;
use super::packet::{ETHERNET, ETHERTYPE_ARP, emit_ethernet};

const PACKET: usize = 28;

fn frame(net: &Net, dst: EthernetAddress, repr: &ArpRepr) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + PACKET];
    emit_ethernet(&mut frame, net.mac, dst, ETHERTYPE_ARP);
    repr.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET..]));
    frame
}

/// Takes an ARP packet of a guest.
pub(super) fn receive(net: &mut Net, packet: Pieces<'_>) {
    let Some(bytes) = packet.read_array::<PACKET>() else {
        net.counters.malformed += 1;
        return;
    };
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: mac,
        source_protocol_addr: addr,
        target_protocol_addr: target,
        ..
    }) = ArpPacket::new_checked(&bytes[..]).and_then(|packet| ArpRepr::parse(&packet))
    else {
        net.counters.malformed += 1;
        return;
    };
    // A probe for a duplicate address has no source address yet; it is answered all the same.
    net.learn(addr.into(), mac);
    let ours = net.addresses.is_ours(target.into());
    if operation == ArpOperation::Request && ours && mac.is_unicast() {
        let reply = frame(
            net,
            mac,
            &ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: net.mac,
                source_protocol_addr: target,
                target_hardware_addr: mac,
                target_protocol_addr: addr,
            },
        );
        net.reply(reply);
    }
}

/// Asks who has `addr`, of whichever version.
pub(super) fn ask(net: &mut Net, addr: IpAddr) {
    match addr {
        IpAddr::V4(addr) => ask4(net, addr),
        IpAddr::V6(addr) => ndp::ask(net, addr),
    }
}

fn ask4(net: &mut Net, addr: Ipv4Addr) {
    let request = frame(
        net,
        EthernetAddress::BROADCAST,
        &ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: net.mac,
            source_protocol_addr: net.addresses.host,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: addr,
        },
    );
    net.reply(request);
}
