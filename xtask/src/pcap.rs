// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands in a capture: classic pcap of Ethernet frames, as far as the checks of switches ask.

use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl Mac {
    /// As Linux writes it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(mac))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    /// A question or an answer of ARP.
    Arp {
        asks: bool,
        from: Ipv4Addr,
        to: Ipv4Addr,
    },
    /// An ICMP echo request or reply.
    Echo {
        asks: bool,
        from: Ipv4Addr,
        to: Ipv4Addr,
    },
    /// TCP.
    Tcp { from: Ipv4Addr, to: Ipv4Addr },
    /// Something else.
    Other,
}

/// A frame of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Its length on the wire in bytes.
    pub(crate) length: u32,
    /// Who sent it.
    pub(crate) source: Mac,
    /// Its VLAN tag.
    pub(crate) vlan: Option<u16>,
    /// What it carries.
    pub(crate) carries: Carries,
}

/// The frames of the capture `path`.
pub(crate) fn read(path: &Path) -> Result<Vec<Frame>> {
    let bytes = fs::read(path).with_context(|| format!("no capture {}", path.display()))?;
    parse(&bytes).with_context(|| format!("{} is no whole capture", path.display()))
}

fn parse(bytes: &[u8]) -> Result<Vec<Frame>> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    ensure!(
        word(0) == Some(0xa1b2_c3d4),
        "it does not begin as pcap does"
    );
    ensure!(word(20) == Some(1), "it is not of Ethernet frames");
    let mut frames = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let (kept, length) = word(at + 8)
            .zip(word(at + 12))
            .context("a record's head is cut off")?;
        let end = at + 16 + kept as usize;
        let data = bytes.get(at + 16..end).context("a record is cut off")?;
        frames.push(frame(data, length).context("a frame is too short")?);
        at = end;
    }
    Ok(frames)
}

fn frame(data: &[u8], length: u32) -> Option<Frame> {
    let source = Mac(data.get(6..12)?.try_into().ok()?);
    let half = |at: usize| Some(u16::from_be_bytes(data.get(at..at + 2)?.try_into().ok()?));
    let (vlan, kind, payload) = match half(12)? {
        0x8100 => (Some(half(14)? & 0xfff), half(16)?, data.get(18..)?),
        kind => (None, kind, data.get(14..)?),
    };
    Some(Frame {
        length,
        source,
        vlan,
        carries: carries(kind, payload).unwrap_or(Carries::Other),
    })
}

fn carries(kind: u16, payload: &[u8]) -> Option<Carries> {
    let address = |at: usize| -> Option<Ipv4Addr> {
        let octets: [u8; 4] = payload.get(at..at + 4)?.try_into().ok()?;
        Some(octets.into())
    };
    match kind {
        0x0806 => Some(Carries::Arp {
            asks: payload.get(7) == Some(&1),
            from: address(14)?,
            to: address(24)?,
        }),
        0x0800 => {
            let (from, to) = (address(12)?, address(16)?);
            let header = usize::from(payload.first()? & 0xf) * 4;
            match payload.get(9)? {
                1 => match payload.get(header)? {
                    8 => Some(Carries::Echo {
                        asks: true,
                        from,
                        to,
                    }),
                    0 => Some(Carries::Echo {
                        asks: false,
                        from,
                        to,
                    }),
                    _ => None,
                },
                6 => Some(Carries::Tcp { from, to }),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "pcap_test.rs"]
mod tests;
