// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A TCP of a guest that does no more than needed, for benchmarks: one connection at a time to
//! the gateway, nothing lost, nothing retransmitted. It sends and takes large segments and partial
//! checksums, which has to be negotiated.

mod copy;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use vmsg_net::VnetHeader;

#[allow(unused_imports, reason = "not every benchmark has a floor of its own")]
pub(crate) use self::copy::through_guest;
pub(crate) use self::copy::{Amount, print_head, print_rows};

/// Bytes of Ethernet, IPv4 and TCP headers without options.
pub(crate) const HEADERS: usize = 54;
/// Most payload of a frame: the largest multiple of 1460 in an IPv4 packet.
pub(crate) const SEGMENT: usize = 64240;
/// Most frames sent at once.
pub(crate) const BATCH: usize = 16;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's own address on the wire.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
const MSS: usize = 1460;
const SCALE: u8 = 8;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
/// Without news for so long, something is lost that should not be.
const PATIENCE: Duration = Duration::from_secs(20);

/// A frame to be sent: what stands before the payload, and how much payload there is. What the
/// payload says is of no interest.
pub(crate) struct Frame {
    pub(crate) vnet: VnetHeader,
    head: [u8; 64],
    head_len: usize,
    pub(crate) payload: usize,
}

impl Frame {
    /// Ethernet, IPv4 and TCP headers, with TCP's options.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..self.head_len]
    }
}

/// What the guest is plugged into.
pub(crate) trait Wire {
    /// Sends all of `frames`, up to [`BATCH`].
    fn send(&mut self, frames: &[Frame]);

    /// Hands the first [`HEADERS`] bytes of each frame that has come to `each`. Waits a little if there is none.
    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS]));
}

impl<W: Wire> Wire for &mut W {
    fn send(&mut self, frames: &[Frame]) {
        (**self).send(frames);
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS])) {
        (**self).receive(each);
    }
}

/// The guest.
pub(crate) struct Guest<W> {
    wire: W,
    port: u16,
    seq: u32,
    ack: u32,
    window: u64,
}

/// The fields of a TCP segment that the guest looks at.
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    payload: usize,
}

impl Segment {
    /// A segment to `port` of the guest; `None` is something else.
    fn parse(bytes: &[u8; HEADERS], port: u16) -> Option<Self> {
        let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(short(at)) << 16 | u32::from(short(at + 2));
        if short(12) != 0x0800 || bytes[23] != 6 || short(36) != port {
            return None;
        }
        let headers = 20 + usize::from(bytes[46] >> 4) * 4;
        Some(Self {
            seq: word(38),
            ack: word(42),
            flags: bytes[47],
            window: short(48),
            // Short frames are padded, so IPv4 knows how long it is.
            payload: usize::from(short(16)).saturating_sub(headers),
        })
    }
}

impl<W: Wire> Guest<W> {
    pub(crate) fn new(wire: W) -> Self {
        Self {
            wire,
            port: 40000,
            seq: 1,
            ack: 0,
            window: 0,
        }
    }

    fn frame(&self, to: u16, flags: u8, options: &[u8], payload: usize) -> Frame {
        let mut head = [0; 64];
        let head_len = HEADERS + options.len();
        let large = payload > MSS;
        head[..6].copy_from_slice(&GATEWAY_MAC);
        head[6..12].copy_from_slice(&MAC);
        head[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        let packet = u16::try_from(head_len - 14 + payload).expect("fits an IPv4 packet");
        head[16..18].copy_from_slice(&packet.to_be_bytes());
        head[22..24].copy_from_slice(&[64, 6]);
        head[26..30].copy_from_slice(&GUEST.octets());
        head[30..34].copy_from_slice(&GATEWAY.octets());
        let sum = !internet_sum(&head[14..34]);
        head[24..26].copy_from_slice(&sum.to_be_bytes());
        head[34..36].copy_from_slice(&self.port.to_be_bytes());
        head[36..38].copy_from_slice(&to.to_be_bytes());
        head[38..42].copy_from_slice(&self.seq.to_be_bytes());
        head[42..46].copy_from_slice(&self.ack.to_be_bytes());
        let words = u8::try_from((head_len - 34) / 4).expect("at most 15");
        head[46..48].copy_from_slice(&[words << 4, flags]);
        head[48..50].copy_from_slice(&[0x40, 0]);
        head[HEADERS..head_len].copy_from_slice(options);
        Frame {
            vnet: VnetHeader {
                flags: VnetHeader::NEEDS_CSUM,
                gso_type: if large {
                    VnetHeader::GSO_TCPV4
                } else {
                    VnetHeader::GSO_NONE
                },
                hdr_len: u16::try_from(head_len).expect("short"),
                gso_size: if large { 1460 } else { 0 },
                csum_start: 34,
                csum_offset: 16,
            },
            head,
            head_len,
            payload,
        }
    }

    fn send(&mut self, to: u16, flags: u8, options: &[u8]) {
        let frame = self.frame(to, flags, options, 0);
        self.wire.send(&[frame]);
    }

    /// Hands the connection's segments that have come to `each`.
    fn receive(&mut self, mut each: impl FnMut(&Segment)) {
        let port = self.port;
        self.wire.receive(&mut |head| {
            // Those of the connection before this one are of no interest.
            if let Some(segment) = Segment::parse(head, port) {
                assert_eq!(segment.flags & RST, 0, "the connection was reset");
                each(&segment);
            }
        });
    }

    fn connect(&mut self, to: u16) {
        self.port += 1;
        self.seq = 0x7000_0000;
        self.ack = 0;
        self.send(to, SYN, &[2, 4, 5, 0xb4, 3, 3, SCALE, 0]);
        let start = Instant::now();
        let mut answer = None;
        while answer.is_none() {
            self.receive(|segment| {
                if segment.flags & SYN != 0 {
                    answer = Some((segment.seq.wrapping_add(1), u64::from(segment.window)));
                }
            });
            assert!(start.elapsed() < PATIENCE, "no connection");
        }
        (self.ack, self.window) = answer.expect("looked at in the loop");
        self.seq += 1;
        self.send(to, ACK, &[]);
    }

    /// Begins a connection that nothing more is said on.
    #[allow(dead_code, reason = "not everybody measures beside others")]
    pub(crate) fn hold(&mut self, to: u16) {
        self.connect(to);
    }

    /// Lets the connection fall.
    pub(crate) fn hang_up(&mut self, to: u16) {
        self.send(to, RST | ACK, &[]);
    }

    /// Sends `total` bytes in large segments until all are acknowledged.
    pub(crate) fn upload(&mut self, to: u16, total: u64) {
        self.connect(to);
        let (mut sent, mut acked) = (0u64, 0u64);
        let mut news = Instant::now();
        let mut frames = Vec::with_capacity(BATCH);
        while acked < total {
            frames.clear();
            while frames.len() < BATCH && sent < total {
                let room = self.window.saturating_sub(sent - acked);
                let len = room.min(total - sent).min(SEGMENT as u64);
                // No crumbs.
                if len == 0 || (len < SEGMENT as u64 && len < total - sent && sent > acked) {
                    break;
                }
                let payload = usize::try_from(len).expect("a segment");
                frames.push(self.frame(to, ACK, &[], payload));
                sent += len;
                self.seq = self
                    .seq
                    .wrapping_add(u32::try_from(len).expect("a segment"));
            }
            self.wire.send(&frames);
            let (before, seq) = (acked, self.seq);
            let mut window = self.window;
            self.receive(|segment| {
                acked = acked.max(sent - u64::from(seq.wrapping_sub(segment.ack)));
                window = u64::from(segment.window) << 8;
            });
            self.window = window;
            if acked > before {
                news = Instant::now();
            }
            assert!(news.elapsed() < PATIENCE, "{acked} of {sent} bytes arrived");
        }
    }

    /// Takes `total` bytes and acknowledges them after each batch.
    pub(crate) fn download(&mut self, to: u16, total: u64) {
        self.connect(to);
        let mut received = 0u64;
        let mut news = Instant::now();
        while received < total {
            let mut expected = self.ack;
            let mut any = false;
            self.receive(|segment| {
                any |= segment.payload > 0;
                // Anything else is a repetition, which the acknowledgement answers.
                if segment.seq == expected {
                    let len = u32::try_from(segment.payload).expect("a packet");
                    expected = expected.wrapping_add(len);
                    received += u64::from(len);
                }
            });
            self.ack = expected;
            if any {
                self.send(to, ACK, &[]);
                news = Instant::now();
            }
            assert!(news.elapsed() < PATIENCE, "{received} of {total} bytes");
        }
    }
}

/// The sum of RFC 1071, not complemented.
fn internet_sum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice")
}
