// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end that keeps what is in flight, with the crate `vhost` in its place.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use rustix::fs::fstat;
use stage::{LIVE, OFFSET, Stage, Vmm, is_closed, request};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vmsg_bus::control::Resume;
use vmsg_mem::{Access, Mapping};

fn bring_up(stage: &Stage, vmm: &mut Vmm, area: &VhostUserInflight, file: &File, base: u16) {
    vmm.features_and_memory();
    vmm.front.set_inflight_fd(area, file.as_raw_fd()).unwrap();
    vmm.set_ring(0, base);
    vmm.front.set_vring_enable(0, true).unwrap();
    stage.until("live", |host| {
        host.status.bits() == LIVE && host.queues.len() == 1
    });
}

#[test]
fn the_record_outlives_the_proxy_with_the_front_end() {
    let stage = Stage::new(Host::rng());
    let mut vmm = Vmm::connect(&stage);
    vmm.init();
    // For fewer entries than the ring will have, as QEMU does on virtio-mmio: there is room for the largest that it lets be.
    let asked = VhostUserInflight::new(0, 0, 1, 32);
    let (area, file) = vmm.front.get_inflight_fd(&asked).unwrap();
    assert_eq!(
        (
            area.mmap_size,
            area.mmap_offset,
            area.num_queues,
            area.queue_size
        ),
        ((16 + 16 * 1024_u64).next_multiple_of(64) + 64, 0, 1, 32)
    );
    // It can be mapped, and is empty.
    let mapping = Mapping::of_fd(file.as_fd(), 0, area.mmap_size, Access::ReadWrite).unwrap();
    let mut bytes = vec![1; mapping.len()];
    mapping.ram().read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));

    bring_up(&stage, &mut vmm, &area, &file, 0);
    let inode = |fd: &dyn AsFd| fstat(fd.as_fd()).unwrap().st_ino;
    {
        let host = stage.host();
        assert_eq!(inode(&host.inflight_files[&0]), inode(&file));
        assert_eq!((host.inflight[&0].offset, host.inflight[&0].len), (0, 1040));
        assert!(host.inflight[&0].resume);
    }
    // As after the end of this process: another connection, the same memory and record.
    let (ram, ram_file) = (vmm.ram, vmm.file);
    drop((vmm.front, vmm.socket));
    stage.until("released", |host| !host.claimed);
    let mut vmm = Vmm::of(UnixStream::connect(stage.socket()).unwrap(), ram, ram_file);
    vmm.init();
    vmm.set_used_index(0, 5);
    bring_up(&stage, &mut vmm, &area, &file, 5);
    let host = stage.host();
    assert_eq!(inode(&host.inflight_files[&0]), inode(&file));
    assert!(host.inflight[&0].resume);
    assert_eq!(host.resume[&0], Resume::UsedInRing);
}

#[test]
fn impossible_records_are_refused() {
    let stage = Stage::new(Host::rng());
    let fields = |size: u64, offset: u64, rings: u16, entries: u16| {
        let mut bytes = [size.to_ne_bytes(), offset.to_ne_bytes()].concat();
        bytes.extend_from_slice(&rings.to_ne_bytes());
        bytes.extend_from_slice(&entries.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes
    };
    for (rings, entries) in [(0, 64), (257, 64), (u16::MAX, 64), (1, 0), (1, 65)] {
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        socket
            .write_all(&request(31, &fields(0, 0, rings, entries)))
            .unwrap();
        assert!(is_closed(&mut socket), "{rings} rings, {entries} entries");
    }
    // Without a file, and with one that is too short.
    let mut socket = UnixStream::connect(stage.socket()).unwrap();
    socket
        .write_all(&request(32, &fields(1088, 0, 1, 64)))
        .unwrap();
    assert!(is_closed(&mut socket));
    for (size, offset) in [
        (1087, 0),
        (1088, OFFSET + stage::RAM - 1087),
        (u64::MAX, 8),
        (1088, 4),
    ] {
        let mut vmm = Vmm::connect(&stage);
        vmm.init();
        let area = VhostUserInflight::new(size, offset, 1, 64);
        let file = vmm.file.as_raw_fd();
        assert!(vmm.front.set_inflight_fd(&area, file).is_err());
    }
    Vmm::start(&stage, 1);
}
