// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers commands: bytes in, bytes out, a device in between.

use crate::capabilities::{Negotiated, Proposal};
use crate::device::{
    Device, DmaMap, DmaUnmap, IrqAction, IrqData, IrqInfo, Region, RegionMap, SetIrqs,
};
use crate::wire::{self, Access, Command, Header, Malformed, Writes};
use crate::wire::{device_flag, irq_flag, map_flag, region_flag, set_flag, unmap_flag};
use crate::{Counters, Options};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tracing::{debug, error};

/// The newest minor version of version 0 there is.
const MINOR: u16 = 1;
/// The most areas that are told of a region.
const MAX_AREAS: usize = 1024;

/// Why a command is refused.
#[derive(Debug)]
enum Refusal {
    Malformed(Malformed),
    Device(Errno),
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Refusal {
        Refusal::Malformed(malformed)
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal::Device(errno)
    }
}

impl Malformed {
    fn errno(self) -> Errno {
        match self {
            Malformed::Long(_) => Errno::TOOBIG,
            Malformed::Version(_) | Malformed::NotServed => Errno::OPNOTSUPP,
            Malformed::Unknown => Errno::NOSYS,
            Malformed::LostDescriptors => Errno::MFILE,
            _ => Errno::INVAL,
        }
    }

    /// Whether a client that does nothing wrong may send it, to see whether it is served.
    fn is_fair(self) -> bool {
        matches!(
            self,
            Malformed::Version(_) | Malformed::NotServed | Malformed::Unknown
        )
    }
}

/// What to send, besides the bytes.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Nothing.
    None,
    /// The bytes, and perhaps a descriptor.
    Send(Option<OwnedFd>),
}

/// One client's view of a device.
#[derive(Debug)]
pub(crate) struct Machine {
    options: Options,
    negotiated: Option<Negotiated>,
    pub(crate) counters: Counters,
}

impl Machine {
    pub(crate) fn new(options: Options) -> Machine {
        Machine {
            options,
            negotiated: None,
            counters: Counters::default(),
        }
    }

    pub(crate) fn negotiated(&self) -> Option<Negotiated> {
        self.negotiated
    }

    /// Does what a command says and leaves the answer in `out`.
    pub(crate) fn command(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: Result<Vec<OwnedFd>, Malformed>,
        device: &mut dyn Device,
        out: &mut Vec<u8>,
    ) -> Answer {
        self.counters.commands += 1;
        wire::begin_reply(out, header);
        // The device, and whatever a mistake here would be: a client like QEMU dies with its server.
        let done = catch_unwind(AssertUnwindSafe(|| {
            let command = Command::parse(header.command, payload)?;
            self.dispatch(command, fds?, device, out)
        }));
        let refusal = match done {
            Ok(Ok(fd)) if header.wants_reply() => {
                wire::finish(out);
                return Answer::Send(fd);
            }
            Ok(Ok(_)) => return Answer::None,
            Ok(Err(refusal)) => refusal,
            Err(_) => {
                self.counters.panics += 1;
                if self.counters.panics == 1 {
                    error!(
                        command = header.command,
                        "the device panicked; answered with EIO; further panics are only counted"
                    );
                }
                Refusal::Device(Errno::IO)
            }
        };
        self.refuse(header, &refusal, out)
    }

    /// An answer came, to a question or to none.
    pub(crate) fn reply(&mut self, expected: bool) {
        if !expected {
            self.counters.stray_replies += 1;
            debug!("an answer to nothing that was asked");
        }
    }

    /// Answers a message of which only the header is kept.
    pub(crate) fn too_long(&mut self, header: &Header, out: &mut Vec<u8>) -> Answer {
        self.counters.commands += 1;
        self.refuse(header, &Malformed::Long(header.size).into(), out)
    }

    fn refuse(&mut self, header: &Header, refusal: &Refusal, out: &mut Vec<u8>) -> Answer {
        self.counters.refused += 1;
        let command = header.command;
        let errno = match refusal {
            Refusal::Malformed(malformed) => {
                self.counters.malformed += u64::from(!malformed.is_fair());
                // Said by whoever serves the connection, if at all: a client can come again and again.
                debug!(command, "refused a command: {malformed}");
                malformed.errno()
            }
            Refusal::Device(errno) => {
                debug!(command, %errno, "the device refused a command");
                *errno
            }
        };
        if !header.wants_reply() {
            return Answer::None;
        }
        wire::error_reply(out, header, errno.raw_os_error().unsigned_abs());
        Answer::Send(None)
    }

    fn dispatch(
        &mut self,
        command: Command<'_>,
        fds: Vec<OwnedFd>,
        device: &mut dyn Device,
        out: &mut Vec<u8>,
    ) -> Result<Option<OwnedFd>, Refusal> {
        let takes_fds = matches!(command, Command::DmaMap { .. } | Command::SetIrqs { .. });
        if !takes_fds && !fds.is_empty() {
            return Err(Malformed::Descriptors(fds.len()).into());
        }
        let negotiated = match (command, self.negotiated) {
            (Command::Version { major, minor, data }, None) => {
                self.version(major, minor, data, device, out)?;
                return Ok(None);
            }
            (Command::Version { .. }, Some(_)) | (_, None) => return Err(Malformed::Order.into()),
            (_, Some(negotiated)) => negotiated,
        };
        match command {
            Command::Version { .. } => {}
            Command::GetInfo => get_info(device, out),
            Command::GetRegionInfo { argsz, index } => {
                return get_region_info(argsz, index, negotiated, device, out);
            }
            Command::GetIrqInfo { index } => get_irq_info(index, device, out)?,
            Command::SetIrqs { .. } => device.set_irqs(set_irqs(command, fds, device)?)?,
            Command::DmaMap {
                flags,
                offset,
                address,
                size,
            } => map(flags, (offset, address, size), fds, device)?,
            Command::DmaUnmap {
                flags,
                address,
                size,
            } => unmap(flags, address, size, device, out)?,
            Command::RegionRead(access) => self.region_read(access, device, out)?,
            Command::RegionWrite(access, data) => {
                self.region_write(access, data, device)?;
                access.put(out);
            }
            Command::RegionWriteMulti(writes) => {
                let done = self.region_write_multi(writes, device)?;
                out.extend_from_slice(&done.to_ne_bytes());
            }
            Command::Reset => {
                if !device.info().can_reset {
                    return Err(Malformed::NotServed.into());
                }
                device.reset()?;
            }
        }
        Ok(None)
    }

    fn version(
        &mut self,
        major: u16,
        minor: u16,
        data: &[u8],
        device: &mut dyn Device,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        if major != 0 {
            return Err(Malformed::Version(major).into());
        }
        let proposal = Proposal::parse(data)?;
        device.greet()?;
        let minor = minor.min(MINOR);
        out.extend_from_slice(&major.to_ne_bytes());
        out.extend_from_slice(&minor.to_ne_bytes());
        proposal.answer(&self.options, out);
        self.negotiated = Some(proposal.negotiated(minor));
        Ok(())
    }

    /// The bounds of an access that is allowed: `Err` or a count within the limit and within the region.
    fn check(
        &self,
        access: Access,
        allowed: impl Fn(&Region<'_>) -> bool,
        device: &dyn Device,
    ) -> Result<(), Refusal> {
        if access.count == 0 {
            return Err(Malformed::Count.into());
        }
        if access.count > self.options.max_data_xfer_size {
            return Err(Malformed::Long(access.count).into());
        }
        let region = (access.region < device.info().regions)
            .then(|| device.region(access.region))
            .flatten()
            .ok_or(Malformed::Range)?;
        let end = access.offset.checked_add(access.count.into());
        if end.is_none_or(|end| end > region.size) {
            return Err(Malformed::Range.into());
        }
        if !allowed(&region) {
            return Err(Errno::ACCESS.into());
        }
        Ok(())
    }

    fn region_read(
        &self,
        access: Access,
        device: &mut dyn Device,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        self.check(access, |region| region.readable, device)?;
        access.put(out);
        let start = out.len();
        out.resize(start + access.len(), 0);
        Ok(device.read(access.region, access.offset, &mut out[start..])?)
    }

    fn region_write(
        &self,
        access: Access,
        data: &[u8],
        device: &mut dyn Device,
    ) -> Result<(), Refusal> {
        self.check(access, |region| region.writable, device)?;
        Ok(device.write(access.region, access.offset, data)?)
    }

    /// Does the writes one after another until one fails, and gives how many were done. An error only if none was.
    fn region_write_multi(
        &mut self,
        writes: Writes<'_>,
        device: &mut dyn Device,
    ) -> Result<u64, Refusal> {
        let mut done = 0;
        for (access, data) in writes.writes() {
            match self.region_write(access, data, device) {
                Ok(()) => done += 1,
                Err(refusal) if done == 0 => return Err(refusal),
                Err(refusal) => {
                    debug!(done, ?refusal, "a write among several was refused");
                    self.counters.refused += 1;
                    break;
                }
            }
        }
        Ok(done)
    }
}

fn put(out: &mut Vec<u8>, numbers: &[u32]) {
    for number in numbers {
        out.extend_from_slice(&number.to_ne_bytes());
    }
}

fn flag(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

fn get_info(device: &dyn Device, out: &mut Vec<u8>) {
    let info = device.info();
    let flags = device_flag::PCI | flag(info.can_reset, device_flag::RESET);
    put(out, &[wire::INFO, flags, info.regions, info.irqs]);
}

fn get_region_info(
    argsz: u32,
    index: u32,
    negotiated: Negotiated,
    device: &dyn Device,
    out: &mut Vec<u8>,
) -> Result<Option<OwnedFd>, Refusal> {
    let region = (index < device.info().regions)
        .then(|| device.region(index))
        .flatten()
        .ok_or(Errno::INVAL)?;
    let mut flags = flag(region.readable, region_flag::READ);
    flags |= flag(region.writable, region_flag::WRITE);
    // The descriptor has to get there.
    let mmap = region.mmap.filter(|_| negotiated.max_msg_fds > 0);
    let capability = mmap.as_ref().map(sparse_mmap).unwrap_or_default();
    let full = wire::REGION_INFO + u32::try_from(capability.len()).expect("1024 areas at most");
    let mut cap_offset = 0;
    let mut offset = 0;
    // Without room for the capability the client is told how much it takes, and nothing that it would misunderstand without.
    let fits = full <= argsz;
    if let Some(map) = mmap.as_ref().filter(|_| fits) {
        flags |= region_flag::MMAP;
        offset = map.offset;
        if !capability.is_empty() {
            flags |= region_flag::CAPS;
            cap_offset = wire::REGION_INFO;
        }
    }
    put(out, &[full, flags, index, cap_offset]);
    out.extend_from_slice(&region.size.to_ne_bytes());
    out.extend_from_slice(&offset.to_ne_bytes());
    if !fits {
        return Ok(None);
    }
    out.extend_from_slice(&capability);
    let fd = mmap.map(|map| map.fd.try_clone_to_owned()).transpose();
    Ok(fd.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?)
}

/// `struct vfio_region_info_cap_sparse_mmap`, or nothing if all of the region can be mapped.
fn sparse_mmap(map: &RegionMap<'_>) -> Vec<u8> {
    let areas = &map.areas[..map.areas.len().min(MAX_AREAS)];
    let mut out = Vec::new();
    if areas.is_empty() {
        return out;
    }
    let (id, version) = wire::CAP_SPARSE_MMAP;
    out.extend_from_slice(&id.to_ne_bytes());
    out.extend_from_slice(&version.to_ne_bytes());
    let next = 0;
    let count = u32::try_from(areas.len()).expect("bounded above");
    put(&mut out, &[next, count, 0]);
    for area in areas {
        out.extend_from_slice(&area.offset.to_ne_bytes());
        out.extend_from_slice(&area.len.to_ne_bytes());
    }
    out
}

fn irq(index: u32, device: &dyn Device) -> Result<IrqInfo, Malformed> {
    if index >= device.info().irqs {
        return Err(Malformed::Range);
    }
    Ok(device.irq(index))
}

fn get_irq_info(index: u32, device: &dyn Device, out: &mut Vec<u8>) -> Result<(), Malformed> {
    let info = irq(index, device)?;
    let flags = flag(info.eventfd, irq_flag::EVENTFD)
        | flag(info.maskable, irq_flag::MASKABLE)
        | flag(info.automasked, irq_flag::AUTOMASKED)
        | flag(info.no_resize, irq_flag::NORESIZE);
    put(out, &[wire::INFO, flags, index, info.count]);
    Ok(())
}

/// What a SET_IRQS says, checked against what the device has.
fn set_irqs(
    command: Command<'_>,
    fds: Vec<OwnedFd>,
    device: &dyn Device,
) -> Result<SetIrqs, Malformed> {
    let Command::SetIrqs {
        flags,
        index,
        start,
        count,
        data,
    } = command
    else {
        return Err(Malformed::Unknown);
    };
    let info = irq(index, device)?;
    if start.checked_add(count).is_none_or(|end| end > info.count) {
        return Err(Malformed::Range);
    }
    let action = match flags & !set_flag::DATA {
        set_flag::ACTION_MASK if info.maskable => IrqAction::Mask,
        set_flag::ACTION_UNMASK if info.maskable => IrqAction::Unmask,
        set_flag::ACTION_TRIGGER => IrqAction::Trigger,
        _ => {
            return Err(Malformed::Flags(
                flags & (set_flag::ACTION | !set_flag::DATA),
            ));
        }
    };
    let kind = flags & set_flag::DATA;
    // None at all stands for all of them, and only for taking them away.
    let all = count == 0 && start == 0 && kind == set_flag::DATA_NONE;
    if count == 0 && !all {
        return Err(Malformed::Count);
    }
    if kind != set_flag::DATA_EVENTFD && !fds.is_empty() {
        return Err(Malformed::Descriptors(fds.len()));
    }
    // Not above what the device says it has, by the check of the range.
    let len = usize::try_from(count).map_err(|_| Malformed::Count)?;
    let data = match kind {
        set_flag::DATA_NONE => IrqData::None,
        set_flag::DATA_BOOL => {
            let bools = data.get(..len).ok_or(Malformed::Count)?;
            IrqData::Bools(bools.iter().map(|byte| *byte != 0).collect())
        }
        set_flag::DATA_EVENTFD if !info.eventfd => return Err(Malformed::Flags(flags)),
        set_flag::DATA_EVENTFD if fds.is_empty() => {
            IrqData::Eventfds(std::iter::repeat_with(|| None).take(len).collect())
        }
        set_flag::DATA_EVENTFD if fds.len() == len => {
            IrqData::Eventfds(fds.into_iter().map(Some).collect())
        }
        set_flag::DATA_EVENTFD => return Err(Malformed::Descriptors(fds.len())),
        _ => return Err(Malformed::Flags(flags)),
    };
    Ok(SetIrqs {
        index,
        start,
        count,
        action,
        data,
    })
}

fn check_range(address: u64, size: u64) -> Result<(), Malformed> {
    // The last byte, so that a range may reach to the end of the address space.
    size.checked_sub(1)
        .and_then(|last| address.checked_add(last))
        .map(drop)
        .ok_or(Malformed::Address)
}

fn map(
    flags: u32,
    (offset, address, size): (u64, u64, u64),
    mut fds: Vec<OwnedFd>,
    device: &mut dyn Device,
) -> Result<(), Refusal> {
    if flags & !(map_flag::READ | map_flag::WRITE) != 0 {
        return Err(Malformed::Flags(flags).into());
    }
    check_range(address, size)?;
    if fds.len() > 1 {
        return Err(Malformed::Descriptors(fds.len()).into());
    }
    device.map(DmaMap {
        address,
        size,
        offset,
        readable: flags & map_flag::READ != 0,
        writable: flags & map_flag::WRITE != 0,
        fd: fds.pop(),
    })?;
    Ok(())
}

fn unmap(
    flags: u32,
    address: u64,
    size: u64,
    device: &mut dyn Device,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let unmap = match flags {
        0 => {
            check_range(address, size)?;
            DmaUnmap {
                address,
                size,
                all: false,
            }
        }
        unmap_flag::ALL => DmaUnmap {
            address: 0,
            size: 0,
            all: true,
        },
        _ if flags & unmap_flag::GET_DIRTY_BITMAP != 0 => return Err(Malformed::NotServed.into()),
        _ => return Err(Malformed::Flags(flags).into()),
    };
    let unmapped = device.unmap(unmap)?;
    put(out, &[wire::UNMAP, flags]);
    out.extend_from_slice(&address.to_ne_bytes());
    out.extend_from_slice(&unmapped.to_ne_bytes());
    Ok(())
}
