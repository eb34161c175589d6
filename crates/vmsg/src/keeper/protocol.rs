// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `serve` and its keeper say to each other.
//!
//! One packet of a SOCK_SEQPACKET socket each: kind u8, length of the device
//! name u8, zero u16, length of the record u32, key u64, name, record;
//! little-endian. A PUT or KEPT has one descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const HEAD: usize = 16;
/// Largest packet, in bytes.
const MAX_PACKET: usize = 4096;

/// What a packet is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the keeper: hold this connection.
    Put = 1,
    /// To the keeper: this connection is over.
    Remove = 2,
    /// To the keeper: all is over, you can go.
    Dismiss = 3,
    /// From the keeper: a connection that was held.
    Kept = 4,
    /// From the keeper: that was all.
    End = 5,
}

/// A packet.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) kind: Kind,
    pub(super) device: String,
    pub(super) key: u64,
    pub(super) record: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// Sends a packet; `fd` goes with it.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    kind: Kind,
    device: &str,
    key: u64,
    record: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let too_long = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "record too long for the keeper",
        )
    };
    let name_len = u8::try_from(device.len()).map_err(|_| too_long())?;
    let record_len = u32::try_from(record.len()).map_err(|_| too_long())?;
    let mut packet = vec![kind as u8, name_len, 0, 0];
    packet.extend(record_len.to_le_bytes());
    packet.extend(key.to_le_bytes());
    packet.extend(device.as_bytes());
    packet.extend(record);
    if packet.len() > MAX_PACKET {
        return Err(too_long());
    }
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(
        socket,
        &[IoSlice::new(&packet)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives a packet; `None` when the other side is gone.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fd = None;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            fd = fds.into_iter().next();
        }
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(message.bytes);
    parse(&bytes, fd).map(Some).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a packet of the keeper's socket is malformed",
        )
    })
}

fn parse(bytes: &[u8], fd: Option<OwnedFd>) -> Option<Packet> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let kind = match head[0] {
        1 => Kind::Put,
        2 => Kind::Remove,
        3 => Kind::Dismiss,
        4 => Kind::Kept,
        5 => Kind::End,
        _ => return None,
    };
    let record_len = u32::from_le_bytes(head[4..8].try_into().ok()?);
    let key = u64::from_le_bytes(head[8..16].try_into().ok()?);
    let (name, record) = rest.split_at_checked(usize::from(head[1]))?;
    if record.len() != usize::try_from(record_len).ok()? {
        return None;
    }
    let device = str::from_utf8(name).ok()?.to_owned();
    Some(Packet {
        kind,
        device,
        key,
        record: record.to_vec(),
        fd,
    })
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
