// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A socket that keeps messages apart stands for the tap driver where that cannot be brought to do something.

use std::sync::atomic::AtomicU64;

use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, send, socketpair};
use rustix::net::{RecvFlags, SendFlags};
use vmsg_mem::RamSlice;

use super::*;

fn pair() -> (Queue, OwnedFd) {
    let (ours, kernels) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (Queue::new(ours, true), kernels)
}

/// One buffer of `0.len()` bytes.
struct One<'a>(&'a [RamSlice<'a>], Option<(VnetHeader, usize)>);

impl RxSink for One<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        let room = Pieces::new(self.0);
        (len <= room.len()).then_some(room)
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        self.1 = Some((*header, len));
    }
}

#[test]
fn a_full_queue_is_told_and_frames_arrive_as_they_were() {
    let (queue, kernels) = pair();
    let words: Vec<AtomicU64> = (0..1000).map(AtomicU64::new).collect();
    let memory = [RamSlice::from_atomics(&words)];
    let payload = Pieces::new(&memory);
    let header = VnetHeader {
        flags: 1,
        gso_type: 4,
        hdr_len: 0x0203,
        gso_size: 0x0405,
        csum_start: 0x0607,
        csum_offset: 0x0809,
    };
    let frame = TxFrame { header, payload };
    let mut sent = 0;
    while queue.send(&frame).unwrap() == Sent::Taken {
        sent += 1;
        assert!(sent < 10_000);
    }
    assert_eq!(queue.send(&frame).unwrap(), Sent::Full);
    let mut bytes = vec![0; 10_000];
    let (_, len) = recv(&kernels, bytes.as_mut_slice(), RecvFlags::empty()).unwrap();
    assert_eq!(len, VNET_HEADER + 8000);
    assert_eq!(bytes[..12], [1, 4, 3, 2, 5, 4, 7, 6, 9, 8, 0, 0]);
    assert_eq!(bytes[12 + 8..12 + 16], 1u64.to_ne_bytes());
    assert_eq!(queue.send(&frame).unwrap(), Sent::Taken);
}

#[test]
fn what_the_kernel_gives_is_checked_all_the_same() {
    let (mut queue, kernels) = pair();
    let words: Vec<AtomicU64> = (0..1000).map(AtomicU64::new).collect();
    let memory = [RamSlice::from_atomics(&words)];
    let give = |bytes: &[u8]| send(&kernels, bytes, SendFlags::empty()).unwrap();
    let mut sink = One(&memory, None);
    let mut take = |queue: &mut Queue, allowed: &Offloads| {
        sink.1 = None;
        (queue.receive(0, false, allowed, &mut sink), sink.1)
    };
    // Shorter than a header, shorter than a frame.
    for len in [1, 11, 12, 25] {
        give(&vec![0; len]);
        assert_eq!(take(&mut queue, &Offloads::NONE), (Step::Dropped, None));
    }
    // num_buffers means nothing here and does not come through.
    let mut bytes = [0; 12 + 60];
    bytes[10..12].copy_from_slice(&[7, 7]);
    give(&bytes);
    let plain = VnetHeader::default();
    assert_eq!(
        take(&mut queue, &Offloads::NONE),
        (Step::Delivered, Some((plain, 60)))
    );
    // Offloads of a driver before this one.
    for (flags, gso_type) in [(1, 0), (1, 1), (0, 4), (0, 5), (0, 0x80), (1, 99)] {
        bytes[..2].copy_from_slice(&[flags, gso_type]);
        give(&bytes);
        assert_eq!(take(&mut queue, &Offloads::NONE), (Step::Dropped, None));
    }
    bytes[..2].copy_from_slice(&[2, 0]);
    give(&bytes);
    let (step, got) = take(&mut queue, &Offloads::NONE);
    assert_eq!(
        (step, got),
        (Step::Delivered, Some((plain, 60))),
        "a hint less"
    );
    bytes[..2].copy_from_slice(&[1, 1]);
    give(&bytes);
    let (step, got) = take(&mut queue, &Offloads::ALL);
    assert_eq!((step, got.unwrap().0.gso_type), (Step::Delivered, 1));
    assert_eq!(take(&mut queue, &Offloads::ALL), (Step::Empty, None));
    assert!(!queue.has_frames());
}

#[test]
fn a_frame_longer_than_the_buffers_waits_until_there_are_larger_ones() {
    let (mut queue, kernels) = pair();
    let words: Vec<AtomicU64> = (0..1000).map(AtomicU64::new).collect();
    let all = RamSlice::from_atomics(&words);
    let small = [all.get(0, 2000).unwrap()];
    let large = [all];
    let mut bytes = vec![0; 12 + 5000];
    for (i, byte) in bytes.iter_mut().enumerate().skip(12) {
        *byte = u8::try_from(i % 251).unwrap();
    }
    send(&kernels, &bytes, SendFlags::empty()).unwrap();
    queue.usual = 0;
    let mut sink = One(&small, None);
    let receive =
        |queue: &mut Queue, sink: &mut One<'_>| queue.receive(0, false, &Offloads::NONE, sink);
    assert_eq!(receive(&mut queue, &mut sink), Step::NoRoom);
    assert!(queue.has_frames());
    assert_eq!(receive(&mut queue, &mut sink), Step::NoRoom);
    let mut sink = One(&large, None);
    assert_eq!(receive(&mut queue, &mut sink), Step::Delivered);
    assert_eq!(sink.1, Some((VnetHeader::default(), 5000)));
    let mut got = vec![0; 5000];
    all.read(0, &mut got);
    assert_eq!(got, bytes[12..]);
}
