// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asks the kernel about a network interface, changes it and hears of changes (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};

/// Message types (include/uapi/linux/netlink.h, rtnetlink.h).
mod kind {
    pub(super) const ERROR: u16 = 2;
    pub(super) const NEW_LINK: u16 = 16;
    pub(super) const DEL_LINK: u16 = 17;
    pub(super) const GET_LINK: u16 = 18;
    pub(super) const NEW_ADDRESS: u16 = 20;
}

/// Flags of requests.
mod request {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const ACK: u16 = 4;
    pub(super) const REPLACE: u16 = 0x100;
    pub(super) const CREATE: u16 = 0x400;
}

/// Attributes of links (include/uapi/linux/if_link.h) and addresses (if_addr.h).
mod attribute {
    pub(super) const LINK_ADDRESS: u16 = 1;
    pub(super) const LINK_NAME: u16 = 3;
    pub(super) const LINK_MTU: u16 = 4;
    pub(super) const LINK_INFO: u16 = 18;
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const INFO_DATA: u16 = 2;
    pub(super) const TUN_OWNER: u16 = 1;
    pub(super) const TUN_TYPE: u16 = 3;
    pub(super) const TUN_MULTI_QUEUE: u16 = 7;
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const LOCAL: u16 = 2;
}

/// `IFF_UP`.
const UP: u32 = 1;
/// `RTMGRP_LINK`.
const GROUP_LINK: u32 = 1;
/// Bytes of a message's header, of `struct ifinfomsg` and of `struct ifaddrmsg`.
const HEADER: usize = 16;
const LINK: usize = 16;
/// What a kernel's message takes at most: link messages with many statistics have a few KiB.
const MESSAGE: usize = 32 << 10;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    /// Administratively up.
    pub(super) up: bool,
    pub(super) mtu: u32,
    pub(super) address: Option<[u8; 6]>,
    /// What the kernel says of tap interfaces.
    pub(super) tap: Option<TapInfo>,
}

/// A tap interface as the kernel describes it (Linux 4.18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TapInfo {
    pub(super) multi_queue: bool,
    /// User who may use it without privilege.
    pub(super) owner: Option<u32>,
}

/// What has become of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It is like this now.
    Is(Link),
    /// It is gone.
    Gone,
}

/// The attributes of a message: their types and contents. What is malformed ends it.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        // The two upper bits say how the content is coded.
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let content = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

impl Link {
    /// Reads `struct ifinfomsg` and what follows it.
    fn parse(payload: &[u8]) -> Option<Self> {
        let mut link = Self {
            index: word(payload.get(4..)?)?,
            up: word(payload.get(8..)?)? & UP != 0,
            ..Self::default()
        };
        for (kind, content) in attributes(payload.get(LINK..)?) {
            match kind {
                attribute::LINK_MTU => link.mtu = word(content)?,
                attribute::LINK_ADDRESS => link.address = content.try_into().ok(),
                attribute::LINK_INFO => link.tap = TapInfo::parse(content),
                _ => {}
            }
        }
        Some(link)
    }
}

impl TapInfo {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let find = |wanted| {
            attributes(bytes).find_map(|(kind, content)| (kind == wanted).then_some(content))
        };
        if text(find(attribute::INFO_KIND)?) != b"tun" {
            return None;
        }
        let mut info = Self::default();
        let mut is_tap = false;
        for (kind, content) in attributes(find(attribute::INFO_DATA).unwrap_or_default()) {
            match kind {
                attribute::TUN_TYPE => is_tap = content.first() == Some(&2),
                attribute::TUN_OWNER => info.owner = word(content),
                attribute::TUN_MULTI_QUEUE => info.multi_queue = content.first() == Some(&1),
                _ => {}
            }
        }
        is_tap.then_some(info)
    }
}

/// A request under construction.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(request::REQUEST | flags).to_ne_bytes());
        // Sequence number and port: one request at a time, over a socket of its own.
        bytes.extend_from_slice(&[0; 8]);
        Self(bytes)
    }

    /// Adds `struct ifinfomsg`: family 0, type 0.
    fn link(mut self, index: u32, flags: u32, mask: u32) -> Self {
        for word in [0, index, flags, mask] {
            self.0.extend_from_slice(&word.to_ne_bytes());
        }
        self
    }

    fn attribute(mut self, kind: u16, content: &[u8]) -> Self {
        let len = u16::try_from(4 + content.len()).expect("short contents only");
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("short contents only");
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// Messages in what was received: their types and payloads.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::try_from(word(bytes)?).ok()?;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let payload = bytes.get(HEADER..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

fn open(flags: SocketFlags, groups: u32) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    // No protocol is number 0: NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Sends a request; returns the payload of the answer, which is empty for a plain success. The
/// kernel answers at once.
fn ask(request: Request) -> io::Result<Vec<u8>> {
    let socket = open(SocketFlags::empty(), 0)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request.finish(), SendFlags::empty(), &kernel)?;
    let mut bytes = vec![0; MESSAGE];
    let (_, len) = recv(&socket, bytes.as_mut_slice(), RecvFlags::empty())?;
    let (kind, payload) = messages(bytes.get(..len).unwrap_or_default())
        .next()
        .ok_or(io::ErrorKind::InvalidData)?;
    if kind != kind::ERROR {
        return Ok(payload.to_vec());
    }
    match word(payload).map(u32::cast_signed) {
        Some(0) => Ok(Vec::new()),
        Some(error) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn find(request: Request) -> io::Result<Option<Link>> {
    match ask(request) {
        Ok(payload) => Ok(Some(
            Link::parse(&payload).ok_or(io::ErrorKind::InvalidData)?,
        )),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The interface `name` of this network namespace, if there is one.
pub(super) fn by_name(name: &str) -> io::Result<Option<Link>> {
    let mut content = name.as_bytes().to_vec();
    content.push(0);
    let request = Request::new(kind::GET_LINK, 0).link(0, 0, 0);
    find(request.attribute(attribute::LINK_NAME, &content))
}

fn by_index(index: u32) -> io::Result<Option<Link>> {
    find(Request::new(kind::GET_LINK, 0).link(index, 0, 0))
}

/// Sets an interface up.
pub(super) fn set_up(index: u32) -> io::Result<()> {
    ask(Request::new(kind::NEW_LINK, request::ACK).link(index, UP, UP)).map(drop)
}

/// Sets the MTU of an interface, in bytes.
pub(super) fn set_mtu(index: u32, mtu: u32) -> io::Result<()> {
    let request = Request::new(kind::NEW_LINK, request::ACK).link(index, 0, 0);
    ask(request.attribute(attribute::LINK_MTU, &mtu.to_ne_bytes())).map(drop)
}

/// Gives an interface an address; no error if it has it.
pub(super) fn add_address(index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
    let flags = request::ACK | request::CREATE | request::REPLACE;
    let mut request = Request::new(kind::NEW_ADDRESS, flags);
    let (family, octets) = match address {
        IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
    };
    let [family, _] = family.as_raw().to_le_bytes();
    // struct ifaddrmsg: family, length of the prefix, flags, scope, index.
    request.0.extend_from_slice(&[family, prefix, 0, 0]);
    request.0.extend_from_slice(&index.to_ne_bytes());
    let request = request.attribute(attribute::LOCAL, &octets);
    ask(request.attribute(attribute::ADDRESS, &octets)).map(drop)
}

/// Hears of changes of one interface.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: OwnedFd,
    index: u32,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Hears of all that happens to interface `index` from now on.
    pub(super) fn new(index: u32) -> io::Result<Self> {
        Ok(Self {
            socket: open(SocketFlags::NONBLOCK, GROUP_LINK)?,
            index,
            buffer: vec![0; MESSAGE],
        })
    }

    /// Readable when [`last_change`](Self::last_change) has something to say.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The latest state that was told since the last call, if any.
    pub(super) fn last_change(&mut self) -> Option<Change> {
        let mut change = None;
        loop {
            let len = match recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((_, len)) => len,
                Err(Errno::INTR) => continue,
                // Too much happened to be told: what is now is all that counts.
                Err(Errno::NOBUFS) => {
                    change = match by_index(self.index) {
                        Ok(Some(link)) => Some(Change::Is(link)),
                        Ok(None) => Some(Change::Gone),
                        Err(_) => change,
                    };
                    continue;
                }
                Err(_) => return change,
            };
            for (kind, payload) in messages(self.buffer.get(..len).unwrap_or_default()) {
                // Bridges use the same messages, in a family of theirs, for their ports.
                if payload.first() != Some(&0) {
                    continue;
                }
                match (kind, Link::parse(payload)) {
                    (_, Some(link)) if link.index != self.index => {}
                    (kind::NEW_LINK, Some(link)) => change = Some(Change::Is(link)),
                    (kind::DEL_LINK, Some(_)) => change = Some(Change::Gone),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "netlink_test.rs"]
mod tests;
