// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::path::PathBuf;

use super::{Backend, Board, Hardware, chardev, command, parse_version};
use crate::kit::{Kit, Qemu};
use crate::machine::Machine;

#[test]
fn versions_of_debian_and_of_upstream_are_read() {
    let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
    assert_eq!(parse_version(debian), Some((7, 2)));
    assert_eq!(
        parse_version("QEMU emulator version 11.1.3\n"),
        Some((11, 1))
    );
    assert_eq!(parse_version("bash: no such program"), None);
}

#[test]
fn the_reconnect_option_fits_the_version() {
    assert_eq!(
        chardev("c", "a,b", (7, 2), true),
        "socket,id=c,path=a,,b,reconnect=1"
    );
    assert_eq!(
        chardev("c", "a", (11, 1), true),
        "socket,id=c,path=a,reconnect-ms=200"
    );
    assert_eq!(chardev("c", "a", (7, 2), false), "socket,id=c,path=a");
}

#[test]
fn each_machine_gets_its_transport() {
    for (machine, net, rng) in [
        (Machine::X86, "virtio-net-pci", "vhost-user-rng-pci"),
        (Machine::Arm64, "virtio-net-device", "vhost-user-rng,"),
    ] {
        let none = PathBuf::from("none");
        let kit = Kit {
            machine,
            qemu: Qemu::Program(none.clone()),
            programs: Vec::new(),
            more_modules: Vec::new(),
            kernel: none.clone(),
            modules: None,
            busybox: none,
        };
        let board = Board::new(
            Backend::VhostUser("n".into()),
            Backend::VhostUser("r".into()),
        );
        let command = command(&kit, (7, 2), Hardware::Board(&board), "initrd");
        let line = command
            .expect("a command")
            .get_args()
            .map(|a| a.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ");
        assert!(
            line.contains(net) && line.contains(rng) && line.contains("share=on"),
            "{line}"
        );
    }
}
