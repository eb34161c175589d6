// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections that outlive this process.
//!
//! A flow holds no payload: what the guest has not acknowledged waits in the host's socket, and
//! the guest keeps what we have not acknowledged. So the socket and what is fixed at the
//! beginning are enough; where a connection stands is what the kernel counts.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use rustix::io::ioctl_fionread;
use smoltcp::wire::EthernetAddress;

use super::flow::{Fixed, MSS_MIN, Tuple};
use super::segment::Seq;
use crate::sys;

/// Keeps a second descriptor of each connection's socket, and a record, where they survive this
/// process.
///
/// [`User::restore`](crate::user::User::restore) takes them back.
pub trait FlowStore: Send {
    /// Keeps `record` (at most [`RECORD_LEN`] bytes) and a duplicate of `fd` under `key`, which
    /// no kept connection has.
    fn put(&mut self, key: u64, record: &[u8], fd: BorrowedFd<'_>);

    /// Closes and forgets what is kept under `key`.
    fn remove(&mut self, key: u64);
}

/// Most bytes of a record.
pub const RECORD_LEN: usize = 66;

/// Layouts of records, by their first byte; others are refused. All numbers are big-endian: 1
/// byte each of version, `acked_base`, `our_scale`, `guest_scale`; 2 of `mss`, 8 of the key, 4 of
/// `iss`, 4 of `irs`; address and port of the guest and of the peer; 6 of hardware address, 2 of a
/// sum.
mod version {
    /// Addresses of 4 bytes: 42 bytes in all.
    pub(super) const IPV4: u8 = 1;
    /// Addresses of 16 bytes: 66 bytes in all. Stacks without IPv6 do not know it.
    pub(super) const IPV6: u8 = 2;
}

/// Where the addresses begin.
const ADDRESSES: usize = 22;

/// Why a kept connection cannot be taken up again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The record is not one of this version of the stack, or damaged.
    #[error("not a record of a connection")]
    Record,
    /// The guest's address is not one of the network, as now configured.
    #[error("the guest at {0} is outside of the network")]
    Guest(IpAddr),
    /// There is such a connection already.
    #[error("there is a connection between {guest} and {peer} already")]
    Taken {
        /// The guest's end.
        guest: SocketAddr,
        /// The other end.
        peer: SocketAddr,
    },
    /// There are as many connections as allowed.
    #[error("too many connections")]
    Limit,
    /// The descriptor is not that of a TCP socket, or cannot be used.
    #[error("the socket of a connection: {0}")]
    Socket(#[from] io::Error),
}

/// What is kept of a connection beside its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: u64,
    pub(super) fixed: Fixed,
    pub(super) mac: EthernetAddress,
}

/// The bytes of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordBytes {
    bytes: [u8; RECORD_LEN],
    len: usize,
}

impl RecordBytes {
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn push_end(&mut self, end: SocketAddr) {
        match end.ip() {
            IpAddr::V4(addr) => self.push(&addr.octets()),
            IpAddr::V6(addr) => self.push(&addr.octets()),
        }
        self.push(&end.port().to_be_bytes());
    }
}

impl Record {
    pub(super) fn emit(&self) -> RecordBytes {
        let fixed = &self.fixed;
        let mut out = RecordBytes {
            bytes: [0; RECORD_LEN],
            len: 0,
        };
        let version = match fixed.tuple.guest {
            SocketAddr::V4(_) => version::IPV4,
            SocketAddr::V6(_) => version::IPV6,
        };
        out.push(&[
            version,
            fixed.acked_base,
            fixed.our_scale,
            fixed.guest_scale,
        ]);
        out.push(&fixed.mss.to_be_bytes());
        out.push(&self.key.to_be_bytes());
        out.push(&fixed.iss.0.to_be_bytes());
        out.push(&fixed.irs.0.to_be_bytes());
        debug_assert_eq!(out.len, ADDRESSES);
        out.push_end(fixed.tuple.guest);
        out.push_end(fixed.tuple.peer);
        out.push(self.mac.as_bytes());
        let sum = out.as_slice().iter().fold(1u16, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u16::from(*byte))
        });
        out.push(&sum.to_be_bytes());
        out
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let half = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let end = |at: usize| -> Option<(SocketAddr, usize)> {
            let (addr, at): (IpAddr, usize) = match *bytes.first()? {
                version::IPV4 => {
                    let octets: [u8; 4] = *bytes.get(at..)?.first_chunk()?;
                    (Ipv4Addr::from_octets(octets).into(), at + 4)
                }
                version::IPV6 => {
                    let octets: [u8; 16] = *bytes.get(at..)?.first_chunk()?;
                    (Ipv6Addr::from_octets(octets).into(), at + 16)
                }
                _ => return None,
            };
            Some((SocketAddr::new(addr, half(at)?), at + 2))
        };
        let (guest, at) = end(ADDRESSES)?;
        let (peer, at) = end(at)?;
        let mac: [u8; 6] = *bytes.get(at..)?.first_chunk()?;
        let this = Self {
            key: u64::from(word(6)?) << 32 | u64::from(word(10)?),
            fixed: Fixed {
                tuple: Tuple { guest, peer },
                iss: Seq(word(14)?),
                irs: Seq(word(18)?),
                our_scale: *bytes.get(2)?,
                guest_scale: *bytes.get(3)?,
                mss: half(4)?,
                acked_base: *bytes.get(1)?,
            },
            mac: EthernetAddress(mac),
        };
        let sane = this.fixed.our_scale <= 14
            && this.fixed.guest_scale <= 14
            && this.fixed.mss >= MSS_MIN
            && this.fixed.acked_base <= 1
            && (1..u64::MAX).contains(&this.key);
        // Emitting it again must give the same bytes, version and sum included.
        (sane && this.emit().as_slice() == bytes).then_some(this)
    }
}

/// Where a socket stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Positions {
    /// Payload bytes taken out of the socket: what the guest had acknowledged.
    pub(super) taken: u64,
    /// Payload bytes that wait in the socket.
    pub(super) unread: u32,
    /// Payload bytes written into it: what we could acknowledge to the guest.
    pub(super) written: u64,
    /// The host has sent its FIN.
    pub(super) host_closed: bool,
    /// The guest's FIN was passed on.
    pub(super) guest_fin: bool,
    /// Both directions are closed and confirmed, or the connection broke.
    pub(super) over: bool,
}

/// States of include/net/tcp_states.h.
mod state {
    pub(super) const ESTABLISHED: u8 = 1;
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const TIME_WAIT: u8 = 6;
    pub(super) const CLOSE: u8 = 7;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const CLOSING: u8 = 11;
}

impl Positions {
    /// Asks the kernel. The counts come from several calls while the connection goes on, so they
    /// are asked for until two answers in a row agree.
    pub(super) fn of(fd: BorrowedFd<'_>, acked_base: u8) -> io::Result<Self> {
        let mut info = sys::tcp_info(fd)?;
        for _ in 0..1000 {
            let unread = ioctl_fionread(fd)?;
            let unacknowledged = sys::unacknowledged(fd)?;
            let again = sys::tcp_info(fd)?;
            if info != again {
                info = again;
                continue;
            }
            let (host_closed, guest_fin) = match info.state {
                state::ESTABLISHED => (false, false),
                state::CLOSE_WAIT => (true, false),
                state::FIN_WAIT1 | state::FIN_WAIT2 => (false, true),
                state::LAST_ACK | state::CLOSING | state::TIME_WAIT | state::CLOSE => (true, true),
                _ => return Err(io::ErrorKind::NotConnected.into()),
            };
            let received = info.bytes_received.checked_sub(u64::from(host_closed));
            let written = (info.bytes_acked + unacknowledged)
                .checked_sub(u64::from(acked_base) + u64::from(guest_fin));
            let taken = received.and_then(|received| received.checked_sub(unread));
            return match (taken, written, u32::try_from(unread)) {
                (Some(taken), Some(written), Ok(unread)) => Ok(Self {
                    taken,
                    unread,
                    written,
                    host_closed,
                    guest_fin,
                    over: info.state == state::CLOSE,
                }),
                // The counts of a broken connection.
                _ => Err(io::ErrorKind::ConnectionReset.into()),
            };
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(guest: &str, peer: &str) -> Record {
        Record {
            key: 0x0102_0304_0506_0708,
            fixed: Fixed {
                tuple: Tuple::new(guest.parse().unwrap(), 4000, peer.parse().unwrap(), 80),
                iss: Seq(0xfedc_ba98),
                irs: Seq(0x7654_3210),
                our_scale: 8,
                guest_scale: 7,
                mss: 1460,
                acked_base: 1,
            },
            mac: EthernetAddress([2, 0, 0, 0, 0, 1]),
        }
    }

    #[test]
    fn a_record_survives_its_bytes_and_damage_is_noticed() {
        for (guest, peer, len) in [
            ("10.0.2.15", "1.2.3.4", 42),
            ("fd00:10:0:2::15", "2001:db8::1", 66),
        ] {
            let record = record(guest, peer);
            let bytes = record.emit();
            let bytes = bytes.as_slice();
            assert_eq!(bytes.len(), len);
            assert_eq!(Record::parse(bytes), Some(record));
            for n in 0..len {
                assert_eq!(Record::parse(&bytes[..n]), None, "{n} bytes");
            }
            for at in 0..len {
                let mut bad = bytes.to_vec();
                bad[at] ^= 0x40;
                assert_eq!(Record::parse(&bad), None, "byte {at}");
            }
        }
    }

    #[test]
    fn records_of_stacks_without_ipv6_are_understood() {
        let old = [
            1, 1, 8, 7, 5, 180, 1, 2, 3, 4, 5, 6, 7, 8, 254, 220, 186, 152, 118, 84, 50, 16, 10, 0,
            2, 15, 15, 160, 1, 2, 3, 4, 0, 80, 2, 0, 0, 0, 0, 1, 0, 0,
        ];
        let record = record("10.0.2.15", "1.2.3.4");
        let bytes = record.emit();
        // All but the sum, which is the same function of what precedes it.
        assert_eq!(bytes.as_slice()[..40], old[..40]);
    }
}
