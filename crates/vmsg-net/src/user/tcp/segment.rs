// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP segments: reading those of the guest, writing ours.

use std::fmt;
use std::net::IpAddr;

use smoltcp::wire::{TcpOption, TcpPacket};
use vmsg_mem::Pieces;

use super::super::net::Net;
use super::super::packet::{
    IPV4, IpIn, IpOut, MAX_HEADERS, MAX_PACKET, TCP, count, headers, ip_header,
};
use super::flow::Tuple;
use crate::checksum::Sum;
use crate::{RxSink, VnetHeader};

/// Bytes of a TCP header without options.
pub(super) const HEADER: usize = 20;
/// Longest options that we send.
const OPTIONS: usize = 8;
/// Room for all headers of a segment.
const ROOM: usize = MAX_HEADERS + HEADER + OPTIONS;

/// A sequence number; comparisons are by the shorter way round.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Seq(pub(super) u32);

impl Seq {
    pub(super) const fn plus(self, n: u32) -> Self {
        Self(self.0.wrapping_add(n))
    }

    /// How far behind `earlier` this lies; negative if before it.
    pub(super) const fn since(self, earlier: Self) -> i32 {
        self.0.wrapping_sub(earlier.0).cast_signed()
    }

    /// The same for a number that is known not to lie before `earlier`.
    pub(super) const fn after(self, earlier: Self) -> u32 {
        let distance = self.since(earlier);
        if distance < 0 {
            0
        } else {
            distance.unsigned_abs()
        }
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Flags of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) syn: bool,
    pub(super) ack: bool,
    pub(super) fin: bool,
    pub(super) rst: bool,
    pub(super) psh: bool,
}

impl Flags {
    pub(super) const ACK: Self = Self {
        syn: false,
        ack: true,
        fin: false,
        rst: false,
        psh: false,
    };

    const fn bits(self) -> u8 {
        self.fin as u8
            | (self.syn as u8) << 1
            | (self.rst as u8) << 2
            | (self.psh as u8) << 3
            | (self.ack as u8) << 4
    }
}

/// A segment of the guest whose header has been checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) tuple: Tuple,
    pub(super) seq: Seq,
    pub(super) ack: Seq,
    pub(super) flags: Flags,
    pub(super) window: u16,
    /// The options of a SYN.
    pub(super) mss: Option<u16>,
    pub(super) scale: Option<u8>,
    pub(super) payload: Pieces<'a>,
}

impl<'a> Segment<'a> {
    /// Reads a segment; `None` if it is malformed.
    pub(super) fn parse(packet: &IpIn<'a>, vnet: &VnetHeader) -> Option<Self> {
        let mut bytes = [0; 60];
        let have = packet.payload.read(&mut bytes);
        let tcp = TcpPacket::new_checked(&bytes[..have]).ok()?;
        if !vnet.needs_csum() {
            let mut sum = Sum::pseudo(packet.src, packet.dst, TCP, packet.payload.len());
            sum.add_pieces(packet.payload);
            if !sum.is_valid() {
                return None;
            }
        }
        let tuple = Tuple::new(packet.src, tcp.src_port(), packet.dst, tcp.dst_port());
        let flags = Flags {
            syn: tcp.syn(),
            ack: tcp.ack(),
            fin: tcp.fin(),
            rst: tcp.rst(),
            psh: tcp.psh(),
        };
        let header_len = usize::from(tcp.header_len());
        // No stack sends these.
        if (flags.syn && (flags.fin || flags.rst)) || tcp.src_port() == 0 || tcp.dst_port() == 0 {
            return None;
        }
        let mut this = Self {
            tuple,
            seq: Seq(u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])),
            ack: Seq(u32::from_be_bytes([
                bytes[8], bytes[9], bytes[10], bytes[11],
            ])),
            flags,
            window: tcp.window_len(),
            mss: None,
            scale: None,
            payload: packet.payload.skip(header_len),
        };
        if flags.syn {
            let mut options = &bytes[HEADER..header_len];
            while let Ok((rest, option)) = TcpOption::parse(options) {
                match option {
                    TcpOption::EndOfList => break,
                    TcpOption::MaxSegmentSize(mss) => this.mss = Some(mss),
                    TcpOption::WindowScale(scale) => this.scale = Some(scale.min(14)),
                    _ => {}
                }
                options = rest;
            }
        }
        Some(this)
    }

    /// The sequence numbers it takes up.
    pub(super) fn len(&self) -> u32 {
        count(self.payload.len()) + u32::from(self.flags.syn) + u32::from(self.flags.fin)
    }
}

/// The header of a segment to the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) tuple: Tuple,
    pub(super) seq: Seq,
    pub(super) ack: Seq,
    pub(super) flags: Flags,
    pub(super) window: u16,
    /// MSS and window scale, in a SYN.
    pub(super) options: Option<(u16, Option<u8>)>,
    /// The guest's MSS, by which large segments are to be cut.
    pub(super) mss: u16,
    /// The guest's queue pair that it goes to.
    pub(super) pair: u16,
}

impl Out {
    fn options_len(&self) -> usize {
        match self.options {
            None => 0,
            Some((_, None)) => 4,
            Some((_, Some(_))) => 8,
        }
    }

    /// Bytes of all headers.
    fn headers_len(&self) -> usize {
        headers(self.tuple.guest.ip()) + HEADER + self.options_len()
    }

    /// Writes all headers into `bytes`, without the checksum of TCP, for `payload` bytes.
    fn emit_head(&self, net: &Net, bytes: &mut [u8; ROOM], payload: usize) {
        let options = self.options_len();
        let ip = IpOut::new(self.tuple.peer.ip(), self.tuple.guest.ip(), TCP);
        let at = net.emit_headers(bytes, &ip, HEADER + options + payload);
        let tcp = &mut bytes[at..];
        tcp[0..2].copy_from_slice(&self.tuple.peer.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.tuple.guest.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.seq.0.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.ack.0.to_be_bytes());
        tcp[12] = match options {
            0 => 5 << 4,
            4 => 6 << 4,
            _ => 7 << 4,
        };
        tcp[13] = self.flags.bits();
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        tcp[16..20].fill(0);
        if let Some((mss, scale)) = self.options {
            tcp[20..22].copy_from_slice(&[2, 4]);
            tcp[22..24].copy_from_slice(&mss.to_be_bytes());
            if let Some(scale) = scale {
                tcp[24..28].copy_from_slice(&[1, 3, 3, scale]);
            }
        }
    }

    /// Writes all headers into `bytes`; returns their length and what is to be said about the
    /// frame. `payload` lies in the guest's memory already.
    fn emit(&self, net: &Net, bytes: &mut [u8; ROOM], payload: Pieces<'_>) -> (usize, VnetHeader) {
        self.emit_head(net, bytes, payload.len());
        let (peer, guest) = (self.tuple.peer.ip(), self.tuple.guest.ip());
        let at = headers(guest);
        let end = self.headers_len();
        let mut vnet = VnetHeader::default();
        let mut sum = Sum::pseudo(peer, guest, TCP, end - at + payload.len());
        let checksum = if net.offloads.guest_csum {
            // Less than a hundred bytes.
            let narrow = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
            vnet.flags = VnetHeader::NEEDS_CSUM;
            vnet.csum_start = narrow(at);
            vnet.csum_offset = 16;
            if payload.len() > usize::from(self.mss) {
                vnet.gso_type = if guest.is_ipv6() {
                    VnetHeader::GSO_TCPV6
                } else {
                    VnetHeader::GSO_TCPV4
                };
                vnet.gso_size = self.mss;
                vnet.hdr_len = narrow(end);
            }
            sum.folded()
        } else {
            sum.add(&bytes[at..end]);
            sum.add_pieces(payload);
            sum.finish()
        };
        bytes[at + 16..at + 18].copy_from_slice(&checksum.to_be_bytes());
        (end, vnet)
    }

    /// Hands a segment without payload to the guest; false if it has no buffer.
    pub(super) fn send(&self, net: &mut Net, sink: &mut dyn RxSink) -> bool {
        let mut bytes = [0; ROOM];
        let (len, vnet) = self.emit(net, &mut bytes, Pieces::EMPTY);
        let Some(room) = sink.offer(net.target(self.pair, &bytes[..len]), len) else {
            return false;
        };
        room.write(&bytes[..len]);
        sink.commit(&vnet, len);
        net.counters.frames_to_guest += 1;
        true
    }

    /// Completes a segment whose payload `fill` puts into the guest's memory. `Ok(None)` if the
    /// guest has no buffer for `len` bytes of payload, else how many `fill` had.
    pub(super) fn send_payload<E>(
        &self,
        net: &mut Net,
        sink: &mut dyn RxSink,
        len: usize,
        fill: impl FnOnce(&mut Net, Pieces<'_>) -> Result<usize, E>,
    ) -> Result<Option<usize>, E> {
        let mut bytes = [0; ROOM];
        let headers = self.headers_len();
        if net.heads {
            self.emit_head(net, &mut bytes, len);
        }
        let to = net.target(self.pair, &bytes[..headers]);
        let Some(room) = sink.offer(to, headers + len) else {
            return Ok(None);
        };
        let (head, body) = room.split_at(headers);
        let body = body.take(len);
        let n = fill(net, body)?.min(body.len());
        if n == 0 {
            return Ok(Some(0));
        }
        let (_, vnet) = self.emit(net, &mut bytes, body.take(n));
        head.write(&bytes[..headers]);
        sink.commit(&vnet, headers + n);
        net.counters.frames_to_guest += 1;
        Ok(Some(n))
    }

    /// The segment as a frame that belongs to no flow.
    pub(super) fn queue(&self, net: &mut Net) {
        let mut bytes = [0; ROOM];
        let csum = net.offloads.guest_csum;
        // Such frames go without a vnet header.
        net.offloads.guest_csum = false;
        let (len, _) = self.emit(net, &mut bytes, Pieces::EMPTY);
        net.offloads.guest_csum = csum;
        net.reply(bytes[..len].to_vec());
    }
}

/// Refuses a segment that belongs to no connection (RFC 9293, 3.10.7.1).
pub(super) fn refuse(net: &mut Net, segment: &Segment<'_>) {
    if segment.flags.rst {
        return;
    }
    let (seq, ack, flags) = if segment.flags.ack {
        let flags = Flags {
            rst: true,
            ..Flags::default()
        };
        (segment.ack, Seq(0), flags)
    } else {
        let flags = Flags {
            rst: true,
            ..Flags::ACK
        };
        (Seq(0), segment.seq.plus(segment.len()), flags)
    };
    Out {
        tuple: segment.tuple,
        seq,
        ack,
        flags,
        window: 0,
        options: None,
        mss: 0,
        pair: net.pair,
    }
    .queue(net);
}

/// The largest payload of a segment to `guest` that fits the MTU.
pub(super) fn largest_mss(net: &Net, guest: IpAddr) -> u16 {
    let mss = net.mtu(guest) - ip_header(guest) - HEADER;
    u16::try_from(mss).unwrap_or(u16::MAX)
}

/// Longest payload for one segment to the guest.
pub(super) fn max_payload(net: &Net, guest: IpAddr, mss: u16) -> usize {
    let mss = usize::from(mss);
    let (large, most) = match guest {
        IpAddr::V4(_) => (net.offloads.guest_tso4, MAX_PACKET - IPV4 - HEADER),
        IpAddr::V6(_) => (net.offloads.guest_tso6, MAX_PACKET - HEADER),
    };
    if large && net.offloads.guest_csum {
        (most / mss * mss).max(mss)
    } else {
        mss
    }
}
