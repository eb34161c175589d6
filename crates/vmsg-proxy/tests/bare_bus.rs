// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front on a bus that carries messages of 48 bytes and nothing else: the link waits on the kicks and rings the calls.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use stage::{LIVE, Setting, Stage, Vmm, is_closed, rung};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_msg::{Message, QueueIndex};

fn bare(host: Host) -> (Stage, Vmm) {
    let (ram, file) = Vmm::memory();
    let stage = Stage::with(host, Setting::bare(&file));
    let socket = UnixStream::connect(stage.socket()).unwrap();
    (stage, Vmm::of(socket, ram, file))
}

fn used(stage: &Stage, queue: u32) {
    let number = stage.host().number;
    let message = Message::EventUsed {
        queue: QueueIndex(queue),
    };
    stage.tell(number, message);
}

#[test]
fn kicks_become_messages_and_messages_become_calls() {
    let (stage, vmm) = bare(Host::rng());
    let vmm = vmm.started(&stage, 1);
    assert!(stage.host().windows.is_empty() && stage.host().notify.is_empty());
    stage.until("the kick of the start", |host| host.kicks == [0]);
    rung(&vmm.calls[&0]);
    for n in 2..50 {
        vmm.kicks[&0].write(1).unwrap();
        stage.until("kicked", |host| host.kicks.len() == n);
        used(&stage, 0);
        rung(&vmm.calls[&0]);
    }
}

#[test]
fn a_kick_is_taken_whether_or_not_the_vmm_reads_or_fills_its_eventfd() {
    let (stage, vmm) = bare(Host::rng());
    let vmm = vmm.started(&stage, 1);
    stage.until("the kick of the start", |host| host.kicks == [0]);
    // Written and taken back at once.
    vmm.kicks[&0].write(1).unwrap();
    vmm.kicks[&0].read().unwrap();
    // Near to full: nobody here reads it.
    vmm.kicks[&0].write(u64::MAX - 2).unwrap();
    let kicked = |host: &Host| host.kicks.len();
    stage.until("kicked", |host| kicked(host) >= 2);
    let before = kicked(&stage.host());
    vmm.kicks[&0].write(1).unwrap();
    stage.until("kicked again", |host| kicked(host) > before);
}

#[test]
fn kicks_before_the_device_is_live_and_of_rings_that_come_later_are_not_lost() {
    let mut host = Host::net();
    host.queue_sizes = vec![256; 5];
    host.info.max_queues = 5;
    host.info.vendor_id = u32::from_le_bytes(*b"vmsg");
    host.offered.insert(22);
    let (stage, mut vmm) = bare(host);
    vmm.init();
    vmm.features_and_memory();
    for ring in 0..4 {
        vmm.set_ring(ring, 0);
        vmm.kicks[&ring].write(1).unwrap();
    }
    assert!(stage.host().kicks.is_empty());
    vmm.front.set_vring_enable(0, true).unwrap();
    vmm.front.set_vring_enable(1, true).unwrap();
    stage.until("the first pair was kicked", |host| {
        host.status.bits() == LIVE && host.kicks.contains(&0) && host.kicks.contains(&1)
    });
    vmm.front.set_vring_enable(3, true).unwrap();
    stage.until("one more", |host| host.kicks.contains(&3));
    assert!(!stage.host().kicks.contains(&2));
}

#[test]
fn a_full_bus_merges_kicks_and_loses_none() {
    let (ram, file) = Vmm::memory();
    let mut setting = Setting::bare(&file);
    setting.options.slots = 2;
    let stage = Stage::with(Host::rng(), setting);
    let socket = UnixStream::connect(stage.socket()).unwrap();
    let vmm = Vmm::of(socket, ram, file).started(&stage, 1);
    stage.until("the kick of the start", |host| host.kicks == [0]);
    for _ in 0..20 {
        let host = stage.host();
        let before = host.kicks.len();
        // The device does not take anything now.
        for _ in 0..100 {
            vmm.kicks[&0].write(1).unwrap();
        }
        drop(host);
        stage.until("kicked", |host| host.kicks.len() > before);
    }
    let handle = stage.link.as_ref().unwrap().handle();
    let end = Instant::now() + stage::PATIENCE;
    // The last one arrives although all before it were in its way.
    let last = loop {
        let sent = handle.stats().unwrap().sent;
        std::thread::sleep(Duration::from_millis(30));
        if handle.stats().unwrap().sent == sent || Instant::now() > end {
            break stage.host().kicks.len();
        }
    };
    vmm.kicks[&0].write(1).unwrap();
    stage.until("the last kick", |host| host.kicks.len() == last + 1);
}

#[test]
fn a_call_that_is_replaced_is_rung_at_once() {
    let (stage, vmm) = bare(Host::rng());
    let vmm = vmm.started(&stage, 1);
    rung(&vmm.calls[&0]);
    used(&stage, 0);
    rung(&vmm.calls[&0]);
    let next = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    vmm.front.set_vring_call(0, &next).unwrap();
    rung(&next);
    used(&stage, 0);
    rung(&next);
}

#[test]
fn a_stopped_ring_is_heard_no_more() {
    let (stage, vmm) = bare(Host::net());
    let vmm = vmm.started(&stage, 2);
    stage.until("both kicked", |host| host.kicks.len() >= 2);
    vmm.front.get_vring_base(1).unwrap();
    let before = stage.host().kicks.len();
    vmm.kicks[&1].write(1).unwrap();
    vmm.kicks[&0].write(1).unwrap();
    stage.until("the other", |host| host.kicks.len() > before);
    assert_eq!(stage.host().kicks[before..], [0]);
}

#[test]
fn memory_that_the_bus_does_not_have_ends_the_connection() {
    let (_, file) = Vmm::memory();
    let stage = Stage::with(Host::rng(), Setting::bare(&file));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    vmm.front
        .set_features(stage::FEATURES | stage::PROTOCOL_FEATURES)
        .unwrap();
    assert!(vmm.front.set_mem_table(&[vmm.region()]).is_err());
    assert!(is_closed(&mut vmm.socket));
    assert_eq!(stage.front().stats().refused, 1);
}

#[test]
fn a_foreign_device_is_not_given_a_ring_in_its_middle() {
    let (stage, vmm) = bare(Host::rng());
    let mut vmm = vmm;
    vmm.init();
    vmm.features_and_memory();
    vmm.set_used_index(0, 9);
    vmm.set_ring(0, 9);
    assert!(vmm.front.set_vring_enable(0, true).is_err());
    assert!(is_closed(&mut vmm.socket));
    assert!(stage.host().queues.is_empty());
    // One of ours begins where the ring stands.
    let mut host = Host::rng();
    host.info.vendor_id = u32::from_le_bytes(*b"vmsg");
    let (stage, mut vmm) = bare(host);
    vmm.init();
    vmm.features_and_memory();
    vmm.set_used_index(0, 9);
    vmm.set_ring(0, 9);
    vmm.front.set_vring_enable(0, true).unwrap();
    stage.until("live", |host| host.status.bits() == LIVE);
    assert!(stage.host().resume.is_empty());
}
