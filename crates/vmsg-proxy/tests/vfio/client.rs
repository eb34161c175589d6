// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vfio-user client that sends what it likes and serves its memory: what the crate `vfio_user` cannot do.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::collections::HashMap;
use std::io::{IoSlice, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vmsg_mem::Mapping;

/// Nothing takes so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;

const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// An errno in an answer.
pub type Answer = Result<Vec<u8>, u32>;

/// Memory that is reached by messages: where it is on the bus, and the bytes.
pub struct Memory {
    pub base: u64,
    pub ram: &'static Mapping,
    /// Transfers done.
    pub transfers: AtomicU64,
    /// Messages for it are left unanswered.
    pub silent: AtomicBool,
}

type Waiting = Arc<Mutex<HashMap<u16, Sender<Answer>>>>;

pub struct Client {
    stream: UnixStream,
    waiting: Waiting,
    next: u16,
    reader: Option<JoinHandle<()>>,
}

fn header(id: u16, command: u16, len: usize, flags: u32, errno: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&id.to_le_bytes());
    bytes[2..4].copy_from_slice(&command.to_le_bytes());
    bytes[4..8].copy_from_slice(&(len as u32 + 16).to_le_bytes());
    bytes[8..12].copy_from_slice(&flags.to_le_bytes());
    bytes[12..].copy_from_slice(&errno.to_le_bytes());
    bytes
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn send(stream: &UnixStream, message: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let bytes = [IoSlice::new(message)];
    let sent = sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    assert_eq!(sent, message.len(), "a short message");
    Ok(())
}

/// Reads what the front says: hands answers on and serves transfers.
fn read(mut stream: UnixStream, waiting: Waiting, memory: Option<Arc<Memory>>) {
    let mut head = [0; 16];
    while stream.read_exact(&mut head).is_ok() {
        let id = u16::from_le_bytes([head[0], head[1]]);
        let command = u16::from_le_bytes([head[2], head[3]]);
        let (size, flags, errno) = (u32_at(&head, 4), u32_at(&head, 8), u32_at(&head, 12));
        let mut payload = vec![0; size as usize - 16];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        if flags & 0xf == REPLY {
            let waits = waiting.lock().unwrap().remove(&id);
            let answer = match flags & ERROR {
                0 => Ok(payload),
                _ => Err(errno),
            };
            waits
                .expect("an answer to a question")
                .send(answer)
                .unwrap();
            continue;
        }
        let memory = memory.as_ref().expect("memory without files");
        if memory.silent.load(Ordering::SeqCst) {
            continue;
        }
        let (address, count) = (u64_at(&payload, 0), u64_at(&payload, 8) as usize);
        let at = (address - memory.base) as usize;
        if count > memory.ram.len() {
            let refused = header(id, command, 0, REPLY | ERROR, 22);
            send(&stream, &refused, &[]).unwrap();
            continue;
        }
        memory.transfers.fetch_add(1, Ordering::SeqCst);
        let mut answer = payload[..16].to_vec();
        match command {
            DMA_READ => {
                let mut bytes = vec![0; count];
                assert_eq!(memory.ram.ram().read(at, &mut bytes), count);
                answer.extend(bytes);
            }
            DMA_WRITE => assert_eq!(memory.ram.ram().write(at, &payload[16..]), count),
            other => panic!("command {other}"),
        }
        let mut message = header(id, command, answer.len(), REPLY, 0).to_vec();
        message.extend(answer);
        if send(&stream, &message, &[]).is_err() {
            return;
        }
    }
}

impl Client {
    /// Connects and says its version.
    pub fn new(socket: &Path, memory: Option<Arc<Memory>>) -> Client {
        let (client, answer) = Client::connect(socket, memory);
        answer.expect("the version");
        client
    }

    /// The same, with the answer to the version.
    pub fn connect(socket: &Path, memory: Option<Arc<Memory>>) -> (Client, Answer) {
        let stream = UnixStream::connect(socket).unwrap();
        let waiting = Waiting::default();
        let (other, waits) = (stream.try_clone().unwrap(), waiting.clone());
        let reader = std::thread::spawn(move || read(other, waits, memory));
        let mut client = Client {
            stream,
            waiting,
            next: 0,
            reader: Some(reader),
        };
        let mut version = vec![0, 0, 1, 0];
        version.extend(br#"{"capabilities":{"max_msg_fds":64,"max_data_xfer_size":1048576}}"#);
        version.push(0);
        let answer = client.ask(VERSION, &version, &[]);
        (client, answer)
    }

    pub fn ask(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        let answer = self.start(command, payload, fds);
        answer.recv_timeout(PATIENCE).expect("an answer")
    }

    /// Asks without waiting for the answer. The connection may have ended.
    pub fn start(
        &mut self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Receiver<Answer> {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let (reply, answer) = mpsc::channel();
        self.waiting.lock().unwrap().insert(id, reply);
        let mut message = header(id, command, payload.len(), 0, 0).to_vec();
        message.extend(payload);
        send(&self.stream, &message, fds).unwrap();
        answer
    }

    pub fn read_region(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        let mut payload = offset.to_le_bytes().to_vec();
        payload.extend(region.to_le_bytes());
        payload.extend((into.len() as u32).to_le_bytes());
        let answer = self.ask(REGION_READ, &payload, &[]).unwrap();
        into.copy_from_slice(&answer[16..]);
    }

    fn write_payload(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
        let mut payload = offset.to_le_bytes().to_vec();
        payload.extend(region.to_le_bytes());
        payload.extend((data.len() as u32).to_le_bytes());
        payload.extend(data);
        payload
    }

    pub fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) {
        let payload = Client::write_payload(region, offset, data);
        self.ask(REGION_WRITE, &payload, &[]).unwrap();
    }

    /// Without an answer, as QEMU does.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let payload = Client::write_payload(region, offset, data);
        let mut message = header(self.next, REGION_WRITE, payload.len(), NO_REPLY, 0).to_vec();
        self.next = self.next.wrapping_add(1);
        message.extend(payload);
        send(&self.stream, &message, &[]).unwrap();
    }

    pub fn map(
        &mut self,
        address: u64,
        size: u64,
        offset: u64,
        fd: Option<BorrowedFd<'_>>,
    ) -> Answer {
        let mut payload = 32u32.to_le_bytes().to_vec();
        payload.extend(3u32.to_le_bytes());
        for value in [offset, address, size] {
            payload.extend(value.to_le_bytes());
        }
        self.ask(DMA_MAP, &payload, fd.as_slice())
    }

    fn unmap_payload(address: u64, size: u64, all: bool) -> Vec<u8> {
        let mut payload = 24u32.to_le_bytes().to_vec();
        payload.extend(if all { 2u32 } else { 0 }.to_le_bytes());
        payload.extend(address.to_le_bytes());
        payload.extend(size.to_le_bytes());
        payload
    }

    /// Gives how many bytes that were.
    pub fn unmap(&mut self, address: u64, size: u64) -> Result<u64, u32> {
        let payload = Client::unmap_payload(address, size, false);
        let answer = self.ask(DMA_UNMAP, &payload, &[])?;
        Ok(u64_at(&answer, 16))
    }

    pub fn unmap_all(&mut self) -> Result<u64, u32> {
        let payload = Client::unmap_payload(0, 0, true);
        let answer = self.ask(DMA_UNMAP, &payload, &[])?;
        Ok(u64_at(&answer, 16))
    }

    /// Eventfds for the interrupts of a kind from `start` on.
    pub fn set_eventfds(&mut self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) {
        let mut payload = Vec::new();
        // VFIO_IRQ_SET_DATA_EVENTFD or _NONE, VFIO_IRQ_SET_ACTION_TRIGGER.
        let kind = if fds.is_empty() { 1u32 } else { 4 };
        for value in [20, kind | 32, index, start, fds.len() as u32] {
            payload.extend(value.to_le_bytes());
        }
        self.ask(SET_IRQS, &payload, fds).unwrap();
    }

    /// VFIO_IRQ_SET_ACTION_UNMASK.
    pub fn unmask(&mut self, index: u32) {
        let mut payload = Vec::new();
        for value in [20u32, 1 | 16, index, 0, 1] {
            payload.extend(value.to_le_bytes());
        }
        self.ask(SET_IRQS, &payload, &[]).unwrap();
    }

    /// The same by an eventfd from now on.
    pub fn set_unmask_eventfd(&mut self, fd: BorrowedFd<'_>) {
        let mut payload = Vec::new();
        for value in [20u32, 4 | 16, 0, 0, 1] {
            payload.extend(value.to_le_bytes());
        }
        self.ask(SET_IRQS, &payload, &[fd]).unwrap();
    }

    pub fn reset(&mut self) {
        self.ask(RESET, &[], &[]).unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let _ = self.reader.take().unwrap().join();
    }
}
