// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

use super::*;
use crate::RamSlice;

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes / 8).map(|_| AtomicU64::new(0)).collect()
}

fn file() -> File {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)
        .unwrap()
        .into()
}

/// Three pieces of 8, 0 and 3 bytes.
fn three(words: &[AtomicU64]) -> [RamSlice<'_>; 3] {
    let ram = RamSlice::from_atomics(words);
    [
        ram.get(16, 8).unwrap(),
        ram.get(0, 0).unwrap(),
        ram.get(1, 3).unwrap(),
    ]
}

fn contents(pieces: Pieces<'_>) -> Vec<u8> {
    let mut bytes = vec![0; pieces.len()];
    assert_eq!(pieces.read(&mut bytes), bytes.len());
    bytes
}

#[test]
fn iovecs_leave_out_empty_pieces_and_stop_at_the_room() {
    let words = memory(64);
    let slices = three(&words);
    let pieces = Pieces::new(&slices).skip(2);
    let mut iovecs = [MaybeUninit::uninit(); 4];
    assert_eq!(pieces.fill_iovecs(&mut iovecs), 2);
    // SAFETY: the first two are written.
    let lens = unsafe { initialized(&iovecs, 2) }
        .iter()
        .map(|iovec| iovec.iov_len)
        .collect::<Vec<_>>();
    assert_eq!(lens, [6, 3]);
    assert_eq!(pieces.fill_iovecs(&mut iovecs[..1]), 1);
}

#[test]
fn files_are_read_and_written_at_offsets() {
    let words = memory(64);
    let slices = three(&words);
    let pieces = Pieces::new(&slices);
    let file = file();
    file.write_all_at(b"..hello world", 0).unwrap();
    assert_eq!(pieces.read_from_at(&file, 2).unwrap(), 11);
    assert_eq!(contents(pieces), b"hello world");
    assert_eq!(pieces.skip(6).write_to_at(&file, 0).unwrap(), 5);
    let mut bytes = [0; 13];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"worldlo world");
    assert_eq!(pieces.read_from_at(&file, 13).unwrap(), 0, "the end");
    assert!(pieces.read_from_at(&file, u64::MAX).is_err());
}

#[test]
fn heads_come_first() {
    let words = memory(64);
    let slices = three(&words);
    let pieces = Pieces::new(&slices);
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    pieces.write(b"hello world");
    assert_eq!(pieces.take(5).write_with_head(b"head", &writer).unwrap(), 9);
    let mut bytes = [0; 9];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"headhello");
    writer.write_all(b"HEADHELLO").unwrap();
    let mut head = [0; 4];
    assert_eq!(pieces.read_with_head(&mut head, &reader).unwrap(), 9);
    assert_eq!(&head, b"HEAD");
    assert_eq!(contents(pieces), b"HELLO world");
    writer.write_all(b"no").unwrap();
    assert_eq!(pieces.read_from(&reader).unwrap(), 2);
    assert_eq!(pieces.take(3).write_to(&writer).unwrap(), 3);
}

#[test]
fn many_pieces_are_moved_up_to_the_limit() {
    let words = memory(2048);
    let ram = RamSlice::from_atomics(&words);
    for count in [63, 64, 65, 1023, 1024, 1500] {
        let slices: Vec<_> = (0..count).map(|i| ram.get(i, 1).unwrap()).collect();
        let bytes: Vec<u8> = (0..=255).cycle().take(count).collect();
        let pieces = Pieces::new(&slices);
        pieces.write(&bytes);
        let file = file();
        assert_eq!(pieces.write_to_at(&file, 0).unwrap(), count.min(1024));
        ram.fill(0);
        assert_eq!(pieces.read_from_at(&file, 0).unwrap(), count.min(1024));
        assert_eq!(contents(pieces.take(1024)), bytes[..count.min(1024)]);
        let with_head = pieces.write_with_head(b"hh", &file).unwrap();
        assert_eq!(with_head, 2 + count.min(1023));
    }
}

#[test]
fn the_same_memory_many_times_is_not_too_much() {
    let (mapping, _fd) = crate::Mapping::memfd("test", 1 << 30, true).unwrap();
    let slices = vec![mapping.ram(); 4];
    let (_reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let written = Pieces::new(&slices).write_to(&writer).unwrap();
    assert!((1..1 << 24).contains(&written));
}

#[test]
fn datagrams_are_sent_and_received_whole() {
    let words = memory(64);
    let slices = three(&words);
    let pieces = Pieces::new(&slices);
    let one = UdpSocket::bind("127.0.0.1:0").unwrap();
    let two = UdpSocket::bind("127.0.0.1:0").unwrap();
    one.connect(two.local_addr().unwrap()).unwrap();
    two.connect(one.local_addr().unwrap()).unwrap();
    pieces.write(b"hello world");
    let none = SendFlags::empty();
    assert_eq!(pieces.send_from(&one, b"head", none).unwrap(), 15);
    assert_eq!(pieces.take(0).send_from(&one, b"", none).unwrap(), 0);
    let mut head = [0; 2];
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC;
    assert_eq!(pieces.recv_into(&two, &mut head, peek).unwrap(), 15);
    assert_eq!(contents(pieces), b"adhello wor");
    let none = RecvFlags::empty();
    assert_eq!(pieces.recv_into(&two, &mut head, none).unwrap(), 13);
    assert_eq!(pieces.recv_into(&two, &mut [], none).unwrap(), 0);
    let error = pieces
        .recv_into(&two, &mut [], RecvFlags::DONTWAIT)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn tcp_bytes_are_peeked_at_and_discarded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (receiver, _) = listener.accept().unwrap();
    sender.write_all(b"hello world").unwrap();
    drop(sender);
    let words = memory(64);
    let slices = three(&words);
    let pieces = Pieces::new(&slices);
    let peek = RecvFlags::PEEK | RecvFlags::WAITALL;
    assert_eq!(pieces.recv_into(&receiver, &mut [], peek).unwrap(), 11);
    let none = RecvFlags::empty();
    assert_eq!(discard(&receiver, 6, none).unwrap(), 6);
    assert_eq!(pieces.recv_into(&receiver, &mut [], none).unwrap(), 5);
    assert_eq!(contents(pieces.take(5)), b"world");
    assert_eq!(discard(&receiver, 6, none).unwrap(), 0);
}

#[test]
fn sending_to_nobody_is_an_error_and_no_signal() {
    let (one, two) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(two);
    let words = memory(64);
    let slices = three(&words);
    let error = Pieces::new(&slices)
        .send_from(&one, &[], SendFlags::empty())
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn what_does_not_fit_goes_behind_the_run() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"01heap and stack").unwrap();
    let words = memory(64);
    let slices = three(&words);
    let run = Pieces::new(&slices).take(5);
    let (mut head, mut tail) = ([0; 2], [0; 20]);
    assert_eq!(run.read_between(&mut head, &mut tail, &reader).unwrap(), 16);
    assert_eq!((&head, contents(run).as_slice()), (b"01", &b"heap "[..]));
    assert_eq!(&tail[..9], b"and stack");
    writer.write_all(b"abc").unwrap();
    assert_eq!(run.read_between(&mut [], &mut [], &reader).unwrap(), 3);
    assert_eq!(contents(run.take(3)), b"abc");
    // As many pieces as one call takes, or more: nothing goes past the rest of them.
    let many = vec![slices[0].get(0, 1).unwrap(); 1100];
    writer.write_all(&[7; 1090]).unwrap();
    let count = Pieces::new(&many).read_between(&mut head, &mut tail, &reader);
    assert_eq!(count.unwrap(), 2 + 1023);
    assert_eq!(&tail[..9], b"and stack");
}

#[test]
fn what_is_in_the_page_cache_is_read_at_once() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[3; 10_000]).unwrap();
    let words = [const { AtomicU64::new(0) }; 32];
    let ram = RamSlice::from_atomics(&words);
    let (one, two) = ram.split_at(100);
    let pieces = [one, two];
    match Pieces::new(&pieces).read_from_at_now(&file, 9_900) {
        Ok(count) => {
            assert_eq!(count, 100);
            assert_eq!(ram.read_array(0), Some([3; 100]));
        }
        // Not every file system knows how.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
    }
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(Pieces::new(&pieces).read_from_at_now(pipe, 0).is_err());
}
