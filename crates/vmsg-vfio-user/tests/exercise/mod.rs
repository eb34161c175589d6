// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A story made of any bytes: what a client sends, in which pieces, with how many descriptors, and when it reads. In the end it has had exactly the answers that it was entitled to.

#![allow(unreachable_pub, reason = "shared with the fuzz target")]

use crate::support::{self, Pair, Recorder};
use std::os::fd::{AsFd, BorrowedFd};
use vmsg_vfio_user::{End, Options};

/// The pieces of a story.
struct Story<'a>(&'a [u8]);

impl<'a> Story<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        front
    }

    /// Numbers that matter more often than by chance.
    fn u32(&mut self) -> u32 {
        match self.byte().unwrap_or(0) {
            byte @ 0..0xe0 => u32::from(byte & 0x3f),
            0xe0..0xe8 => 4096,
            0xe8..0xf0 => 4095,
            0xf0..0xf8 => u32::MAX,
            _ => {
                let mut number = [0; 4];
                for (to, from) in number.iter_mut().zip(self.bytes(4)) {
                    *to = *from;
                }
                u32::from_le_bytes(number)
            }
        }
    }

    fn u64(&mut self) -> u64 {
        let high = self.u32();
        let high = if high < 0x30 { 0 } else { high };
        u64::from(high) << 32 | u64::from(self.u32())
    }

    /// The payload of a command that has the right form at least.
    fn payload(&mut self, command: u16) -> Vec<u8> {
        let argsz = [16, 24, 32, 64, 1000, 0][usize::from(self.byte().unwrap_or(0) % 6)];
        match command {
            support::VERSION => match self.byte().unwrap_or(0) {
                0..0xc0 => support::version(support::QEMU),
                0xc0..0xe0 => support::version(self.bytes(40)),
                _ => support::version(b""),
            },
            support::DMA_MAP => {
                support::dma_map(self.u32() & 7, self.u64(), self.u64(), self.u64())
            }
            support::DMA_UNMAP => support::dma_unmap(self.u32() & 7, self.u64(), self.u64()),
            support::SET_IRQS => {
                let fields = [argsz, self.u32(), self.u32() & 7, self.u32(), self.u32()];
                let mut payload = support::u32s(&fields);
                payload.extend_from_slice(self.bytes(4));
                payload
            }
            support::REGION_READ | support::REGION_WRITE => {
                let (offset, region, count) = (self.u64(), self.u32() & 7, self.u32());
                let sent = if command == support::REGION_WRITE {
                    count & 0xff
                } else {
                    0
                };
                let data = vec![0xa5; usize::try_from(sent).unwrap_or(0)];
                support::access(offset, region, count, &data)
            }
            support::REGION_WRITE_MULTI => {
                let count = self.byte().unwrap_or(0) % 4;
                let mut payload = u64::from(count).to_ne_bytes().to_vec();
                for _ in 0..count {
                    let access = (self.u64(), self.u32() & 7, self.u32() & 15);
                    payload.extend(support::access(access.0, access.1, access.2, &[7; 8]));
                }
                payload
            }
            _ => support::u32s(&[argsz, 0, self.u32() & 15, 0, 0, 0, 0, 0]),
        }
    }

    /// A message as a correct client might send it, or nearly.
    fn message(&mut self, id: u16) -> Vec<u8> {
        let kind = self.byte().unwrap_or(0);
        let command = u16::from(kind & 0x1f);
        let flags = match kind >> 5 {
            0..4 => 0,
            4 | 5 => support::NO_REPLY,
            6 => support::REPLY,
            _ => support::REPLY | support::ERROR,
        };
        let payload = self.payload(command);
        support::message(id, command, flags, &payload)
    }
}

/// What a client is entitled to for the bytes it has sent.
fn entitled(stream: &[u8]) -> (Vec<(u16, u16)>, bool) {
    let mut answers = Vec::new();
    let mut rest = stream;
    while let Some((header, _)) = rest.split_first_chunk::<16>() {
        let field = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (size, flags) = (field(4), field(8));
        if size < 16 || flags & 15 > 1 {
            return (answers, false);
        }
        let size = usize::try_from(size).expect("32 bits fit");
        // What is longer than 1 MiB and a header is refused as soon as it begins.
        let whole = rest.len() >= size;
        let begun = whole || size > (1 << 20) + 32;
        if begun && flags & 15 == 0 && flags & support::NO_REPLY == 0 {
            let id = u16::from_ne_bytes([header[0], header[1]]);
            answers.push((id, u16::from_ne_bytes([header[2], header[3]])));
        }
        if !whole {
            break;
        }
        rest = &rest[size..];
    }
    (answers, true)
}

/// Tells the story.
pub fn server(bytes: &[u8]) {
    let mut story = Story(bytes);
    let mut pair = Pair::silent(Options::default());
    let file = support::file(0x1000);
    let mut sent = Vec::new();
    let mut answered = Vec::new();
    let mut end = None;
    let mut next_id = 0;
    if story.byte().unwrap_or(0) & 7 != 0 {
        let version = support::message(
            0xffff,
            support::VERSION,
            0,
            &support::version(support::QEMU),
        );
        support::send(&pair.client, &version, &[]);
        sent.extend(version);
        end = turn(&mut pair, &mut answered);
    }
    while let Some(what) = story.byte() {
        let chunk = if what & 0x80 == 0 {
            next_id += 1;
            story.message(next_id)
        } else {
            story.bytes(usize::from(what & 0x1f)).to_vec()
        };
        let fds = vec![file.as_fd(); [0, 0, 1, 1, 2, 16, 17, 30][usize::from(what & 7)]];
        // In two pieces, with descriptors at either.
        let cut = if what & 0x40 == 0 {
            chunk.len()
        } else {
            chunk.len() / 2
        };
        let (front, back) = chunk.split_at(cut);
        let with_back = what & 0x20 != 0;
        for (piece, with_fds) in [(front, !with_back), (back, with_back)] {
            let fds: &[BorrowedFd<'_>] = if with_fds { &fds } else { &[] };
            if piece.is_empty() || end.is_some() {
                continue;
            }
            support::send(&pair.client, piece, fds);
            sent.extend_from_slice(piece);
            end = turn(&mut pair, &mut answered);
        }
    }
    assert_eq!(pair.connection.counters().panics, 0);
    let (expected, still_sane) = entitled(&sent);
    assert_eq!(end.is_none(), still_sane, "{end:?}");
    assert!(matches!(end, None | Some(End::Header(_))), "{end:?}");
    assert_eq!(answered, expected);
    if end.is_none() {
        pair.client
            .shutdown(std::net::Shutdown::Write)
            .expect("open");
        let last = turn(&mut pair, &mut answered);
        assert!(matches!(last, Some(End::Closed | End::Cut)), "{last:?}");
        assert_eq!(answered, expected);
    }
}

/// Lets the server do all there is, and reads what it says.
fn turn(pair: &mut Pair, answered: &mut Vec<(u16, u16)>) -> Option<End> {
    loop {
        let result = pair.connection.turn(&mut Quiet(&mut pair.device), 7);
        while let Some(answer) = pair.receive() {
            assert_eq!(answer.flags & support::REPLY, support::REPLY);
            assert!(answer.flags & support::ERROR == 0 || answer.payload.is_empty());
            answered.push((answer.id, answer.command));
        }
        match result {
            Err(end) => return Some(end),
            Ok(turn) if turn.more || pair.connection.interest().write => {}
            Ok(_) => return None,
        }
    }
}

/// The device, without what panics on purpose: a fuzzer takes any panic for a find.
struct Quiet<'a>(&'a mut Recorder);

mod quiet {
    use super::Quiet;
    use crate::support::PANIC;
    use vmsg_vfio_user::{Device, DeviceInfo, DmaMap, DmaUnmap, Errno, IrqInfo, Region, SetIrqs};

    impl Device for Quiet<'_> {
        fn info(&self) -> DeviceInfo {
            self.0.info()
        }
        fn region(&self, index: u32) -> Option<Region<'_>> {
            self.0.region(index).filter(|_| index != PANIC)
        }
        fn irq(&self, index: u32) -> IrqInfo {
            self.0.irq(index)
        }
        fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
            self.0.read(region, offset, data)
        }
        fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
            self.0.write(region, offset, data)
        }
        fn set_irqs(&mut self, set: SetIrqs) -> Result<(), Errno> {
            self.0.calls.clear();
            self.0.set_irqs(set)
        }
        fn map(&mut self, map: DmaMap) -> Result<(), Errno> {
            self.0.calls.clear();
            self.0.map(map)
        }
        fn unmap(&mut self, unmap: DmaUnmap) -> Result<u64, Errno> {
            self.0.calls.clear();
            self.0.unmap(unmap)
        }
        fn reset(&mut self) -> Result<(), Errno> {
            self.0.calls.clear();
            self.0.reset()
        }
    }
}
