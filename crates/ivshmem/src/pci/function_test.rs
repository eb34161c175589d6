// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::pci::Access;
use crate::{Device, PeerId};

/// A machine's files, made up.
struct Fake {
    dir: TempDir,
}

impl Fake {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sys/bus/pci/devices")).unwrap();
        Self { dir }
    }

    fn tree(&self) -> Tree {
        Tree::new(self.dir.path().join("sys"), self.dir.path().join("dev"))
    }

    fn put(&self, address: &str, name: &str, contents: &[u8]) {
        let dir = self.dir.path().join("sys/bus/pci/devices").join(address);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), contents).unwrap();
    }

    fn link(&self, address: &str, name: &str, target: &str) {
        let target = self.dir.path().join("sys").join(target);
        fs::create_dir_all(&target).unwrap();
        let dir = self.dir.path().join("sys/bus/pci/devices").join(address);
        symlink(target, dir.join(name)).unwrap();
    }

    /// A function with 64 KiB of memory, as QEMU 7.2 has it.
    fn ivshmem(&self, address: &str, doorbell: bool) {
        self.put(address, "vendor", b"0x1af4\n");
        self.put(address, "device", b"0x1110\n");
        self.put(address, "revision", b"0x01\n");
        self.put(address, "enable", b"0\n");
        let bar1 = if doorbell {
            "0x00000000febf1000 0x00000000febf1fff 0x0000000000040200"
        } else {
            "0x0000000000000000 0x0000000000000000 0x0000000000000000"
        };
        let resource = format!(
            "0x00000000febf0100 0x00000000febf01ff 0x0000000000040200\n{bar1}\n\
             0x00000000fe000000 0x00000000fe00ffff 0x000000000014220c\n"
        );
        self.put(address, "resource", resource.as_bytes());
        let mut config = vec![0; 256];
        if doorbell {
            config[6] = 0x10;
            config[0x34] = 0x40;
            config[0x40..0x44].copy_from_slice(&[0x11, 0, 3, 0]);
        }
        self.put(address, "config", &config);
        let mut bar0 = vec![0; 4096];
        bar0[0x108] = 9;
        self.put(address, "resource0", &bar0);
        self.put(address, "resource2", &[0; 65536]);
        self.put(address, "resource2_wc", &[0; 65536]);
    }
}

#[test]
fn functions_are_found_by_their_id_and_told_apart() {
    let fake = Fake::new();
    assert!(fake.tree().functions().unwrap().is_empty());
    assert!(matches!(fake.tree().only_function(), Err(Error::None)));
    fake.ivshmem("0000:00:05.0", true);
    fake.ivshmem("0000:00:04.0", false);
    fake.put("0000:00:01.0", "vendor", b"0x8086\n");
    fake.put("0000:00:01.0", "device", b"0x1110\n");
    fake.put("0000:00:02.0", "vendor", b"nonsense\n");
    fs::create_dir(fake.dir.path().join("sys/bus/pci/devices/odd")).unwrap();
    fake.link("0000:00:05.0", "driver", "bus/pci/drivers/vfio-pci");
    fake.link("0000:00:05.0", "iommu_group", "kernel/iommu_groups/12");
    let functions = fake.tree().functions().unwrap();
    let [plain, doorbell] = &functions[..] else {
        panic!("{functions:?}");
    };
    assert_eq!(plain.address().to_string(), "0000:00:04.0");
    assert_eq!((plain.kind(), plain.vectors()), (Kind::Plain, None));
    assert_eq!((plain.driver(), plain.group()), (None, None));
    assert_eq!(doorbell.kind(), Kind::Doorbell);
    assert_eq!(doorbell.vectors(), Some(4));
    assert_eq!(doorbell.driver(), Some("vfio-pci"));
    assert_eq!(doorbell.group(), Some(12));
    assert_eq!((doorbell.memory_size(), doorbell.revision()), (65536, 1));
    let only = fake.tree().only_function().unwrap();
    assert_eq!(only.address(), doorbell.address(), "the one with doorbells");
    fake.ivshmem("0000:00:06.0", true);
    let error = fake.tree().only_function().unwrap_err().to_string();
    assert!(error.contains("0000:00:04.0, 0000:00:05.0, 0000:00:06.0"));
    let other = fake.tree().function("00:01.0".parse().unwrap());
    assert!(matches!(other, Err(Error::NotThere(_))));
}

#[test]
fn who_may_not_read_all_of_the_configuration_sees_the_kind_too() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", true);
    fake.put("0000:00:05.0", "config", &[0; 64]);
    let function = fake.tree().only_function().unwrap();
    assert_eq!(
        (function.kind(), function.vectors()),
        (Kind::Doorbell, None)
    );
}

#[test]
fn a_list_of_capabilities_may_be_a_ring_or_lead_nowhere() {
    let mut config = vec![0; 256];
    config[6] = 0x10;
    config[0x34] = 0x40;
    config[0x41] = 0x40;
    assert_eq!(vectors(&config), None);
    config[0x41] = 0x10;
    assert_eq!(vectors(&config), None);
    config[0x41] = 0xff;
    assert_eq!(vectors(&config), None);
    config[0xfc] = 0x11;
    config[0xfe..].copy_from_slice(&[0xff, 0xff]);
    assert_eq!(vectors(&config), Some(2048));
    assert_eq!(vectors(&config[..0xff]), None);
}

#[test]
fn bars_that_make_no_sense_are_not_there() {
    assert_eq!(bars(""), [Bar::default(); 3]);
    assert_eq!(bars("1 0 0\nx y z\n0x0 0xffffffffffffffff 0"), {
        let whole = Bar {
            start: 0,
            size: u64::MAX,
        };
        [Bar::default(), Bar::default(), whole]
    });
}

#[test]
fn a_function_without_a_driver_is_switched_on_and_reached_by_sysfs() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", true);
    let function = fake.tree().only_function().unwrap();
    let device = Device::pci(&function, Access::Auto).unwrap();
    let file = |name: &str| fs::read(function.dir().join(name)).unwrap();
    assert_eq!(file("enable"), b"1");
    assert_eq!(file("config")[4..6], [2, 0], "the kernel did nothing here");
    assert_eq!(
        device.id(),
        Some(PeerId(9)),
        "BAR0 is not at a page's beginning"
    );
    assert_eq!((device.vectors(), device.memory().len()), (0, 65536));
    device.ring(PeerId(3), 1).unwrap();
    assert_eq!(file("resource0")[0x10c..0x110], [1, 0, 3, 0]);
    device.bell(PeerId(4), 0).unwrap().ring().unwrap();
    assert_eq!(file("resource0")[0x10c..0x110], [0, 0, 4, 0]);
    assert!(device.memory().region().write_u32(8, 0x0403_0201));
    let name = if cfg!(target_arch = "x86_64") {
        "resource2"
    } else {
        "resource2_wc"
    };
    assert_eq!(file(name)[8..12], [1, 2, 3, 4]);
}

#[test]
fn a_plain_function_has_no_doorbells() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", false);
    let function = fake.tree().only_function().unwrap();
    let device = Device::pci(&function, Access::Sysfs).unwrap();
    assert_eq!(device.id(), None);
    assert!(device.bell(PeerId(0), 0).is_none());
    assert!(device.vector_fd(0).is_none());
    let error = device.ring(PeerId(0), 0).unwrap_err();
    assert!(matches!(error, crate::RingError::NoDoorbells));
}

#[test]
fn what_stands_in_the_way_has_a_name_and_a_remedy() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", true);
    let function = fake.tree().only_function().unwrap();
    let vfio = |function: &Function| Device::pci(function, Access::Vfio).unwrap_err();
    assert!(vfio(&function).to_string().contains("vmsg ivshmem bind"));
    assert!(matches!(function.bind(), Err(Error::NoModule("vfio-pci"))));
    fs::create_dir_all(fake.dir.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
    assert!(matches!(function.bind(), Err(Error::NoGroup(_))));

    fake.link("0000:00:05.0", "driver", "bus/pci/drivers/vfio-pci");
    let function = fake.tree().only_function().unwrap();
    assert!(matches!(
        Device::pci(&function, Access::Sysfs),
        Err(Error::Off { .. })
    ));
    assert!(matches!(vfio(&function), Error::NoGroup(_)));
    fake.link("0000:00:05.0", "iommu_group", "kernel/iommu_groups/12");
    let function = fake.tree().only_function().unwrap();
    assert!(matches!(vfio(&function), Error::NoModule("vfio")));
}

#[test]
fn binding_says_so_if_the_driver_does_not_take_the_function() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", true);
    fake.link("0000:00:05.0", "iommu_group", "kernel/iommu_groups/12");
    fs::create_dir_all(fake.dir.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let function = fake.tree().only_function().unwrap();
    assert!(matches!(function.bind(), Err(Error::NotTaken(_))));
    let file = |name: &str| fs::read_to_string(name).unwrap();
    let sys = fake.dir.path().join("sys/bus/pci");
    let overridden = sys.join("devices/0000:00:05.0/driver_override");
    assert_eq!(file(overridden.to_str().unwrap()), "vfio-pci");
    let probed = sys.join("drivers_probe");
    assert_eq!(file(probed.to_str().unwrap()), "0000:00:05.0");
}

#[test]
fn a_function_whose_memory_answers_is_left_as_it_is() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", false);
    let mut config = [0; 256];
    config[4] = 2;
    fake.put("0000:00:05.0", "config", &config);
    fake.link("0000:00:05.0", "driver", "bus/pci/drivers/uio_pci_generic");
    let function = fake.tree().only_function().unwrap();
    let device = Device::pci(&function, Access::Auto).unwrap();
    assert_eq!(device.memory().len(), 65536);
    assert_eq!(fs::read(function.dir().join("enable")).unwrap(), b"0\n");
}

#[test]
fn registers_that_cannot_be_mapped_leave_the_memory() {
    let fake = Fake::new();
    fake.ivshmem("0000:00:05.0", true);
    let function = fake.tree().only_function().unwrap();
    fs::remove_file(function.dir().join("resource0")).unwrap();
    let device = Device::pci(&function, Access::Sysfs).unwrap();
    assert_eq!((device.id(), device.memory().len()), (None, 65536));
    assert!(device.ring(PeerId(0), 0).is_err());
}
