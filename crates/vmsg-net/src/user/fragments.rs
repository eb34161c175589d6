// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Putting fragmented packets of a guest together again (RFC 791, RFC 8200).

use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vmsg_mem::{Pieces, RamSlice};

use super::net::Net;
use super::packet::{Fragment, IpIn};

/// Packets in pieces at a time, and bytes of them; the oldest make way.
const MAX_PACKETS: usize = 64;
const MAX_BYTES: usize = 1 << 20;
/// Fragments of one packet: 65535 bytes at the smallest usual MTU of 576.
const MAX_FRAGMENTS: usize = 128;
const TIMEOUT: Duration = Duration::from_secs(15);

/// A packet of which some fragments have come, or all.
#[derive(Debug)]
pub(super) struct Partial {
    src: IpAddr,
    dst: IpAddr,
    /// What the first fragment says; the others' word counts only to tell packets apart.
    protocol: u8,
    hop_limit: u8,
    ident: u32,
    since: Instant,
    /// First byte and length of each fragment that has come.
    parts: Vec<(usize, usize)>,
    /// Length of the whole, once the last fragment has come.
    total: Option<usize>,
    /// The payload, as the memory of a guest lies.
    words: Vec<AtomicU64>,
}

/// The packets of which some fragments have come.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    partial: Vec<Partial>,
}

impl Fragments {
    /// Takes a fragment; returns the whole packet when this was the last one missing. Fragments
    /// that overlap make the whole packet void (RFC 5722).
    pub(super) fn receive(
        &mut self,
        net: &mut Net,
        now: Instant,
        packet: &IpIn<'_>,
    ) -> Option<Partial> {
        let part = packet.fragment?;
        self.partial
            .retain(|partial| now.saturating_duration_since(partial.since) < TIMEOUT);
        let found = self.partial.iter().position(|partial| {
            (partial.src, partial.dst, partial.protocol, partial.ident)
                == (packet.src, packet.dst, packet.protocol, part.ident)
        });
        let index = found.unwrap_or_else(|| {
            if self.partial.len() >= MAX_PACKETS {
                net.counters.limited += 1;
                self.partial.remove(0);
            }
            self.partial.push(Partial {
                src: packet.src,
                dst: packet.dst,
                protocol: packet.protocol,
                hop_limit: packet.hop_limit,
                ident: part.ident,
                since: now,
                parts: Vec::new(),
                total: None,
                words: Vec::new(),
            });
            self.partial.len() - 1
        });
        let partial = self.partial.get_mut(index)?;
        let Some(complete) = partial.add(part, packet.payload) else {
            net.counters.malformed += 1;
            self.partial.remove(index);
            return None;
        };
        if complete {
            return Some(self.partial.remove(index));
        }
        while self.bytes() > MAX_BYTES {
            net.counters.limited += 1;
            self.partial.remove(0);
        }
        None
    }

    fn bytes(&self) -> usize {
        self.partial
            .iter()
            .map(|partial| 8 * partial.words.len())
            .sum()
    }
}

impl Partial {
    /// Puts a fragment in: whether all are there now, or `None` if they do not fit together.
    fn add(&mut self, part: Fragment, payload: Pieces<'_>) -> Option<bool> {
        let (start, len) = (part.offset, payload.len());
        // Within 64 KiB: whoever parsed the packet has seen to that.
        let end = start + len;
        let overlaps = self
            .parts
            .iter()
            .any(|(first, n)| start < first + n && *first < end);
        let misfit = len == 0
            || (part.more && !len.is_multiple_of(8))
            || self.total.is_some_and(|total| end > total || !part.more);
        if overlaps || misfit || self.parts.len() >= MAX_FRAGMENTS {
            return None;
        }
        if !part.more {
            if self.parts.iter().any(|(first, n)| first + n > end) {
                return None;
            }
            self.total = Some(end);
        }
        let words = end.div_ceil(8);
        if self.words.len() < words {
            self.words.resize_with(words, AtomicU64::default);
        }
        let room = [RamSlice::from_atomics(&self.words)];
        payload.copy_to(Pieces::new(&room).skip(start));
        self.parts.push((start, len));
        // Without overlaps, the lengths add up to the whole when nothing is missing.
        let have: usize = self.parts.iter().map(|(_, n)| n).sum();
        Some(self.total == Some(have))
    }

    /// Where the payload lies.
    pub(super) fn memory(&self) -> [RamSlice<'_>; 1] {
        [RamSlice::from_atomics(&self.words)]
    }

    /// The packet, once all of it is there, with its payload in [`memory`](Self::memory).
    pub(super) fn packet<'a>(&self, memory: &'a [RamSlice<'a>; 1]) -> IpIn<'a> {
        IpIn {
            src: self.src,
            dst: self.dst,
            protocol: self.protocol,
            hop_limit: self.hop_limit,
            fragment: None,
            payload: Pieces::new(memory).take(self.total.unwrap_or(0)),
        }
    }
}
