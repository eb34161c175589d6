// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What drivers that behave see.

use super::bench::{Bench, seen};
use crate::console::{MAX_PORTS, Settings, Size, SizeOrder, bits};
use crate::device::ReadOnly;
use crate::worker::{Command, Notice};

const READY: u16 = 0;
const ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE: u16 = 4;
const RESIZE: u16 = 5;
const OPEN: u16 = 6;
const NAME: u16 = 7;

/// A driver with several ports that has said all that Linux says.
fn multiport(ports: &[&str]) -> Bench {
    let mut bench = Bench::new(ports);
    bring_up(&mut bench);
    bench
}

fn bring_up(bench: &mut Bench) {
    let queues: Vec<usize> = (0..bench.sizes.len()).collect();
    bench.bring_up(&[bits::SIZE, bits::MULTIPORT], &queues);
    bench.give(2, 32, 128);
    bench.say(u32::MAX, READY, 1);
}

#[test]
fn a_console_alone_has_two_queues_and_its_size_in_the_configuration() {
    let mut bench = Bench::new(&[]);
    assert_eq!(bench.sizes.len(), 2);
    assert!(!bench.offered.contains(bits::MULTIPORT));
    assert!(bench.offered.contains(bits::SIZE) && bench.offered.contains(bits::EMERG_WRITE));
    bench.bring_up(&[bits::SIZE], &[0, 1]);
    bench.handles[0].set_size(Size { cols: 80, rows: 25 });
    bench.poll();
    assert_eq!(bench.config_notice(0), Some(vec![80, 0, 25, 0]));
    // The next driver is told when it is ready, for Linux does not look before.
    bench.tell(Command::Reset).expect("reset");
    bench.bring_up(&[bits::SIZE], &[0, 1]);
    assert_eq!(bench.config_notice(0), Some(vec![80, 0, 25, 0]));
}

#[test]
fn output_goes_to_clients_and_input_to_the_guest() {
    let mut bench = Bench::new(&[]);
    bench.bring_up(&[], &[0, 1]);
    bench.send(1, b"before\n");
    let mut first = bench.client(0);
    let mut second = bench.client(0);
    bench.send(1, b"login: ");
    assert_eq!(seen(&mut first), b"before\nlogin: ");
    assert_eq!(seen(&mut second), b"before\nlogin: ");
    bench.type_on(&mut first, b"ro");
    bench.type_on(&mut second, b"ot");
    assert_eq!(bench.pop(0), None, "there are no buffers yet");
    bench.give(0, 4, 3);
    assert_eq!(bench.received(0), b"root");
    bench.type_on(&mut first, b"x");
    assert_eq!(bench.received(0), b"x");
    let report = bench.handles[0].report();
    assert_eq!((report.clients, report.input, report.output), (2, 5, 14));
    assert!(report.guest_open);
    assert_eq!(bench.counter("output_bytes"), 14);
}

#[test]
fn what_is_typed_before_the_guest_starts_waits_for_it() {
    let mut bench = Bench::new(&[]);
    let mut client = bench.client(0);
    bench.type_on(&mut client, b"early");
    bench.bring_up(&[], &[0, 1]);
    bench.give(0, 1, 100);
    assert_eq!(bench.received(0), b"early");
}

#[test]
fn ports_are_told_as_linux_wants_it() {
    let mut bench = multiport(&["agent"]);
    assert_eq!(bench.sizes.len(), 6);
    assert_eq!(
        bench.told(),
        [(0, ADD, 1, vec![]), (1, ADD, 1, vec![])],
        "both ports are added"
    );
    bench.handles[0].set_size(Size {
        cols: 0x102,
        rows: 3,
    });
    bench.poll();
    assert_eq!(bench.told(), [(0, RESIZE, 1, vec![2, 1, 3, 0])]);
    bench.say(0, PORT_READY, 1);
    assert_eq!(
        bench.told(),
        [
            (0, CONSOLE, 1, vec![]),
            (0, OPEN, 1, vec![]),
            (0, RESIZE, 1, vec![2, 1, 3, 0])
        ]
    );
    bench.say(1, PORT_READY, 1);
    assert_eq!(
        bench.told(),
        [(1, NAME, 1, b"agent".to_vec()), (1, OPEN, 1, vec![])]
    );
}

#[test]
fn kernels_that_have_it_the_other_way_round_are_told_rows_first() {
    let mut bench = Bench::with(&Settings {
        multiport: true,
        size_order: SizeOrder::RowsFirst,
        ..Settings::default()
    });
    bring_up(&mut bench);
    bench.told();
    bench.handles[0].set_size(Size { cols: 80, rows: 25 });
    bench.poll();
    assert_eq!(bench.told(), [(0, RESIZE, 1, vec![25, 0, 80, 0])]);
}

#[test]
fn a_named_port_gets_input_when_the_guest_has_opened_it() {
    let mut bench = multiport(&["agent"]);
    bench.say(1, PORT_READY, 1);
    bench.give(4, 8, 16);
    let mut client = bench.client(1);
    bench.type_on(&mut client, b"ping");
    assert_eq!(bench.received(4), b"");
    assert!(!bench.handles[1].report().guest_open);
    bench.say(1, OPEN, 1);
    assert_eq!(bench.received(4), b"ping");
    bench.send(5, b"pong");
    assert_eq!(seen(&mut client), b"pong");
    bench.say(1, OPEN, 0);
    bench.type_on(&mut client, b"again");
    assert_eq!(bench.received(4), b"");
    bench.say(1, OPEN, 1);
    assert_eq!(bench.received(4), b"again");
}

#[test]
fn a_driver_that_knows_one_port_only_uses_a_device_with_several() {
    let mut bench = Bench::new(&["agent"]);
    bench.bring_up(&[bits::SIZE], &[0, 1]);
    let mut client = bench.client(0);
    bench.send(1, b"hello");
    assert_eq!(seen(&mut client), b"hello");
    bench.give(0, 1, 16);
    bench.type_on(&mut client, b"you");
    assert_eq!(bench.received(0), b"you");
}

#[test]
fn a_driver_that_noticed_nothing_goes_on_after_a_restart() {
    let settings = Settings {
        ports: vec!["agent".to_owned()],
        ..Settings::default()
    };
    let mut bench = Bench::with(&settings);
    bring_up(&mut bench);
    bench.say(0, PORT_READY, 1);
    bench.say(0, OPEN, 1);
    bench.say(1, PORT_READY, 1);
    bench.say(1, OPEN, 1);
    bench.told();
    bench.give(0, 4, 16);
    bench.give(4, 4, 16);
    // Written before, and not seen by the one that is killed.
    bench.add(1, b"in between", 0);
    bench.killed_and_resumed(&settings);
    assert_eq!(bench.pop(1), Some(Vec::new()));
    let mut client = bench.client(0);
    assert_eq!(seen(&mut client), b"in between");
    bench.type_on(&mut client, b"go on");
    assert_eq!(bench.received(0), b"go on");
    let mut agent = bench.client(1);
    bench.type_on(&mut agent, b"here");
    assert_eq!(bench.received(4), b"here");
    bench.send(5, b"there");
    assert_eq!(seen(&mut agent), b"there");
    // What the one before had still to tell is told; a driver that knows it answers.
    assert_eq!(bench.told(), [(0, ADD, 1, vec![]), (1, ADD, 1, vec![])]);
    bench.say(1, PORT_READY, 1);
    assert_eq!(
        bench.told(),
        [(1, NAME, 1, b"agent".to_vec()), (1, OPEN, 1, vec![])]
    );
    bench.handles[0].set_size(Size { cols: 80, rows: 25 });
    bench.poll();
    assert_eq!(bench.told(), [(0, RESIZE, 1, vec![80, 0, 25, 0])]);
}

#[test]
fn a_console_without_several_ports_goes_on_after_a_restart() {
    let mut bench = Bench::new(&[]);
    bench.bring_up(&[bits::SIZE], &[0, 1]);
    bench.give(0, 4, 16);
    bench.send(1, b"before");
    bench.killed_and_resumed(&Settings::default());
    let mut client = bench.client(0);
    bench.send(1, b"after");
    assert_eq!(seen(&mut client), b"after");
    bench.type_on(&mut client, b"typed");
    assert_eq!(bench.received(0), b"typed");
}

#[test]
fn the_emergency_character_is_output_and_the_rest_is_read_only() {
    let mut bench = Bench::new(&[]);
    let mut client = bench.client(0);
    let write = |bench: &mut Bench, offset, data: &[u8]| {
        let data = data.to_vec();
        bench.tell(Command::WriteConfig { offset, data })
    };
    write(&mut bench, 8, &[b'!', 0, 0, 0]).expect("written");
    write(&mut bench, 8, b"?").expect("written");
    assert_eq!(seen(&mut client), b"!?");
    assert_eq!(bench.counter("emergency_bytes"), 2);
    let refused = Err(ReadOnly.to_string());
    assert_eq!(write(&mut bench, 0, &[1]), refused);
    assert_eq!(write(&mut bench, 4, &[0; 8]), refused);
    assert_eq!(write(&mut bench, 8, &[0; 5]), refused);
}

#[test]
fn a_long_chain_takes_several_turns_and_is_whole() {
    let mut bench = Bench::new(&[]);
    bench.bring_up(&[], &[0, 1]);
    let mut client = bench.client(0);
    let text: Vec<u8> = (0..200_000u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    bench.add(1, &text, 0);
    bench.add(1, b"end", 0);
    bench.kick(1);
    let mut got = Vec::new();
    for _ in 0..10 {
        got.extend(seen(&mut client));
        bench.poll();
    }
    got.extend(seen(&mut client));
    assert_eq!(got.len(), text.len() + 3);
    assert!(got.starts_with(&text) && got.ends_with(b"end"));
}

#[test]
fn there_are_up_to_31_ports() {
    let names: Vec<String> = (1..MAX_PORTS).map(|port| format!("p{port}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut bench = multiport(&names);
    assert_eq!(bench.sizes.len(), 64);
    let added = bench.told();
    assert_eq!(added.len(), MAX_PORTS);
    for id in 0..31 {
        bench.say(id, PORT_READY, 1);
    }
    let mut named = bench.told();
    // Into buffers that were given back.
    bench.kick(2);
    named.extend(bench.told());
    assert_eq!(
        named.iter().filter(|told| told.1 == NAME).count(),
        MAX_PORTS - 1
    );
    bench.send(63, b"last");
    let mut client = bench.client(30);
    assert_eq!(seen(&mut client), b"last");
}

#[test]
fn a_reset_forgets_what_the_driver_has_said() {
    let mut bench = multiport(&["agent"]);
    bench.say(0, PORT_READY, 1);
    bench.say(0, OPEN, 1);
    bench.tell(Command::Reset).expect("reset");
    assert!(!bench.handles[0].report().guest_open);
    bench
        .notices
        .retain(|notice| !matches!(notice, Notice::Config { .. }));
    let queues: Vec<usize> = (0..6).collect();
    bench.bring_up(&[bits::MULTIPORT], &queues);
    bench.give(2, 8, 128);
    bench.say(0, PORT_READY, 1);
    assert_eq!(bench.told(), [], "DEVICE_READY has not come");
    assert_eq!(bench.counter("control_refused"), 1);
}
