// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue of a tap interface: frames between the kernel and guest memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmsg_mem::Pieces;

use super::open::VNET_HEADER;
use super::{LONGEST, SHORTEST};
use crate::{Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Room that every guest's receive buffer has (virtio 1.3, 5.1.6.3.1: 1526 bytes with the header).
const USUAL: usize = 1514;

/// After so many frames of usual length in a row the next one is expected to be so, too.
const USUAL_RUN: u8 = 16;

/// How handing over one frame ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The guest has it.
    Delivered,
    /// It was no good.
    Dropped,
    /// There is no more.
    Empty,
    /// The guest has no room.
    NoRoom,
    /// The interface does not exist any more.
    Gone,
}

/// How handing a frame to the kernel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Taken,
    Dropped,
    Full,
}

/// A queue.
#[derive(Debug)]
pub(super) struct Queue {
    fd: OwnedFd,
    /// Bytes of the vnet header before frames, or 0.
    header_len: usize,
    /// Takes part in the interface's traffic.
    pub(super) attached: bool,
    /// There may be something to read.
    pub(super) readable: bool,
    /// For frames for which the guest's room turns out too short, and those at which the device wants to have a look.
    own: Box<[u8]>,
    /// Bytes of the frame that waits in `own`; 0: none does.
    waiting: usize,
    /// What its header says.
    header: VnetHeader,
    /// Frames of usual length in a row, up to [`USUAL_RUN`].
    usual: u8,
}

impl Queue {
    pub(super) fn new(fd: OwnedFd, vnet: bool) -> Self {
        Self {
            fd,
            header_len: if vnet { VNET_HEADER } else { 0 },
            attached: true,
            readable: true,
            // Untouched memory costs nothing.
            own: vec![0; LONGEST].into_boxed_slice(),
            waiting: 0,
            header: VnetHeader::default(),
            usual: USUAL_RUN,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn has_frames(&self) -> bool {
        self.waiting > 0 || (self.attached && self.readable)
    }

    /// Forgets everything that the interface has sent so far.
    pub(super) fn discard(&mut self, most: usize) {
        self.waiting = 0;
        for _ in 0..most {
            match rustix::io::read(&self.fd, &mut self.own[..64]) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => break,
            }
        }
    }

    /// Sends one frame of the guest.
    pub(super) fn send(&self, frame: &TxFrame<'_>) -> io::Result<Sent> {
        let mut bytes = [0; VNET_HEADER];
        // num_buffers, behind it, is 0 for frames from a driver.
        bytes[..VnetHeader::LEN].copy_from_slice(&frame.header.to_bytes());
        let whole = self.header_len + frame.payload.len();
        let sent = frame
            .payload
            .write_with_head(&bytes[..self.header_len], &self.fd);
        match sent {
            Ok(len) if len == whole => Ok(Sent::Taken),
            // More pieces than the kernel takes.
            Ok(_) => Ok(Sent::Dropped),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
            Err(error) => Err(error),
        }
    }

    /// Hands the next frame to the guest.
    pub(super) fn receive(
        &mut self,
        pair: u16,
        heads: bool,
        allowed: &Offloads,
        sink: &mut dyn RxSink,
    ) -> Step {
        if self.waiting == 0 {
            let step = if heads {
                self.read()
            } else {
                self.read_into(pair, allowed, sink)
            };
            if step != Step::Delivered || self.waiting == 0 {
                return step;
            }
        }
        self.hand_over(pair, heads, allowed, sink)
    }

    /// Reads straight into the guest's buffers. A frame longer than they are waits in own memory afterwards.
    fn read_into(&mut self, pair: u16, allowed: &Offloads, sink: &mut dyn RxSink) -> Step {
        if !self.readable || !self.attached {
            return Step::Empty;
        }
        let most = match self.usual {
            USUAL_RUN.. => USUAL,
            _ => LONGEST,
        };
        let Some(room) = sink.offer_between(Target::Pair(pair), USUAL, most) else {
            return Step::NoRoom;
        };
        let room = room.take(most);
        let tail = self.own.get_mut(room.len()..).unwrap_or_default();
        let mut head = [0; VNET_HEADER];
        let read = room.read_between(&mut head[..self.header_len], tail, &self.fd);
        let len = match self.frame_len(read) {
            Ok(len) => len,
            Err(step) => return step,
        };
        let Some(header) = checked(&head, allowed) else {
            return Step::Dropped;
        };
        if len > USUAL {
            self.usual = 0;
        } else {
            self.usual = self.usual.saturating_add(1).min(USUAL_RUN);
        }
        if len <= room.len() {
            sink.commit(&header, len);
            return Step::Delivered;
        }
        // The guest may have changed the beginning meanwhile: its own loss.
        let first = room.len();
        room.read(&mut self.own[..first]);
        self.waiting = len;
        self.header = header;
        Step::Delivered
    }

    /// Reads into own memory.
    fn read(&mut self) -> Step {
        if !self.readable || !self.attached {
            return Step::Empty;
        }
        let mut head = [0; VNET_HEADER];
        let read =
            Pieces::EMPTY.read_between(&mut head[..self.header_len], &mut self.own, &self.fd);
        match self.frame_len(read) {
            Ok(len) => {
                self.waiting = len;
                self.header = VnetHeader::from_bytes(head.first_chunk().expect("longer"));
                Step::Delivered
            }
            Err(step) => step,
        }
    }

    /// Gives the guest the frame that waits.
    fn hand_over(
        &mut self,
        pair: u16,
        heads: bool,
        allowed: &Offloads,
        sink: &mut dyn RxSink,
    ) -> Step {
        let frame = &self.own[..self.waiting];
        let Some(header) = allow(self.header, allowed) else {
            self.waiting = 0;
            return Step::Dropped;
        };
        let target = match heads {
            true => Target::Head(&frame[..frame.len().min(Target::HEAD)]),
            false => Target::Pair(pair),
        };
        let Some(room) = sink.offer(target, frame.len()) else {
            return Step::NoRoom;
        };
        room.write(frame);
        sink.commit(&header, frame.len());
        self.waiting = 0;
        Step::Delivered
    }

    /// What reading a frame has come to: its length, without the vnet header.
    fn frame_len(&mut self, read: io::Result<usize>) -> Result<usize, Step> {
        match read {
            Ok(len) => match len.checked_sub(self.header_len) {
                Some(len @ SHORTEST..) => Ok(len),
                _ => Err(Step::Dropped),
            },
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                self.readable = false;
                Err(Step::Gone)
            }
            // The guest's memory is gone; the frame is lost.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Err(Step::Dropped),
            Err(_) => {
                self.readable = false;
                Err(Step::Empty)
            }
        }
    }
}

fn checked(head: &[u8; VNET_HEADER], allowed: &Offloads) -> Option<VnetHeader> {
    let header = VnetHeader::from_bytes(head.first_chunk()?);
    allow(header, allowed)
}

/// The header as the guest may see it; `None` if it does not take such frames: they were on their
/// way when another driver was there.
fn allow(mut header: VnetHeader, allowed: &Offloads) -> Option<VnetHeader> {
    if !allowed.guest_csum {
        if header.needs_csum() {
            return None;
        }
        header.flags = 0;
    }
    header.flags &= VnetHeader::NEEDS_CSUM | VnetHeader::DATA_VALID;
    let ecn = header.gso_type & VnetHeader::GSO_ECN != 0;
    let good = match header.gso_type & !VnetHeader::GSO_ECN {
        VnetHeader::GSO_NONE => !ecn,
        VnetHeader::GSO_TCPV4 => allowed.guest_tso4,
        VnetHeader::GSO_TCPV6 => allowed.guest_tso6,
        VnetHeader::GSO_UDP => allowed.guest_ufo,
        VnetHeader::GSO_UDP_L4 => allowed.guest_uso4 || allowed.guest_uso6,
        _ => false,
    };
    (good && (!ecn || allowed.guest_ecn)).then_some(header)
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
