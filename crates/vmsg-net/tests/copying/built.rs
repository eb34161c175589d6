// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of TCP and UDP, written and read byte by byte.

use vmsg_net::VnetHeader;

use super::Choices;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The sum of 16-bit words, as RFC 1071 has it, one by one.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for word in part.chunks(2) {
            let low = word.get(1).copied().unwrap_or(0);
            sum += u64::from(word[0]) * 256 + u64::from(low);
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).expect("folded")
}

pub(super) fn low_byte(n: usize) -> u8 {
    u8::try_from(n & 0xff).expect("eight bits")
}

pub(super) fn be16(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) * 256 + usize::from(bytes[at + 1])
}

/// A frame of TCP or UDP, and where its parts are.
#[derive(Clone, Debug)]
pub struct Built {
    pub bytes: Vec<u8>,
    pub network: usize,
    pub transport: usize,
    pub payload: usize,
    pub v6: bool,
    pub udp: bool,
}

impl Built {
    /// What the partial checksum holds, or all of it must add up to.
    fn pseudo(&self) -> u16 {
        let len = u32::try_from(self.bytes.len() - self.transport).expect("short");
        let protocol = [0, if self.udp { UDP } else { TCP }];
        let addresses = if self.v6 {
            self.network + 8..self.network + 40
        } else {
            self.network + 12..self.network + 20
        };
        sum(&[&self.bytes[addresses], &protocol, &len.to_be_bytes()])
    }

    pub const fn checksum_offset(&self) -> usize {
        if self.udp { 6 } else { 16 }
    }

    fn put(&mut self, at: usize, value: usize) {
        let value = u16::try_from(value).expect("short");
        self.bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// Writes the checksum of TCP or UDP: only the sum of the pseudo-header, or all.
    pub fn finish(&mut self, partial: bool) {
        let at = self.transport + self.checksum_offset();
        let pseudo = self.pseudo();
        self.put(at, pseudo.into());
        if !partial {
            let whole = !sum(&[&self.bytes[self.transport..]]);
            self.put(at, if whole == 0 { 0xffff } else { whole }.into());
        }
    }

    /// Reads a frame as its receiver would; panics where that would drop it.
    pub fn read(bytes: &[u8]) -> Self {
        let mut network = 14;
        while matches!(be16(bytes, network - 2), 0x8100 | 0x88a8) {
            network += 4;
        }
        let v6 = be16(bytes, network - 2) == 0x86dd;
        let (mut protocol, mut transport, len);
        if v6 {
            protocol = bytes[network + 6];
            transport = network + 40;
            len = 40 + be16(bytes, network + 4);
            while protocol != TCP && protocol != UDP {
                assert!(matches!(protocol, 0 | 43 | 60), "protocol {protocol}");
                protocol = bytes[transport];
                transport += 8 + 8 * usize::from(bytes[transport + 1]);
            }
        } else {
            assert_eq!(be16(bytes, network - 2), 0x800, "type");
            let header = usize::from(bytes[network] & 15) * 4;
            protocol = bytes[network + 9];
            transport = network + header;
            len = be16(bytes, network + 2);
            assert_eq!(sum(&[&bytes[network..transport]]), 0xffff, "checksum of IP");
        }
        assert_eq!(len, bytes.len() - network, "length of IP");
        let udp = protocol == UDP;
        let payload = if udp {
            assert_eq!(be16(bytes, transport + 4), bytes.len() - transport);
            transport + 8
        } else {
            transport + usize::from(bytes[transport + 12] >> 4) * 4
        };
        Self {
            bytes: bytes.to_vec(),
            network,
            transport,
            payload,
            v6,
            udp,
        }
    }

    /// What a receiver checks who is told `header`.
    pub(super) fn check(&self, header: &VnetHeader) {
        let at = self.transport + self.checksum_offset();
        if header.needs_csum() {
            assert_eq!(usize::from(header.csum_start), self.transport);
            assert_eq!(usize::from(header.csum_offset), self.checksum_offset());
            let zero = |sum: u16| sum % 0xffff;
            let partial = u16::try_from(be16(&self.bytes, at)).expect("16 bits");
            assert_eq!(zero(partial), zero(self.pseudo()), "partial checksum");
        } else {
            let all = sum(&[&self.bytes[self.transport..], &self.pseudo().to_be_bytes()]);
            assert_eq!(all, 0xffff, "checksum");
            assert!(!self.udp || be16(&self.bytes, at) != 0, "no checksum");
        }
        if header.gso_type != VnetHeader::GSO_NONE {
            assert_eq!(usize::from(header.hdr_len), self.payload);
        }
    }
}

/// To whom frames are, and from whom.
pub const ADDRESSES: [u8; 12] = [0x52, 0x54, 0, 1, 2, 3, 0x52, 0x54, 0, 1, 2, 4];

/// A frame that makes sense, with `payload` bytes that repeat after no power of two.
pub fn build(choices: &mut Choices<'_>, payload: usize) -> Built {
    let mut bytes = ADDRESSES.to_vec();
    let shape = choices.byte();
    for _ in 0..(shape & 3).min(2) {
        let tpid = if shape & 4 == 0 { 0x81 } else { 0x88 };
        let low = if tpid == 0x81 { 0 } else { 0xa8 };
        bytes.extend([tpid, low, choices.byte(), choices.byte()]);
    }
    let v6 = shape & 8 != 0;
    let udp = shape & 16 != 0;
    let protocol = if udp { UDP } else { TCP };
    let options = choices.below(11) * 4;
    bytes.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let network = bytes.len();
    if v6 {
        let mut extensions = Vec::new();
        let mut first = protocol;
        for kind in (0..choices.below(3)).map(|i| [60, 43, 0][i]) {
            let words = u8::try_from(choices.below(3)).expect("small");
            let mut extension = vec![0; 8 + 8 * usize::from(words)];
            extension[0] = first;
            extension[1] = words;
            first = kind;
            extension.extend(extensions);
            extensions = extension;
        }
        bytes.extend([
            0x60 | choices.byte() & 15,
            choices.byte(),
            0,
            0,
            0,
            0,
            first,
            64,
        ]);
        bytes.extend((0..32).map(|_| choices.byte()));
        bytes.extend(extensions);
    } else {
        let words = u8::try_from(5 + choices.below(11)).expect("small");
        bytes.extend([
            0x40 | words,
            choices.byte(),
            0,
            0,
            choices.byte(),
            choices.byte(),
        ]);
        bytes.extend([0x40 & choices.byte(), 0, 64, protocol, 0, 0]);
        bytes.extend((0..8).map(|_| choices.byte()));
        bytes.resize(network + usize::from(words) * 4, 1);
    }
    let transport = bytes.len();
    bytes.extend([choices.byte(), 80, 0, choices.byte()]);
    if udp {
        bytes.extend([0; 4]);
    } else {
        bytes.extend((0..8).map(|_| choices.byte()));
        let words = u8::try_from(5 + options / 4).expect("small");
        bytes.extend([words << 4, choices.byte(), 1, 2, 0, 0, 0, 0]);
        bytes.resize(transport + usize::from(words) * 4, 1);
    }
    let header = bytes.len();
    let payload = payload.min(65535 - (header - network));
    let seed = usize::from(choices.byte());
    bytes.extend((0..payload).map(|i| low_byte(i * 7 + i / 251 + seed)));
    let mut built = Built {
        bytes,
        network,
        transport,
        payload: header,
        v6,
        udp,
    };
    let len = built.bytes.len();
    if udp {
        built.put(transport + 4, len - transport);
    }
    if v6 {
        built.put(network + 4, len - network - 40);
    } else {
        built.put(network + 2, len - network);
        let sum = !sum(&[&built.bytes[network..transport]]);
        built.put(network + 10, sum.into());
    }
    built
}
