// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::path::PathBuf;

use vmsg_proxy::front::qemu::Arch;

use super::super::description::Version;
use super::super::source::Source;
use super::super::{describe, plan};
use super::*;

/// What is said of a description, and what it is if it can be.
fn check(text: &str) -> (Option<Description>, String) {
    let world = World {
        runs: &|program| program == "sh" || program.starts_with("./here"),
        program: "/bin/vmsg".to_owned(),
        exists: &|path| path == Path::new("vmlinuz"),
        qemu_version: &version,
        kvm: Some(Arch::X86),
        runtimes: PathBuf::from("/run/vmsg"),
    };
    let source = Source::new("d.toml", text);
    let environment = |key: &str| (key == "HOME").then(|| "/root".to_owned());
    let set = [("KERNEL".to_owned(), "vmlinuz".to_owned())];
    // Not unused in any.
    let text = format!("{text}\n# ");
    let source_text = Source::new("d.toml", text);
    let set = if source.text().contains("KERNEL") {
        &set[..]
    } else {
        &[]
    };
    let (description, mistakes) = describe(
        Path::new("/d/d.toml"),
        &source_text,
        set,
        &environment,
        &world,
    );
    (description, source.show_all(&mistakes))
}

fn version(qemu: &str) -> Result<Version, String> {
    match qemu {
        "qemu-old" => Ok((6, 0)),
        "qemu-new" => Ok((11, 1)),
        "qemu-none" => Err("cannot run qemu-none".to_owned()),
        _ => Ok((7, 2)),
    }
}

const HEAD: &str = "version = 1\n[bus.b0]\n[device.net0]\ntype = \"net\"\n";

#[test]
fn a_description_is_read_and_everything_has_its_default() {
    let (description, said) = check(&format!("{HEAD}[guest.vm1]\nkernel = \"${{KERNEL}}\"\n"));
    assert_eq!(said, "");
    let description = description.expect("it is right");
    assert_eq!(description.name, "d");
    assert_eq!(description.folder, Path::new("/d"));
    assert_eq!(
        description.host.control,
        Path::new("/run/vmsg/d/control.sock")
    );
    assert_eq!(description.buses[0].text, "unix,path=/run/vmsg/d/b0.sock");
    let mac = vmsg_device::net::Mac::derived("d/net0");
    assert_eq!(
        description.devices[0].text,
        format!("net,id=net0,bus=b0,num=0,mac={mac}")
    );
    let guest = &description.guests[0];
    assert_eq!(guest.devices, [0]);
    assert_eq!(
        (guest.qemu.as_str(), guest.version),
        ("qemu-system-x86_64", (7, 2))
    );
    assert_eq!(guest.accel.as_deref(), Some("kvm"));
    assert_eq!(guest.restart, Restart::Never);
}

#[test]
fn keys_are_those_of_the_command_line_in_toml_s_words() {
    let text = "version = 1
        [bus.b0]
        path = \"a,b/x.sock\"
        [device.net0]
        type = \"net\"
        mac = \"52:54:00:00:00:01\"
        ipv6 = false
        mtu = 0x5dc
        hostfwd = [\"tcp::1-:2\", \"tcp::3-:4\"]
        num = 3
        [device.rng0]
        type = \"rng\"
        [program.p]
        command = [\"vmsg\", \"$$HOME=${HOME}\", '${HOME}$']";
    let (description, said) = check(text);
    let description = description.expect(&said);
    assert_eq!(description.buses[0].text, "unix,path=a,,b/x.sock,id=b0");
    assert_eq!(
        description.devices[0].text,
        "net,id=net0,mac=52:54:00:00:00:01,ipv6=off,mtu=0x5dc,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4,num=3,bus=b0"
    );
    assert_eq!(description.devices[1].text, "rng,id=rng0,bus=b0,num=0");
    assert_eq!(
        description.programs[0].command,
        ["/bin/vmsg", "$HOME=/root", "/root$"]
    );
}

/// Each mistake with the line that it is told of, counted from 1, and words of what is said. A text begins with `HEAD`.
const MISTAKES: &[(&str, usize, &[&str])] = &[
    (
        "[guest.vm1]\nkernle = \"vmlinuz\"",
        6,
        &["unknown key `kernle`", "`kernel`", "did you mean `kernel`?"],
    ),
    (
        "[guest.vm1]\nkernel = \"gone\"",
        6,
        &["there is no file gone"],
    ),
    (
        "[guest.vm1]\ninitrd = \"vmlinuz\"",
        6,
        &["`initrd` needs `kernel`"],
    ),
    (
        "[guest.vm1]\nkernel = \"${NOT}\"",
        6,
        &["${NOT} is not set", "--set NOT=…"],
    ),
    (
        "[guest.vm1]\nappend = \"${NOT\"\nkernel = \"vmlinuz\"",
        6,
        &["a `${` has no `}`"],
    ),
    (
        "[guest.vm1]\nmachine = \"z80\"",
        6,
        &["`machine` must be one of \"x86\", \"arm64\", not \"z80\""],
    ),
    ("[guest.vm1]\nmemory = \"5\"", 6, &["512M"]),
    (
        "[guest.vm1]\nmemory = 5",
        6,
        &["`memory` must be a string, not a number"],
    ),
    ("[guest.vm1]\ncpus = 0", 6, &["1 to 1024"]),
    ("[guest.vm1]\ncpus = -1", 6, &["not negative"]),
    ("[guest.vm1]\nserial = \"yes\"", 6, &["true or false"]),
    ("[guest.vm1]\nargs = \"-s\"", 6, &["a list of strings"]),
    (
        "[guest.vm1]\nargs = [\"-s\", 1]",
        6,
        &["a list of strings", "a number"],
    ),
    (
        "[guest.vm1]\nrestart = \"sometimes\"",
        6,
        &["\"never\", \"on-failure\", \"always\""],
    ),
    ("[guest.vm1]\nhotplug = 99", 6, &["0 to 31"]),
    (
        "[guest.vm1]\nfront = \"vfio-user\"",
        6,
        &["since version 10.1", "7.2"],
    ),
    (
        "[guest.vm1]\nqemu = \"qemu-new\"\nfront = \"vfio-user\"\nhotplug = 1",
        8,
        &["QEMU aborts", "vhost-user"],
    ),
    (
        "[guest.vm1]\nqemu = \"qemu-none\"",
        6,
        &["cannot run qemu-none"],
    ),
    (
        "[guest.vm1]\nqemu = \"qemu-old\"",
        6,
        &["6.0", "7.2 is the oldest"],
    ),
    ("[guest.vm1]\nqemu-version = \"x\"", 6, &["\"7.2\""]),
    (
        "[guest.vm1]\nbus = \"b7\"",
        6,
        &["there is no bus `b7`, known: `b0`", "did you mean `b0`?"],
    ),
    (
        "[guest.vm1]\ndevices = [\"net1\"]",
        6,
        &["there is no device `net1`; did you mean `net0`?"],
    ),
    (
        "[guest.vm1]\ndevices = [\"net0\", \"net0\"]",
        6,
        &["named twice"],
    ),
    (
        "[guest.vm1]\ndevices = [\"net0\"]\nbus = \"b0\"",
        6,
        &["cannot both be"],
    ),
    (
        "[guest.vm1]\nbus = \"b0\"\n[guest.vm2]\nbus = \"b0\"",
        8,
        &["the guest `vm1` has the device `net0` already"],
    ),
    (
        "[guest.vm1]\n[guest.vm2]\nbus = \"b0\"",
        5,
        &["[guest.vm1] does not say which devices it has"],
    ),
    (
        "[guest.serve]\n",
        5,
        &["`serve` is the name of a part of every description"],
    ),
    ("[guest.\"a b\"]\n", 5, &["`a b`", "1 to 32 letters"]),
    (
        "[guest.x]\n[program.x]\ncommand = [\"sh\"]",
        6,
        &["a guest has the name `x` already"],
    ),
    ("[program.x]\n", 5, &["needs `command`"]),
    ("[program.x]\ncommand = []", 6, &["no program"]),
    (
        "[program.x]\ncommand = [\"nope\"]",
        6,
        &["there is no program `nope`"],
    ),
    (
        "[program.x]\ncommand = [\"sh\"]\nafter = [\"y\"]",
        7,
        &["there is no part `y`"],
    ),
    (
        "[program.x]\ncommand = [\"sh\"]\nafter = [\"x\"]",
        7,
        &["cannot wait for itself"],
    ),
    (
        "[program.x]\ncommand = [\"sh\"]\nafter = [\"y\"]\n[program.y]\ncommand = [\"sh\"]\nafter = \"x\"",
        7,
        &["`x` waits for something that waits for `x`"],
    ),
    (
        "[bus.b1]\ntype = \"unx\"",
        6,
        &["unknown name `unx`", "did you mean `unix`?"],
    ),
    (
        "[bus.b1]\nslot = 5",
        6,
        &["unknown key `slot`", "did you mean `slots`?"],
    ),
    ("[bus.b1]\nslots = \"many\"", 6, &["slots"]),
    (
        "[bus.b1]\npath = \"/run/vmsg/d/b0.sock\"",
        6,
        &["is at this place already"],
    ),
    (
        "[bus.b1]\nid = \"b1\"",
        6,
        &["the table's name, `b1`, is it"],
    ),
    (
        "[bus.b1]\npath = { a = 1 }",
        6,
        &["`path` cannot be a table"],
    ),
    ("[device.x]\n", 5, &["[device.x] needs `type`"]),
    (
        "[device.x]\ntype = \"nett\"",
        6,
        &["unknown name `nett`", "did you mean `net`?"],
    ),
    (
        "[device.x]\ntype = \"rng\"\nbus = \"b1\"",
        7,
        &["there is no bus `b1`"],
    ),
    (
        "[device.x]\ntype = \"net\"\nbackend = \"tap\"\nhostfwd = [\"tcp::1-:2\"]",
        8,
        &["hostfwd= needs backend=user"],
    ),
    (
        "[device.x]\ntype = \"net\"\nmac = \"1\"",
        7,
        &["MAC address"],
    ),
    (
        "[device.x]\ntype = \"rng\"\nworker = 3",
        7,
        &["there is no worker 3"],
    ),
    (
        "[device.x]\ntype = \"rng\"\nnum = 5\n[device.y]\ntype = \"rng\"\nnum = 5",
        10,
        &["`x` has the number 5 on this bus already"],
    ),
    (
        "[device.x]\ntype = \"blk\"\npath = \"disk\"\n[device.y]\ntype = \"blk\"\npath = \"disk\"\nro = true",
        10,
        &["`x` has this image already", "both are `ro`"],
    ),
    ("[device.7]\ntype = \"rng\"", 5, &["taken for a number"]),
    (
        "[bus.lu]\ntype = \"linux-user\"\n[device.x]\ntype = \"rng\"\nbus = \"lu\"\n[guest.vm]\nbus = \"lu\"",
        5,
        &["[bus.lu]: QEMU needs ram=FILE"],
    ),
    (
        "[device.vm]\ntype = \"console\"\n[guest.vm]\nserial = true",
        5,
        &["the serial line of the guest `vm` by this name"],
    ),
    (
        "[device.x]\ntype = \"net\"\nswitch = \"s1\"\n[switch.s0]\nallow = \"* > *\"",
        7,
        &["there is no switch `s1`, known: `s0`"],
    ),
    ("[switch.s0]\nallow = [\"a >\"]", 6, &["allow="]),
    ("[switch.s0]\nage = 0", 6, &["age=0"]),
    ("[switch.s0]\nunknown = \"up9\"", 6, &["up9"]),
    (
        "[uplink.u]\nswitch = \"s0\"\nbackend = \"tap\"",
        6,
        &["there is no switch `s0`, there are none"],
    ),
    ("[host]\nworkers = 0", 6, &["1 to 256"]),
    ("[host]\nname = \"a/b\"", 6, &["`a/b`"]),
    ("[host]\nrunime = \"x\"", 6, &["did you mean `runtime`?"]),
    (
        "[hots]\n",
        5,
        &["unknown key `hots`", "did you mean `host`?"],
    ),
    ("[guest]\nkernel = \"vmlinuz\"", 6, &["[guest.NAME]"]),
    ("bus = 3", 5, &["bus"]),
    ("[guest.vm1]\nkernel = vmlinuz", 6, &["string"]),
];

#[test]
fn each_mistake_is_told_with_its_line() {
    for (text, line, words) in MISTAKES {
        let (description, said) = check(&format!("{HEAD}{text}\n"));
        assert!(description.is_none(), "{text}");
        let first = said
            .lines()
            .find(|text| text.contains(&format!("d.toml:{line}:")) && text.contains(": error: "))
            .unwrap_or_else(|| panic!("{text}\nnothing of line {line}:\n{said}"));
        for word in *words {
            assert!(first.contains(word), "{text}\n{word} is not in {said}");
        }
        // The line itself, and where in it.
        let whole = format!("{HEAD}{text}");
        let shown = whole.lines().nth(line - 1).expect("the line");
        assert!(
            said.contains(&format!("| {shown}\n")) && said.contains('^'),
            "{said}"
        );
    }
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_text() {
    let text = "version = 2\n[bus.b0]\nslot = 1\nmodee = 3\n[device.x]\ntype = \"net\"\nmac = \"1\"\nmtuu = 2\n\
        [guest.g]\ncpus = 0\nqemu = \"qemu-none\"\nkernel = \"gone\"\n[program.p]\ncommand = [\"nope\"]\n";
    let (_, said) = check(text);
    let lines: Vec<usize> = said
        .lines()
        .filter_map(|line| {
            line.strip_prefix("d.toml:")?
                .split(':')
                .next()?
                .parse()
                .ok()
        })
        .collect();
    assert_eq!(lines, [1, 3, 4, 7, 8, 10, 11, 12, 14], "{said}");
}

#[test]
fn a_text_that_is_no_toml_is_told_with_its_place() {
    for text in [
        "version = ",
        "version = 1\n[bus.b0\n",
        "version = 1\nversion = 1",
        "\u{0}",
        "[[bus]]",
    ] {
        let (description, said) = check(text);
        assert!(
            description.is_none() && said.contains("d.toml:"),
            "{text}: {said}"
        );
    }
    let (_, said) = check("");
    assert!(
        said.contains("the first line must be `version = 1`"),
        "{said}"
    );
}

#[test]
fn what_can_be_lived_with_is_a_warning() {
    for (text, words) in [
        (
            "[switch.s0]\n[device.x]\ntype = \"net\"\nswitch = \"s0\"",
            "nobody on it reaches anybody",
        ),
        ("[switch.s0]\nallow = \"* > *\"", "nothing is on the switch"),
        (
            "[switch.s0]\nallow = [\"x <> y\"]\n[device.x]\ntype = \"net\"\nswitch = \"s0\"",
            "nothing called `y` is on the switch `s0`",
        ),
    ] {
        let (description, said) = check(&format!("{HEAD}{text}\n"));
        assert!(description.is_some(), "{said}");
        assert!(said.contains("warning: ") && said.contains(words), "{said}");
    }
}

#[test]
fn numbers_and_addresses_stay_when_others_come_and_go() {
    let both = |text: &str| {
        let (description, said) = check(&format!("version = 1\n[bus.b0]\n{text}"));
        let description = description.expect(&said);
        let of = |id: &str| {
            let device = description.devices.iter().find(|device| device.id == id);
            device.expect("it is there").shape.mac
        };
        of("b")
    };
    let one = both("[device.b]\ntype = \"net\"\n");
    let two = both("[device.a]\ntype = \"net\"\n[device.b]\ntype = \"net\"\n");
    assert!(one.is_some() && one == two);
}

#[test]
fn a_plan_can_be_made_of_whatever_has_no_mistakes() {
    for (text, _, _) in MISTAKES {
        for line in text.lines() {
            let (description, _) = check(&format!("{HEAD}{line}\n"));
            if let Some(description) = description {
                plan::plan(&description, "vmsg");
            }
        }
    }
}
