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
    }
}

#[test]
fn a_network_device_gets_its_address_and_its_pairs() {
    let mut net = device(1, 5);
    net.mac = Some([0x52, 0x54, 0, 0x12, 0x34, 0x0a]);
    let args = device_args(&net, &Machine::default());
    assert_eq!(
        args,
        [
            "-chardev",
            "socket,id=vmsg-dev0,path=a,,b.sock,reconnect=1",
            "-netdev",
            "vhost-user,id=net-dev0,chardev=vmsg-dev0,queues=2",
            "-device",
            "virtio-net-pci,netdev=net-dev0,mac=52:54:00:12:34:0a,vectors=0",
        ]
    );
}

#[test]
fn arm_machines_have_devices_on_mmio_that_is_not_legacy() {
    let machine = Machine {
        arch: Arch::Arm64,
        memory: "1G".into(),
        version: (11, 1),
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
            "virtio-net-pci,netdev=net-dev0,vectors=0",
        ),
        (Arch::X86, (8, 0), "virtio-net-pci,netdev=net-dev0,mq=on"),
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
        assert_eq!(device_args(&device(1, 5), &machine)[5], wanted);
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
