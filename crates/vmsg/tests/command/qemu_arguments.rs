// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `vmsg proxy --print-qemu` prints.

use super::*;

/// What is said of the device `dev` of a bus.
fn print_qemu(folder: &TempDir, bus: &str, dev: &str, more: &[&str]) -> Output {
    let front = format!("vhost-user,socket=x.sock,dev={dev}");
    let args = ["proxy", "--print-qemu", "--bus", bus, "--front", &front];
    output(folder.path(), &[&args, more].concat())
}

#[test]
fn a_script_gets_the_arguments_of_a_vfio_user_device_as_words() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let front = "vfio-user,socket=x.sock,dev=net0";
    let args = ["proxy", "--print-qemu", "--bus", BUS, "--front", front];
    let printed = output(folder.path(), &args);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    // As the shell splits what `$(…)` gives: no quote is taken away.
    let printed = text(&printed.stdout);
    let device = printed.split_whitespace().last().expect("a device");
    let device: serde_json::Value = serde_json::from_str(device).expect("JSON");
    assert_eq!(device["driver"], "vfio-user-pci");
    assert_eq!(device["socket"]["path"], "x.sock");
    host.end();
}

#[test]
fn the_qemu_arguments_fit_the_devices() {
    let folder = TempDir::new().expect("a folder");
    let host = serve(&folder);
    let fronts = [
        "--front",
        "vhost-user,socket=net.sock,dev=net0",
        "--front",
        "vhost-user,socket=rng.sock,dev=1",
    ];
    for (machine, parts) in [
        ("x86", ["virtio-net-pci", "vhost-user-rng-pci", "share=on"]),
        (
            "arm64",
            ["virtio-net-device", "vhost-user-rng,", "force-legacy=false"],
        ),
    ] {
        let mut args = vec!["proxy", "--print-qemu", "--machine", machine, "--bus", BUS];
        args.extend(fronts);
        let printed = output(folder.path(), &args);
        assert!(printed.status.success(), "{}", text(&printed.stderr));
        let printed = text(&printed.stdout);
        for part in parts {
            assert!(printed.contains(part), "{part} is missing: {printed}");
        }
        assert!(!printed.contains('\\'), "for `$(…)` of a script: {printed}");
    }
    let mut args = vec!["proxy", "--print-qemu", "--bus", BUS];
    args.extend(fronts);
    args.extend(["--qemu-version", "11.1"]);
    let printed = text(&output(folder.path(), &args).stdout);
    assert!(printed.contains("reconnect-ms="), "{printed}");
    assert!(!printed.contains("vectors=0"), "{printed}");
    host.end();
}

#[test]
fn the_qemu_arguments_are_asked_for_once() {
    let folder = TempDir::new().expect("a folder");
    let refused = |bus: &str, dev: &str, words: &[&str]| {
        let refused = print_qemu(&folder, bus, dev, &[]);
        let error = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{bus} {dev}: {error}");
        assert!(refused.stdout.is_empty(), "{bus} {dev}");
        for word in words {
            assert!(error.contains(word), "{bus} {dev} without {word}: {error}");
        }
    };
    let bus = linux_user("");
    refused(BUS, "net0", &["b0.sock", "vmsg serve"]);
    refused(&bus, "0", &["linux-user.socket", "vmsg serve"]);

    let host = serve(&folder);
    let printed = print_qemu(&folder, BUS, "rng0", &[]);
    assert!(printed.status.success());
    assert_eq!(text(&printed.stderr), "", "there is nothing to be said");
    refused(BUS, "nett", &["nett", "known: net0, rng0"]);
    refused(BUS, "7", &["device 7", "vmsg ls"]);
    host.end();

    let args = ["serve", "--bus", &bus, "--device", "rng"];
    let host = Running::start(folder.path(), &args, 1);
    let printed = print_qemu(&folder, &bus, "rng0", &[]);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    assert!(text(&printed.stdout).contains("/ram,share=on"));
    refused(&linux_user(",revision=r1"), "0", &["revision=1"]);
    let front = "vhost-user,socket=y.sock,dev=0";
    let args = ["proxy", "--bus", &bus, "--front", front];
    let proxy = Running::start(folder.path(), &args, 1);
    // It connects when it is ready already.
    until("the proxy has the bus", || {
        !print_qemu(&folder, &bus, "0", &[]).status.success()
    });
    refused(&bus, "0", &["vmsg proxy", "before the proxy"]);
    proxy.end();
    host.end();
}

#[test]
fn the_qemu_arguments_need_memory_that_fits_the_machine() {
    let folder = TempDir::new().expect("a folder");
    for (bus, more, words) in [
        ("linux-user", &[][..], "ram=FILE"),
        ("linux-user,ram=ram", &[], "mem-offset=0,"),
        (
            &linux_user(""),
            &["--memory", "3G"],
            "mem-low-size=2G,mem-hole=2G",
        ),
        (
            &linux_user(""),
            &["--machine", "arm64"],
            "mem-offset=0x40000000",
        ),
        (BUS, &["--memory", "512"], "512M"),
    ] {
        let refused = print_qemu(&folder, bus, "0", more);
        let error = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{bus} {more:?}: {error}");
        assert!(error.contains(words), "{bus} {more:?}: {error}");
    }
}

#[test]
fn a_console_needs_vfio_user_or_a_qemu_with_a_device_for_all_types() {
    let folder = TempDir::new().expect("a folder");
    let args = [
        "serve",
        "--bus",
        BUS,
        "--device",
        "console,id=con0,port=agent",
    ];
    let host = Running::start(folder.path(), &args, 1);
    let old = print_qemu(&folder, BUS, "con0", &[]);
    assert_eq!(old.status.code(), Some(2));
    let error = text(&old.stderr);
    assert!(
        error.contains("vfio-user") && error.contains("11.1"),
        "{error}"
    );
    let new = print_qemu(&folder, BUS, "con0", &["--qemu-version", "11.1"]);
    assert!(new.status.success(), "{}", text(&new.stderr));
    let new = text(&new.stdout);
    let device =
        "vhost-user-test-device-pci,chardev=vmsg-x,virtio-id=3,num_vqs=6,vq_size=64,config_size=12";
    assert!(new.contains(device), "{new}");
    host.end();
}
