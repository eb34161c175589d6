// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn device(device_id: u32, queues: usize) -> QemuDevice<'static> {
    QemuDevice {
        queues,
        config_size: 12,
        ..QemuDevice::new("dev0", Path::new("a,b.sock"), device_id)
    }
}

#[test]
fn a_network_device_gets_its_address_and_its_pairs() {
    let mut net = device(1, 5);
    net.mac = Some([0x52, 0x54, 0, 0x12, 0x34, 0x0a]);
    net.pairs = 2;
    net.mtu = Some(9000);
    let args = device_args(&net, &Machine::default());
    assert_eq!(
        args,
        [
            "-chardev",
            "socket,id=vmsg-dev0,path=a,,b.sock,reconnect=1",
            "-netdev",
            "vhost-user,id=net-dev0,chardev=vmsg-dev0,queues=2",
            "-device",
            "virtio-net-pci,netdev=net-dev0,mac=52:54:00:12:34:0a,host_mtu=9000,mq=on,vectors=0",
        ]
    );
}

#[test]
fn arm_machines_have_devices_on_mmio_that_is_not_legacy() {
    let machine = Machine {
        arch: Arch::Arm64,
        memory: "1G".into(),
        version: (11, 1),
        backend: MemoryBackend::Any,
    };
    let args = device_args(&device(4, 1), &machine);
    assert_eq!(args[1], "socket,id=vmsg-dev0,path=a,,b.sock");
    assert_eq!(args[3], "vhost-user-rng,chardev=vmsg-dev0");
    let args = machine_args(&machine).join(" ");
    assert!(args.contains("memory-backend-memfd,id=mem,size=1G,share=on"));
    assert!(args.contains("-machine virt,memory-backend=mem"));
    assert!(args.contains("virtio-mmio.force-legacy=false"));
}

#[test]
fn a_network_device_has_vectors_where_qemu_survives_them() {
    for (arch, version, wanted) in [
        (
            Arch::X86,
            (7, 2),
            "virtio-net-pci,netdev=net-dev0,mq=on,vectors=0",
        ),
        (
            Arch::X86,
            (8, 0),
            "virtio-net-pci,netdev=net-dev0,mq=on,vectors=8",
        ),
        (
            Arch::Arm64,
            (7, 2),
            "virtio-net-device,netdev=net-dev0,mq=on",
        ),
    ] {
        let machine = Machine {
            arch,
            version,
            ..Machine::default()
        };
        let mut net = device(1, 7);
        net.pairs = 3;
        assert_eq!(device_args(&net, &machine)[5], wanted);
    }
}

#[test]
fn devices_that_can_wait_for_their_back_end_connect_again() {
    let new = Machine {
        version: (9, 2),
        ..Machine::default()
    };
    for (id, machine, wanted) in [
        (1, &Machine::default(), Some("reconnect=1")),
        (2, &new, Some("reconnect-ms=1000")),
        (8, &Machine::default(), None),
        (
            8,
            &Machine {
                version: (11, 1),
                ..Machine::default()
            },
            Some("reconnect-ms=1000"),
        ),
        (4, &Machine::default(), None),
        (26, &new, None),
    ] {
        let chardev = device_args(&device(id, 2), machine).swap_remove(1);
        match wanted {
            Some(option) => assert!(chardev.ends_with(option), "{id}: {chardev}"),
            None => assert!(!chardev.contains("reconnect"), "{id}: {chardev}"),
        }
    }
}

#[test]
fn types_qemu_has_no_device_for_get_the_one_for_all_types() {
    let machine = |arch, version| Machine {
        arch,
        version,
        ..Machine::default()
    };
    let spec = |id, machine: &Machine| device_args(&device(id, 3), machine).swap_remove(3);
    for (id, arch, version, wanted) in [
        (99, Arch::X86, (11, 1), None),
        (3, Arch::Arm64, (11, 1), None),
        (25, Arch::X86, (10, 0), Some("vhost-user-snd-pci")),
        (32, Arch::X86, (11, 1), None),
        (32, Arch::Arm64, (11, 1), Some("vhost-user-scmi")),
        (45, Arch::Arm64, (11, 1), Some("vhost-user-spi-device")),
        (19, Arch::Arm64, (7, 2), Some("vhost-user-vsock-device")),
        (34, Arch::Arm64, (7, 2), Some("vhost-user-i2c-device")),
        (41, Arch::X86, (7, 2), Some("vhost-user-gpio-pci")),
        (18, Arch::Arm64, (7, 2), Some("vhost-user-input")),
    ] {
        let spec = spec(id, &machine(arch, version));
        assert!(has_vhost_user(id, arch, version), "{id}");
        match wanted {
            Some(name) => assert_eq!(spec, format!("{name},chardev=vmsg-dev0")),
            None => assert!(spec.contains(&format!("virtio-id={id},")), "{spec}"),
        }
    }
    assert_eq!(
        spec(99, &machine(Arch::X86, (11, 1))),
        "vhost-user-test-device-pci,chardev=vmsg-dev0,virtio-id=99,num_vqs=3,config_size=12"
    );
    for (id, arch, version, since) in [
        (25, Arch::X86, (9, 2), (10, 0)),
        (3, Arch::X86, (11, 0), (11, 1)),
        (32, Arch::X86, (10, 0), (11, 1)),
        (17, Arch::X86, (10, 0), (11, 1)),
    ] {
        assert!(!has_vhost_user(id, arch, version), "{id}");
        assert_eq!(vhost_user_since(id, arch), since, "{id}");
    }
}

#[test]
fn a_disk_has_all_its_queues_whatever_the_processors() {
    let mut disk = device(2, 4);
    disk.queue_size = 256;
    disk.boot_index = Some(1);
    let args = device_args(&disk, &Machine::default());
    assert_eq!(
        args[3],
        "vhost-user-blk-pci,chardev=vmsg-dev0,num-queues=4,queue-size=256,bootindex=1"
    );
    disk.queue_size = 4096;
    disk.boot_index = None;
    let arm = Machine {
        arch: Arch::Arm64,
        ..Machine::default()
    };
    let args = device_args(&disk, &arm);
    assert_eq!(
        args[3],
        "vhost-user-blk,chardev=vmsg-dev0,num-queues=4,queue-size=1024"
    );
}

#[test]
fn what_qemu_keeps_itself_is_what_the_device_says() {
    let facts = |device_id, sizes: &[u16], config_size| DeviceFacts {
        number: virtio_msg::DevNum(0),
        info: virtio_msg::DeviceInfo {
            device_id,
            config_size,
            ..virtio_msg::DeviceInfo::ABSENT
        },
        offered: virtio_msg::FeatureSet::EMPTY,
        queue_sizes: sizes.to_vec(),
    };
    let spec = |facts: &DeviceFacts, config: &[u8]| {
        let device = QemuDevice::of("d", Path::new("s"), facts, config);
        device_args(&device, &Machine::default()).swap_remove(3)
    };
    let mut config = b"my,share".to_vec();
    config.resize(36, 0);
    config.extend(2u32.to_le_bytes());
    let fs = facts(26, &[128, 100, 1024], 40);
    assert_eq!(
        spec(&fs, &config),
        "vhost-user-fs-pci,chardev=vmsg-d,tag=my,,share,num-request-queues=2,queue-size=64"
    );
    // More than it has, and no tag that could be told.
    config[..36].copy_from_slice(&[0xff; 36]);
    config[36..].copy_from_slice(&u32::MAX.to_le_bytes());
    let wanted = "vhost-user-fs-pci,chardev=vmsg-d,tag=d,num-request-queues=2,queue-size=64";
    assert_eq!(spec(&fs, &config), wanted);
    assert_eq!(spec(&fs, &[]), wanted);
    config[..36].copy_from_slice(&[b'\n'; 36]);
    assert_eq!(spec(&fs, &config), wanted);
    let scsi = facts(8, &[128; 6], 36);
    assert_eq!(
        spec(&scsi, &[]),
        "vhost-user-scsi-pci,chardev=vmsg-d,num_queues=4,virtqueue_size=128"
    );
    let nothing = facts(26, &[], 0);
    assert!(spec(&nothing, &[]).ends_with("tag=d,num-request-queues=1"));
}

#[test]
fn what_is_printed_can_be_pasted_into_a_shell() {
    let args = [
        "-chardev".to_owned(),
        "socket,path=it's here".to_owned(),
        "-m".to_owned(),
        "1G".to_owned(),
    ];
    assert_eq!(
        to_shell(&args),
        "-chardev 'socket,path=it'\\''s here' \\\n-m 1G"
    );
}

#[test]
fn pairs_and_mtu_are_what_the_device_says_and_offers() {
    let config = [1, 2, 3, 4, 5, 6, 1, 0, 4, 0, 0x28, 0x23];
    let offered = |bits: &[u32]| virtio_msg::FeatureSet::from_bits(bits);
    assert_eq!(pairs_of(&offered(&[22]), &config), 4);
    assert_eq!(pairs_of(&offered(&[]), &config), 1);
    assert_eq!(pairs_of(&offered(&[22]), &config[..9]), 1);
    assert_eq!(pairs_of(&offered(&[22]), &[0xff; 12]), 128);
    assert_eq!(pairs_of(&offered(&[22]), &[0; 12]), 1);
    assert_eq!(mtu_of(&offered(&[3]), &config), Some(9000));
    assert_eq!(mtu_of(&offered(&[]), &config), None);
    assert_eq!(mtu_of(&offered(&[3]), &config[..10]), None);
}

#[test]
fn a_bus_with_memory_in_common_names_the_file() {
    let machine = Machine {
        backend: MemoryBackend::File("/dev/shm/a,b".into()),
        ..Machine::default()
    };
    let args = machine_args(&machine).join(" ");
    assert!(
        args.contains("memory-backend-file,id=mem,size=512M,mem-path=/dev/shm/a,,b,share=on"),
        "{args}"
    );
}

#[test]
fn the_remedy_is_a_line_to_use() {
    let other = OtherMemory::OtherFile {
        path: "/dev/shm/ram".into(),
        size: 1 << 30,
        base: 0,
    };
    let remedy = memory_remedy(&other).unwrap();
    assert!(
        remedy.contains("memory-backend-file,id=mem,size=1024M,mem-path=/dev/shm/ram,share=on"),
        "{remedy}"
    );
    assert_eq!(memory_remedy(&OtherMemory::NotSaid), None);
}

#[test]
fn a_vfio_user_device_is_described_in_json_whatever_its_path() {
    let args = vfio_user_args(Path::new("/run/net.sock"), None);
    assert_eq!(
        to_shell(&args),
        r#"-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/net.sock"}}'"#
    );
    let args = vfio_user_args(Path::new("d"), Some(2));
    assert!(args[1].ends_with(r#"},"bootindex":2}"#), "{}", args[1]);
    let args = vfio_user_args(Path::new("a\"b\\c\n'd"), None);
    assert_eq!(
        args[1],
        r#"{"driver":"vfio-user-pci","socket":{"type":"unix","path":"a\"b\\c\u000a'd"}}"#
    );
}

#[test]
fn memory_that_is_found_by_its_pages_has_pages_that_stay() {
    let args = |backend| {
        let machine = Machine {
            memory: "1G".into(),
            backend,
            ..Machine::default()
        };
        machine_args(&machine).join(" ")
    };
    let bound = args(MemoryBackend::Huge(Some(1)));
    let object = "memory-backend-file,id=mem,size=1G,mem-path=/dev/hugepages,host-nodes=1,policy=bind,prealloc=on,share=on";
    assert!(bound.contains(object), "{bound}");
    let anywhere = args(MemoryBackend::Huge(None));
    let object = "memory-backend-file,id=mem,size=1G,mem-path=/dev/hugepages,prealloc=on,share=on";
    assert!(anywhere.contains(object), "{anywhere}");
}

#[test]
fn memory_that_is_not_in_common_is_named_with_what_to_do() {
    let other = OtherMemory::NoPlace {
        base: 0x10_0000,
        why: crate::places::PlaceError::Movable { page_size: 4096 },
    };
    let remedy = memory_remedy(&other).unwrap();
    for part in ["0x100000", "4096", "hugetlbfs", "--print-qemu"] {
        assert!(remedy.contains(part), "{remedy}");
    }
}
