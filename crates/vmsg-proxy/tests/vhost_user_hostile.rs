// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The front between a VMM and a device host of which one, or both, do their worst.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use stage::{
    FEATURES, GUEST, OFFSET, PROTOCOL_FEATURES, RAM, Setting, Stage, USER, Vmm, is_closed, request,
};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_msg::{ConfigEvent, DeviceStatus, Frame, Generation, Message, Token};
use vmsg_mem::Mapping;

/// What a VMM may have to wait for a dead device host, all in all: one operation's patience of 2 s, and what a busy machine adds. Each
/// of the VMM's requests waiting as long would be twice or many times that.
const BOUND: Duration = Duration::from_millis(3800);

/// The host lives, and may have requests under way: it is waited for as any device that does not stop, and not longer.
#[test]
fn a_guest_can_be_powered_off_while_the_device_host_hangs() {
    let setting = Setting {
        stop_patience: Some(Duration::from_millis(500)),
        ..Setting::default()
    };
    let stage = Stage::with(Host::net(), setting);
    let vmm = Vmm::start(&stage, 2);
    vmm.set_used_index(0, 700);
    vmm.set_used_index(1, 5);
    // Nothing is answered as long as this is held.
    let host = stage.host();
    let begin = Instant::now();
    assert_eq!(vmm.front.get_vring_base(0).unwrap(), 700);
    assert_eq!(vmm.front.get_vring_base(1).unwrap(), 5);
    vmm.front
        .reset_owner()
        .expect_err("its memory may be in use");
    drop(vmm);
    // Until it is given up, and then for it to come back.
    assert!(begin.elapsed() < 4 * BOUND, "{:?}", begin.elapsed());
    drop(host);
}

#[test]
fn a_ring_stands_where_it_stands_even_if_the_device_refuses_to_stop() {
    let stage = Stage::new(Host::rng());
    let vmm = Vmm::start(&stage, 1);
    vmm.set_used_index(0, 700);
    stage.host().refuse_reset = true;
    assert_eq!(vmm.front.get_vring_base(0).unwrap(), 700);
}

#[test]
fn a_guest_can_boot_while_the_device_host_hangs() {
    let stage = Stage::new(Host::net());
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let host = stage.host();
    let begin = Instant::now();
    vmm.features_and_memory();
    vmm.set_ring(0, 0);
    vmm.set_ring(1, 0);
    for index in 0..2 {
        vmm.front.set_vring_enable(index, true).unwrap();
    }
    // A dozen requests.
    assert!(begin.elapsed() < 3 * BOUND, "{:?}", begin.elapsed());
    drop(host);
}

#[test]
fn a_write_of_configuration_that_cannot_be_done_costs_nobody_the_device() {
    let stage = Stage::new(Host::new(2, "disk", 2, 1, &[1, 2, 3, 4, 5, 6, 7, 8]));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let outside = vmm
        .front
        .set_config(60, VhostUserConfigFlags::WRITABLE, &[0x33]);
    assert!(outside.is_err());
    let host = stage.host();
    let begin = Instant::now();
    let unheard = vmm
        .front
        .set_config(0, VhostUserConfigFlags::WRITABLE, &[0x33]);
    assert!(unheard.is_err());
    // As last seen.
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, config) = vmm.front.get_config(0, 4, flags, &[0; 4]).unwrap();
    assert_eq!(config, [1, 2, 3, 4]);
    assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
    drop(host);
    assert_eq!(stage.front().stats().refused, 2);
    assert_eq!(stage.front().stats().connections, 1);
}

#[test]
fn memory_truncated_at_any_moment_is_only_lost() {
    let stage = Stage::new(Host::net());
    let mut vmm = Vmm::start(&stage, 2);
    let stop = Arc::new(AtomicBool::new(false));
    let file = vmm.file.try_clone().unwrap();
    let truncating = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::ftruncate(&file, 0).unwrap();
                rustix::fs::ftruncate(&file, OFFSET + RAM).unwrap();
            }
        }
    });
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        assert_eq!(vmm.front.get_vring_base(1).unwrap(), 0);
        vmm.set_ring(1, 0);
    }
    stop.store(true, Ordering::Relaxed);
    truncating.join().unwrap();
}

fn region(guest: u64, size: u64, user: u64, file: &OwnedFd) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: user,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

#[test]
fn tables_that_overlap_wrap_or_reach_past_their_files_are_refused_and_nothing_is_lent() {
    let (_, file) = Mapping::memfd("guest", 0x10_0000, false).unwrap();
    let eight = |change: &dyn Fn(&mut VhostUserMemoryRegionInfo)| {
        let mut table: Vec<_> = (0..8)
            .map(|i| region(i << 20, 0x10_0000, USER + (i << 20), &file))
            .collect();
        change(&mut table[3]);
        table
    };
    let tables = [
        eight(&|r| r.guest_phys_addr = 0x40_0001),
        eight(&|r| r.guest_phys_addr = 0),
        eight(&|r| r.guest_phys_addr = u64::MAX - 0xf_0000),
        eight(&|r| r.userspace_addr = u64::MAX - 0xf_0000),
        eight(&|r| r.mmap_offset = u64::MAX - 0xf_0000),
        eight(&|r| r.mmap_offset = 1),
        eight(&|r| r.memory_size = u64::MAX),
        eight(&|r| r.memory_size = 1 << 63),
        eight(&|r| r.mmap_offset = 1 << 63),
    ];
    let stage = Stage::new(Host::rng());
    for (i, table) in tables.iter().enumerate() {
        let mut vmm = Vmm::connect(&stage);
        vmm.init();
        vmm.front
            .set_features(FEATURES | PROTOCOL_FEATURES)
            .unwrap();
        assert!(vmm.front.set_mem_table(table).is_err(), "table {i}");
        assert!(stage.host().windows.is_empty());
    }
    Vmm::start(&stage, 1);
}

#[test]
fn rings_that_leave_their_region_are_refused() {
    let stage = Stage::new(Host::rng());
    let (_more, other) = Mapping::memfd("next", 0x1_0000, false).unwrap();
    // The last byte of the region, the seam of two, the end of all addresses.
    for at in [USER + RAM - 1, USER + RAM - 500, USER - 2, u64::MAX - 8] {
        for part in 0..3 {
            let mut vmm = Vmm::connect(&stage);
            vmm.init();
            vmm.front
                .set_features(FEATURES | PROTOCOL_FEATURES)
                .unwrap();
            let table = [
                vmm.region(),
                region(GUEST + RAM, 0x1_0000, USER + RAM, &other),
            ];
            vmm.front.set_mem_table(&table).unwrap();
            let mut message = 0u64.to_ne_bytes().to_vec();
            for i in 0..3 {
                let good = USER + 0x1000 * (i + 1);
                message.extend_from_slice(&(if i == part { at } else { good }).to_ne_bytes());
            }
            message.extend_from_slice(&[0; 8]);
            vmm.front.set_vring_num(0, 256).unwrap();
            vmm.front.set_vring_enable(0, true).unwrap();
            let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            vmm.front.set_vring_kick(0, &kick).unwrap();
            let mut socket = vmm.socket.try_clone().unwrap();
            socket.write_all(&request(9, &message)).unwrap();
            assert!(is_closed(&mut socket), "{at:#x} as part {part}");
            assert!(stage.host().queues.is_empty());
        }
    }
}

/// Sends one message with descriptors.
fn send_with(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .is_ok()
}

fn table_of_one(size: u64) -> Vec<u8> {
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for field in [GUEST, size, USER, 0] {
        table.extend_from_slice(&field.to_ne_bytes());
    }
    request(5, &table)
}

#[test]
fn files_that_are_no_memory_are_refused_before_anybody_touches_them() {
    let stage = Stage::new(Host::rng());
    let (pipe, _other) = std::io::pipe().unwrap();
    let files: Vec<OwnedFd> = vec![
        pipe.into(),
        std::fs::File::open("/dev/zero").unwrap().into(),
        std::fs::File::open("/proc/self/maps").unwrap().into(),
        std::fs::File::open("/sys/kernel/mm/transparent_hugepage/enabled")
            .unwrap_or_else(|_| std::fs::File::open("/proc/self/status").unwrap())
            .into(),
        std::fs::File::open(stage.dir.path()).unwrap().into(),
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
    ];
    for file in files {
        let name = format!("{file:?}");
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        assert!(send_with(&socket, &table_of_one(2), &[file]));
        assert!(is_closed(&mut socket), "{name}");
        assert!(stage.host().windows.is_empty());
    }
    Vmm::start(&stage, 1);
}

#[test]
fn changes_of_the_configuration_without_end_reach_a_vmm_at_a_pace_it_can_bear() {
    let stage = Stage::new(Host::new(2, "disk", 2, 1, &[1, 2, 3, 4]));
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    vmm.front.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    let event = |value: u8| {
        let event = ConfigEvent {
            status: DeviceStatus::RESET,
            generation: Generation(2),
            offset: 0,
            len: 1,
            data: &[value],
        };
        let mut bytes = vec![0; 64];
        let frame = Frame::new(stage.host().number, Token(0), Message::EventConfig(event));
        let len = frame.encode(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    };
    let begin = Instant::now();
    let mut rounds = 0;
    while begin.elapsed() < Duration::from_secs(1) {
        stage
            .shared
            .events
            .lock()
            .unwrap()
            .push(event(rounds as u8));
        vmm.front.get_features().unwrap();
        rounds += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    ours.set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let (mut told, mut time) = (0, Duration::ZERO);
    while ours.read_exact(&mut [0; 12]).is_ok() {
        told += 1;
        time = begin.elapsed();
    }
    assert!(told > 1, "{told} of {rounds}");
    // Ten in a second.
    assert!(
        told <= 3 + time.as_millis() / 100,
        "{told} of {rounds} in {time:?}"
    );
    ours.set_read_timeout(Some(stage::PATIENCE)).unwrap();
    stage.shared.events.lock().unwrap().push(event(0xee));
    ours.read_exact(&mut [0; 12]).unwrap();
}
