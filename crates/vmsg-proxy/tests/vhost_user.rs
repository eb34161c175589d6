// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vhost-user front over a real socket: the `vhost` crate plays the VMM, a scripted device host stands behind a bus.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use rustix::event::{PollFd, PollFlags, poll};
use stage::{
    FEATURES, GUEST, LIVE, OFFSET, PATIENCE, PROTOCOL_FEATURES, RAM, Stage, USER, Vmm, is_closed,
    request, ring_at, rung,
};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_msg::{ConfigEvent, DevNum, DeviceStatus, FeatureSet, Generation, Message, QueueIndex};
use vmm_sys_util::eventfd::EventFd;
use vmsg_bus::control::Resume;
use vmsg_mem::Mapping;
use vmsg_proxy::front::vhost_user::{BindError, VhostUserFront, VhostUserOptions};

#[test]
fn a_vmm_brings_an_entropy_device_up() {
    let stage = Stage::new(Host::rng());
    let vmm = Vmm::start(&stage, 1);
    let host = stage.host();
    assert!(host.claimed);
    assert_eq!(host.features, FeatureSet::from_u64(FEATURES));
    let queue = host.queues[&0];
    let at = GUEST + ring_at(0);
    assert_eq!(
        (queue.size.0, queue.descriptor, queue.driver, queue.device),
        (64, at, at + 0x1000, at + 0x2000)
    );
    let window = host.windows.values().next().unwrap();
    assert_eq!(
        (
            window.base.0,
            window.len,
            window.file_offset,
            window.writable
        ),
        (GUEST, RAM, OFFSET, true)
    );
    assert!(
        !host.resume.contains_key(&0),
        "a new ring starts at its beginning"
    );
    // Kick and call are the VMM's own eventfds.
    let (notify, fds) = &host.notify[&0];
    assert!(notify.kick && notify.call);
    vmm.kicks[&0].write(3).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&fds[0], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
    rustix::io::write(&fds[1], &5u64.to_ne_bytes()).unwrap();
    assert_eq!(vmm.calls[&0].read().unwrap(), 5);
}

#[test]
fn a_pair_of_rings_is_set_up_before_the_device_goes_live_and_more_come_later() {
    let mut host = Host::net();
    host.queue_sizes = vec![256; 5];
    host.info.max_queues = 5;
    host.info.vendor_id = u32::from_le_bytes(*b"vmsg");
    host.offered.insert(22); // MQ
    let stage = Stage::new(host);
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    assert_eq!(vmm.front.get_queue_num().unwrap(), 2, "pairs");
    // The crate takes that for a number of rings; to it, another connection.
    drop(vmm);
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    vmm.features_and_memory();
    for index in 0..2 {
        vmm.front.set_vring_enable(index, true).unwrap();
    }
    vmm.set_ring(0, 0);
    assert_eq!(stage.host().status.bits(), LIVE & !4);
    vmm.set_ring(1, 0);
    let host = stage.host();
    assert_eq!(host.status.bits(), LIVE);
    let log = &host.log;
    let last_queue = log
        .iter()
        .rposition(|line| line.contains("SET_VQUEUE"))
        .unwrap();
    let driver_ok = log
        .iter()
        .rposition(|line| line.contains("SET_DEVICE_STATUS"))
        .unwrap();
    assert!(last_queue < driver_ok, "{log:?}");
}

#[test]
fn the_proxy_does_not_run_for_a_kick_or_a_call() {
    let stage = Stage::new(Host::rng());
    let vmm = Vmm::start(&stage, 1);
    let fds: Vec<OwnedFd> = stage.host().notify[&0]
        .1
        .iter()
        .map(|fd| fd.try_clone().unwrap())
        .collect();
    let handle = stage.link.as_ref().unwrap().handle();
    let begun = Instant::now();
    loop {
        let (before, front_before) = (handle.stats().unwrap(), stage.front().stats());
        for _ in 0..1000 {
            vmm.kicks[&0].write(1).unwrap();
            let mut count = [0; 8];
            rustix::io::read(&fds[0], &mut count).unwrap();
            rustix::io::write(&fds[1], &1u64.to_ne_bytes()).unwrap();
            vmm.calls[&0].read().unwrap();
        }
        let (after, front_after) = (handle.stats().unwrap(), stage.front().stats());
        let slept = (after.sent, after.received) == (before.sent, before.received)
            // One wake-up for the question itself.
            && after.wakeups <= before.wakeups + 2
            && front_after == front_before;
        if slept {
            break;
        }
        // It may still have been busy with what was before, not without end.
        assert!(begun.elapsed() < PATIENCE, "{before:?} {after:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_kick_before_enable_is_not_lost() {
    let stage = Stage::new(Host::rng());
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    vmm.features_and_memory();
    vmm.set_ring(0, 0);
    vmm.kicks[&0].write(1).unwrap();
    assert!(stage.host().queues.is_empty());
    vmm.front.set_vring_enable(0, true).unwrap();
    stage.until("the device was kicked", |host| host.kicks == [0]);
    // And the eventfd itself is as the driver left it.
    let host = stage.host();
    let mut fds = [PollFd::new(&host.notify[&0].1[0], PollFlags::IN)];
    assert_eq!(
        poll(
            &mut fds,
            Some(&rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0
            })
        ),
        Ok(1)
    );
}

#[test]
fn rings_enabled_before_features_are_known_start_as_well() {
    // As QEMU's network devices do it.
    let stage = Stage::new(Host::net());
    let mut socket = UnixStream::connect(stage.socket()).unwrap();
    for index in 0..2u32 {
        let message = request(18, &[index.to_ne_bytes(), 1u32.to_ne_bytes()].concat());
        socket.write_all(&message).unwrap();
    }
    socket.write_all(&request(1, &[])).unwrap();
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(stage.front().stats().malformed, 0);
    let mut vmm = Vmm::over(socket);
    vmm.features_and_memory();
    vmm.set_ring(0, 0);
    vmm.set_ring(1, 0);
    stage.until("live", |host| {
        host.status.bits() == LIVE && host.queues.len() == 2
    });
}

#[test]
fn a_ring_stops_where_the_used_index_stands_and_starts_there_again() {
    let stage = Stage::new(Host::net());
    let mut vmm = Vmm::start(&stage, 2);
    vmm.set_used_index(0, 700);
    vmm.set_used_index(1, 5);
    assert_eq!(vmm.front.get_vring_base(0).unwrap(), 700);
    assert_eq!(stage.host().queues.len(), 1, "the other goes on");
    assert_eq!(stage.host().status.bits(), LIVE);
    assert_eq!(vmm.front.get_vring_base(1).unwrap(), 5);
    assert_eq!(
        stage.host().status,
        DeviceStatus::RESET,
        "the last one resets the device"
    );
    // The next driver, with other features.
    vmm.front.set_features(1 << 32 | PROTOCOL_FEATURES).unwrap();
    vmm.front.set_mem_table(&[vmm.region()]).unwrap();
    vmm.set_ring(0, 700);
    vmm.set_ring(1, 7);
    stage.until("live again", |host| {
        host.status.bits() == LIVE && host.queues.len() == 2
    });
    let host = stage.host();
    assert_eq!(host.features, FeatureSet::from_u64(1 << 32));
    assert_eq!(host.resume[&0], Resume::UsedInRing);
    assert_eq!(
        host.resume[&1],
        Resume::At {
            avail_idx: 7,
            used_idx: 5
        }
    );
    assert_eq!(host.table_changes, 1, "the same memory was not lent twice");
}

#[test]
fn a_disabled_ring_rests_and_goes_on() {
    let stage = Stage::new(Host::net());
    let mut vmm = Vmm::start(&stage, 2);
    vmm.set_used_index(1, 9);
    vmm.front.set_vring_enable(1, false).unwrap();
    assert_eq!(stage.host().queues.len(), 1);
    vmm.front.set_vring_enable(1, true).unwrap();
    stage.until("two again", |host| host.queues.len() == 2);
    assert_eq!(stage.host().resume[&1], Resume::UsedInRing);
}

#[test]
fn the_memory_table_changes_under_live_rings() {
    let stage = Stage::new(Host::rng());
    let mut vmm = Vmm::start(&stage, 1);
    let (_more, file) = Mapping::memfd("dimm", 0x1_0000, false).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x1_0000_0000,
        memory_size: 0x1_0000,
        userspace_addr: 0x7000_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    assert!(vmm.front.get_max_mem_slots().unwrap() >= 8);
    let first = stage.host().windows.keys().copied().collect::<Vec<_>>();
    vmm.front.add_mem_region(&region).unwrap();
    assert_eq!(stage.host().windows.len(), 2);
    assert!(stage.host().windows.contains_key(&first[0]));
    vmm.front.remove_mem_region(&region).unwrap();
    assert_eq!(
        stage.host().windows.keys().copied().collect::<Vec<_>>(),
        first
    );
    vmm.front.set_mem_table(&[vmm.region(), region]).unwrap();
    assert_eq!(stage.host().windows.len(), 2);
    assert!(stage.host().windows.contains_key(&first[0]));
    assert_eq!(stage.host().status.bits(), LIVE);
}

#[test]
fn configuration_is_read_live_padded_and_written() {
    let stage = Stage::new(Host::new(2, "disk", 2, 1, &[1, 2, 3, 4, 5, 6, 7, 8]));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let read = |vmm: &mut Vmm, offset, len: u32| {
        let flags = VhostUserConfigFlags::WRITABLE;
        vmm.front
            .get_config(offset, len, flags, &vec![0; len as usize])
            .unwrap()
            .1
    };
    assert_eq!(read(&mut vmm, 0, 12), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
    assert_eq!(read(&mut vmm, 6, 4), [7, 8, 0, 0]);
    assert_eq!(read(&mut vmm, 60, 4), [0; 4]);
    vmm.front
        .set_config(2, VhostUserConfigFlags::WRITABLE, &[0x33])
        .unwrap();
    assert_eq!(stage.host().config[2], 0x33);
    assert_eq!(read(&mut vmm, 2, 1), [0x33]);
}

/// As much as QEMU's message for it holds, from a device that has more.
#[test]
fn the_first_256_bytes_of_a_long_configuration_are_read_at_once() {
    let long: Vec<u8> = (0..=255).chain(0..44).collect();
    let stage = Stage::new(Host::new(2, "disk", 2, 1, &long));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, read) = vmm.front.get_config(0, 256, flags, &[0; 256]).unwrap();
    assert_eq!(read, long[..256]);
}

#[test]
fn a_change_of_the_configuration_reaches_the_vmm() {
    let stage = Stage::new(Host::new(2, "disk", 2, 1, &[1, 2, 3, 4]));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let (ours, theirs) = UnixStream::pair().unwrap();
    vmm.front.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    let event = ConfigEvent {
        status: DeviceStatus::RESET,
        generation: Generation(2),
        offset: 1,
        len: 2,
        data: &[8, 9],
    };
    stage.tell(DevNum(2), Message::EventConfig(event));
    let mut message = [0; 12];
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (&ours).read_exact(&mut message).unwrap();
    assert_eq!(
        message,
        [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        "CONFIG_CHANGE_MSG without payload"
    );
}

/// vhost-user has no word for it: the VMM hears it by the eventfds for errors, and nothing else changes.
#[test]
fn a_device_that_needs_a_reset_rings_the_eventfds_for_errors() {
    let stage = Stage::new(Host::rng());
    let vmm = Vmm::start(&stage, 1);
    let error = EventFd::new(0).unwrap();
    vmm.front.set_vring_err(0, &error).unwrap();
    let event = ConfigEvent {
        status: DeviceStatus::from_bits_retain(LIVE) | DeviceStatus::NEEDS_RESET,
        generation: Generation(2),
        offset: 0,
        len: 0,
        data: &[],
    };
    stage.tell(DevNum(1), Message::EventConfig(event));
    assert_eq!(rung(&error), 1);
    assert!(vmm.front.get_features().is_ok());
    // A VMM that starts over finds a clean device.
    drop(vmm);
    Vmm::start(&stage, 1);
}

#[test]
fn a_used_queue_by_message_rings_the_call_eventfd() {
    let stage = Stage::new(Host::rng());
    let vmm = Vmm::start(&stage, 1);
    let queue = QueueIndex(0);
    stage.tell(DevNum(1), Message::EventUsed { queue });
    assert_eq!(rung(&vmm.calls[&0]), 1);
}

#[test]
fn the_next_vmm_follows_the_last_one_and_finds_a_clean_device() {
    let stage = Stage::new(Host::rng());
    for _ in 0..3 {
        let vmm = Vmm::start(&stage, 1);
        drop(vmm);
        stage.until("released", |host| {
            !host.claimed && host.windows.is_empty() && host.status.is_empty()
        });
    }
    assert_eq!(stage.front().stats().connections, 3);
}

#[test]
fn a_vmm_that_connects_again_says_where_its_rings_stand() {
    let stage = Stage::new(Host::rng());
    drop(Vmm::start(&stage, 1));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    vmm.features_and_memory();
    vmm.set_used_index(0, 1234);
    vmm.set_ring(0, 1234);
    vmm.front.set_vring_enable(0, true).unwrap();
    stage.until("live", |host| {
        host.status.bits() == LIVE && host.queues.len() == 1
    });
    assert_eq!(stage.host().resume[&0], Resume::UsedInRing);
}

#[test]
fn features_the_device_does_not_have_or_take_end_the_connection_not_the_front() {
    let stage = Stage::new(Host::rng());
    let mut vmm = Vmm::connect(&stage);
    let features = vmm.init();
    assert_eq!(
        features & !PROTOCOL_FEATURES,
        stage.host().offered.low_u64()
    );
    assert!(vmm.front.set_features(1 << 63 | PROTOCOL_FEATURES).is_err());
    stage.until_front("refused", |stats| stats.refused == 1);
    stage.host().refuse_features = true;
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    assert!(
        vmm.front
            .set_features(FEATURES | PROTOCOL_FEATURES)
            .is_err()
    );
    stage.host().refuse_features = false;
    Vmm::start(&stage, 1);
}

#[test]
fn what_only_messages_can_do_is_not_offered() {
    let mut host = Host::rng();
    for bit in [33, 34, 38, 40, 41] {
        host.offered.insert(bit);
    }
    let stage = Stage::new(host);
    let features = Vmm::connect(&stage).init();
    assert_eq!(features, 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32);
}

#[test]
fn memory_without_files_is_refused() {
    let stage = Stage::new(Host::rng());
    let mut socket = UnixStream::connect(stage.socket()).unwrap();
    socket
        .write_all(&request(2, &(FEATURES | PROTOCOL_FEATURES).to_ne_bytes()))
        .unwrap();
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for field in [GUEST, RAM, USER, 0] {
        table.extend_from_slice(&field.to_ne_bytes());
    }
    socket.write_all(&request(5, &table)).unwrap();
    assert!(is_closed(&mut socket));
    assert_eq!(stage.front().stats().refused, 1);
    Vmm::start(&stage, 1);
}

#[test]
fn the_worst_bytes_on_the_socket_end_that_connection_only() {
    let stage = Stage::new(Host::rng());
    let mut sent = 0;
    let mut bad: Vec<Vec<u8>> = vec![
        vec![0xff; 4096],
        vec![0; 4096],
        request(5, &[0xff; 500]),
        request(12, &[0; 8]),
        request(24, &[0xff; 12]),
    ];
    let mut endless = request(5, &[]);
    endless[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    bad.push(endless);
    for id in 0..64 {
        for len in [0, 4, 8, 12, 40, 72] {
            for fill in [0x00, 0x01, 0xff] {
                bad.push(request(id, &vec![fill; len]));
            }
        }
    }
    for bytes in bad {
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        // The front may have closed it before all was written.
        let _ = socket.write_all(&bytes);
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_closed(&mut socket), "{bytes:?}");
        sent += 1;
    }
    stage.until_front("all of them", |stats| stats.connections == sent);
    assert!(stage.front().stats().malformed > 0);
    // Pieces of a message, one byte at a time, are a message all the same.
    let mut socket = UnixStream::connect(stage.socket()).unwrap();
    for byte in request(1, &[]) {
        socket.write_all(&[byte]).unwrap();
    }
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    drop(socket);
    Vmm::start(&stage, 1);
}

#[test]
fn one_that_never_reads_its_replies_is_left_alone_until_it_goes() {
    let stage = Stage::new(Host::rng());
    let mut socket = UnixStream::connect(stage.socket()).unwrap();
    socket
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let many: Vec<u8> = (0..4096).flat_map(|_| request(1, &[])).collect();
    let begun = Instant::now();
    loop {
        // Ends when both buffers are full: the front does not take requests it cannot answer; or when it had no time to.
        while socket.write_all(&many).is_ok() {}
        let before = stage.front().stats().wakeups;
        std::thread::sleep(Duration::from_millis(100));
        if stage.front().stats().wakeups <= before + 1 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it does not sleep");
    }
    drop(socket);
    Vmm::start(&stage, 1);
}

#[test]
fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
    let stage = Stage::new(Host::rng());
    let handle = || stage.link.as_ref().unwrap().handle();
    let options = |path: PathBuf| VhostUserOptions::new(path);
    assert!(matches!(
        VhostUserFront::start("b", handle(), options(stage.socket())),
        Err(BindError::InUse(_))
    ));
    let mode = std::fs::metadata(stage.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let stale = stage.dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let front = VhostUserFront::start("c", handle(), options(stale.clone())).unwrap();
    UnixStream::connect(&stale).unwrap();
    drop(front);
    assert!(!stale.exists());

    let file = stage.dir.path().join("file");
    std::fs::write(&file, b"keep").unwrap();
    assert!(matches!(
        VhostUserFront::start("d", handle(), options(file.clone())),
        Err(BindError::NotASocket(_))
    ));
    assert_eq!(std::fs::read(&file).unwrap(), b"keep");
}
