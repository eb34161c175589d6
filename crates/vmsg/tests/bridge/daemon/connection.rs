// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection to the daemon of the tests: messages, and how they are answered.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vmsg_mem::{Doorbell, Mapping};

use super::ring::{Region, Ring, process, stride};
use super::{CONFIG, Mischief, QUEUES, SECTORS, Shared};

/// What one connection has said.
pub(super) struct Connection {
    socket: UnixStream,
    protocol: u64,
    shared: Arc<Shared>,
    regions: Vec<Region>,
    rings: Vec<Ring>,
    inflight: Option<(Arc<OwnedFd>, u64, u16)>,
    /// Where queues were, also those that were stopped.
    addresses: Vec<[u64; 3]>,
}

fn word(body: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(body[at..at + 4].try_into().expect("four"))
}

fn long(body: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(body[at..at + 8].try_into().expect("eight"))
}

impl Connection {
    pub(super) fn new(socket: UnixStream, protocol: u64, shared: Arc<Shared>) -> Self {
        Self {
            socket,
            protocol,
            shared,
            regions: Vec::new(),
            rings: (0..QUEUES).map(|_| Ring::default()).collect(),
            inflight: None,
            addresses: Vec::new(),
        }
    }

    /// Waits for something to do, and does it; `None` at the end.
    pub(super) fn serve(&mut self) -> Option<()> {
        let enabled = self.rings.iter().filter(|ring| ring.enabled).count();
        self.shared.enabled.store(enabled, Ordering::SeqCst);
        let ready: Vec<bool> = {
            let kicks = self.rings.iter().filter(|ring| ring.enabled);
            let kicks = kicks.filter_map(|ring| ring.kick.as_ref());
            let fds = std::iter::once(self.socket.as_fd()).chain(kicks.map(|kick| kick.as_fd()));
            let mut fds: Vec<_> = fds
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            poll(&mut fds, None).ok()?;
            fds.iter().map(|fd| !fd.revents().is_empty()).collect()
        };
        if ready[0] {
            let slow = self.shared.slow.load(Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(slow));
            return self.message();
        }
        let rings = self.rings.iter_mut().zip(0..);
        let active = rings.filter(|(ring, _)| ring.enabled && ring.kick.is_some());
        for ((ring, index), ready) in active.zip(&ready[1..]) {
            if *ready {
                let mut count = [0; 8];
                let _ = rustix::io::read(ring.kick.as_ref().expect("active"), &mut count);
                let kicks = &self.shared.kicks[usize::try_from(index).expect("few")];
                kicks.fetch_add(1, Ordering::SeqCst);
                let inflight = self.inflight.as_ref();
                let taken = || self.shared.taken.load(Ordering::SeqCst);
                let before = taken();
                process(ring, &self.regions, inflight, index, &self.shared);
                if self.shared.dies.load(Ordering::SeqCst) && taken() != before {
                    return None;
                }
            }
        }
        Some(())
    }

    fn message(&mut self) -> Option<()> {
        let mut head = [0; 12];
        let mut files = Vec::new();
        let mut have = 0;
        while have < head.len() {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let mut into = [IoSliceMut::new(&mut head[have..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = recvmsg(&self.socket, &mut into, &mut control, flags).ok()?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(given) = message {
                    files.extend(given);
                }
            }
            if got.bytes == 0 {
                return None;
            }
            have += got.bytes;
        }
        let (id, flags) = (word(&head, 0), word(&head, 4));
        let mut body = vec![0; word(&head, 8) as usize];
        self.socket.read_exact(&mut body).ok()?;
        let (mut answer, mut file) = self.handle(id, &body, files);
        if self.shared.keeps_addresses.load(Ordering::SeqCst) && [5, 37].contains(&id) {
            let there = |addr: &u64| {
                let mut regions = self.regions.iter();
                regions.any(|region| (region.0..region.0 + region.1).contains(addr))
            };
            if !self.addresses.iter().flatten().all(there) {
                self.shared.lost_addresses.fetch_add(1, Ordering::SeqCst);
                return None;
            }
        }
        if self.shared.refused.lock().expect("sound").contains(&id) {
            if self.shared.refuses_by_closing.load(Ordering::SeqCst) {
                return None;
            }
            file = None;
            if id == 32 {
                self.inflight = None;
            }
            answer = Some(match id {
                31 => vec![0; 24],
                _ => 1u64.to_ne_bytes().to_vec(),
            });
        }
        let answer = match answer {
            Some(answer) => answer,
            None if flags & 8 != 0 && self.protocol & 1 << 3 != 0 => 0u64.to_ne_bytes().to_vec(),
            None => {
                let planned = self
                    .shared
                    .mischief
                    .lock()
                    .expect("sound")
                    .take_if(|(at, _)| *at == id);
                return match planned {
                    Some((_, what)) => {
                        self.shared.done_wrong.store(true, Ordering::SeqCst);
                        self.answer(id, vec![0; 8], None, Some(what))
                    }
                    None => Some(()),
                };
            }
        };
        let planned = self
            .shared
            .mischief
            .lock()
            .expect("sound")
            .take_if(|(at, _)| *at == id);
        if planned.is_some() {
            self.shared.done_wrong.store(true, Ordering::SeqCst);
        }
        self.answer(id, answer, file, planned.map(|(_, what)| what))
    }

    fn answer(
        &mut self,
        id: u32,
        mut body: Vec<u8>,
        file: Option<OwnedFd>,
        mischief: Option<Mischief>,
    ) -> Option<()> {
        let mut head = [id, 5, u32::try_from(body.len()).expect("short")];
        let mut files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let mut times = 1;
        let mut end = false;
        let null = std::fs::File::open("/dev/null").expect("there");
        match mischief {
            None => {}
            Some(Mischief::Hang) => {
                // Until the other side has had enough.
                let mut byte = [0];
                let _ = self.socket.read(&mut byte);
                return None;
            }
            Some(Mischief::Close) => return None,
            Some(Mischief::Stuck) => {
                while !self.shared.let_go.load(Ordering::SeqCst) {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                return None;
            }
            Some(Mischief::Short) => {
                head[2] -= 1;
                body.pop();
            }
            Some(Mischief::Endless) => head[2] = u32::MAX,
            Some(Mischief::Other) => head[0] += 1,
            Some(Mischief::Unmarked) => head[1] = 1,
            Some(Mischief::Twice) => times = 2,
            Some(Mischief::Descriptors) => files.extend([null.as_fd(); 5]),
            Some(Mischief::Ones) => body.fill(0xff),
            Some(Mischief::Unasked) => {
                let mut bytes = Vec::new();
                for word in [11, 5, 8, 0, 0] {
                    bytes.extend(u32::to_ne_bytes(word));
                }
                self.socket.write_all(&bytes).ok()?;
            }
            Some(Mischief::CutOff) => {
                body.truncate(3);
                end = true;
            }
        }
        let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(body);
        for _ in 0..times {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            if !files.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            }
            let flags = SendFlags::NOSIGNAL;
            sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags).ok()?;
        }
        (!end).then_some(())
    }

    fn handle(
        &mut self,
        id: u32,
        body: &[u8],
        files: Vec<OwnedFd>,
    ) -> (Option<Vec<u8>>, Option<OwnedFd>) {
        let mut files = files.into_iter();
        let number = |number: u64| (Some(number.to_ne_bytes().to_vec()), None);
        let index = || (word(body, 0) & 0xff) as usize;
        match id {
            // FLUSH, CONFIG_WCE, MQ, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1; packed and in order, which must not be taken.
            1 => return number(1 << 9 | 1 << 11 | 1 << 12 | 1 << 29 | 1 << 30 | 1 << 32 | 3 << 34),
            2 => {
                let features = long(body, 0);
                assert!(features & (3 << 33 | 1 << 35) == 0, "{features:#x}");
            }
            5 => {
                self.regions.clear();
                for at in 0..word(body, 0) as usize {
                    let at = 8 + 32 * at;
                    self.add(&body[at..], files.next());
                }
            }
            37 => self.add(&body[8..], files.next()),
            38 => {
                let guest = long(body, 8);
                let before = self.regions.len();
                self.regions.retain(|region| region.0 != guest);
                assert_eq!(self.regions.len() + 1, before);
            }
            8 => self.rings[index()].size = u16::try_from(word(body, 4)).expect("small"),
            9 => {
                let addresses = [long(body, 8), long(body, 24), long(body, 16)];
                self.rings[index()].addresses = addresses;
                self.addresses.push(addresses);
            }
            10 => self.rings[index()].base = u16::try_from(word(body, 4)).expect("small"),
            11 => {
                let ring = &mut self.rings[index()];
                let base = match ring.queue.take() {
                    Some((mut queue, _)) => queue.queue().avail_index(),
                    None => ring.base,
                };
                *ring = Ring::default();
                let mut answer = body[..4].to_vec();
                answer.extend(u32::from(base).to_ne_bytes());
                return (Some(answer), None);
            }
            12 => self.rings[index()].kick = files.next(),
            13 => {
                let call = Doorbell::from_fd(files.next().expect("one")).expect("an eventfd");
                if index() == 0 {
                    let copy = call.try_clone().expect("a descriptor");
                    *self.shared.call.lock().expect("sound") = Some(copy);
                }
                self.rings[index()].call = Some(call);
            }
            14 => {
                let error = Doorbell::from_fd(files.next().expect("one")).expect("an eventfd");
                *self.shared.error.lock().expect("sound") = Some(error);
            }
            15 => return number(self.protocol),
            17 => return number(QUEUES.into()),
            18 => self.rings[index()].enabled = word(body, 4) == 1,
            21 => {
                let channel = UnixStream::from(files.next().expect("one"));
                *self.shared.channel.lock().expect("sound") = Some(channel);
            }
            24 => {
                if (word(body, 0), word(body, 4)) != (0, CONFIG) {
                    // As libvhost-user says that it has not so much.
                    return (Some(Vec::new()), None);
                }
                let mut answer = body.to_vec();
                let config = &mut answer[12..];
                config[..8].copy_from_slice(&SECTORS.to_le_bytes());
                config[32] = self.shared.write_back.load(Ordering::SeqCst).into();
                config[34..36].copy_from_slice(&QUEUES.to_le_bytes());
                return (Some(answer), None);
            }
            25 => {
                self.shared.config_writes.fetch_add(1, Ordering::SeqCst);
                assert_eq!((word(body, 0), word(body, 4)), (32, 1));
                self.shared
                    .write_back
                    .store(body[12] == 1, Ordering::SeqCst);
            }
            31 => {
                let (queues, size) = (word(body, 16) & 0xffff, word(body, 16) >> 16);
                let size = u16::try_from(size).expect("16 bits");
                let len = stride(size) * u64::from(queues);
                let (_, file) = Mapping::memfd("test", len, false).expect("memory");
                let mut answer = len.to_ne_bytes().to_vec();
                answer.extend(0u64.to_ne_bytes());
                answer.extend(&body[16..20]);
                answer.extend([0; 4]);
                return (Some(answer), Some(file));
            }
            32 => {
                let size = u16::try_from(word(body, 16) >> 16).expect("16 bits");
                let file = Arc::new(files.next().expect("one"));
                self.inflight = Some((file, long(body, 8), size));
            }
            36 => return number(32),
            _ => {}
        }
        let count = self.regions.len();
        self.shared.regions.store(count, Ordering::SeqCst);
        let memory = self.regions.iter().map(|region| (region.0, region.1));
        *self.shared.memory.lock().expect("sound") = memory.collect();
        (None, None)
    }

    fn add(&mut self, body: &[u8], file: Option<OwnedFd>) {
        assert_eq!(long(body, 0), long(body, 16), "the addresses of rings");
        let file = Arc::new(file.expect("a file"));
        let region = (long(body, 0), long(body, 8), long(body, 24), file);
        self.regions.push(region);
    }
}
