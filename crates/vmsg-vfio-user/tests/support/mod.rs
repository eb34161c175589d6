// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that writes down what is done to it, and a client that sends what it is told to.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use vmsg_vfio_user::{
    Connection, Device, DeviceInfo, DmaMap, DmaUnmap, End, Errno, IrqData, IrqInfo, MapArea,
    Options, Region, RegionMap, SetIrqs,
};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_REGION_IO_FDS: u16 = 6;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const REGION_WRITE_MULTI: u16 = 15;

pub const REPLY: u32 = 1;
pub const NO_REPLY: u32 = 1 << 4;
pub const ERROR: u32 = 1 << 5;

/// Plain memory, 4 KiB.
pub const RAM: u32 = 0;
/// 16 KiB of which two parts can be mapped.
pub const MAPPED: u32 = 1;
/// Whatever is done to it panics.
pub const PANIC: u32 = 3;
/// Can be read, not written.
pub const READ_ONLY: u32 = 4;
/// Not described.
pub const ROM: u32 = 6;
/// Interrupts with eventfds, 20 of them.
pub const MSIX: u32 = 2;

pub fn file(len: u64) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC).expect("a file");
    ftruncate(&file, len).expect("a length");
    file
}

/// A device that keeps what is written to it and a line for each other call.
#[derive(Debug)]
pub struct Recorder {
    pub ram: Vec<u8>,
    pub file: OwnedFd,
    pub calls: Vec<String>,
    pub eventfds: Vec<Option<OwnedFd>>,
    pub fds: Vec<OwnedFd>,
    /// Turns clients away.
    pub busy: bool,
}

impl Recorder {
    pub fn new() -> Recorder {
        Recorder {
            ram: vec![0; 4096],
            file: file(0x4000),
            calls: Vec::new(),
            eventfds: Vec::new(),
            fds: Vec::new(),
            busy: false,
        }
    }

    pub fn take_calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.calls)
    }
}

fn span(offset: u64, len: usize) -> std::ops::Range<usize> {
    let offset = usize::try_from(offset).expect("inside of the region");
    offset..offset + len
}

impl Device for Recorder {
    fn greet(&mut self) -> Result<(), Errno> {
        if self.busy { Err(Errno::BUSY) } else { Ok(()) }
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            regions: 9,
            irqs: 5,
            can_reset: true,
        }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        let map = RegionMap {
            areas: vec![
                MapArea {
                    offset: 0,
                    len: 0x1000,
                },
                MapArea {
                    offset: 0x2000,
                    len: 0x1000,
                },
            ],
            fd: self.file.as_fd(),
            offset: 0x8000,
        };
        let size = match index {
            ROM => return None,
            RAM | PANIC | READ_ONLY => 4096,
            MAPPED => 0x4000,
            _ => 0,
        };
        Some(Region {
            size,
            readable: size > 0,
            writable: size > 0 && index != READ_ONLY,
            mmap: (index == MAPPED).then_some(map),
        })
    }

    fn irq(&self, index: u32) -> IrqInfo {
        match index {
            0 => IrqInfo {
                count: 1,
                eventfd: true,
                maskable: true,
                automasked: true,
                no_resize: false,
            },
            MSIX => IrqInfo {
                count: 20,
                eventfd: true,
                no_resize: true,
                ..IrqInfo::NONE
            },
            _ => IrqInfo::NONE,
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        assert!(!data.is_empty() && data.iter().all(|byte| *byte == 0));
        assert!(region != PANIC, "as told");
        if region == MAPPED {
            return Err(Errno::NXIO);
        }
        data.copy_from_slice(&self.ram[span(offset, data.len())]);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        assert!(!data.is_empty());
        assert!(region != PANIC, "as told");
        if region == MAPPED {
            return Err(Errno::NXIO);
        }
        self.ram[span(offset, data.len())].copy_from_slice(data);
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> Result<(), Errno> {
        let SetIrqs {
            index,
            start,
            count,
            action,
            data,
        } = set;
        assert!(u64::from(start) + u64::from(count) <= u64::from(self.irq(index).count));
        let (what, len) = match data {
            IrqData::None => ("none".to_string(), count),
            IrqData::Bools(bools) => {
                let len = u32::try_from(bools.len()).expect("few");
                (format!("{bools:?}"), len)
            }
            IrqData::Eventfds(fds) => {
                let len = u32::try_from(fds.len()).expect("few");
                let have = fds.iter().filter(|fd| fd.is_some()).count();
                self.eventfds = fds;
                (format!("{have} eventfds"), len)
            }
        };
        assert_eq!(len, count);
        self.calls
            .push(format!("irqs {index}: {start}+{count} {action:?} {what}"));
        Ok(())
    }

    fn map(&mut self, map: DmaMap) -> Result<(), Errno> {
        let DmaMap {
            address,
            size,
            offset,
            readable,
            writable,
            fd,
        } = map;
        assert!(size > 0 && address.checked_add(size - 1).is_some());
        if address == 0xbad_0000 {
            return Err(Errno::EXIST);
        }
        let fd_text = if fd.is_some() { "fd" } else { "none" };
        let rights = format!(
            "{}{}",
            if readable { "r" } else { "" },
            if writable { "w" } else { "" }
        );
        self.calls.push(format!(
            "map {address:#x}+{size:#x} {rights} {fd_text}@{offset:#x}"
        ));
        self.fds.extend(fd);
        // Enough of them for a test, not for a fuzzer that sends them all day.
        self.fds.truncate(16);
        Ok(())
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result<u64, Errno> {
        self.calls.push(format!("{unmap:?}"));
        Ok(if unmap.all { 0x7000 } else { unmap.size })
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.calls.push("reset".into());
        Ok(())
    }
}

pub fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).expect("short");
    let mut bytes = header(id, command, size, flags, 0);
    bytes.extend_from_slice(payload);
    bytes
}

pub fn header(id: u16, command: u16, size: u32, flags: u32, error: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&id.to_ne_bytes());
    bytes.extend_from_slice(&command.to_ne_bytes());
    for field in [size, flags, error] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes
}

pub fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect()
}

pub fn version(text: &[u8]) -> Vec<u8> {
    [&[0; 4], text].concat()
}

/// What QEMU 11.1 says of itself.
pub const QEMU: &[u8] = b"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \"write_multiple\": true, \"max_data_xfer_size\": 1048576, \"max_dma_maps\": 65535, \"max_msg_fds\": 16, \"pgsizes\": 4096}}\0";

pub fn access(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = offset.to_ne_bytes().to_vec();
    bytes.extend(u32s(&[region, count]));
    bytes.extend_from_slice(data);
    bytes
}

pub fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut bytes = u32s(&[32, flags]);
    for field in [offset, address, size] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes
}

pub fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    let mut bytes = u32s(&[24, flags]);
    for field in [address, size] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes
}

/// A message from the server.
#[derive(Debug)]
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.payload[at..at + 4].try_into().expect("4 bytes"))
    }

    pub fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.payload[at..at + 8].try_into().expect("8 bytes"))
    }

    pub fn ok(self) -> Message {
        assert_eq!(self.flags & ERROR, 0, "{self:?}");
        self
    }

    #[track_caller]
    pub fn refused(self) -> Errno {
        assert_eq!(self.flags, REPLY | ERROR, "{self:?}");
        assert!(self.payload.is_empty());
        Errno::from_raw_os_error(self.error.try_into().expect("an errno"))
    }
}

pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> usize {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .expect("the server is there")
}

fn receive_exact(socket: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> bool {
    let mut at = 0;
    while at < bytes.len() {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut room);
        let mut iov = [IoSliceMut::new(&mut bytes[at..])];
        let received = match recvmsg(socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received,
            Err(Errno::AGAIN) if at == 0 => return false,
            Err(error) => panic!("{error} in the middle of a message"),
        };
        assert!(!received.flags.contains(ReturnFlags::CTRUNC));
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            assert_eq!(at, 0, "closed in the middle of a message");
            return false;
        }
        at += received.bytes;
    }
    true
}

/// The next message of the server, if there is one.
pub fn receive(socket: &UnixStream) -> Option<Message> {
    let mut head = [0; 16];
    let mut fds = Vec::new();
    if !receive_exact(socket, &mut head, &mut fds) {
        return None;
    }
    let number = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let mut payload = vec![0; usize::try_from(number(4)).expect("fits") - 16];
    assert!(payload.is_empty() || receive_exact(socket, &mut payload, &mut fds));
    Some(Message {
        id: u16::from_ne_bytes([head[0], head[1]]),
        command: u16::from_ne_bytes([head[2], head[3]]),
        flags: number(8),
        error: number(12),
        payload,
        fds,
    })
}

/// A client and its server in one thread: the server gets its turn after everything that is sent.
#[derive(Debug)]
pub struct Pair {
    pub client: UnixStream,
    pub connection: Connection,
    pub device: Recorder,
    pub panics: u32,
    next_id: u16,
}

impl Pair {
    /// Connected, no word said.
    pub fn silent(options: Options) -> Pair {
        let (client, server) = UnixStream::pair().expect("a pair");
        client.set_nonblocking(true).expect("it can be");
        Pair {
            client,
            connection: Connection::new(server, options).expect("a connection"),
            device: Recorder::new(),
            panics: 0,
            next_id: 100,
        }
    }

    /// Connected, the version agreed on.
    pub fn new() -> Pair {
        let mut pair = Pair::silent(Options::default());
        pair.ask(VERSION, &version(QEMU)).ok();
        pair
    }

    pub fn turn(&mut self) -> Result<u32, End> {
        let mut handled = 0;
        loop {
            let turn = self.connection.turn(&mut self.device, 8)?;
            handled += turn.handled;
            self.panics += turn.panics;
            if !turn.more {
                return Ok(handled);
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(send(&self.client, bytes, fds), bytes.len());
        self.turn().expect("not ended");
    }

    pub fn receive(&mut self) -> Option<Message> {
        receive(&self.client)
    }

    /// Sends a command and gives the one answer to it.
    #[track_caller]
    pub fn ask(&mut self, command: u16, payload: &[u8]) -> Message {
        self.ask_with(command, payload, &[])
    }

    #[track_caller]
    pub fn ask_with(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Message {
        self.next_id += 1;
        self.send(&message(self.next_id, command, 0, payload), fds);
        let answer = self.receive().expect("an answer");
        assert_eq!((answer.id, answer.command), (self.next_id, command));
        assert_eq!(answer.flags & !ERROR, REPLY);
        assert!(self.receive().is_none(), "one answer only");
        answer
    }

    /// The server still does what it should.
    #[track_caller]
    pub fn check_alive(&mut self) {
        let info = self.ask(GET_INFO, &u32s(&[16, 0, 0, 0])).ok();
        assert_eq!(info.payload, u32s(&[16, 3, 9, 5]));
    }
}
