// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Putting fragmented datagrams of a guest together again (RFC 791).

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::net::Net;
use super::packet::Ipv4In;

/// Datagrams in pieces at a time; the oldest makes way. Each takes up to 64 KiB.
const MAX_DATAGRAMS: usize = 8;
/// Fragments of one datagram: 65535 bytes at the smallest usual MTU of 576.
const MAX_FRAGMENTS: usize = 128;
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug)]
struct Partial {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    ident: u16,
    since: Instant,
    /// First byte and length of each fragment that has come.
    parts: Vec<(usize, usize)>,
    /// Length of the whole, once the last fragment has come.
    total: Option<usize>,
    bytes: Vec<u8>,
}

/// The datagrams of which some fragments have come.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    partial: Vec<Partial>,
}

impl Fragments {
    /// Takes a fragment; returns the payload of the whole datagram when this was the last one
    /// missing. Fragments that overlap make the whole datagram void.
    pub(super) fn receive(
        &mut self,
        net: &mut Net,
        now: Instant,
        packet: &Ipv4In<'_>,
    ) -> Option<Vec<u8>> {
        self.partial
            .retain(|partial| now.saturating_duration_since(partial.since) < TIMEOUT);
        let found = self.partial.iter().position(|partial| {
            (partial.src, partial.dst, partial.protocol, partial.ident)
                == (packet.src, packet.dst, packet.protocol, packet.ident)
        });
        let index = found.unwrap_or_else(|| {
            if self.partial.len() >= MAX_DATAGRAMS {
                net.counters.limited += 1;
                self.partial.remove(0);
            }
            self.partial.push(Partial {
                src: packet.src,
                dst: packet.dst,
                protocol: packet.protocol,
                ident: packet.ident,
                since: now,
                parts: Vec::new(),
                total: None,
                bytes: Vec::new(),
            });
            self.partial.len() - 1
        });
        let partial = self.partial.get_mut(index)?;
        let Some(complete) = partial.add(packet) else {
            net.counters.malformed += 1;
            self.partial.remove(index);
            return None;
        };
        complete.then(|| self.partial.remove(index).bytes)
    }
}

impl Partial {
    /// Puts a fragment in: whether all are there now, or `None` if they do not fit together.
    fn add(&mut self, packet: &Ipv4In<'_>) -> Option<bool> {
        let (start, len) = (packet.fragment_offset, packet.payload.len());
        // Within 64 KiB: `Ipv4In::parse` has seen to that.
        let end = start + len;
        let overlaps = self
            .parts
            .iter()
            .any(|(first, n)| start < first + n && *first < end);
        let misfit = len == 0
            || (packet.more_fragments && !len.is_multiple_of(8))
            || self
                .total
                .is_some_and(|total| end > total || !packet.more_fragments);
        if overlaps || misfit || self.parts.len() >= MAX_FRAGMENTS {
            return None;
        }
        if !packet.more_fragments {
            if self.parts.iter().any(|(first, n)| first + n > end) {
                return None;
            }
            self.total = Some(end);
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        packet.payload.read(&mut self.bytes[start..end]);
        self.parts.push((start, len));
        // Without overlaps, the lengths add up to the whole when nothing is missing.
        let have: usize = self.parts.iter().map(|(_, n)| n).sum();
        Some(self.total == Some(have))
    }
}
