// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The drivers of the `virtio-drivers` crate against `vmsg serve`, over each bus: a disk and a network, and no virtual machine.

#[path = "../examples/virtio_drivers.rs"]
#[allow(unreachable_pub, reason = "a program of its own")]
mod example;
mod program;

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use program::{Running, vmsg};

/// Bytes of the disk: more than the message of a read, and no multiple of one.
const DISK: usize = 3 * 128 * 1024 + 512;

/// A device host that has said that it is ready; killed when it is dropped.
fn serve(dir: &Path, bus: &str) -> Running {
    let disk: Vec<u8> = (1..=250).cycle().take(DISK).collect();
    fs::write(dir.join("disk.img"), disk).unwrap();
    let mut host = vmsg(dir, &["serve", "--bus", bus, "--device", "rng"]);
    host.args(["--device", "blk,path=disk.img,serial=number 7"])
        .args(["--device", "net,backend=user"])
        .stderr(Stdio::null());
    Running::start(&mut host)
}

/// Serves on a bus and drives what is there, twice. `DIR` in its name stands for a folder of its own, with the files `ram` and `common`.
#[track_caller]
fn both_work_over(bus: &str) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["ram", "common"] {
        let file = File::create(dir.path().join(file)).unwrap();
        file.set_len(16 << 20).unwrap();
    }
    let bus = bus.replace("DIR", &dir.path().display().to_string());
    let _host = serve(dir.path(), &bus);
    let sum: u64 = (1..=250_u64).cycle().take(DISK).sum();
    for round in 0..2 {
        let text = example::run(&bus.parse().unwrap()).unwrap();
        for wanted in [
            "rng0: EntropySource".to_owned(),
            format!("blk0: disk of {DISK} bytes, id \"number 7"),
            "begins with 01 02 03 04".to_owned(),
            format!("{DISK} bytes read"),
            format!("their sum is {sum}\n"),
            "10.0.2.2 is at 52-55-0a-00-02-02".to_owned(),
            "5 of 5 pings answered".to_owned(),
        ] {
            assert!(text.contains(&wanted), "{round}: no {wanted:?} in {text}");
        }
    }
}

#[test]
fn a_disk_and_a_network_are_driven_over_unix() {
    both_work_over("unix,path=DIR/bus.sock");
}

#[test]
fn a_disk_and_a_network_are_driven_over_unix_with_the_smallest_messages() {
    both_work_over("unix,path=DIR/bus.sock,message-size=48");
}

#[test]
fn a_disk_and_a_network_are_driven_over_linux_user() {
    both_work_over("linux-user,dir=DIR,ram=DIR/ram,mem-offset=0x40000000");
}

#[test]
fn a_disk_and_a_network_are_driven_over_ivshmem_with_memory_in_common() {
    both_work_over("ivshmem,file=DIR/common,memory=bounce,ram=DIR/ram");
}

#[test]
fn a_disk_and_a_network_are_driven_over_ivshmem_with_memory_that_both_know() {
    both_work_over("ivshmem,file=DIR/common,layout=spsc,memory=known,ram=DIR/ram");
}
