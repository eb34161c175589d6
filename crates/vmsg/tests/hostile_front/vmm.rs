// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM that sends what it likes, and takes what comes.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmsg_mem::Mapping;

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const DMA_READ: u16 = 11;
pub(crate) const RESET: u16 = 13;

pub(crate) const NO_REPLY: u32 = 1 << 4;
const REPLY: u32 = 1;
const ERROR: u32 = 1 << 5;

pub(crate) const CONFIG: u32 = 7;
/// The BAR of virtio's structures, and where they are.
pub(crate) const BAR: u32 = 4;
pub(crate) const NOTIFY: u64 = 0x3000;
pub(crate) const INTX: u32 = 0;
pub(crate) const MSIX: u32 = 2;

/// Nobody in front of a guest may wait longer. The front's own bounds are 3 s and less; the machine may be busy.
pub(crate) const LONGEST: Duration = Duration::from_secs(15);
/// What blocks blocks longer.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) const GUEST: u64 = 0x4000_0000;
pub(crate) const RAM: u64 = 0x40_0000;

/// Numbers that look random.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A guest's memory.
pub(crate) struct Ram {
    pub(crate) mapping: Mapping,
    pub(crate) file: OwnedFd,
}

impl Ram {
    pub(crate) fn new() -> Ram {
        let (mapping, file) = Mapping::memfd("guest", RAM, false).unwrap();
        Ram { mapping, file }
    }
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        self.mapping.ram().write(at, bytes);
    }
    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mapping.ram().read(at, &mut bytes);
        bytes
    }
}

/// A file of memory, not mapped here.
pub(crate) fn memfd(len: u64) -> OwnedFd {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("hostile", flags).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

/// An answer: its payload, or an errno.
pub(crate) type Answer = Result<Vec<u8>, u32>;

/// What came.
pub(crate) enum Came {
    Answer(u16, Answer),
    /// A question about memory: id, command, payload.
    Question(u16, u16, Vec<u8>),
    End,
}

pub(crate) struct Vmm {
    pub(crate) socket: UnixStream,
    next: u16,
    /// Questions about memory are answered from here; otherwise not at all.
    pub(crate) serves: Option<Mapping>,
    /// The longest that an answer has taken.
    pub(crate) longest: Duration,
}

pub(crate) fn header(id: u16, command: u16, len: usize, flags: u32, errno: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend((len as u32 + 16).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(errno.to_le_bytes());
    bytes
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(crate) fn version() -> Vec<u8> {
    let mut version = vec![0, 0, 1, 0];
    version.extend(br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}"#);
    version.push(0);
    version
}

pub(crate) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let mut payload = offset.to_le_bytes().to_vec();
    payload.extend(region.to_le_bytes());
    payload.extend(count.to_le_bytes());
    payload
}

impl Vmm {
    /// Connects, without a word.
    pub(crate) fn silent(path: &Path) -> Vmm {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        Vmm {
            socket,
            next: 0,
            serves: None,
            longest: Duration::ZERO,
        }
    }

    /// Connects and says its version.
    pub(crate) fn new(path: &Path) -> Vmm {
        let mut vmm = Vmm::silent(path);
        vmm.ask(VERSION, &version(), &[]).unwrap();
        vmm.longest = Duration::ZERO;
        vmm
    }

    /// False: the other side does not want it.
    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(bytes)];
        match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent < bytes.len() => self.send(&bytes[sent..], &[]),
            Ok(_) => true,
            Err(_) => false,
        }
    }

    /// A command; gives its id.
    pub(crate) fn tell(
        &mut self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: u32,
    ) -> u16 {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let mut message = header(id, command, payload.len(), flags, 0);
        message.extend(payload);
        self.send(&message, fds);
        id
    }

    pub(crate) fn come(&mut self) -> Came {
        let mut head = [0; 16];
        if self.socket.read_exact(&mut head).is_err() {
            return Came::End;
        }
        let id = u16::from_le_bytes([head[0], head[1]]);
        let command = u16::from_le_bytes([head[2], head[3]]);
        let (size, flags, errno) = (u32_at(&head, 4), u32_at(&head, 8), u32_at(&head, 12));
        let mut payload = vec![0; size as usize - 16];
        if self.socket.read_exact(&mut payload).is_err() {
            return Came::End;
        }
        if flags & 0xf != REPLY {
            return Came::Question(id, command, payload);
        }
        let answer = if flags & ERROR == 0 {
            Ok(payload)
        } else {
            Err(errno)
        };
        Came::Answer(id, answer)
    }

    /// The answer to a command; `None` at the end of the connection.
    pub(crate) fn wait(&mut self, id: u16) -> Option<Answer> {
        loop {
            match self.come() {
                Came::Answer(of, answer) if of == id => return Some(answer),
                Came::Answer(..) => {}
                Came::Question(id, command, payload) => self.serve(id, command, &payload),
                Came::End => return None,
            }
        }
    }

    fn serve(&mut self, id: u16, command: u16, payload: &[u8]) {
        let Some(ram) = &self.serves else { return };
        let (address, count) = (u64_at(payload, 0), u64_at(payload, 8));
        let at = address.wrapping_sub(GUEST);
        if at.checked_add(count).is_none_or(|end| end > RAM) {
            self.send(&header(id, command, 0, REPLY | ERROR, 22), &[]);
            return;
        }
        let mut answer = payload[..16].to_vec();
        if command == DMA_READ {
            let mut bytes = vec![0; count as usize];
            ram.ram().read(at as usize, &mut bytes);
            answer.extend(bytes);
        } else {
            ram.ram().write(at as usize, &payload[16..]);
        }
        let mut message = header(id, command, answer.len(), REPLY, 0);
        message.extend(answer);
        self.send(&message, &[]);
    }

    #[track_caller]
    pub(crate) fn ask(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        let begin = Instant::now();
        let id = self.tell(command, payload, fds, 0);
        let answer = self.wait(id).expect("the connection has ended");
        self.longest = self.longest.max(begin.elapsed());
        assert!(
            begin.elapsed() < LONGEST,
            "command {command} took {:?}",
            begin.elapsed()
        );
        answer
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, len: u32) -> Vec<u8> {
        let answer = self.ask(REGION_READ, &access(region, offset, len), &[]);
        answer.unwrap()[16..].to_vec()
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let mut payload = access(region, offset, data.len() as u32);
        payload.extend(data);
        self.ask(REGION_WRITE, &payload, &[]).unwrap();
    }

    /// Without an answer.
    pub(crate) fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let mut payload = access(region, offset, data.len() as u32);
        payload.extend(data);
        self.tell(REGION_WRITE, &payload, &[], NO_REPLY);
    }

    pub(crate) fn map_payload(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
        let mut payload = words(&[32, flags]);
        for value in [offset, address, size] {
            payload.extend(value.to_le_bytes());
        }
        payload
    }

    pub(crate) fn map(
        &mut self,
        address: u64,
        size: u64,
        offset: u64,
        fd: Option<&OwnedFd>,
    ) -> Answer {
        let payload = Vmm::map_payload(3, offset, address, size);
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.ask(DMA_MAP, &payload, &fds)
    }

    pub(crate) fn unmap(&mut self, address: u64, size: u64) -> Answer {
        let mut payload = words(&[24, 0]);
        payload.extend(address.to_le_bytes());
        payload.extend(size.to_le_bytes());
        self.ask(DMA_UNMAP, &payload, &[])
    }

    pub(crate) fn unmap_all(&mut self) -> Answer {
        let mut payload = words(&[24, 2]);
        payload.extend([0; 16]);
        self.ask(DMA_UNMAP, &payload, &[])
    }

    pub(crate) fn set_irqs(
        &mut self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Answer {
        let payload = words(&[20, flags, index, start, count]);
        self.ask(SET_IRQS, &payload, fds)
    }

    pub(crate) fn status(&mut self) -> u8 {
        self.read(BAR, 0x14, 1)[0]
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        self.write(BAR, 0x14, &[status]);
    }

    /// Resets the device, and waits until it says so.
    pub(crate) fn reset(&mut self) {
        self.set_status(0);
        let end = Instant::now() + TIMEOUT;
        while self.status() != 0 {
            assert!(Instant::now() < end, "no reset");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Memory and bus mastering on, reset, the driver is there with these features, if they are offered, and VERSION_1.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(CONFIG, 4, &6u16.to_le_bytes());
        self.reset();
        self.set_status(1);
        self.set_status(3);
        for block in 0..2u32 {
            self.write(BAR, 0, &block.to_le_bytes());
            let offered = self.read(BAR, 4, 4);
            let offered = u32::from_le_bytes(offered.try_into().unwrap());
            let wanted = ((features | 1 << 32) >> (32 * block)) as u32 & offered;
            self.write(BAR, 8, &block.to_le_bytes());
            self.write(BAR, 0xc, &wanted.to_le_bytes());
        }
        self.set_status(0xb);
    }

    /// A queue with rings at these addresses.
    pub(crate) fn queue(&mut self, index: u16, size: u16, at: [u64; 3]) {
        self.write(BAR, 0x16, &index.to_le_bytes());
        self.write(BAR, 0x18, &size.to_le_bytes());
        for (offset, at) in [0x20, 0x28, 0x30].into_iter().zip(at) {
            self.write(BAR, offset, &at.to_le_bytes());
        }
        self.write(BAR, 0x1c, &1u16.to_le_bytes());
    }

    pub(crate) fn kick(&mut self, index: u16) {
        self.post(BAR, NOTIFY + 4 * u64::from(index), &index.to_le_bytes());
    }

    /// Everything with one queue of `size` at `at` of its memory; see [`rings`].
    pub(crate) fn start(&mut self, features: u64, size: u16, at: u64) {
        self.negotiate(features);
        self.queue(0, size, rings(at));
        self.set_status(0xf);
    }
}

/// Addresses of rings, one page after another, for sizes of up to 256.
pub(crate) fn rings(at: u64) -> [u64; 3] {
    [at, at + 0x1000, at + 0x2000]
}

pub(crate) fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

pub(crate) fn new_eventfd() -> OwnedFd {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}
