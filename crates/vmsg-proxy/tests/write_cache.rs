// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has said about its disk's write cache holds for as long as its driver runs, whoever ends meanwhile.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use common::Host;
use stage::{FEATURES, LIVE, PROTOCOL_FEATURES, Stage, Vmm};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vmsg_mem::Mapping;

/// VIRTIO_BLK_F_FLUSH, CONFIG_WCE.
const CHOOSES: u64 = 1 << 9 | 1 << 11;
const WCE: usize = 32;
/// What the device has by itself.
const CACHED: u8 = 1;

fn disk() -> Host {
    let mut config = [0; 60];
    config[WCE] = CACHED;
    let mut host = Host::new(3, "disk0", 2, 2, &config);
    host.offered.insert(9);
    host.offered.insert(11);
    host
}

struct Front {
    vmm: Vmm,
    kept: Option<(VhostUserInflight, File)>,
}

impl Front {
    /// A front end that asks for memory for records, if it keeps any.
    fn new(stage: &Stage, keeps: bool) -> Front {
        let mut vmm = Vmm::connect(stage);
        vmm.init();
        let asked = VhostUserInflight::new(0, 0, 2, 64);
        let kept = keeps.then(|| vmm.front.get_inflight_fd(&asked).unwrap());
        Front { vmm, kept }
    }

    /// The same QEMU, connected again.
    fn again(self, stage: &Stage) -> Front {
        let Front { vmm, kept } = self;
        let (ram, file): (Mapping, _) = (vmm.ram, vmm.file);
        drop((vmm.front, vmm.socket));
        stage.until("released", |host| !host.claimed);
        let mut vmm = Vmm::of(UnixStream::connect(stage.socket()).unwrap(), ram, file);
        vmm.init();
        Front { vmm, kept }
    }

    fn start(&mut self, stage: &Stage, features: u64, base: u16) {
        let vmm = &mut self.vmm;
        vmm.front
            .set_features(FEATURES | PROTOCOL_FEATURES | features)
            .unwrap();
        vmm.front.set_mem_table(&[vmm.region()]).unwrap();
        if let Some((area, file)) = &self.kept {
            vmm.front.set_inflight_fd(area, file.as_raw_fd()).unwrap();
        }
        vmm.set_used_index(0, base);
        vmm.set_ring(0, base);
        vmm.front.set_vring_enable(0, true).unwrap();
        stage.until("live", |host| host.status.bits() == LIVE);
    }

    /// All rings: the device is reset, and has its configuration from before.
    fn stop(&mut self, stage: &Stage) {
        self.vmm.front.get_vring_base(0).unwrap();
        forget(stage);
    }

    fn write(&mut self, byte: u8) {
        let flags = VhostUserConfigFlags::WRITABLE;
        let front = &mut self.vmm.front;
        front.set_config(WCE as u32, flags, &[byte]).unwrap();
    }
}

/// As a device does that was reset, and as another device host's is.
fn forget(stage: &Stage) {
    stage.host().config[WCE] = CACHED;
}

#[test]
fn a_guest_that_pauses_finds_its_disk_as_it_was() {
    for keeps in [true, false] {
        let stage = Stage::new(disk());
        let mut front = Front::new(&stage, keeps);
        front.start(&stage, CHOOSES, 0);
        assert_eq!(stage.host().config[WCE], CACHED);
        front.write(0);
        assert_eq!(stage.host().config[WCE], 0);
        front.stop(&stage);
        // In the middle of its rings, and before they were used.
        for base in [5, 0] {
            front.start(&stage, CHOOSES, base);
            assert_eq!(stage.host().config[WCE], 0, "{keeps} {base}");
            front.stop(&stage);
        }
        // And the other way round.
        front.start(&stage, CHOOSES, 7);
        front.write(1);
        stage.host().config[WCE] = 0;
        front.vmm.front.get_vring_base(0).unwrap();
        front.start(&stage, CHOOSES, 7);
        assert_eq!(stage.host().config[WCE], 1);
    }
}

#[test]
fn it_outlives_the_proxy_with_what_is_in_flight() {
    let stage = Stage::new(disk());
    let mut front = Front::new(&stage, true);
    front.start(&stage, CHOOSES, 0);
    front.write(0);
    let mut front = front.again(&stage);
    forget(&stage);
    front.start(&stage, CHOOSES, 5);
    assert_eq!(stage.host().config[WCE], 0);
    // Whoever has never chosen gets what the device has.
    drop(front);
    stage.until("released", |host| !host.claimed);
    forget(&stage);
    let mut other = Front::new(&stage, true);
    other.start(&stage, CHOOSES, 0);
    let mut other = other.again(&stage);
    forget(&stage);
    other.start(&stage, CHOOSES, 5);
    assert_eq!(stage.host().config[WCE], CACHED);
}

#[test]
fn a_guest_of_which_nothing_is_known_gets_a_disk_that_does_not_cache() {
    let stage = Stage::new(disk());
    // In the middle of its rings, without a note.
    let mut front = Front::new(&stage, false);
    front.start(&stage, CHOOSES, 5);
    assert_eq!(stage.host().config[WCE], 0);
    drop(front);
    // With memory of another back end: its bytes are left as they are.
    forget(&stage);
    let mut front = Front::new(&stage, false);
    let (mapping, file) = Mapping::memfd("inflight", 4096, false).unwrap();
    mapping.ram().fill(0x11);
    let len = 2 * 1088;
    mapping.ram().write(0, &vec![0; len]);
    let area = VhostUserInflight::new(len as u64 + 64, 0, 2, 64);
    front.kept = Some((area, File::from(file)));
    front.start(&stage, CHOOSES, 5);
    assert_eq!(stage.host().config[WCE], 0);
    front.write(1);
    let mut rest = vec![0; 64];
    mapping.ram().read(len, &mut rest);
    assert!(rest.iter().all(|byte| *byte == 0x11));
    drop(front);
    // Whoever does not choose flushes; whoever begins may read what there is.
    for (features, base) in [(1 << 9, 5), (CHOOSES, 0)] {
        stage.until("released", |host| !host.claimed);
        forget(&stage);
        let mut front = Front::new(&stage, false);
        front.start(&stage, features, base);
        assert_eq!(stage.host().config[WCE], CACHED, "{base}");
    }
}
