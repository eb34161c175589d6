// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Records of what is in flight, as the session lends them.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::Host;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::os::fd::OwnedFd;
use virtio_msg::{DeviceStatus, QueueIndex};
use vmsg_bus::control::{Resume, Status};
use vmsg_proxy::session::{InflightMemory, Op, Outcome, ResumeAt};
use world::{LIVE, World, setup};

fn inode(fd: &OwnedFd) -> u64 {
    fstat(fd).unwrap().st_ino
}

#[test]
fn each_queue_has_a_record_of_its_own_that_begins_with_the_guest() {
    let mut world = World::net();
    world.bring_up();
    let host = &world.host;
    let (a, b) = (host.inflight[&0], host.inflight[&1]);
    assert!(!a.resume && !b.resume);
    assert_eq!((a.len, b.len), (16 + 128 * 16, 16 + 128 * 16));
    assert_eq!((a.offset % 64, b.offset % 64), (0, 0));
    assert!(a.offset + 16 + 32768 * 16 <= b.offset, "room for any size");
    let (file, other) = (&host.inflight_files[&0], &host.inflight_files[&1]);
    assert_eq!(inode(file), inode(other));
    assert!(fcntl_get_seals(file).unwrap().contains(SealFlags::SHRINK));
    let size = u64::try_from(fstat(file).unwrap().st_size).unwrap();
    assert!(size >= b.offset + b.len);
}

#[test]
fn a_restarted_host_goes_on_with_the_same_record() {
    let mut world = World::net();
    world.bring_up();
    let before = (
        inode(&world.host.inflight_files[&0]),
        world.host.inflight[&0],
    );
    let next = world.host.restarted();
    world.replace(next);
    world.assert_host_is_live();
    let now = world.host.inflight[&0];
    assert!(now.resume);
    assert_eq!((now.offset, now.len), (before.1.offset, before.1.len));
    assert_eq!(inode(&world.host.inflight_files[&0]), before.0);
    // A device with queues in order needs to know as well.
    assert_eq!(world.host.resume[&0], Resume::UsedInRing);
}

#[test]
fn a_guest_that_starts_over_begins_its_records_anew() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::SetStatus(DeviceStatus::RESET)).unwrap();
    for op in World::bring_up_ops().drain(2..) {
        world.op(op).unwrap();
    }
    assert!(!world.host.inflight[&0].resume);
    let before = inode(&world.host.inflight_files[&0]);
    // The next guest has nothing to do with the last one.
    world.op(Op::Release).unwrap();
    world.bring_up();
    assert!(!world.host.inflight[&0].resume);
    assert_ne!(inode(&world.host.inflight_files[&0]), before);
}

#[test]
fn a_queue_that_was_stopped_goes_on_with_its_record() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::StopQueue(QueueIndex(0))).unwrap();
    let again = vmsg_proxy::session::QueueSetup {
        resume: ResumeAt::UsedIndex,
        ..setup(0x1000)
    };
    world.op(Op::SetQueue(QueueIndex(0), again)).unwrap();
    assert!(world.host.inflight[&0].resume);
}

#[test]
fn memory_of_the_front_end_is_lent_in_place_of_the_sessions() {
    let mut world = World::net();
    let memory = InflightMemory::new(2, 128).unwrap();
    world.op(Op::KeepInflight(Some(memory.clone()))).unwrap();
    world.bring_up();
    let (a, b) = (world.host.inflight[&0], world.host.inflight[&1]);
    assert!(a.resume && b.resume, "what it says is what there is");
    assert_eq!((a.offset, b.offset), (0, 2112));
    assert_eq!(inode(&world.host.inflight_files[&1]), inode(memory.file()));
    // It has room for two.
    world
        .op(Op::SetQueue(QueueIndex(2), setup(0x1_0000)))
        .unwrap();
    assert!(!world.host.inflight.contains_key(&2));
}

#[test]
fn a_host_that_does_not_take_records_is_lived_with() {
    for answer in [Status::UNSUPPORTED, Status::BAD_FD, Status::TOO_MANY] {
        let mut host = Host::net();
        host.inflight_answer = answer;
        let mut world = World::up(
            vmsg_proxy::session::Target::Number(virtio_msg::DevNum(3)),
            host,
        );
        world.bring_up();
        world.assert_host_is_live();
        assert!(world.host.inflight.is_empty());
        // What it did was not noted: its successor must not believe the record.
        let next = world.host.restarted();
        world.replace(next);
        world.assert_host_is_live();
        assert!(world.host.inflight.values().all(|record| !record.resume));
    }
}

#[test]
fn a_host_that_says_nothing_to_a_record_is_lived_with() {
    let mut host = Host::net();
    host.mute_inflight = true;
    let mut world = World::up(
        vmsg_proxy::session::Target::Number(virtio_msg::DevNum(3)),
        host,
    );
    for op in World::bring_up_ops() {
        let id = world.submit(op.clone());
        while world.result(id).is_none() {
            assert!(world.tick());
        }
        assert!(
            !matches!(world.result(id), Some(Err(_))),
            "{op:?}: {:?}",
            world.result(id)
        );
    }
    world.assert_host_is_live();
    let status = world.op(Op::SetStatus(LIVE)).unwrap();
    assert_eq!(status, Outcome::Status(LIVE));
    assert_eq!(world.session.counters().link_faults, 0);
}
