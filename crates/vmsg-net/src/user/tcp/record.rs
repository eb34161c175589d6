// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections that outlive this process.
//!
//! A flow holds no payload: what the guest has not acknowledged waits in the host's socket, and
//! the guest keeps what we have not acknowledged. So the socket and what is fixed at the
//! beginning are enough; where a connection stands is what the kernel counts.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
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

/// Bytes of a record.
pub const RECORD_LEN: usize = 42;

/// Layout of records; others are refused.
const VERSION: u8 = 1;

/// Why a kept connection cannot be taken up again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The record is not one of this version of the stack, or damaged.
    #[error("not a record of a connection")]
    Record,
    /// The guest's address is not one of the network, as now configured.
    #[error("the guest at {0} is outside of the network")]
    Guest(Ipv4Addr),
    /// There is such a connection already.
    #[error("there is a connection between {guest} and {peer} already")]
    Taken {
        /// The guest's end.
        guest: SocketAddrV4,
        /// The other end.
        peer: SocketAddrV4,
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

impl Record {
    pub(super) fn emit(&self) -> [u8; RECORD_LEN] {
        let fixed = &self.fixed;
        let mut out = [0; RECORD_LEN];
        out[0] = VERSION;
        out[1] = fixed.acked_base;
        out[2] = fixed.our_scale;
        out[3] = fixed.guest_scale;
        out[4..6].copy_from_slice(&fixed.mss.to_be_bytes());
        out[6..14].copy_from_slice(&self.key.to_be_bytes());
        out[14..18].copy_from_slice(&fixed.iss.0.to_be_bytes());
        out[18..22].copy_from_slice(&fixed.irs.0.to_be_bytes());
        for (end, at) in [(fixed.tuple.guest, 22), (fixed.tuple.peer, 28)] {
            out[at..at + 4].copy_from_slice(&end.ip().octets());
            out[at + 4..at + 6].copy_from_slice(&end.port().to_be_bytes());
        }
        out[34..40].copy_from_slice(self.mac.as_bytes());
        let sum = out[..40].iter().fold(1u16, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u16::from(*byte))
        });
        out[40..42].copy_from_slice(&sum.to_be_bytes());
        out
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; RECORD_LEN] = bytes.try_into().ok()?;
        let word = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let end = |at: usize| SocketAddrV4::new(Ipv4Addr::from_bits(word(at)), half(at + 4));
        let this = Self {
            key: u64::from(word(6)) << 32 | u64::from(word(10)),
            fixed: Fixed {
                tuple: Tuple {
                    guest: end(22),
                    peer: end(28),
                },
                iss: Seq(word(14)),
                irs: Seq(word(18)),
                our_scale: bytes[2],
                guest_scale: bytes[3],
                mss: half(4),
                acked_base: bytes[1],
            },
            mac: EthernetAddress::from_bytes(&bytes[34..40]),
        };
        let sane = this.fixed.our_scale <= 14
            && this.fixed.guest_scale <= 14
            && this.fixed.mss >= MSS_MIN
            && this.fixed.acked_base <= 1
            && (1..u64::MAX).contains(&this.key);
        // Emitting it again must give the same bytes, version and sum included.
        (sane && this.emit() == *bytes).then_some(this)
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

    #[test]
    fn a_record_survives_its_bytes_and_damage_is_noticed() {
        let record = Record {
            key: 0x0102_0304_0506_0708,
            fixed: Fixed {
                tuple: Tuple::new(
                    Ipv4Addr::new(10, 0, 2, 15),
                    4000,
                    Ipv4Addr::new(1, 2, 3, 4),
                    80,
                ),
                iss: Seq(0xfedc_ba98),
                irs: Seq(0x7654_3210),
                our_scale: 8,
                guest_scale: 7,
                mss: 1460,
                acked_base: 1,
            },
            mac: EthernetAddress([2, 0, 0, 0, 0, 1]),
        };
        let bytes = record.emit();
        assert_eq!(Record::parse(&bytes), Some(record));
        assert_eq!(Record::parse(&bytes[1..]), None);
        for at in 0..bytes.len() {
            let mut bad = bytes;
            bad[at] ^= 0x40;
            assert_eq!(Record::parse(&bad), None, "byte {at}");
        }
    }
}
