// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user back end of a network device, for tests: what a virtual switch has on its side. It trusts its front end.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test needs another part of it"
)]

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use vmsg_mem::{Access, AddressSpace, BusAddr, Mapping, RamSlice, Window};
use vmsg_net::VnetHeader;
use vmsg_queue::{ChainStorage, DeviceQueue, QueueConfig, QueueFeatures};

pub const CSUM: u64 = 1;
pub const GUEST_CSUM: u64 = 1 << 1;
pub const GUEST_TSO4: u64 = 1 << 7;
pub const HOST_TSO4: u64 = 1 << 11;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PROTOCOL: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;

/// Bytes of the header before frames.
const HEADER: usize = 12;

#[derive(Debug, Default)]
struct Ring {
    size: u16,
    /// Descriptors, used, available.
    areas: [u64; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    queue: Option<DeviceQueue>,
}

/// The back end; [`step`](Self::step) answers what the front end has asked.
#[derive(Debug)]
pub struct BackEnd {
    socket: UnixStream,
    offered: u64,
    pub features: u64,
    pub memory: Option<Mapping>,
    pub base: u64,
    rings: [Ring; 2],
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl BackEnd {
    pub fn new(socket: UnixStream, offered: u64) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket,
            offered,
            features: 0,
            memory: None,
            base: 0,
            rings: Default::default(),
            bytes: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// Both rings are to be used.
    pub fn runs(&self) -> bool {
        let enabled = |ring: &Ring| ring.enabled || self.features & PROTOCOL == 0;
        self.rings
            .iter()
            .all(|ring| ring.kick.is_some() && enabled(ring))
    }

    /// Looks after everything that has come.
    pub fn step(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let got = recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::empty());
            let n = match got {
                Ok(message) if message.bytes > 0 => message.bytes,
                Ok(_) | Err(Errno::AGAIN | Errno::CONNRESET) => return,
                Err(error) => panic!("{error}"),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            self.bytes.extend_from_slice(&bytes[..n]);
            while let Some(body) = self.message() {
                self.request(&body);
            }
        }
    }

    /// The next message that is there as a whole.
    fn message(&mut self) -> Option<Vec<u8>> {
        let header = self.bytes.get(..12)?;
        let len = u32::from_ne_bytes(header[8..12].try_into().expect("4 bytes"));
        let end = 12 + usize::try_from(len).expect("short");
        (self.bytes.len() >= end).then(|| self.bytes.drain(..end).collect())
    }

    fn answer(&self, request: u32, value: u64) {
        let mut bytes = Vec::new();
        for word in [request, 5, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(value.to_ne_bytes());
        self.say(&bytes);
    }

    /// Writes any bytes to the front end.
    pub fn say(&self, bytes: &[u8]) {
        // It may have had enough. A fuzzer's process would be ended by the signal for that.
        let _ = send(&self.socket, bytes, SendFlags::NOSIGNAL);
    }

    fn request(&mut self, message: &[u8]) {
        let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().expect("4"));
        let long = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8"));
        let index = |word: u32| usize::try_from(word & 1).expect("0 or 1");
        match word(0) {
            1 => self.answer(1, self.offered),
            2 => {
                self.features = long(12);
                assert_eq!(
                    self.features & !self.offered,
                    0,
                    "features that were not offered"
                );
            }
            3 => {}
            5 => {
                assert_eq!(word(12), 1, "one region");
                let fd = self.fds.remove(0);
                assert_eq!(long(20), long(36), "addresses of the guest and of the user");
                self.base = long(20);
                let memory = Mapping::of_fd(fd.as_fd(), long(44), long(28), Access::ReadWrite);
                self.memory = Some(memory.expect("memory"));
            }
            8 => self.rings[index(word(12))].size = u16::try_from(word(16)).expect("a size"),
            9 => self.rings[index(word(12))].areas = [long(20), long(28), long(36)],
            10 => assert_eq!(word(16), 0),
            12 => self.rings[index(word(12))].kick = Some(self.fds.remove(0)),
            13 => self.rings[index(word(12))].call = Some(self.fds.remove(0)),
            15 => self.answer(15, 1 << 3),
            16 => assert_eq!(long(12) & !(1 << 3), 0),
            18 => self.rings[index(word(12))].enabled = word(16) == 1,
            other => panic!("request {other}"),
        }
    }

    /// Works on ring `index` with `work`; rings the front end's bell if it wants that.
    fn with<R>(
        &mut self,
        index: usize,
        work: impl FnOnce(&mut DeviceQueue, AddressSpace<'_>) -> R,
    ) -> R {
        let memory = self.memory.as_ref().expect("memory");
        let window = Window::new(BusAddr(self.base), memory.ram(), Access::ReadWrite);
        let windows = [window.expect("a window")];
        let space = AddressSpace::new(&windows).expect("one");
        let ring = &mut self.rings[index];
        let queue = ring.queue.get_or_insert_with(|| {
            let [desc, device, driver] = ring.areas.map(BusAddr);
            let config = QueueConfig {
                size: ring.size,
                desc,
                driver,
                device,
            };
            DeviceQueue::new(config, QueueFeatures::from_bits(self.features), space)
                .expect("a queue")
        });
        let result = work(queue, space);
        if queue.publish(space).expect("published") {
            let call = ring.call.as_ref().expect("a bell");
            rustix::io::write(call, &1u64.to_ne_bytes()).expect("rung");
        }
        result
    }

    /// Takes up to `most` frames that the front end has sent.
    pub fn take(&mut self, most: usize) -> Vec<(VnetHeader, Vec<u8>)> {
        self.with(1, |queue, space| {
            let mut storage = ChainStorage::with_capacity(256);
            let batch = queue.pop(space, &mut storage, most).expect("sound");
            let mut frames = Vec::new();
            let mut heads = Vec::new();
            for chain in batch.iter() {
                let bytes = chain.readable();
                let header: [u8; VnetHeader::LEN] = bytes.read_array().expect("a header");
                let mut frame = vec![0; bytes.len() - HEADER];
                bytes.skip(HEADER).read(&mut frame);
                frames.push((VnetHeader::from_bytes(&header), frame));
                heads.push(chain.head());
            }
            for head in heads {
                queue.complete(space, head, 0).expect("completed");
            }
            frames
        })
    }

    /// Sends a frame, in as many buffers as it takes; false if there are not enough.
    pub fn give(&mut self, header: &VnetHeader, frame: &[u8]) -> bool {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(frame);
        self.with(0, |queue, space| {
            let mut storage = ChainStorage::with_capacity(64);
            let batch = queue.pop(space, &mut storage, 64).expect("sound");
            let mut parts = Vec::new();
            let mut rest = &bytes[..];
            let all = batch.len();
            for chain in batch.iter() {
                if rest.is_empty() {
                    break;
                }
                let n = chain.writable().write(rest);
                rest = &rest[n..];
                parts.push((chain.head(), u32::try_from(n).expect("short")));
            }
            let enough = rest.is_empty();
            if let (true, Some(first)) = (enough, batch.get(0)) {
                let count = u16::try_from(parts.len()).expect("few");
                first.writable().skip(10).write(&count.to_le_bytes());
            }
            queue.rewind(all - if enough { parts.len() } else { 0 });
            if enough {
                for (head, written) in parts {
                    queue.complete(space, head, written).expect("completed");
                }
            }
            enough
        })
    }

    /// The words of the used ring of ring `index`, to write what one likes there.
    pub fn used(&self, index: usize) -> RamSlice<'_> {
        let at = usize::try_from(self.rings[index].areas[1] - self.base).expect("inside");
        self.memory.as_ref().expect("memory").ram().split_at(at).1
    }

    /// Rings the front end's bell of ring `index`.
    pub fn ring(&self, index: usize) {
        let call = self.rings[index].call.as_ref().expect("a bell");
        rustix::io::write(call, &1u64.to_ne_bytes()).expect("rung");
    }

    /// The bell of ring `index` that the front end rings.
    pub fn kick(&self, index: usize) -> &OwnedFd {
        self.rings[index].kick.as_ref().expect("a bell")
    }
}
