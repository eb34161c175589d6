// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is changed while everything runs: devices that come and go, and that it is still so after a restart.

use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Lab, Up};

const LAB: &str = "
[switch.s0]
allow = [\"* <> *\"]
[bus.b1]
[device.net1]
type = \"net\"
switch = \"s0\"
[guest.vm1]
qemu = \"./qemu\"
devices = [\"net1\"]
hotplug = 2
restart = \"always\"
[guest.vm2]
qemu = \"./qemu\"
devices = []
restart = \"always\"
";

fn kill_and_await(up: &Up, name: &str) {
    let before = up.part(name);
    let pid = before.pid.and_then(Pid::from_raw).expect("it runs");
    kill_process(pid, Signal::KILL).expect("it is ours");
    up.until(name, |part| part.state == "ready" && part.pid != before.pid);
}

/// The commands that the guest's QEMU has got since it was started last.
fn commands(lab: &Lab, guest: &str) -> Vec<String> {
    let log = lab.read(&format!("{guest}.qmp"));
    let last = log.rsplit("start ").next().unwrap_or_default();
    last.lines().skip(1).map(str::to_owned).collect()
}

#[test]
fn a_device_comes_to_a_running_guest_and_goes_again() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    assert_eq!(
        up.done(&["add-device", "net,id=extra,switch=s0", "--guest", "vm1"]),
        "b1/extra number 1\n"
    );
    assert_eq!(up.part("vm1.extra").state, "ready");
    let told = commands(&lab, "vm1");
    let names: Vec<&str> = told
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(names, ["chardev-add", "netdev_add", "device_add"]);
    assert!(
        told[2].contains("\"bus\":\"hotplug0\"") && told[2].contains("dev-extra"),
        "{}",
        told[2]
    );
    assert!(up.done(&["list"]).contains("extra"));

    up.done(&["remove-device", "extra"]);
    let told = commands(&lab, "vm1");
    let names: Vec<&str> = told
        .iter()
        .skip(3)
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(names, ["device_del", "netdev_del", "chardev-remove"]);
    assert!(!up.done(&["list"]).contains("extra"));
    assert!(up.parts().iter().all(|(name, _)| name != "vm1.extra"));
    // Its number is nobody's any more.
    assert_eq!(
        up.done(&["add-device", "rng,id=rng0", "--guest", "vm1"]),
        "b1/rng0 number 2\n"
    );
    // Without a guest it is on the bus for anybody.
    assert_eq!(
        up.done(&["add-device", "rng,id=rng1"]),
        "b1/rng1 number 3\n"
    );
    up.done(&["remove-device", "rng1"]);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    let add = |spec: &str, guest: &str| up.refused(&["add-device", spec, "--guest", guest]);
    for (said, words) in [
        (
            add("rng,id=r", "vm3"),
            "there is no guest `vm3`; known: `vm1`, `vm2`",
        ),
        (add("rng,id=r", "vm2"), "no root ports"),
        (
            add("rng,id=net1", "vm1"),
            "there is a device `net1` already",
        ),
        (up.refused(&["add-device", "console,id=vm1"]), "serial line"),
        (add("rng,id=r,bus=b9", "vm1"), "there is no bus `b9`"),
        (add("rng,id=a b", "vm1"), "1 to 32 letters"),
        (add("rng,id=r,num=0", "vm1"), "numbers are not used again"),
        (add("net,id=r,switch=s9", "vm1"), "s9"),
        (
            up.refused(&["remove-device", "net1"]),
            "guest `vm1` was started with `net1`",
        ),
        (up.refused(&["remove-device", "none"]), "none"),
    ] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    up.done(&["add-device", "rng,id=one", "--guest", "vm1"]);
    up.done(&["add-device", "rng,id=two", "--guest", "vm1"]);
    assert!(add("rng,id=three", "vm1").contains("all 2 root ports"));
    up.done(&["stop-part", "vm2"]);
    let parts: Vec<String> = up.parts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        parts,
        ["serve", "vm1.proxy", "vm1", "vm2", "vm1.one", "vm1.two"]
    );
}

#[test]
fn a_step_that_fails_takes_back_those_before_it() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    lab.write("vm1.obey", "fails");
    let said = up.refused(&["add-device", "net,id=extra,switch=s0", "--guest", "vm1"]);
    assert!(said.contains("QEMU refuses device_add: no room"), "{said}");
    let told = commands(&lab, "vm1");
    let names: Vec<&str> = told
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(
        names,
        [
            "chardev-add",
            "netdev_add",
            "device_add",
            "netdev_del",
            "chardev-remove"
        ]
    );
    assert!(!up.done(&["list"]).contains("extra"));
    assert!(up.parts().iter().all(|(name, _)| name != "vm1.extra"));

    lab.write("vm1.obey", "refuses");
    up.done(&["add-device", "net,id=extra,switch=s0", "--guest", "vm1"]);
    let said = up.refused(&["remove-device", "extra"]);
    assert!(said.contains("the guest does not let `extra` go"), "{said}");
    assert_eq!(up.part("vm1.extra").state, "ready");
    assert!(up.done(&["list"]).contains("extra"));
    lab.write("vm1.obey", "");
    up.done(&["remove-device", "extra"]);
}

#[test]
fn what_was_changed_is_so_after_a_restart() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    up.done(&["add-device", "net,id=extra,switch=s0", "--guest", "vm1"]);
    up.done(&["rule", "deny", "net1 <> extra"]);
    up.done(&["rule", "allow", "net1 > extra"]);
    up.done(&["capture", "net1", "net1.pcap"]);
    lab.append("net1.pcap", &[0; 16]);
    up.done(&["port", "set", "net1", "rate-in=10M"]);
    up.done(&["link", "net1", "down"]);
    let before = up.done(&["list"]);
    kill_and_await(&up, "serve");
    up.until("serve", |_| up.done(&["list"]) == before);
    let switches = up.done(&["switches"]);
    assert!(
        switches.contains("deny extra > net1") && switches.contains("allow net1 > extra"),
        "{switches}"
    );
    assert!(switches.contains("captured"), "{switches}");
    // The header and the record of before.
    assert_eq!(lab.len("net1.pcap"), 24 + 16);

    kill_and_await(&up, "vm1");
    let log = lab.read("vm1.qmp");
    let last = log.lines().last().expect("a start");
    assert!(
        last.starts_with("start ") && last.contains("id=dev-extra,bus=hotplug0"),
        "{last}"
    );
    // It goes from there, too.
    up.done(&["remove-device", "extra"]);
    kill_and_await(&up, "serve");
    assert!(!up.done(&["list"]).contains("extra"));
}
