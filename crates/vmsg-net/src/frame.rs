// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames as a network device and a back end hand them to each other.

use vmsg_mem::Pieces;

/// What `struct virtio_net_hdr` says about a frame (virtio 1.3, 5.1.6), without `num_buffers`,
/// which is the device's business.
///
/// All fields come from the peer as they are; whoever uses them checks them against the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`VnetHeader::NEEDS_CSUM`], [`VnetHeader::DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` constants, perhaps with [`VnetHeader::GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers to be repeated in each segment, in bytes.
    pub hdr_len: u16,
    /// Payload of each segment, in bytes.
    pub gso_size: u16,
    /// Where checksumming starts, in bytes from the Ethernet header.
    pub csum_start: u16,
    /// Where the checksum is stored, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Bytes of the header on the wire, without `num_buffers`.
    pub const LEN: usize = 10;

    /// The checksum holds that of the pseudo-header only and is still to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum has been verified.
    pub const DATA_VALID: u8 = 2;

    /// Not a large segment.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// UDP fragmentation.
    pub const GSO_UDP: u8 = 3;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP segmentation.
    pub const GSO_UDP_L4: u8 = 5;
    /// The segments carry ECN marks; an addition to the other types.
    pub const GSO_ECN: u8 = 0x80;

    /// Reads the little-endian form of virtio 1.
    pub const fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
        }
    }

    /// The little-endian form of virtio 1.
    pub const fn to_bytes(&self) -> [u8; Self::LEN] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// True if the transport checksum is still to be completed.
    pub const fn needs_csum(&self) -> bool {
        self.flags & Self::NEEDS_CSUM != 0
    }
}

/// A frame that the guest sends, still in the guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct TxFrame<'a> {
    /// What the guest says about it.
    pub header: VnetHeader,
    /// The frame, from the Ethernet header on, without a frame check sequence.
    pub payload: Pieces<'a>,
}

/// Which of the guest's queue pairs a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// This one: the back end has chosen, as a multiqueue tap does. A number beyond the enabled
    /// pairs is taken modulo their number.
    Pair(u16),
    /// The device chooses by the beginning of the frame: [`Target::HEAD`] bytes of it, or all of
    /// a shorter one. Addresses, protocol numbers and ports must be final; checksums and lengths
    /// need not be, and are not looked at.
    Head(&'a [u8]),
}

impl Target<'_> {
    /// Bytes with which a choice can be made: two VLAN tags, an IPv6 header with a few extensions
    /// and the ports fit.
    pub const HEAD: usize = 128;
}

/// Where a back end puts frames for the guest: straight into the guest's buffers.
pub trait RxSink {
    /// Room for a frame of up to `len` bytes from the Ethernet header on, or `None` if the guest
    /// has not enough buffers now; smaller frames may still fit.
    ///
    /// `None` only speaks of the pair that the frame is for: a back end that can tell its flows
    /// apart goes on with others. Frames of one flow keep their order.
    ///
    /// The room may be shorter than `len` when the guest's buffers can never hold the frame, or
    /// lie outside the guest's memory when the guest does not want it (receive filter): write what
    /// fits and commit all the same; the device drops the frame and counts it. An offer that is
    /// not committed is void and has no other effect: asking again for the same target and no more
    /// bytes than that succeeds, and may give the same memory.
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>>;

    /// As [`offer`](Self::offer), for a frame whose length is not known yet: the room is that for
    /// `least` bytes, and longer, up to `most` bytes, as far as the guest has buffers now. More
    /// than `most` is of no use, fewer than `most` mean nothing but that they are not at hand.
    fn offer_between(&mut self, to: Target<'_>, least: usize, _most: usize) -> Option<Pieces<'_>> {
        self.offer(to, least)
    }

    /// Hands the frame in the last offer to the guest: its first `len` bytes, at most as many as
    /// had been asked for, or as there was room for.
    fn commit(&mut self, header: &VnetHeader, len: usize);

    /// Offers and commits in one: hands the guest a frame that begins with `front` and goes on with `rest`. False if the guest
    /// has not enough buffers now.
    ///
    /// One call for each frame instead of two is what a switch saves by it; nobody needs another one than this.
    fn put(&mut self, to: Target<'_>, header: VnetHeader, front: &[u8], rest: Pieces<'_>) -> bool {
        let len = front.len() + rest.len();
        let Some(room) = self.offer(to, len) else {
            return false;
        };
        // An Ethernet header, with a VLAN tag or without: no loop for so few bytes.
        if let Ok(front) = <&[u8; 14]>::try_from(front) {
            room.write_array(front);
        } else if let Ok(front) = <&[u8; 18]>::try_from(front) {
            room.write_array(front);
        } else {
            room.write(front);
        }
        rest.copy_to(room.skip(front.len()));
        self.commit(&header, len);
        true
    }
}

/// What frames may carry. Each field stands for the virtio-net feature of its name
/// (virtio 1.3, 5.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// `CSUM`: the guest may send frames with partial checksums.
    pub csum: bool,
    /// `HOST_TSO4`: the guest may send large TCP segments over IPv4.
    pub tso4: bool,
    /// `HOST_TSO6`: the same over IPv6.
    pub tso6: bool,
    /// `HOST_ECN`: such segments may carry ECN marks.
    pub ecn: bool,
    /// `HOST_UFO`: the guest may send large UDP datagrams to be fragmented.
    pub ufo: bool,
    /// `HOST_USO`: the guest may send runs of UDP datagrams as one frame.
    pub uso: bool,
    /// `GUEST_CSUM`: the guest takes frames with partial checksums.
    pub guest_csum: bool,
    /// `GUEST_TSO4`: the guest takes large TCP segments over IPv4.
    pub guest_tso4: bool,
    /// `GUEST_TSO6`: the same over IPv6.
    pub guest_tso6: bool,
    /// `GUEST_ECN`: such segments may carry ECN marks.
    pub guest_ecn: bool,
    /// `GUEST_UFO`: the guest takes large UDP datagrams unfragmented.
    pub guest_ufo: bool,
    /// `GUEST_USO4`: the guest takes runs of UDP datagrams over IPv4 as one frame.
    pub guest_uso4: bool,
    /// `GUEST_USO6`: the same over IPv6.
    pub guest_uso6: bool,
    /// `MTU`: largest IP packet in bytes that goes in one frame without segmentation.
    pub mtu: u16,
}

impl Offloads {
    /// Plain Ethernet: nothing is left to the other side, 1500 bytes.
    pub const NONE: Self = Self {
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        ufo: false,
        uso: false,
        guest_csum: false,
        guest_tso4: false,
        guest_tso6: false,
        guest_ecn: false,
        guest_ufo: false,
        guest_uso4: false,
        guest_uso6: false,
        mtu: 1500,
    };

    /// Everything, with the largest MTU there can be.
    pub const ALL: Self = Self {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
        uso: true,
        guest_csum: true,
        guest_tso4: true,
        guest_tso6: true,
        guest_ecn: true,
        guest_ufo: true,
        guest_uso4: true,
        guest_uso6: true,
        mtu: u16::MAX,
    };

    /// What both `self` and `other` allow; the smaller MTU.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self {
            csum: self.csum && other.csum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
            ufo: self.ufo && other.ufo,
            uso: self.uso && other.uso,
            guest_csum: self.guest_csum && other.guest_csum,
            guest_tso4: self.guest_tso4 && other.guest_tso4,
            guest_tso6: self.guest_tso6 && other.guest_tso6,
            guest_ecn: self.guest_ecn && other.guest_ecn,
            guest_ufo: self.guest_ufo && other.guest_ufo,
            guest_uso4: self.guest_uso4 && other.guest_uso4,
            guest_uso6: self.guest_uso6 && other.guest_uso6,
            mtu: self.mtu.min(other.mtu),
        }
    }
}

impl Default for Offloads {
    fn default() -> Self {
        Self::NONE
    }
}

/// What the driver of the device has settled on, as far as a back end cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// What frames may carry.
    pub offloads: Offloads,
    /// Queue pairs that are enabled now, at least 1.
    pub pairs: u16,
    /// A driver has brought the device up. Without one nobody takes frames.
    pub running: bool,
    /// [`RxSink::offer`] must be given [`Target::Head`]: the guest has the device choose the pair
    /// (RSS), or reports the hash of each frame. Otherwise a back end may do either.
    pub heads: bool,
}

impl Guest {
    /// No driver yet: plain Ethernet, one pair.
    pub const NONE: Self = Self {
        offloads: Offloads::NONE,
        pairs: 1,
        running: false,
        heads: false,
    };
}

impl Default for Guest {
    fn default() -> Self {
        Self::NONE
    }
}
