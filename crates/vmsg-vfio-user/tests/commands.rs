// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each command, as a correct client sends it.

mod support;

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::AsFd;
use support::*;
use vmsg_vfio_user::{Errno, Options};

#[test]
fn the_version_is_agreed_on_and_the_answer_fits_where_the_proposal_was() {
    let mut pair = Pair::silent(Options::default());
    let answer = pair.ask(VERSION, &version(QEMU)).ok();
    assert!(answer.payload.len() <= 4 + QEMU.len());
    assert_eq!(
        &answer.payload[4..],
        b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"write_multiple\":true}}\0"
    );
    let negotiated = pair.connection.negotiated().expect("agreed");
    assert_eq!((negotiated.minor, negotiated.max_msg_fds), (0, 16));
}

#[test]
fn a_client_that_proposes_nothing_gets_defaults() {
    let mut pair = Pair::silent(Options::default());
    let answer = pair.ask(VERSION, &[0, 0, 9, 9]).ok();
    assert_eq!(answer.payload, [0u16, 1].map(u16::to_ne_bytes).concat());
    let negotiated = pair.connection.negotiated().expect("agreed");
    assert_eq!(
        (negotiated.max_msg_fds, negotiated.max_data_xfer_size),
        (1, 1 << 20)
    );
}

#[test]
fn nothing_is_served_before_the_version_and_no_version_twice() {
    let mut pair = Pair::silent(Options::default());
    assert_eq!(
        pair.ask(GET_INFO, &u32s(&[16, 0, 0, 0])).refused(),
        Errno::INVAL
    );
    assert_eq!(pair.ask(RESET, &[]).refused(), Errno::INVAL);
    let another_major = [&1u16.to_ne_bytes()[..], &[0, 0]].concat();
    assert_eq!(
        pair.ask(VERSION, &another_major).refused(),
        Errno::OPNOTSUPP
    );
    pair.ask(VERSION, &version(QEMU)).ok();
    assert_eq!(pair.ask(VERSION, &version(QEMU)).refused(), Errno::INVAL);
    pair.check_alive();
    assert!(pair.device.calls.is_empty());
}

#[test]
fn version_data_without_nul_or_sense_is_refused_and_a_good_one_still_taken() {
    let deep = format!("{{\"a\":{}{}}}\0", "[".repeat(2000), "]".repeat(2000));
    let long = format!("{{\"a\":\"{}\"}}\0", "x".repeat(5000));
    let texts: [&[u8]; 12] = [
        b"{\"capabilities\":{\"max_msg_fds\":1}}",
        b"{}\0{}\0",
        b"\0",
        b"{\0",
        b"{\"capabilities\":3}\0",
        b"{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"{\"capabilities\":{\"max_data_xfer_size\":0}}\0",
        b"{\"capabilities\":{\"max_data_xfer_size\":99999999999999999999}}\0",
        b"{\"\xff\":1}\0",
        deep.as_bytes(),
        long.as_bytes(),
    ];
    let mut pair = Pair::silent(Options::default());
    for text in texts {
        let errno = pair.ask(VERSION, &version(text)).refused();
        assert!(errno == Errno::INVAL || errno == Errno::TOOBIG, "{errno}");
    }
    pair.ask(VERSION, &version(QEMU)).ok();
    pair.check_alive();
}

#[test]
fn a_region_tells_what_it_is() {
    let mut pair = Pair::new();
    let ask = |argsz, index| u32s(&[argsz, 0, index, 0, 0, 0, 0, 0]);
    let ram = pair.ask(GET_REGION_INFO, &ask(32, RAM)).ok();
    assert_eq!(ram.payload[..16], u32s(&[32, 3, RAM, 0]));
    assert_eq!((ram.u64_at(16), ram.u64_at(24)), (4096, 0));
    assert!(ram.fds.is_empty());
    let none = pair.ask(GET_REGION_INFO, &ask(32, 8)).ok();
    assert_eq!(none.u64_at(16), 0);
    assert_eq!(
        pair.ask(GET_REGION_INFO, &ask(32, ROM)).refused(),
        Errno::INVAL
    );
    assert_eq!(
        pair.ask(GET_REGION_INFO, &ask(32, 9)).refused(),
        Errno::INVAL
    );
    assert_eq!(
        pair.ask(GET_REGION_INFO, &ask(31, RAM)).refused(),
        Errno::INVAL
    );
}

#[test]
fn a_mappable_region_comes_with_areas_and_a_descriptor_where_there_is_room() {
    let mut pair = Pair::new();
    let ask = |argsz| u32s(&[argsz, 0, MAPPED, 0, 0, 0, 0, 0]);
    let short = pair.ask(GET_REGION_INFO, &ask(32)).ok();
    let full = 32 + 16 + 2 * 16;
    assert_eq!(short.payload.len(), 32);
    assert_eq!(short.payload[..16], u32s(&[full, 3, MAPPED, 0]));
    assert!(short.fds.is_empty());

    let info = pair.ask(GET_REGION_INFO, &ask(full)).ok();
    assert_eq!(info.payload.len(), full as usize);
    assert_eq!(info.payload[..16], u32s(&[full, 0xf, MAPPED, 32]));
    assert_eq!((info.u64_at(16), info.u64_at(24)), (0x4000, 0x8000));
    let cap = [
        &1u16.to_ne_bytes()[..],
        &1u16.to_ne_bytes(),
        &u32s(&[0, 2, 0]),
    ]
    .concat();
    assert_eq!(info.payload[32..48], cap);
    let areas = [
        info.u64_at(48),
        info.u64_at(56),
        info.u64_at(64),
        info.u64_at(72),
    ];
    assert_eq!(areas, [0, 0x1000, 0x2000, 0x1000]);
    assert_eq!(info.fds.len(), 1);
}

#[test]
fn a_client_that_takes_no_descriptors_is_sent_none() {
    let mut pair = Pair::silent(Options::default());
    let caps = b"{\"capabilities\":{\"max_msg_fds\":0}}\0";
    pair.ask(VERSION, &version(caps)).ok();
    let ask = u32s(&[1000, 0, MAPPED, 0, 0, 0, 0, 0]);
    let info = pair.ask(GET_REGION_INFO, &ask).ok();
    assert_eq!(info.payload[..16], u32s(&[32, 3, MAPPED, 0]));
    assert!(info.fds.is_empty());
}

#[test]
fn region_io_descriptors_and_migration_are_refused() {
    let mut pair = Pair::new();
    let ask = u32s(&[16, 0, RAM, 0]);
    assert_eq!(
        pair.ask(GET_REGION_IO_FDS, &ask).refused(),
        Errno::OPNOTSUPP
    );
    for command in [14, 16, 17, 18, DMA_READ, DMA_WRITE] {
        assert_eq!(pair.ask(command, &[0; 40]).refused(), Errno::OPNOTSUPP);
    }
    for command in [0, 19, 0xffff] {
        assert_eq!(pair.ask(command, &[0; 40]).refused(), Errno::NOSYS);
    }
    pair.check_alive();
}

#[test]
fn interrupts_tell_what_they_are() {
    let mut pair = Pair::new();
    let intx = pair.ask(GET_IRQ_INFO, &u32s(&[16, 0, 0, 0])).ok();
    assert_eq!(intx.payload, u32s(&[16, 0b111, 0, 1]));
    let msix = pair.ask(GET_IRQ_INFO, &u32s(&[16, 0, MSIX, 0])).ok();
    assert_eq!(msix.payload, u32s(&[16, 0b1001, MSIX, 20]));
    let none = pair.ask(GET_IRQ_INFO, &u32s(&[16, 0, 4, 0])).ok();
    assert_eq!(none.payload, u32s(&[16, 0, 4, 0]));
    assert_eq!(
        pair.ask(GET_IRQ_INFO, &u32s(&[16, 0, 5, 0])).refused(),
        Errno::INVAL
    );
}

#[test]
fn interrupts_are_set_up_in_portions_masked_raised_and_taken_away() {
    let mut pair = Pair::new();
    let eventfds: Vec<_> = (0..20)
        .map(|_| eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"))
        .collect();
    let fds: Vec<_> = eventfds.iter().map(|fd| fd.as_fd()).collect();
    let set = |flags, index, start, count| u32s(&[20, flags, index, start, count]);
    let trigger = 4 | 32;
    pair.ask_with(SET_IRQS, &set(trigger, MSIX, 0, 16), &fds[..16])
        .ok();
    pair.ask_with(SET_IRQS, &set(trigger, MSIX, 16, 4), &fds[16..])
        .ok();
    let last = pair.device.eventfds[3].take().expect("came along");
    rustix::io::write(&last, &7u64.to_ne_bytes()).expect("an eventfd");
    let mut count = [0; 8];
    rustix::io::read(&eventfds[19], &mut count).expect("the same one");
    assert_eq!(count, 7u64.to_ne_bytes());

    pair.ask(SET_IRQS, &set(trigger, MSIX, 3, 2)).ok();
    pair.ask(SET_IRQS, &set(1 | 32, MSIX, 0, 0)).ok();
    pair.ask(SET_IRQS, &set(1 | 8, 0, 0, 1)).ok();
    pair.ask(SET_IRQS, &set(1 | 16, 0, 0, 1)).ok();
    let bools = [set(2 | 32, MSIX, 4, 3), vec![1, 0, 2]].concat();
    pair.ask(SET_IRQS, &bools).ok();
    assert_eq!(
        pair.device.take_calls(),
        [
            "irqs 2: 0+16 Trigger 16 eventfds",
            "irqs 2: 16+4 Trigger 4 eventfds",
            "irqs 2: 3+2 Trigger 0 eventfds",
            "irqs 2: 0+0 Trigger none",
            "irqs 0: 0+1 Mask none",
            "irqs 0: 0+1 Unmask none",
            "irqs 2: 4+3 Trigger [true, false, true]",
        ]
    );
}

#[test]
fn regions_are_read_and_written() {
    let mut pair = Pair::new();
    let answer = pair.ask(REGION_WRITE, &access(0x10, RAM, 4, b"word")).ok();
    assert_eq!(answer.payload, access(0x10, RAM, 4, b""));
    let answer = pair.ask(REGION_READ, &access(0x0f, RAM, 6, b"")).ok();
    assert_eq!(answer.payload, access(0x0f, RAM, 6, b"\0word\0"));
    let all = pair.ask(REGION_READ, &access(0, RAM, 4096, b"")).ok();
    assert_eq!(all.payload.len(), 16 + 4096);
    let refused = pair.ask(REGION_READ, &access(0, MAPPED, 4, b"")).refused();
    assert_eq!(refused, Errno::NXIO, "as the device says");
    let refused = pair
        .ask(REGION_WRITE, &access(0, READ_ONLY, 1, b"x"))
        .refused();
    assert_eq!(refused, Errno::ACCESS);
    pair.ask(REGION_READ, &access(0, READ_ONLY, 1, b"")).ok();
}

#[test]
fn posted_writes_are_done_in_order_and_not_answered() {
    let mut pair = Pair::new();
    let mut burst = Vec::new();
    for n in 0..40u8 {
        burst.extend(message(
            n.into(),
            REGION_WRITE,
            NO_REPLY,
            &access(u64::from(n % 4), RAM, 1, &[n]),
        ));
    }
    burst.extend(message(
        77,
        REGION_WRITE,
        NO_REPLY,
        &access(5000, RAM, 1, b"x"),
    ));
    burst.extend(message(78, 99, NO_REPLY, b""));
    burst.extend(message(79, REGION_READ, 0, &access(0, RAM, 4, b"")));
    pair.send(&burst, &[]);
    let answer = pair.receive().expect("to the read").ok();
    assert_eq!(
        (answer.id, answer.payload),
        (79, access(0, RAM, 4, &[36, 37, 38, 39]))
    );
    assert!(pair.receive().is_none());
    let counters = pair.connection.counters();
    assert_eq!((counters.refused, counters.malformed), (2, 1));
}

#[test]
fn several_writes_in_one_message_are_done_until_one_fails() {
    let entry = |offset, count, data: u64| access(offset, RAM, count, &data.to_ne_bytes());
    let multi = |entries: &[Vec<u8>]| {
        let count = u64::try_from(entries.len()).expect("few");
        [count.to_ne_bytes().to_vec(), entries.concat()].concat()
    };
    let mut pair = Pair::new();
    let writes = multi(&[entry(0, 8, u64::MAX), entry(2, 1, 0), entry(9, 2, 0x0101)]);
    let answer = pair.ask(REGION_WRITE_MULTI, &writes).ok();
    assert_eq!(answer.payload, 3u64.to_ne_bytes());
    assert_eq!(
        pair.device.ram[..12],
        [255, 255, 0, 255, 255, 255, 255, 255, 0, 1, 1, 0]
    );

    let writes = multi(&[
        entry(20, 1, 0x0101),
        entry(4096, 1, 0),
        entry(21, 1, 0x0101),
    ]);
    let answer = pair.ask(REGION_WRITE_MULTI, &writes).ok();
    assert_eq!(answer.payload, 1u64.to_ne_bytes());
    assert_eq!(pair.device.ram[20..22], [1, 0]);

    let refused = |pair: &mut Pair, payload: &[u8]| pair.ask(REGION_WRITE_MULTI, payload).refused();
    assert_eq!(
        refused(&mut pair, &multi(&[entry(4096, 1, 0)])),
        Errno::INVAL
    );
    assert_eq!(refused(&mut pair, &multi(&[entry(0, 9, 0)])), Errno::INVAL);
    let short = multi(&[entry(0, 1, 0)]);
    assert_eq!(refused(&mut pair, &short[..short.len() - 1]), Errno::INVAL);
    assert_eq!(refused(&mut pair, &u64::MAX.to_ne_bytes()), Errno::INVAL);
    let answer = pair.ask(REGION_WRITE_MULTI, &multi(&[])).ok();
    assert_eq!(answer.payload, 0u64.to_ne_bytes());
}

#[test]
fn memory_is_lent_with_and_without_a_descriptor_and_taken_back() {
    let mut pair = Pair::new();
    let memory = file(0x10000);
    pair.ask_with(
        DMA_MAP,
        &dma_map(3, 0x2000, 0x4000_0000, 0x1000),
        &[memory.as_fd()],
    )
    .ok();
    pair.ask(DMA_MAP, &dma_map(1, 0, u64::MAX - 0xfff, 0x1000))
        .ok();
    let refused = pair
        .ask(DMA_MAP, &dma_map(3, 0, 0xbad_0000, 0x1000))
        .refused();
    assert_eq!(refused, Errno::EXIST);
    let answer = pair.ask(DMA_UNMAP, &dma_unmap(0, 0x4000_0000, 0x1000)).ok();
    assert_eq!(answer.payload, dma_unmap(0, 0x4000_0000, 0x1000));
    let answer = pair.ask(DMA_UNMAP, &dma_unmap(2, 0, 0)).ok();
    assert_eq!(answer.payload, dma_unmap(2, 0, 0x7000));
    assert_eq!(
        pair.device.take_calls(),
        [
            "map 0x40000000+0x1000 rw fd@0x2000",
            "map 0xfffffffffffff000+0x1000 r none@0x0",
            "DmaUnmap { address: 1073741824, size: 4096, all: false }",
            "DmaUnmap { address: 0, size: 0, all: true }",
        ]
    );
    assert_eq!(pair.device.fds.len(), 1);
}

#[test]
fn descriptors_stay_with_the_message_they_came_with() {
    let mut pair = Pair::new();
    let (first, second) = (file(1), file(2));
    let (client, plain) = (
        pair.client.try_clone().expect("a clone"),
        message(1, RESET, 0, b""),
    );
    send(&client, &plain, &[]);
    send(
        &client,
        &message(2, DMA_MAP, 0, &dma_map(1, 0, 0x1000, 1)),
        &[first.as_fd()],
    );
    send(&client, &plain, &[]);
    send(
        &client,
        &message(3, DMA_MAP, 0, &dma_map(1, 0, 0x2000, 1)),
        &[second.as_fd()],
    );
    send(
        &client,
        &message(4, DMA_MAP, 0, &dma_map(1, 0, 0x3000, 1)),
        &[],
    );
    pair.turn().expect("not ended");
    for _ in 0..5 {
        pair.receive().expect("an answer").ok();
    }
    assert_eq!(
        pair.device.take_calls(),
        [
            "reset",
            "map 0x1000+0x1 r fd@0x0",
            "reset",
            "map 0x2000+0x1 r fd@0x0",
            "map 0x3000+0x1 r none@0x0"
        ]
    );
    let sizes = pair
        .device
        .fds
        .iter()
        .map(|fd| rustix::fs::fstat(fd).expect("a file").st_size);
    assert_eq!(sizes.collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_reset_reaches_the_device() {
    let mut pair = Pair::new();
    assert!(pair.ask(RESET, b"").ok().payload.is_empty());
    assert_eq!(pair.device.take_calls(), ["reset"]);
}

#[test]
fn a_panic_of_the_device_is_an_answer() {
    let mut pair = Pair::new();
    assert_eq!(
        pair.ask(REGION_READ, &access(0, PANIC, 1, b"")).refused(),
        Errno::IO
    );
    pair.send(
        &message(1, REGION_WRITE, NO_REPLY, &access(0, PANIC, 1, b"x")),
        &[],
    );
    assert!(pair.receive().is_none());
    assert_eq!((pair.panics, pair.connection.counters().panics), (2, 2));
    pair.check_alive();
}

#[test]
fn a_device_turns_a_client_away_until_it_is_ready() {
    let mut pair = Pair::silent(Options::default());
    pair.device.busy = true;
    let errno = pair.ask(VERSION, &version(QEMU)).refused();
    assert_eq!(errno, Errno::BUSY);
    assert_eq!(pair.connection.negotiated(), None);
    assert_eq!(pair.ask(RESET, b"").refused(), Errno::INVAL);
    pair.device.busy = false;
    pair.ask(VERSION, &version(QEMU)).ok();
    pair.check_alive();
}
