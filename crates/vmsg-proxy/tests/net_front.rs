// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network devices behind the vhost-user front: link state, MTU, pairs of rings; and devices that somebody else holds.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use stage::{LIVE, Setting, Stage, Vmm, is_closed, request};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_msg::{ConfigEvent, DeviceStatus, Generation, Message};
use vmsg_mem::Mapping;

const F_MTU: u32 = 3;
const F_STATUS: u32 = 16;
const F_MQ: u32 = 22;

/// MAC, status, pairs, MTU.
fn net() -> Host {
    let config = [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 5];
    let mut host = Host::new(3, "net0", 1, 3, &config);
    host.offered.insert(F_STATUS);
    host
}

fn set_link(stage: &Stage, up: bool) {
    let mut host = stage.host();
    host.config[6] = u8::from(up);
    host.generation += 1;
    if !host.status.contains(DeviceStatus::DRIVER_OK) {
        // Who has not come so far is not told.
        return;
    }
    let event = ConfigEvent {
        status: host.status,
        generation: Generation(host.generation),
        offset: 6,
        len: 2,
        data: &[u8::from(up), 0],
    };
    stage.tell(host.number, Message::EventConfig(event));
}

#[track_caller]
fn until_there(path: &Path, there: bool) {
    let end = Instant::now() + stage::PATIENCE;
    while path.exists() != there {
        assert!(Instant::now() < end, "{}: {there}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_link_that_goes_down_ends_the_connection_until_it_is_up() {
    let stage = Stage::new(net());
    let mut vmm = Vmm::start(&stage, 2);
    set_link(&stage, false);
    assert!(is_closed(&mut vmm.socket));
    // The front end serves the rings itself now: nobody else may be at them.
    {
        let host = stage.host();
        assert_eq!(host.status.bits(), LIVE, "and hears of changes");
        assert!(host.queues.is_empty() && host.windows.is_empty());
        assert!(host.claimed, "nobody else gets the device meanwhile");
    }
    assert!(UnixStream::connect(stage.socket()).is_err());
    // Other changes do not open the door.
    set_link(&stage, false);
    std::thread::sleep(Duration::from_millis(100));
    assert!(UnixStream::connect(stage.socket()).is_err());
    set_link(&stage, true);
    until_there(&stage.socket(), true);
    let vmm = Vmm::start(&stage, 2);
    assert_eq!(stage.host().status.bits(), LIVE);
    drop(vmm);
    stage.until("released", |host| !host.claimed);
}

#[test]
fn a_vmm_that_starts_while_the_link_is_down_hears_of_it_when_its_guests_driver_has_started() {
    let mut host = net();
    host.config[6] = 0;
    let stage = Stage::new(host);
    // QEMU waits at its start until it has connected once, and keeps the features that the driver has chosen when the connection ends.
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    std::thread::sleep(Duration::from_millis(400));
    vmm.features_and_memory();
    for ring in 0..2 {
        vmm.set_ring(ring, 0);
        vmm.front.set_vring_enable(ring, true).unwrap();
    }
    stage.until("running", |host| host.status.bits() == LIVE);
    assert!(is_closed(&mut vmm.socket));
    assert!(UnixStream::connect(stage.socket()).is_err());
    set_link(&stage, true);
    until_there(&stage.socket(), true);
    Vmm::start(&stage, 2);
}

/// Not a test by itself: the front end of the next one, in a process of its own.
#[test]
fn a_front_end_in_another_process() {
    let Some(socket) = std::env::var_os("VMSG_TEST_SOCKET") else {
        return;
    };
    let mut socket = UnixStream::connect(socket).unwrap();
    socket.write_all(&request(1, &[])).unwrap();
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    // All that is offered.
    socket.write_all(&request(2, &reply[12..])).unwrap();
    assert!(is_closed(&mut socket));
    // Until the other side has seen enough.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn another_vmm_is_let_in_when_the_one_that_was_told_has_ended() {
    let mut host = net();
    host.config[6] = 0;
    let stage = Stage::new(host);
    let mut vmm = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_front_end_in_another_process"])
        .env("VMSG_TEST_SOCKET", stage.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until_there(&stage.socket(), false);
    std::thread::sleep(Duration::from_millis(100));
    assert!(UnixStream::connect(stage.socket()).is_err());
    drop(vmm.stdin.take());
    assert!(vmm.wait().unwrap().success());
    until_there(&stage.socket(), true);
    stage.until("nothing is kept for the other", |host| !host.claimed);
    Vmm::connect(&stage).init();
}

#[test]
fn a_front_end_that_reads_the_configuration_hears_of_the_link_there() {
    let setting = Setting {
        config: Some(true),
        ..Setting::default()
    };
    let stage = Stage::with(net(), setting);
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    // All rings, the control queue too.
    assert_eq!(vmm.front.get_queue_num().unwrap(), 3);
    let mut vmm = Vmm::connect_after(vmm, &stage);
    vmm.init();
    vmm.features_and_memory();
    vmm.set_ring(0, 0);
    vmm.front.set_vring_enable(0, true).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    vmm.front.set_backend_request_fd(&theirs).unwrap();
    set_link(&stage, false);
    let mut header = [0; 12];
    ours.set_read_timeout(Some(stage::PATIENCE)).unwrap();
    ours.read_exact(&mut header).unwrap();
    assert_eq!(u32::from_ne_bytes(header[..4].try_into().unwrap()), 2);
    std::thread::sleep(Duration::from_millis(500));
    assert!(stage.socket().exists());
    vmm.front.get_features().unwrap();
}

#[test]
fn the_mtu_of_the_vmm_must_not_be_more_than_the_device_has() {
    let mut host = net();
    host.offered.insert(F_MTU);
    let stage = Stage::new(host);
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let mut set_mtu = |mtu: u64| {
        let mut message = request(20, &mtu.to_ne_bytes());
        message[4] |= 8; // with an answer
        vmm.socket.write_all(&message).unwrap();
        let mut reply = [0; 20];
        vmm.socket.read_exact(&mut reply).unwrap();
        u64::from_ne_bytes(reply[12..].try_into().unwrap())
    };
    assert_eq!(set_mtu(1500), 0);
    assert_eq!(set_mtu(1501), 1);
    assert_eq!(set_mtu(u64::MAX), 1);
    assert_eq!(set_mtu(68), 0, "the connection goes on");
}

#[test]
fn several_pairs_only_where_the_device_takes_them_as_they_come() {
    let pairs = |vendor: &[u8; 4], mq: bool| {
        let mut host = Host::new(3, "net0", 1, 9, &[0; 12]);
        host.info.vendor_id = u32::from_le_bytes(*vendor);
        if mq {
            host.offered.insert(F_MQ);
        }
        host.offered.insert(17); // CTRL_VQ
        host.offered.insert(57); // HASH_REPORT
        host.offered.insert(60); // RSS
        host.offered.insert(1);
        let stage = Stage::new(host);
        let mut vmm = Vmm::connect(&stage);
        let features = vmm.init();
        assert_eq!(features & (1 << 17 | 1 << 57 | 1 << 60), 0);
        assert_ne!(features & 2, 0);
        let offered = features & (1 << F_MQ) != 0;
        (offered, vmm.front.get_queue_num().unwrap())
    };
    assert_eq!(pairs(b"vmsg", true), (true, 4));
    assert_eq!(pairs(b"vmsg", false), (false, 1));
    // QEMU's network device is told over its control queue how many are in use.
    assert_eq!(pairs(b"QEMU", true), (false, 1));
}

#[test]
fn regions_may_come_and_go_once_for_each_pair() {
    // As QEMU 7.2 has it: each pair of rings tells of all regions.
    let mut host = Host::new(3, "net0", 1, 5, &[0; 12]);
    host.info.vendor_id = u32::from_le_bytes(*b"vmsg");
    host.offered.insert(F_MQ);
    let stage = Stage::new(host);
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    let (_more, file) = Mapping::memfd("dimm", 0x1_0000, false).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x1_0000_0000,
        memory_size: 0x1_0000,
        userspace_addr: 0x7000_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    vmm.front
        .set_features(stage::FEATURES | stage::PROTOCOL_FEATURES)
        .unwrap();
    for _ in 0..2 {
        vmm.front.add_mem_region(&vmm.region()).unwrap();
        vmm.front.add_mem_region(&region).unwrap();
    }
    assert_eq!(stage.host().windows.len(), 2);
    for _ in 0..2 {
        vmm.front.remove_mem_region(&region).unwrap();
    }
    assert_eq!(stage.host().windows.len(), 1);
    for ring in 0..4 {
        vmm.set_ring(ring, 0);
        vmm.front.set_vring_enable(ring, true).unwrap();
    }
    stage.until("all pairs", |host| {
        host.status.bits() == LIVE && host.queues.len() == 4
    });
}

#[test]
fn a_device_that_is_held_is_known_at_the_start_and_its_front_backs_off() {
    let mut host = net();
    host.held_by = Some("another proxy (pid 7)");
    let stage = Stage::new(host);
    stage.until("asked at the start", |host| {
        host.log.iter().any(|line| line.contains("0x84"))
    });
    let mut vmm = Vmm::connect(&stage);
    let _ = vmm.front.set_owner();
    assert!(is_closed(&mut vmm.socket));
    until_there(&stage.socket(), false);
    stage.host().held_by = None;
    until_there(&stage.socket(), true);
    Vmm::start(&stage, 2);
}

#[test]
fn a_device_that_is_free_stays_free_until_it_is_needed() {
    let stage = Stage::new(net());
    stage.until("asked at the start", |host| {
        host.log.iter().filter(|line| line.contains("0x84")).count() == 2
    });
    assert!(!stage.host().claimed);
}
