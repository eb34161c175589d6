// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What no correct client sends, and clients that stop in the middle.

mod support;

use std::os::fd::AsFd;
use support::*;
use vmsg_vfio_user::{End, Errno, HeaderError, Options};

/// Refused commands of each kind. None of them reaches the device.
fn refused() -> Vec<(u16, Vec<u8>)> {
    let set = |flags, index, start, count| u32s(&[20, flags, index, start, count]);
    let mut list = vec![
        (GET_INFO, vec![]),
        (GET_INFO, u32s(&[15, 0, 0, 0])),
        (GET_REGION_INFO, u32s(&[32, 0])),
        (GET_IRQ_INFO, u32s(&[16])),
        (GET_IRQ_INFO, u32s(&[16, 0, u32::MAX, 0])),
        // Reads and writes outside, around the end of everything, of nothing, and of too much.
        (REGION_READ, access(4096, RAM, 1, b"")),
        (REGION_READ, access(4093, RAM, 4, b"")),
        (REGION_READ, access(u64::MAX, RAM, 2, b"")),
        (REGION_READ, access(0, RAM, 0, b"")),
        (REGION_READ, access(0, RAM, u32::MAX, b"")),
        (REGION_READ, access(0, ROM, 4, b"")),
        (REGION_READ, access(0, u32::MAX, 4, b"")),
        (REGION_READ, access(0, RAM, 4, b"")[..15].to_vec()),
        (REGION_WRITE, access(4096, RAM, 1, b"x")),
        (REGION_WRITE, access(0, 8, 1, b"x")),
        // More or fewer bytes than the count says.
        (REGION_WRITE, access(0, RAM, 4, b"xyz")),
        (REGION_WRITE, access(0, RAM, 4, b"vwxyz")),
        (REGION_WRITE, access(0, RAM, u32::MAX, b"xyz")),
        (REGION_WRITE_MULTI, vec![1]),
        (DMA_MAP, dma_map(3, 0, 0x1000, 0)),
        (DMA_MAP, dma_map(3, 0, u64::MAX, 2)),
        (DMA_MAP, dma_map(7, 0, 0x1000, 0x1000)),
        (DMA_MAP, dma_map(3, 0, 0x1000, 0x1000)[..31].to_vec()),
        (DMA_UNMAP, dma_unmap(0, 0x1000, 0)),
        (DMA_UNMAP, dma_unmap(0, u64::MAX - 1, 3)),
        (DMA_UNMAP, dma_unmap(1, 0x1000, 0x1000)),
        (DMA_UNMAP, dma_unmap(4, 0x1000, 0x1000)),
        (DMA_UNMAP, dma_unmap(2, 0, 0)[..23].to_vec()),
        // Interrupts that are not there.
        (SET_IRQS, set(1 | 32, 5, 0, 1)),
        (SET_IRQS, set(1 | 32, MSIX, 20, 1)),
        (SET_IRQS, set(4 | 32, MSIX, 0, u32::MAX)),
        (SET_IRQS, set(4 | 32, MSIX, u32::MAX, 2)),
        (SET_IRQS, set(1 | 32, 1, 0, 1)),
        // Nothing to do, nothing to do it with, and everything at once.
        (SET_IRQS, set(4 | 32, MSIX, 0, 0)),
        (SET_IRQS, set(1 | 32, MSIX, 1, 0)),
        (SET_IRQS, set(0, MSIX, 0, 1)),
        (SET_IRQS, set(32, MSIX, 0, 1)),
        (SET_IRQS, set(1, MSIX, 0, 1)),
        (SET_IRQS, set(1 | 2 | 32, MSIX, 0, 1)),
        (SET_IRQS, set(1 | 16 | 32, 0, 0, 1)),
        (SET_IRQS, set(1 | 32 | 64, MSIX, 0, 1)),
        // Masking what cannot be masked.
        (SET_IRQS, set(1 | 8, MSIX, 0, 1)),
        // Fewer bytes than interrupts.
        (SET_IRQS, [set(2 | 32, MSIX, 0, 3), vec![1, 1]].concat()),
        (SET_IRQS, vec![0; 19]),
    ];
    list.extend((19..40).map(|command| (command, vec![0; 7])));
    list
}

#[test]
fn every_malformed_command_is_refused_and_the_next_one_answered() {
    let mut pair = Pair::new();
    for (command, payload) in refused() {
        let errno = pair.ask(command, &payload).refused();
        let known = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS, Errno::TOOBIG];
        assert!(known.contains(&errno), "{command} {payload:?}: {errno}");
        pair.check_alive();
    }
    assert!(pair.device.calls.is_empty(), "{:?}", pair.device.calls);
    assert!(pair.device.ram.iter().all(|byte| *byte == 0));
}

#[test]
fn refused_commands_that_want_no_answer_get_none() {
    let mut pair = Pair::new();
    for (command, payload) in refused() {
        pair.send(&message(1, command, NO_REPLY, &payload), &[]);
        assert!(pair.receive().is_none());
    }
    pair.check_alive();
}

#[test]
fn descriptors_where_they_do_not_belong_are_closed() {
    let mut pair = Pair::new();
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let fds = vec![writer.as_fd(); 17];
    let set = |flags, count| u32s(&[20, flags, MSIX, 0, count]);
    let attempts = [
        (GET_INFO, u32s(&[16, 0, 0, 0]), 1),
        (RESET, vec![], 16),
        (99, vec![], 3),
        (REGION_WRITE, access(0, RAM, 1, b"x"), 1),
        (DMA_MAP, dma_map(3, 0, 0x1000, 0x1000), 2),
        (DMA_MAP, dma_map(3, 0, 0x1000, 0), 1),
        (SET_IRQS, set(1 | 32, 2), 2),
        (SET_IRQS, set(4 | 32, 3), 2),
        (SET_IRQS, set(4 | 32, 2), 3),
        // One above what was agreed on.
        (SET_IRQS, set(4 | 32, 17), 17),
        (GET_INFO, u32s(&[16, 0, 0, 0]), 17),
    ];
    for (command, payload, count) in attempts {
        pair.ask_with(command, &payload, &fds[..count]).refused();
        pair.check_alive();
    }
    assert!(pair.device.calls.is_empty(), "{:?}", pair.device.calls);
    drop(fds);
    drop(writer);
    let read = rustix::io::read(&reader, &mut [0; 1]).expect("closed everywhere");
    assert_eq!(read, 0);
}

#[test]
fn the_most_descriptors_that_a_message_carries_are_no_trouble() {
    let mut pair = Pair::new();
    let file = file(1);
    let fds = vec![file.as_fd(); 253];
    // On every byte of a message.
    let bytes = message(1, GET_INFO, 0, &u32s(&[16, 0, 0, 0]));
    for byte in &bytes {
        pair.send(&[*byte], &fds);
    }
    assert_eq!(pair.receive().expect("an answer").refused(), Errno::MFILE);
    pair.check_alive();
    let open = std::fs::read_dir("/proc/self/fd").expect("a list").count();
    assert!(open < 200, "{open} descriptors are open");
}

#[test]
fn descriptors_on_any_byte_of_a_message_belong_to_it() {
    let bytes = message(1, DMA_MAP, 0, &dma_map(3, 0, 0x1000, 0x1000));
    let file = file(1);
    for at in 0..bytes.len() {
        let mut pair = Pair::new();
        pair.send(&bytes[..at], &[]);
        pair.send(&bytes[at..], &[file.as_fd()]);
        pair.receive().expect("an answer").ok();
        assert_eq!(pair.device.take_calls(), ["map 0x1000+0x1000 rw fd@0x0"]);
        pair.check_alive();
    }
}

#[test]
fn messages_come_byte_by_byte() {
    let mut pair = Pair::silent(Options::default());
    let stream = [
        message(1, VERSION, 0, &version(QEMU)),
        message(2, REGION_WRITE, NO_REPLY, &access(8, RAM, 2, b"ab")),
        message(3, REGION_READ, 0, &access(8, RAM, 2, b"")),
        message(4, 99, 0, b"what?"),
        message(5, RESET, 0, b""),
    ]
    .concat();
    for byte in &stream {
        pair.send(&[*byte], &[]);
    }
    let ids = std::iter::from_fn(|| pair.receive()).map(|answer| (answer.id, answer.flags));
    assert_eq!(
        ids.collect::<Vec<_>>(),
        [(1, 1), (3, 1), (4, 1 | ERROR), (5, 1)]
    );
    assert_eq!(&pair.device.ram[8..10], b"ab");
}

#[test]
fn a_message_too_long_is_refused_and_swallowed() {
    let mut pair = Pair::new();
    let size = (3 << 20) + 5;
    pair.send(&header(9, REGION_WRITE, size, 0, 0), &[]);
    assert_eq!(pair.receive().expect("at once").refused(), Errno::TOOBIG);
    let mut left = usize::try_from(size).expect("fits") - 16;
    let junk = vec![0xff; 100_000];
    while left > 0 {
        let len = left.min(junk.len());
        pair.send(&junk[..len], &[]);
        left -= len;
    }
    assert!(pair.receive().is_none());
    pair.check_alive();
    // The longest there can be says 4 GiB.
    pair.send(&header(10, 1, u32::MAX, NO_REPLY, 0), &[]);
    pair.send(&junk, &[]);
    assert!(pair.receive().is_none());
}

#[test]
fn the_longest_write_fits() {
    let mut pair = Pair::new();
    let data = vec![0x5a; 1 << 20];
    let count = u32::try_from(data.len()).expect("fits");
    let bytes = message(5, REGION_WRITE, 0, &access(0, RAM, count, &data));
    for part in bytes.chunks(50_000) {
        pair.send(part, &[]);
    }
    let errno = pair.receive().expect("an answer").refused();
    assert_eq!(errno, Errno::INVAL, "outside of the region, not too long");
    pair.check_alive();
}

#[test]
fn what_is_no_header_ends_the_connection() {
    for size in [0, 1, 15] {
        let mut pair = Pair::new();
        send(&pair.client, &header(1, GET_INFO, size, 0, 0), &[]);
        let end = pair.turn().expect_err("no header");
        assert!(matches!(end, End::Header(HeaderError::Size(was)) if was == size));
    }
    for flags in [2, 15, 0xffff_ffff] {
        let mut pair = Pair::new();
        send(&pair.client, &header(1, GET_INFO, 16, flags, 0), &[]);
        let end = pair.turn().expect_err("no header");
        assert!(matches!(end, End::Header(HeaderError::Type(was)) if was == flags));
    }
}

#[test]
fn replies_to_nothing_are_dropped_and_counted() {
    let mut pair = Pair::new();
    let file = file(1);
    for (n, command) in [VERSION, GET_INFO, DMA_READ, DMA_WRITE, 0xffff]
        .into_iter()
        .enumerate()
    {
        let id = u16::try_from(n).expect("few");
        pair.send(&message(id, command, REPLY, &[1; 40]), &[file.as_fd()]);
        pair.send(&message(id, command, REPLY | ERROR, b""), &[]);
        assert!(pair.receive().is_none());
    }
    pair.send(&header(1, DMA_READ, 2 << 20, REPLY, 0), &[]);
    pair.send(&vec![0; 70_000], &[]);
    assert_eq!(pair.connection.counters().stray_replies, 11);
    assert!(pair.device.calls.is_empty());
}

#[test]
fn the_end_has_a_name() {
    let mut pair = Pair::new();
    pair.client
        .shutdown(std::net::Shutdown::Both)
        .expect("open");
    assert!(matches!(pair.turn(), Err(End::Closed)));

    let mut pair = Pair::new();
    pair.send(&message(1, RESET, 0, b"")[..9], &[]);
    pair.client
        .shutdown(std::net::Shutdown::Write)
        .expect("open");
    assert!(matches!(pair.turn(), Err(End::Cut)));

    // What came before the end is still done.
    let mut pair = Pair::new();
    send(&pair.client, &message(1, RESET, 0, b""), &[]);
    pair.client
        .shutdown(std::net::Shutdown::Write)
        .expect("open");
    assert_eq!(pair.turn().expect("something to do"), 1);
    assert!(matches!(pair.turn(), Err(End::Closed)));
    assert_eq!(pair.device.take_calls(), ["reset"]);
    pair.receive().expect("an answer").ok();
}

#[test]
fn a_client_that_does_not_read_is_not_waited_for_and_is_served_when_it_does() {
    let mut pair = Pair::new();
    let ask = message(1, REGION_READ, 0, &access(0, RAM, 4096, b""));
    let mut asked = 0;
    // Until the server takes no more.
    while pair.connection.interest().read {
        assert!(asked < 10_000, "somewhere there is an end");
        pair.send(&ask, &[]);
        asked += 1;
    }
    assert!(pair.connection.interest().write);
    let handled = pair.connection.counters().commands;
    for _ in 0..20 {
        pair.send(&ask, &[]);
        asked += 1;
    }
    assert_eq!(pair.connection.counters().commands, handled);
    // It reads at last.
    let mut answered = 0;
    while answered < asked {
        match pair.receive() {
            Some(answer) => {
                assert_eq!(answer.ok().payload.len(), 16 + 4096);
                answered += 1;
            }
            None => assert!(pair.turn().expect("not ended") > 0),
        }
    }
    assert!(!pair.connection.interest().write);
    pair.check_alive();
}

#[test]
fn a_descriptor_that_had_to_wait_arrives_with_its_message() {
    let mut pair = Pair::new();
    let read = message(1, REGION_READ, 0, &access(0, RAM, 4096, b""));
    let info = message(
        2,
        GET_REGION_INFO,
        0,
        &u32s(&[100, 0, MAPPED, 0, 0, 0, 0, 0]),
    );
    let mut asked = 1;
    pair.send(&read, &[]);
    while !pair.connection.interest().write {
        pair.send(&read, &[]);
        asked += 1;
    }
    pair.send(&info, &[]);
    pair.send(&read, &[]);
    let mut answers = Vec::new();
    while answers.len() < asked + 2 {
        match pair.receive() {
            Some(answer) => answers.push(answer.ok()),
            None => assert!(pair.turn().is_ok()),
        }
    }
    let with_fds: Vec<_> = answers
        .iter()
        .filter(|answer| !answer.fds.is_empty())
        .collect();
    assert_eq!(with_fds.len(), 1);
    assert_eq!((with_fds[0].id, with_fds[0].fds.len()), (2, 1));
    assert_eq!(answers[asked].id, 2);
}

#[test]
fn a_turn_ends_with_its_budget() {
    let mut pair = Pair::new();
    let burst: Vec<u8> = (0..10).flat_map(|id| message(id, RESET, 0, b"")).collect();
    send(&pair.client, &burst, &[]);
    let turn = pair
        .connection
        .turn(&mut pair.device, 4)
        .expect("not ended");
    assert_eq!((turn.handled, turn.more), (4, true));
    let turn = pair
        .connection
        .turn(&mut pair.device, 4)
        .expect("not ended");
    assert_eq!((turn.handled, turn.more), (4, true));
    let turn = pair
        .connection
        .turn(&mut pair.device, 4)
        .expect("not ended");
    assert_eq!((turn.handled, turn.more), (2, false));
}
