// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP segments: reading those of the guest, writing ours.

use std::fmt;

use smoltcp::wire::{TcpOption, TcpPacket};
use vmsg_mem::Pieces;

use super::super::net::Net;
use super::super::packet::{HEADERS, IPV4, Ipv4In, Ipv4Out, TCP, count};
use super::flow::Tuple;
use crate::checksum::Sum;
use crate::{RxSink, Target, VnetHeader};

/// Bytes of a TCP header without options.
pub(super) const HEADER: usize = 20;
/// Bytes of all headers of a segment without options.
pub(super) const ALL_HEADERS: usize = HEADERS + HEADER;
/// [`HEADERS`] in the width of a vnet header.
const CSUM_START: u16 = 34;
const _: () = assert!(CSUM_START as usize == HEADERS && HEADER == 20);
/// Longest options that we send.
const OPTIONS: usize = 8;

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
    pub(super) fn parse(packet: &Ipv4In<'a>, vnet: &VnetHeader) -> Option<Self> {
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
}

impl Out {
    /// Writes all headers into `bytes`; returns their length and what is to be said about the
    /// frame. `payload` lies in the guest's memory already.
    fn emit(
        &self,
        net: &mut Net,
        bytes: &mut [u8; ALL_HEADERS + OPTIONS],
        payload: Pieces<'_>,
    ) -> (usize, VnetHeader) {
        let options = match self.options {
            None => 0,
            Some((_, None)) => 4,
            Some((_, Some(_))) => 8,
        };
        let tcp_len = HEADER + options + payload.len();
        let ip = Ipv4Out {
            src: *self.tuple.peer.ip(),
            dst: *self.tuple.guest.ip(),
            protocol: TCP,
            ident: 0,
            fragment: Ipv4Out::DONT_FRAGMENT,
        };
        net.emit_headers(bytes, &ip, tcp_len);
        let tcp = &mut bytes[HEADERS..];
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
        let mut vnet = VnetHeader::default();
        let mut sum = Sum::pseudo(ip.src, ip.dst, TCP, tcp_len);
        let checksum = if net.offloads.guest_csum {
            vnet.flags = VnetHeader::NEEDS_CSUM;
            vnet.csum_start = CSUM_START;
            vnet.csum_offset = 16;
            if payload.len() > usize::from(self.mss) {
                vnet.gso_type = VnetHeader::GSO_TCPV4;
                vnet.gso_size = self.mss;
                vnet.hdr_len = CSUM_START + 20;
            }
            sum.folded()
        } else {
            sum.add(&tcp[..HEADER + options]);
            sum.add_pieces(payload);
            sum.finish()
        };
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        net.counters.frames_to_guest += 1;
        (HEADERS + HEADER + options, vnet)
    }

    /// Hands a segment without payload to the guest; false if it has no buffer.
    pub(super) fn send(&self, net: &mut Net, sink: &mut dyn RxSink) -> bool {
        let Some(room) = sink.offer(Target::Pair(0), ALL_HEADERS + OPTIONS) else {
            return false;
        };
        let mut bytes = [0; ALL_HEADERS + OPTIONS];
        let (len, vnet) = self.emit(net, &mut bytes, Pieces::EMPTY);
        room.write(&bytes[..len]);
        sink.commit(&vnet, len);
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
        let Some(room) = sink.offer(Target::Pair(0), ALL_HEADERS + len) else {
            return Ok(None);
        };
        let (head, body) = room.split_at(ALL_HEADERS);
        let body = body.take(len);
        let n = fill(net, body)?.min(body.len());
        if n == 0 {
            return Ok(Some(0));
        }
        let mut bytes = [0; ALL_HEADERS + OPTIONS];
        let (_, vnet) = self.emit(net, &mut bytes, body.take(n));
        head.write(&bytes[..ALL_HEADERS]);
        sink.commit(&vnet, ALL_HEADERS + n);
        Ok(Some(n))
    }

    /// The segment as a frame that belongs to no flow.
    pub(super) fn queue(&self, net: &mut Net) {
        let mut bytes = [0; ALL_HEADERS + OPTIONS];
        let csum = net.offloads.guest_csum;
        // Such frames go without a vnet header.
        net.offloads.guest_csum = false;
        let (len, _) = self.emit(net, &mut bytes, Pieces::EMPTY);
        net.offloads.guest_csum = csum;
        net.counters.frames_to_guest -= 1;
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
    }
    .queue(net);
}

/// Longest payload for one segment to the guest.
pub(super) fn max_payload(net: &Net, mss: u16) -> usize {
    let mss = usize::from(mss);
    if net.offloads.guest_tso4 && net.offloads.guest_csum {
        let most = super::super::packet::MAX_PACKET - IPV4 - HEADER;
        (most / mss * mss).max(mss)
    } else {
        mss
    }
}
