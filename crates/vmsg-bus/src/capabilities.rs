// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a bus can do, and who is at its other end.

use std::fmt;

/// What a bus can do beyond carrying messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Messages may carry file descriptors.
    pub passes_fds: bool,
    /// Windows are added and removed by messages while the bus runs.
    pub runtime_windows: bool,
    /// Kicks and calls of a queue can go over eventfds of their own.
    pub out_of_band_notify: bool,
    /// The device side answers GET_DEVICES and names its devices.
    pub enumerates: bool,
    /// Devices are claimed: several drivers may look, one drives.
    pub claims: bool,
    /// Windows can be parts of files that are mapped once (BACKING_ADD, VIEW_ADD). Without [`Self::passes_fds`]: parts of the memory that both
    /// ends have in common, and of nothing else ([`COMMON_BACKING`](crate::control::COMMON_BACKING)).
    pub views: bool,
    /// Shared-memory regions of devices can be had with their files (SHARED_MEMORY).
    pub shared_memory: bool,
    /// Kicks and calls of a queue can go over doorbell vectors of their own (QUEUE_VECTORS); for buses that pass no descriptors.
    pub queue_vectors: bool,
    /// Longest message in bytes, 48 to 65536.
    pub max_message_size: usize,
}

/// Bits of the WELCOME frame, docs/bus-unix.md §2.
const BITS: [u32; 8] = [1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7];

impl Capabilities {
    /// Everything that a bus with descriptors can do, with messages up to `max_message_size` bytes.
    pub const fn all(max_message_size: usize) -> Self {
        Self {
            passes_fds: true,
            runtime_windows: true,
            out_of_band_notify: true,
            enumerates: true,
            claims: true,
            views: true,
            shared_memory: true,
            queue_vectors: false,
            max_message_size,
        }
    }

    /// What two ends of ours can do that share memory and doorbells, and pass no descriptors: windows are views of the common memory, queues
    /// have vectors of their own. Devices are not claimed: there is one driver.
    pub const fn common(max_message_size: usize) -> Self {
        Self {
            passes_fds: false,
            runtime_windows: true,
            out_of_band_notify: false,
            enumerates: true,
            claims: false,
            views: true,
            shared_memory: false,
            queue_vectors: true,
            max_message_size,
        }
    }

    /// Whether windows are parts of memory that both ends have in common, and nothing else is lent.
    pub const fn has_common_views(&self) -> bool {
        self.runtime_windows && self.views && !self.passes_fds
    }

    /// The flags as bits of a WELCOME frame.
    pub fn bits(&self) -> u32 {
        let flags = [
            self.passes_fds,
            self.runtime_windows,
            self.out_of_band_notify,
            self.enumerates,
            self.claims,
            self.views,
            self.shared_memory,
            self.queue_vectors,
        ];
        flags
            .into_iter()
            .zip(BITS)
            .map(|(on, bit)| if on { bit } else { 0 })
            .sum()
    }

    /// The flags from the bits of a WELCOME frame; unknown bits mean nothing.
    pub const fn from_bits(bits: u32, max_message_size: usize) -> Self {
        Self {
            passes_fds: bits & BITS[0] != 0,
            runtime_windows: bits & BITS[1] != 0,
            out_of_band_notify: bits & BITS[2] != 0,
            enumerates: bits & BITS[3] != 0,
            claims: bits & BITS[4] != 0,
            views: bits & BITS[5] != 0,
            shared_memory: bits & BITS[6] != 0,
            queue_vectors: bits & BITS[7] != 0,
            max_message_size,
        }
    }
}

/// Who is at the other end, for messages to people. Only `pid` and `uid` are
/// vouched for by the kernel; the name is what the other side calls itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name of the program; printable, at most 64 bytes.
    pub name: String,
    /// Process that connected or listens, as far as it is visible from here.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: Option<u32>,
    /// It said that it only looks (HELLO flag *observer*).
    pub observer: bool,
}

impl Peer {
    /// A peer called `name`, of which nothing else is known.
    pub fn named(name: &str) -> Self {
        Self {
            name: printable(name.as_bytes()),
            pid: None,
            uid: None,
            observer: false,
        }
    }
}

/// The longest name of a program in bytes.
pub(crate) const MAX_NAME: usize = 64;

/// A name from outside, made fit for a terminal.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut name = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        let c = if c.is_control() { '?' } else { c };
        if name.len() + c.len_utf8() > MAX_NAME {
            break;
        }
        name.push(c);
    }
    name
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() {
            "unnamed"
        } else {
            &self.name
        };
        match self.pid {
            Some(pid) => write!(f, "{name} (pid {pid})"),
            None => f.write_str(name),
        }
    }
}
