// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a configuration to open queues of a tap interface.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};

use super::ioctl::{self, Value, flag, offload};
use super::netlink::{self, Link};
use crate::Offloads;

const NODE: &str = "/dev/net/tun";

/// Queues of an interface that Linux allows (`MAX_TAP_QUEUES`).
const MAX_QUEUES: usize = 256;

/// Bytes of `struct virtio_net_hdr_v1`, which then stands before every frame.
pub(super) const VNET_HEADER: usize = 12;

/// Which interface, and how it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapConfig {
    /// Name of the interface, at most 15 bytes. It is created if it is not there; for `%d` in a
    /// new name the kernel puts a number.
    pub ifname: String,
    /// Descriptors of a tap interface that were opened for this process, one for each queue; then
    /// `ifname` and `queues` do not count, and no privilege is needed.
    pub fds: Vec<RawFd>,
    /// Queue pairs, 1 to 256. More than one needs an interface with `multi_queue`.
    pub queues: u16,
    /// Whether the interface is set up; `None`: if it is created here.
    pub up: Option<bool>,
    /// Addresses that the host's side gets, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// MTU that the interface gets, in bytes; `None`: it stays as it is.
    pub mtu: Option<u16>,
    /// Whether frames may be large or lack a checksum, if the kernel and the guest can do it.
    pub offloads: bool,
}

impl Default for TapConfig {
    fn default() -> Self {
        Self {
            ifname: "tap%d".to_owned(),
            fds: Vec::new(),
            queues: 1,
            up: None,
            addresses: Vec::new(),
            mtu: None,
            offloads: true,
        }
    }
}

/// Why there is no tap interface.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// Such a name cannot be.
    #[error("ifname={0}: the name of an interface has 1 to 15 bytes and neither `/` nor spaces")]
    Name(String),
    /// There is no such number of queues.
    #[error("queues={0}: 1 to 256 are possible")]
    Queues(usize),
    /// Such a prefix cannot be.
    #[error("addr={0}/{1}: the prefix is too long")]
    Prefix(IpAddr, u8),
    /// There is no tap driver here.
    #[error(
        "{NODE} is not there: `modprobe tun`; a container must be given the device (`--device {NODE}`)"
    )]
    NoDriver,
    /// The driver may not be opened.
    #[error("{NODE} may not be opened by this user: `chmod 666 {NODE}`, which is safe and usual")]
    Node,
    /// An interface is there, but not for this user.
    #[error(
        "{ifname} is there, but {}; this needs CAP_NET_ADMIN, or: `ip link delete {ifname}; ip tuntap add dev {ifname} mode tap user $USER{}`",
        match owner {
            Some(uid) => format!("for user {uid}"),
            None => "not for this user".to_owned(),
        },
        multi_queue(*queues)
    )]
    Owner {
        /// The interface.
        ifname: String,
        /// Who may use it.
        owner: Option<u32>,
        /// Queues that were asked for.
        queues: u16,
    },
    /// An interface may not be created.
    #[error(
        "creating {ifname} needs CAP_NET_ADMIN; or an administrator creates it for this user: `ip tuntap add dev {} mode tap user $USER{}`",
        ifname.replace("%d", "0"),
        multi_queue(*queues)
    )]
    NotPermitted {
        /// The interface.
        ifname: String,
        /// Queues that were asked for.
        queues: u16,
    },
    /// The interface has one queue, and somebody has it.
    #[error(
        "{ifname} is in use (`ip -details link show {ifname}`, `fuser {NODE}` tell by whom); each device needs an interface of its own"
    )]
    Busy {
        /// The interface.
        ifname: String,
    },
    /// The interface has one queue.
    #[error(
        "queues={queues}: {ifname} has been created with a single queue: `ip link delete {ifname}; ip tuntap add dev {ifname} mode tap multi_queue`"
    )]
    SingleQueue {
        /// The interface.
        ifname: String,
        /// Queues that were asked for.
        queues: u16,
    },
    /// The interface is of another kind.
    #[error(
        "{ifname} is there and is no tap interface; choose another name, and join both by a bridge: `ip link set TAP master BRIDGE`"
    )]
    NotTap {
        /// The interface.
        ifname: String,
    },
    /// A descriptor that was handed over is of no use.
    #[error("fd={fd}: {reason}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
    /// The interface could not be set up as wanted.
    #[error("{ifname}: `ip {command}` is not possible: {source}; {}", match source.kind() {
        io::ErrorKind::PermissionDenied => "this needs CAP_NET_ADMIN: let an administrator do it beforehand",
        _ => "see ip-link(8)",
    })]
    Setup {
        /// The interface.
        ifname: String,
        /// What was tried, as one would write it for `ip`.
        command: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}

fn multi_queue(queues: u16) -> &'static str {
    if queues > 1 { " multi_queue" } else { "" }
}

fn os(what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Os { what, source }
}

/// An interface that has been joined.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) name: String,
    /// Without one the interface is in another network namespace.
    pub(super) link: Option<Link>,
    pub(super) queues: Vec<OwnedFd>,
    /// A vnet header stands before frames.
    pub(super) vnet: bool,
    /// What there is to negotiate.
    pub(super) offloads: Offloads,
}

impl TapConfig {
    /// Joins or creates the interface and gives the descriptors, one for each queue: to be handed
    /// to a process without privileges, as its [`fds`](Self::fds). They do not block.
    ///
    /// # Errors
    ///
    /// [`TapError`] says what is missing and how it can be had.
    pub fn join(&self) -> Result<Vec<OwnedFd>, TapError> {
        Ok(self.open()?.queues)
    }

    /// Joins or creates the interface.
    pub(super) fn open(&self) -> Result<Opened, TapError> {
        for &(address, prefix) in &self.addresses {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            if prefix > longest {
                return Err(TapError::Prefix(address, prefix));
            }
        }
        let (mut opened, created) = match self.fds.as_slice() {
            [] => self.join_by_name()?,
            fds => (inherit(fds)?, false),
        };
        for fd in &opened.queues {
            rustix::io::ioctl_fionbio(fd, true)
                .map_err(|error| os("a tap descriptor without blocking")(error.into()))?;
        }
        self.set_up_frames(&mut opened)?;
        self.set_up_link(&mut opened, created)?;
        Ok(opened)
    }

    /// Joins by name; also returns whether the interface was not there before.
    fn join_by_name(&self) -> Result<(Opened, bool), TapError> {
        let name = &self.ifname;
        let wrong = |byte: u8| byte == b'/' || byte == 0 || byte.is_ascii_whitespace();
        if name.is_empty() || name.len() >= ioctl::IFNAMSIZ || name.bytes().any(wrong) {
            return Err(TapError::Name(name.clone()));
        }
        let count = usize::from(self.queues);
        if !(1..=MAX_QUEUES).contains(&count) {
            return Err(TapError::Queues(count));
        }
        let before = netlink::by_name(name).map_err(os("looking for the interface"))?;
        let joined = |source: io::Error| self.join_error(before.as_ref(), source);

        let mut flags = flag::TAP | flag::NO_PI;
        if self.offloads {
            flags |= flag::VNET_HDR;
        }
        let several = before
            .as_ref()
            .and_then(|link| link.tap)
            .is_some_and(|tap| tap.multi_queue);
        if self.queues > 1 || several {
            flags |= flag::MULTI_QUEUE;
        }
        let first = node()?;
        // Kernels before 6.2 refuse the flag, or take it for nothing.
        let name = ioctl::attach(first.as_fd(), name, flags | flag::NO_CARRIER)
            .or_else(|_| ioctl::attach(first.as_fd(), name, flags))
            .map_err(joined)?;
        let mut queues = vec![first];
        while queues.len() < count {
            let next = node()?;
            ioctl::attach(next.as_fd(), &name, flags)
                .map_err(|source| self.join_error(before.as_ref(), source))?;
            queues.push(next);
        }
        let link = netlink::by_name(&name).map_err(os("looking for the interface"))?;
        Ok((
            Opened {
                name,
                link,
                queues,
                vnet: self.offloads,
                offloads: Offloads::NONE,
            },
            before.is_none(),
        ))
    }

    /// Says what TUNSETIFF means (drivers/net/tun.c: `tun_set_iff`).
    fn join_error(&self, before: Option<&Link>, source: io::Error) -> TapError {
        let ifname = self.ifname.clone();
        let queues = self.queues;
        let tap = before.and_then(|link| link.tap);
        match (source.raw_os_error(), before, tap) {
            (Some(libc::EPERM), Some(_), Some(tap)) => TapError::Owner {
                ifname,
                owner: tap.owner,
                queues,
            },
            (Some(libc::EPERM), None, _) => TapError::NotPermitted { ifname, queues },
            (Some(libc::EBUSY), Some(_), _) => TapError::Busy { ifname },
            (Some(libc::EINVAL), Some(_), Some(tap)) if !tap.multi_queue && queues > 1 => {
                TapError::SingleQueue { ifname, queues }
            }
            (Some(libc::EINVAL | libc::EPERM), Some(_), None) => TapError::NotTap { ifname },
            (Some(libc::E2BIG), ..) => TapError::Queues(usize::from(queues)),
            _ => TapError::Os {
                what: "joining the interface (TUNSETIFF)",
                source,
            },
        }
    }

    /// Chooses the header before frames, and finds out what they may carry.
    fn set_up_frames(&self, opened: &mut Opened) -> Result<(), TapError> {
        let header = os("setting the vnet header");
        for fd in &opened.queues {
            let fd = fd.as_fd();
            if opened.vnet {
                let size = VNET_HEADER.try_into().expect("small");
                let result = ioctl::set(fd, Value::HeaderSize, size)
                    .and_then(|()| ioctl::set(fd, Value::LittleEndian, 1));
                if let Err(error) = result {
                    return Err(header(error));
                }
            }
        }
        let Some(first) = opened.queues.first() else {
            return Ok(());
        };
        if !opened.vnet || !self.offloads {
            return Ok(());
        }
        use offload::{CSUM, ECN, TSO4, TSO6, UFO, USO};
        let can = |bits| ioctl::set_offload(first.as_fd(), bits).is_ok();
        let csum = can(CSUM);
        let tso = csum && can(CSUM | TSO4 | TSO6);
        let ecn = tso && can(CSUM | TSO4 | TSO6 | ECN);
        let ufo = csum && can(CSUM | UFO);
        let uso = csum && can(CSUM | USO);
        let _ = can(0);
        opened.offloads = Offloads {
            csum,
            tso4: tso,
            tso6: tso,
            ecn,
            ufo,
            uso,
            guest_csum: csum,
            guest_tso4: tso,
            guest_tso6: tso,
            guest_ecn: ecn,
            guest_ufo: ufo,
            guest_uso4: uso,
            guest_uso6: uso,
            mtu: Offloads::NONE.mtu,
        };
        Ok(())
    }

    /// MTU, addresses, up.
    fn set_up_link(&self, opened: &mut Opened, created: bool) -> Result<(), TapError> {
        let name = opened.name.clone();
        let setup = |command: String| {
            let ifname = name.clone();
            move |source| TapError::Setup {
                ifname,
                command,
                source,
            }
        };
        let up = self.up.unwrap_or(created);
        let Some(link) = &mut opened.link else {
            if self.up == Some(true) || !self.addresses.is_empty() {
                let elsewhere = io::Error::other("it is in another network namespace");
                return Err(setup(format!("link set {name} up"))(elsewhere));
            }
            opened.offloads.mtu = self.mtu.unwrap_or(Offloads::NONE.mtu);
            return Ok(());
        };
        if let Some(mtu) = self.mtu.map(u32::from).filter(|mtu| *mtu != link.mtu) {
            netlink::set_mtu(link.index, mtu)
                .map_err(setup(format!("link set {name} mtu {mtu}")))?;
            link.mtu = mtu;
        }
        for &(address, prefix) in &self.addresses {
            netlink::add_address(link.index, address, prefix)
                .map_err(setup(format!("address add {address}/{prefix} dev {name}")))?;
        }
        if up && !link.up {
            netlink::set_up(link.index).map_err(setup(format!("link set {name} up")))?;
            link.up = true;
        }
        opened.offloads.mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
        Ok(())
    }
}

/// A descriptor of the tap driver, without an interface.
fn node() -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(NODE, flags, Mode::empty()).map_err(|error| {
        use rustix::io::Errno;
        match error {
            Errno::NOENT | Errno::NXIO | Errno::NODEV => TapError::NoDriver,
            Errno::ACCESS | Errno::PERM => TapError::Node,
            other => os("opening /dev/net/tun")(other.into()),
        }
    })
}

/// Takes descriptors that somebody else has opened.
fn inherit(fds: &[RawFd]) -> Result<Opened, TapError> {
    if fds.len() > MAX_QUEUES {
        return Err(TapError::Queues(fds.len()));
    }
    let mut opened: Option<Opened> = None;
    for (index, &number) in fds.iter().enumerate() {
        let wrong = |reason: String| TapError::Descriptor { fd: number, reason };
        if fds[..index].contains(&number) {
            return Err(wrong("is named twice".to_owned()));
        }
        if number <= 2 {
            return Err(wrong("is an input or output of this process".to_owned()));
        }
        let fd = ioctl::inherited(number)
            .map_err(|_| wrong("was not handed to this process, or is closed".to_owned()))?;
        let (name, flags) = ioctl::interface(fd.as_fd()).map_err(|_| {
            wrong("is no tap descriptor, or none with an interface (TUNSETIFF)".to_owned())
        })?;
        if flags & flag::TAP == 0 || flags & flag::NO_PI == 0 {
            return Err(wrong(format!(
                "{name} must have been joined with IFF_TAP and IFF_NO_PI"
            )));
        }
        let vnet = flags & flag::VNET_HDR != 0;
        match &mut opened {
            None => {
                opened = Some(Opened {
                    link: same_here(&name, &fd)?,
                    name,
                    queues: vec![fd],
                    vnet,
                    offloads: Offloads::NONE,
                });
            }
            Some(first) if first.name != name || first.vnet != vnet => {
                let other = &first.name;
                return Err(wrong(format!("is of {name}, another one of {other}")));
            }
            Some(first) => first.queues.push(fd),
        }
    }
    opened.ok_or(TapError::Queues(0))
}

/// The interface `name` of this network namespace, if it is the one that `fd` has joined.
fn same_here(name: &str, fd: &OwnedFd) -> Result<Option<Link>, TapError> {
    let address = ioctl::hardware_address(fd.as_fd()).map_err(os("asking for the address"))?;
    let link = netlink::by_name(name).map_err(os("looking for the interface"))?;
    Ok(link.filter(|link| link.tap.is_some() && link.address == Some(address)))
}
