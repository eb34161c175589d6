// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn device(device_id: u32, queues: usize) -> QemuDevice<'static> {
    QemuDevice {
        id: "dev0",
        socket: Path::new("a,b.sock"),
        device_id,
        queues,
        config_size: 12,
        mac: None,
        pairs: 1,
        mtu: None,
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
fn types_qemu_has_no_name_for_are_told_by_number() {
    let known =
        |id: &u32| !device_args(&device(*id, 3), &Machine::default())[3].contains("virtio-id");
    let own: Vec<u32> = (0..100).filter(known).collect();
    assert_eq!(
        own,
        (0..100)
            .filter(|id| has_own_device(*id))
            .collect::<Vec<_>>()
    );
    let args = device_args(&device(99, 3), &Machine::default());
    assert_eq!(
        args[3],
        "vhost-user-test-device-pci,chardev=vmsg-dev0,virtio-id=99,num_vqs=3,config_size=12"
    );
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
    let args = vfio_user_args(Path::new("/run/net.sock"));
    assert_eq!(
        to_shell(&args),
        r#"-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/net.sock"}}'"#
    );
    let args = vfio_user_args(Path::new("a\"b\\c\n'd"));
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
