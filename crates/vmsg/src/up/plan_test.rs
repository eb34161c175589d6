// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::path::Path;

use serde_json::json;

use super::super::describe;
use super::super::description::World;
use super::super::source::Source;
use super::*;

fn make(text: &str) -> Plan {
    let world = World {
        runs: &|_| true,
        program: "vmsg".to_owned(),
        exists: &|_| true,
        qemu_version: &|qemu| Ok(if qemu == "qemu-new" { (11, 1) } else { (7, 2) }),
        kvm: None,
        runtimes: "/run/vmsg".into(),
    };
    let source = Source::new("lab.toml", text);
    let (description, mistakes) =
        describe(Path::new("/d/lab.toml"), &source, &[], &|_| None, &world);
    let description = description.unwrap_or_else(|| panic!("{}", source.show_all(&mistakes)));
    plan(&description, "vmsg")
}

const LAB: &str = r#"
version = 1
[host]
workers = 2
[switch.s0]
worker = 1
allow = ["* <> *"]
[bus.b1]
[bus.b2]
mode = "0660"
[device.net1]
type = "net"
bus = "b1"
switch = "s0"
[device.net2]
type = "net"
bus = "b2"
switch = "s0"
[device.rng2]
type = "rng"
bus = "b2"
[port.net1]
rate-in = "100M"
[uplink.up]
switch = "s0"
backend = "tap"
[guest.vm1]
bus = "b1"
kernel = "vmlinuz"
append = "console=ttyS0 panic=-1"
hotplug = 1
[guest.vm2]
machine = "arm64"
qemu = "qemu-new"
bus = "b2"
front = "vfio-user"
isolate = true
serial = false
args = ["-drive", "file=disk 1.img"]
[program.probe]
command = ["sh", "-c", "sleep 5"]
after = ["vm1"]
[program.first]
command = ["sh", "-c", "echo it's up"]
ready = "it's up"
"#;

#[test]
fn a_plan_is_printed_as_it_is_run() {
    let printed = to_shell(&make(LAB));
    let golden = include_str!("plan_golden.sh");
    assert_eq!(printed, golden, "\n--- printed ---\n{printed}");
}

#[test]
fn who_needs_nothing_comes_first_and_who_waits_for_guests_last() {
    let plan = make(LAB);
    let order: Vec<(&str, &[String])> = plan
        .parts
        .iter()
        .map(|part| (part.name.as_str(), part.after.as_slice()))
        .collect();
    let names: Vec<&str> = order.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        [
            "first",
            "serve",
            "vm1.proxy",
            "vm1",
            "vm2.proxy",
            "vm2",
            "probe"
        ]
    );
    assert_eq!(order[1].1, ["first"]);
    assert_eq!(order[2].1, ["serve"]);
    assert_eq!(order[3].1, ["vm1.proxy"]);
    assert_eq!(order[6].1, ["vm1"]);
    assert_eq!(plan.parts[0].ready, Ready::Text("it's up".to_owned()));
    assert_eq!(
        plan.parts[1].ready,
        Ready::Lines("ready bus=".to_owned(), 2)
    );
}

#[test]
fn guests_without_devices_and_programs_alone_are_plans_too() {
    let plan = make("version = 1\n[guest.vm]\nkernel = \"k\"\n[program.p]\ncommand = [\"a\"]\n");
    let names: Vec<&str> = plan.parts.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(names, ["p", "vm"]);
    assert_eq!(plan.parts[1].after, ["p"]);
}

#[test]
fn a_device_that_is_plugged_in_is_told_qemu_with_its_types() {
    let plan = make(LAB);
    let Kind::Guest(machine) = &plan.parts[3].kind else {
        panic!("vm1 is a guest");
    };
    let plugged = Plugged {
        id: "extra".to_owned(),
        shape: super::super::description::Shape {
            mac: Some(vmsg_device::net::Mac([0x52, 0x54, 0, 0, 0, 9])),
            pairs: 2,
            mtu: Some(9000),
            ..super::super::description::Shape::new(1, 3, 24)
        },
        port: 0,
    };
    let plug = machine.plug(&plugged);
    assert_eq!(
        plug.chardev,
        json!({ "id": "vmsg-extra", "backend": { "type": "socket", "data": {
            "addr": { "type": "unix", "data": { "path": "/run/vmsg/lab/vm1.extra.sock" } },
            "server": false, "reconnect": 1 } } })
    );
    assert_eq!(
        plug.netdev,
        Some(
            json!({ "type": "vhost-user", "id": "net-extra", "chardev": "vmsg-extra", "queues": 2 })
        )
    );
    assert_eq!(
        plug.device,
        json!({ "driver": "virtio-net-pci", "netdev": "net-extra", "mac": "52:54:00:00:00:09",
            "host_mtu": 9000, "mq": true, "vectors": 0, "romfile": "", "id": "dev-extra", "bus": "hotplug0" })
    );
    // A QEMU that is started again has it from the start.
    let argv = machine.argv(&[plugged], Sockets::Connect).join(" ");
    assert!(
        argv.contains("virtio-net-pci,netdev=net-extra,") && argv.contains(",bus=hotplug0"),
        "{argv}"
    );
    assert!(!argv.contains("server=on"), "{argv}");
}

/// A guest with devices of these shapes, as QEMU gets them.
fn devices_of(text: &str, shapes: &[(&str, u32)]) -> Vec<String> {
    let plan = make(text);
    let Some(Kind::Guest(machine)) = plan.parts.last().map(|part| &part.kind) else {
        panic!("the guest is last");
    };
    let mut machine = machine.clone();
    machine.devices = shapes
        .iter()
        .map(|(id, device_id)| {
            let shape = super::super::description::Shape::new(*device_id, 2, 60);
            ((*id).to_owned(), shape)
        })
        .collect();
    let argv = machine.argv(&[], Sockets::Connect);
    let pairs = argv.windows(2).filter(|pair| pair[0] == "-device");
    pairs.map(|pair| pair[1].clone()).collect()
}

#[test]
fn the_first_disk_is_the_one_that_a_guest_boots_from() {
    const SHAPES: [(&str, u32); 4] = [("a", 2), ("r", 4), ("b", 2), ("c", 2)];
    let order = |devices: &[String]| -> String {
        let id = |spec: &String| spec.split_once("dev-").map(|(_, id)| id.to_owned());
        devices.iter().filter_map(id).collect()
    };
    let kernel = devices_of("version = 1\n[guest.vm]\nkernel = \"k\"\n", &SHAPES);
    assert_eq!(order(&kernel), "arbc");
    assert!(
        kernel[0].starts_with("vhost-user-blk-pci,chardev=vmsg-a,num-queues=2"),
        "{kernel:?}"
    );
    assert!(!kernel.concat().contains("bootindex"), "{kernel:?}");
    // Its firmware finds it by its place.
    let firmware = devices_of("version = 1\n[guest.vm]\n", &SHAPES);
    for (at, index) in [(0, 0), (2, 1), (3, 2)] {
        let wanted = format!("bootindex={index}");
        assert!(firmware[at].contains(&wanted), "{firmware:?}");
    }
    let new = "version = 1\n[guest.vm]\nqemu = \"qemu-new\"\nfront = \"vfio-user\"\n";
    let vfio = devices_of(new, &SHAPES);
    assert!(
        vfio[0].ends_with(r#"vm.a.sock"},"bootindex":0}"#),
        "{vfio:?}"
    );
    // Linux finds those on virtio-mmio from the last one on.
    let arm = "version = 1\n[guest.vm]\nmachine = \"arm64\"\nkernel = \"k\"\n";
    assert_eq!(order(&devices_of(arm, &SHAPES)), "crba");
}

#[test]
fn disks_and_shared_folders_are_plugged_in_as_well() {
    let plan = make(LAB);
    let Kind::Guest(machine) = &plan.parts[3].kind else {
        panic!("vm1 is a guest");
    };
    let plug = |shape| {
        let id = "more".to_owned();
        machine.plug(&Plugged { id, shape, port: 0 }).device
    };
    let disk = super::super::description::Shape {
        queue_size: 256,
        ..super::super::description::Shape::new(2, 4, 60)
    };
    assert_eq!(
        plug(disk),
        json!({ "driver": "vhost-user-blk-pci", "chardev": "vmsg-more", "num-queues": 4, "queue-size": 256,
            "id": "dev-more", "bus": "hotplug0" })
    );
    for tag in ["my,share", "7", "on"] {
        let share = super::super::description::Shape {
            tag: Some(tag.to_owned()),
            ..super::super::description::Shape::new(26, 2, 40)
        };
        assert_eq!(
            plug(share),
            json!({ "driver": "vhost-user-fs-pci", "chardev": "vmsg-more", "tag": tag, "num-request-queues": 1,
                "id": "dev-more", "bus": "hotplug0" })
        );
    }
}
