// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that cannot go on in the middle of its queues, and a front end that would not connect again (`vhost-user-fs-pci` of QEMU has no
//! `reconnect`): it stays connected, is told by the ring's error eventfd, and works again when its guest's driver has started over.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod late;
mod vmm;

use late::{Late, Platter};
use std::thread::JoinHandle;
use std::time::Instant;
use vmm::{End, PATIENCE, Vmm};
use vmsg_bus::{BusSpec, keyval};
use vmsg_device::host::{Host, Stop};
use vmsg_proxy::{FrontSpec, Proxy};

struct Running {
    stop: Stop,
    thread: JoinHandle<()>,
}

impl Running {
    fn start(spec: &BusSpec, platter: &Platter) -> Running {
        let listener = spec.listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let bus = host.add_bus(48, Some(listener)).unwrap();
        let device = Late::new(false, platter.clone());
        host.add_device(bus, "late", Some(0), None, Box::new(device))
            .unwrap();
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().unwrap());
        Running { stop, thread }
    }

    fn end(self) {
        self.stop.stop();
        self.thread.join().unwrap();
    }
}

/// Sets the device up, from where the front end is, and uses it.
fn work(vmm: &mut Vmm) {
    while !vmm.is_set_up() {
        vmm.step().unwrap();
    }
    let until = vmm.answered + 10;
    while vmm.answered < until {
        vmm.ask();
        vmm.await_answer().unwrap();
    }
}

#[test]
fn a_front_end_stays_when_its_guest_has_to_start_over_and_works_again_after_that() {
    for revision in ["1", "r1"] {
        let dir = tempfile::tempdir().unwrap();
        let (at, base) = (dir.path().display(), vmm::GUEST);
        // Here nobody keeps what is in flight.
        let bus: BusSpec =
            format!("linux-user,dir={at},ram={at}/ram,mem-offset={base:#x},revision={revision}")
                .parse()
                .unwrap();
        let platter = Platter::default();
        let mut host = Running::start(&bus, &platter);
        let socket = dir.path().join("vu.sock");
        let spec = format!(
            "vhost-user,socket={},dev=0",
            keyval::escape(&socket.to_string_lossy())
        );
        let spec: FrontSpec = keyval::from_str(&spec).unwrap();
        let proxy = Proxy::start(std::slice::from_ref(&bus), &[spec], |_| {}).unwrap();
        let mut vmm = Vmm::new(socket, dir.path().join("ram"), false);
        work(&mut vmm);
        let begin = Instant::now();
        let mut refused = 0;
        while refused < 3 {
            assert!(begin.elapsed() < PATIENCE, "{refused} times");
            // With requests under way, most of the time.
            (0..6).for_each(|_| vmm.ask());
            host.end();
            host = Running::start(&bus, &platter);
            let end = loop {
                if vmm.outstanding() == 0 {
                    break None;
                }
                if let Err(end) = vmm.await_answer() {
                    break Some(end);
                }
            };
            match end {
                None => {}
                Some(End::Broken(_)) => {
                    refused += 1;
                    vmm.reset_driver().unwrap();
                    work(&mut vmm);
                }
                Some(End::SentAway) => panic!("the front end was sent away"),
            }
        }
        let (_, _, stats) = proxy.fronts().next().unwrap();
        assert_eq!(stats.connections, 1);
        drop(proxy);
        host.end();
        platter.check();
    }
}
