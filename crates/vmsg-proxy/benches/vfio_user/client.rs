// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vfio-user client that does what QEMU does, and waits for each answer in recv(2).

use crate::guest::{self, BASE, BUFFERS, Driver, LEN, Ram, SIZE};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

// Commands and flags of the vfio-user specification.
const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Regions.
pub(crate) const BAR4: u32 = 4;
const CONFIG: u32 = 7;

// Offsets in BAR 4.
pub(crate) const STATUS: u64 = 0x14;
pub(crate) const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

/// Bytes of a REGION_READ, of its answer without the data, of a REGION_WRITE without the data, and of its answer.
pub(crate) const REGION_MESSAGE: usize = 32;

/// A connection.
pub(crate) struct Client {
    stream: UnixStream,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).expect("a front");
        let client = Client { stream };
        let mut version = vec![0, 0, 1, 0];
        version.extend(br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#);
        version.push(0);
        client.ask(VERSION, &version, &[]);
        client
    }

    /// Without descriptors by send(2).
    fn send(&self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut message = [0; 256];
        let len = 16 + payload.len();
        message[2..4].copy_from_slice(&command.to_le_bytes());
        message[4..8].copy_from_slice(&u32::try_from(len).expect("short").to_le_bytes());
        message[8..12].copy_from_slice(&flags.to_le_bytes());
        message[16..len].copy_from_slice(payload);
        let message = &message[..len];
        let sent = if fds.is_empty() {
            send(&self.stream, message, SendFlags::NOSIGNAL)
        } else {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "room");
            let bytes = [IoSlice::new(message)];
            sendmsg(&self.stream, &bytes, &mut control, SendFlags::NOSIGNAL)
        };
        assert_eq!(sent, Ok(len), "all of it");
    }

    /// Gives the answer's payload, which must be no error.
    fn ask(&self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> [u8; 512] {
        self.send(command, 0, payload, fds);
        let mut answer = [0; 512];
        let mut got = 0;
        loop {
            let more = recv(&self.stream, &mut answer[got..], RecvFlags::empty());
            got += more.expect("an answer").0;
            let len = u32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]);
            if got >= 16 && got == len as usize {
                break;
            }
            assert_ne!(got, 0, "the connection has ended");
        }
        let flags = u32::from_le_bytes([answer[8], answer[9], answer[10], answer[11]]);
        assert_eq!(flags & ERROR, 0, "command {command}");
        answer
    }

    pub(crate) fn read(&self, region: u32, offset: u64, len: usize) -> u64 {
        let mut payload = [0; 16];
        payload[..8].copy_from_slice(&offset.to_le_bytes());
        payload[8..12].copy_from_slice(&region.to_le_bytes());
        payload[12..].copy_from_slice(&u32::try_from(len).expect("short").to_le_bytes());
        let answer = self.ask(REGION_READ, &payload, &[]);
        let mut value = [0; 8];
        value[..len].copy_from_slice(&answer[REGION_MESSAGE..REGION_MESSAGE + len]);
        u64::from_le_bytes(value)
    }

    fn write_payload(region: u32, offset: u64, value: u64, len: usize) -> [u8; 24] {
        let mut payload = [0; 24];
        payload[..8].copy_from_slice(&offset.to_le_bytes());
        payload[8..12].copy_from_slice(&region.to_le_bytes());
        payload[12..16].copy_from_slice(&u32::try_from(len).expect("short").to_le_bytes());
        payload[16..16 + len].copy_from_slice(&value.to_le_bytes()[..len]);
        payload
    }

    pub(crate) fn write(&self, region: u32, offset: u64, value: u64, len: usize) {
        let payload = Client::write_payload(region, offset, value, len);
        self.ask(REGION_WRITE, &payload[..16 + len], &[]);
    }

    /// Without an answer, as QEMU writes to BARs.
    pub(crate) fn post(&self, region: u32, offset: u64, value: u64, len: usize) {
        let payload = Client::write_payload(region, offset, value, len);
        self.send(REGION_WRITE, NO_REPLY, &payload[..16 + len], &[]);
    }

    /// Opens memory to the device.
    pub(crate) fn map(&self, address: u64, size: u64, offset: u64, file: impl AsFd) {
        let mut payload = [0; 32];
        payload[..4].copy_from_slice(&32u32.to_le_bytes());
        // Readable and writable.
        payload[4..8].copy_from_slice(&3u32.to_le_bytes());
        payload[8..16].copy_from_slice(&offset.to_le_bytes());
        payload[16..24].copy_from_slice(&address.to_le_bytes());
        payload[24..].copy_from_slice(&size.to_le_bytes());
        self.ask(DMA_MAP, &payload, &[file.as_fd()]);
    }

    /// Closes it.
    pub(crate) fn unmap(&self, address: u64, size: u64) {
        let mut payload = [0; 24];
        payload[..4].copy_from_slice(&24u32.to_le_bytes());
        payload[8..16].copy_from_slice(&address.to_le_bytes());
        payload[16..].copy_from_slice(&size.to_le_bytes());
        self.ask(DMA_UNMAP, &payload, &[]);
    }

    fn set_eventfds(&self, fds: &[BorrowedFd<'_>]) {
        let mut payload = [0; 20];
        let count = u32::try_from(fds.len()).expect("few");
        // MSI-X from vector 0 on; VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER.
        for (at, value) in (0..).step_by(4).zip([20, 4 | 32, 2, 0, count]) {
            payload[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.ask(SET_IRQS, &payload, fds);
    }

    fn set(&self, offset: u64, value: u64, len: usize) {
        self.write(BAR4, offset, value, len);
    }

    /// Brings the device up as a driver does (virtio 1.3 §3.1.1 and §4.1.5.1), with one queue of the one at the beginning of `ram`.
    pub(crate) fn bring_up(self: &Rc<Self>, queue: u16, ram: &Ram) -> Driver<'static> {
        self.set(STATUS, 0, 1);
        assert_eq!(self.read(BAR4, STATUS, 1), 0, "reset");
        self.set(STATUS, 1, 1);
        self.set(STATUS, 3, 1);
        // EVENT_IDX; VERSION_1, ACCESS_PLATFORM.
        for (block, wanted) in [(0, 1 << 29), (1, 3)] {
            self.set(0x0, block, 4);
            assert_eq!(self.read(BAR4, 0x4, 4) & wanted, wanted, "offered");
            self.set(0x8, block, 4);
            self.set(0xc, wanted, 4);
        }
        self.set(STATUS, 0xb, 1);
        assert_eq!(self.read(BAR4, STATUS, 1), 0xb, "features");
        let (other, call) = (guest::bell(), guest::bell());
        self.set_eventfds(&[other.as_fd(), call.as_fd()]);
        // MSI-X on.
        self.write(CONFIG, 0x42, 0x8000, 2);
        let ring = ram.queue();
        self.set(0x16, queue.into(), 2);
        self.set(0x18, SIZE.into(), 2);
        self.set(0x1a, 1, 2);
        let config = ring.config();
        let areas = [config.desc, config.driver, config.device];
        for (at, area) in (0x20..).step_by(8).zip(areas) {
            self.set(at, area.0 & 0xffff_ffff, 4);
            self.set(at + 4, area.0 >> 32, 4);
        }
        self.set(0x1c, 1, 2);
        assert_eq!(self.read(BAR4, 0x1c, 2), 1, "the queue");
        self.set(STATUS, 0xf, 1);
        assert_eq!(self.read(BAR4, STATUS, 1), 0xf, "DRIVER_OK");
        let client = Rc::clone(self);
        let at = NOTIFY + 4 * u64::from(queue);
        Driver {
            queue: ring,
            kick: Box::new(move || client.post(BAR4, at, queue.into(), 2)),
            call,
            buffers: BASE + BUFFERS,
        }
    }

    /// The same, with all of the memory open.
    pub(crate) fn drive(self: &Rc<Self>, queue: u16, ram: &Ram) -> Driver<'static> {
        self.map(BASE, LEN, 0, &ram.file);
        self.bring_up(queue, ram)
    }
}
