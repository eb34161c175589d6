// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that come and go, and those that stay without a word.

use crate::stage::{ISOLATED, LENT, Stage};
use crate::vmm::{
    BAR, CONFIG, GET_INFO, GUEST, MSIX, RAM, RESET, Ram, VERSION, Vmm, header, new_eventfd, version,
};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How far a client gets before it goes.
fn go(socket: &std::path::Path, step: usize, ram: &Ram) {
    let mut vmm = Vmm::silent(socket);
    match step {
        0 => return,
        1 => return assert!(vmm.send(&header(0, VERSION, 0, 0, 0)[..7], &[])),
        2 => return assert!(vmm.send(&header(0, VERSION, 100, 0, 0), &[ram.file.as_fd()])),
        3 => {
            vmm.tell(VERSION, &version(), &[], 0);
            return;
        }
        _ => drop(vmm.ask(VERSION, &version(), &[])),
    }
    if step == 4 {
        vmm.tell(GET_INFO, &[], &[ram.file.as_fd()], 0);
        return;
    }
    vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
    let call = new_eventfd();
    if step == 5 {
        return drop(vmm.set_irqs(4 | 32, MSIX, 0, 2, &[call.as_fd(), call.as_fd()]));
    }
    vmm.write(CONFIG, 4, &6u16.to_le_bytes());
    match step {
        6 => vmm.post(BAR, 0x14, &[1]),
        7 => vmm.negotiate(0),
        8 => {
            vmm.negotiate(0);
            vmm.queue(0, 64, crate::vmm::rings(GUEST));
        }
        9 => vmm.start(0, 64, GUEST),
        10 => {
            vmm.start(0, 64, GUEST);
            vmm.kick(0);
            vmm.tell(RESET, &[], &[], 0);
        }
        _ => {
            vmm.start(0, 64, GUEST);
            vmm.tell(crate::vmm::DMA_UNMAP, &[24, 0, 0, 0, 2], &[], 0);
            vmm.post(BAR, 0x14, &[0]);
        }
    }
}

#[test]
fn a_thousand_clients_that_go_at_each_step_leave_nothing_behind() {
    let stage = Stage::start();
    let ram = Ram::new();
    for front in [LENT, ISOLATED] {
        let socket = stage.socket(front);
        for n in 0..500 {
            go(&socket, n % 12, &ram);
        }
    }
    stage.finish();
}

#[test]
fn who_waits_behind_a_client_that_stays_gets_its_turn_and_others_do_not_notice() {
    let stage = Stage::start();
    let socket = stage.socket(LENT);
    let ram = Ram::new();
    let mut first = Vmm::new(&socket);
    first.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
    first.start(0, 64, GUEST);
    // Those behind it: silent ones, and some that have gone before it was their turn.
    let mut waiting: Vec<UnixStream> = Vec::new();
    for n in 0..60 {
        let mut other = Vmm::silent(&socket);
        other.tell(VERSION, &version(), &[], 0);
        if n % 2 == 0 {
            waiting.push(other.socket.try_clone().unwrap());
        }
    }
    for _ in 0..100 {
        assert_eq!(first.status(), 0xf);
    }
    drop(first);
    for mut other in waiting {
        let mut answer = [0; 20];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(answer[8..12], [1, 0, 0, 0], "an answer without an error");
    }
    stage.finish();
}

#[test]
fn a_client_that_stops_reading_waits_alone() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut deaf = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        deaf.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        deaf.start(0, 64, GUEST);
        deaf.socket
            .set_write_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        // It asks until nobody listens any more.
        let begin = Instant::now();
        let question = crate::vmm::access(BAR, 0, 0x4000);
        let mut message = header(7, crate::vmm::REGION_READ, question.len(), 0, 0);
        message.extend(question);
        let burst = message.repeat(100);
        while deaf.send(&burst, &[]) {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "it is read on and on"
            );
        }
        assert!(stage.proxy().memory < stage.before().memory + (30 << 10));
    }
    stage.finish();
}
