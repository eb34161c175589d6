// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An operator who never stops, and clients of the control socket that only take room.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::host::{Host, NET, PATIENCE, arp_request};
use crate::peer::{EVENT_CONFIG, Peer, words};
use crate::rings::{Memory, WRITE};

/// VIRTIO_NET_F_STATUS.
const STATUS: u32 = 1 << 16;
const GET_CONFIG: u8 = 0x05;

/// Where the status stands in the configuration.
const STATUS_AT: u32 = 6;

/// What the device says about its link when asked.
fn link_of(peer: &mut Peer) -> u8 {
    let answer = peer.ask(GET_CONFIG, NET, &words(&[STATUS_AT, 2]));
    answer[12] & 1
}

/// Sends `lines`, and waits for the answer to each.
fn operate(control: &mut BufReader<UnixStream>, lines: &str) {
    control
        .get_mut()
        .write_all(lines.as_bytes())
        .expect("taken");
    for _ in lines.lines() {
        let mut answer = String::new();
        control.read_line(&mut answer).expect("an answer");
        assert_eq!(answer, "{\"done\":{}}\n");
    }
}

#[test]
fn a_link_that_goes_up_and_down_without_end_is_told_as_it_is_in_the_end() {
    let mut host = Host::start();
    let before = host.resident();
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 4 << 20);
    peer.negotiate(NET, STATUS);
    let rings = [0, 1].map(|queue| memory.ring(&mut peer, NET, queue, 64));
    assert_eq!(peer.set_status(NET, 15), 15);
    let mut frame = vec![0; 12];
    frame.extend(arp_request());
    rings[1].write(0, &frame);
    let len = u32::try_from(frame.len()).expect("short");
    for index in 0..64 {
        let addr = memory.base + (1 << 20) + u64::from(index) * 2048;
        rings[0].descriptor(index, addr, 2048, WRITE, 0);
        rings[1].descriptor(index, memory.base, len, 0, 0);
    }
    let stream = UnixStream::connect(host.control()).expect("a control socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut control = BufReader::new(stream);
    let line = |state: &str| {
        format!("{{\"command\":\"link\",\"device\":\"net0\",\"state\":\"{state}\"}}\n")
    };
    let both = line("down") + &line("up");
    // Without a word from the driver, and with frames both ways.
    let mut offered = [0u16; 2];
    for _ in 0..100 {
        operate(&mut control, &both.repeat(25));
        // What was sent while the link was down has no answer, and its buffer stays where it is.
        for (ring, offered) in rings.iter().zip(&mut offered) {
            if offered.wrapping_sub(ring.used_index()) < 64 {
                ring.offer(*offered % 64);
                *offered += 1;
            }
        }
        peer.kick(NET, 0);
        peer.kick(NET, 1);
    }
    let mut told = None;
    for (last, up) in [
        (line("down"), 0),
        (line("up"), 1),
        (both + &line("down"), 0),
    ] {
        operate(&mut control, &last);
        let deadline = Instant::now() + PATIENCE;
        // Whoever only listens to what is told gets to know the same.
        while link_of(&mut peer) != up || told != Some(up) {
            assert!(Instant::now() < deadline, "the link stays as it was");
            while let Some(event) = peer.events.pop_front() {
                if event[1] == EVENT_CONFIG && event.len() > 24 {
                    told = Some(event[24] & 1);
                }
            }
        }
    }
    operate(&mut control, &line("up"));
    assert!(host.resident() < before + (8 << 10), "{before} KiB before");
    host.assert_idle();
    drop(peer);
    drop(control);
    host.finish();
}

#[test]
fn control_clients_that_only_take_room_cost_nobody_anything() {
    let mut host = Host::start();
    let before = host.resident();
    // Half lines, lines without end, answers that nobody reads; more than there is room for.
    let mut clients = Vec::new();
    for number in 0..100 {
        let Ok(mut client) = UnixStream::connect(host.control()) else {
            continue;
        };
        client.set_nonblocking(true).expect("a socket");
        let bytes = match number % 4 {
            0 => b"{\"command\":".to_vec(),
            1 => vec![b'['; 1 << 20],
            2 => b"{\"command\":\"list\"}\n".repeat(10_000),
            _ => vec![0; 1 << 20],
        };
        // As much as is taken.
        let _ = client.write(&bytes);
        clients.push(client);
        if number % 10 == 9 {
            host.ping();
        }
    }
    host.assert_idle();
    assert!(host.resident() < before + (8 << 10), "{before} KiB before");
    drop(clients);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stream = UnixStream::connect(host.control()).expect("a control socket");
        let mut control = BufReader::new(stream);
        let _ = control.get_mut().write_all(b"{\"command\":\"list\"}\n");
        let mut answer = String::new();
        if control.read_line(&mut answer).is_ok_and(|len| len > 0) && answer.contains("net0") {
            break;
        }
        assert!(Instant::now() < deadline, "no room again: {answer}");
        host.ping();
    }
    host.finish();
}
