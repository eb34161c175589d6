// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn fit(keys: &str, arch: Arch, memory: &str) -> Result<MemoryBackend, Usage> {
    let spec: BusSpec = format!("linux-user,ram=/ram{keys}").parse().expect("a bus");
    let BusSpec::LinuxUser(bus) = spec else {
        panic!("{spec}")
    };
    fitting_memory(&bus, arch, parse_size(memory).expect("a size"))
}

#[test]
fn memory_must_be_where_the_machine_has_it() {
    let split = ",mem-offset=0,mem-low-size=2G,mem-hole=2G";
    for (keys, arch, memory) in [
        (",mem-offset=0", Arch::X86, "512M"),
        (",mem-offset=0", Arch::X86, "2815M"),
        (split, Arch::X86, "2816M"),
        (split, Arch::X86, "2G"),
        ("", Arch::Arm64, "8G"),
    ] {
        assert!(fit(keys, arch, memory).is_ok(), "{keys} {memory}");
    }
    for (keys, arch, memory, remedy) in [
        ("", Arch::X86, "512M", "mem-offset=0,"),
        (",mem-offset=0", Arch::X86, "2816M", &split[1..]),
        (split, Arch::X86, "2176M", "without mem-hole="),
        (",mem-offset=0", Arch::Arm64, "1G", "mem-offset=0x40000000"),
    ] {
        let Err(Usage(error)) = fit(keys, arch, memory) else {
            panic!("{keys} {memory}");
        };
        assert!(error.contains(remedy), "{error}");
    }
}

#[test]
fn memory_between_machines_is_what_the_bus_can_find() {
    let fit = |keys: &str, arch| {
        let spec: BusSpec = format!("ivshmem,pci=auto,{keys}").parse().expect("a bus");
        let BusSpec::Ivshmem(bus) = spec else {
            panic!("{spec}")
        };
        fitting_common(&bus, arch, GIB).map_err(|Usage(error)| error)
    };
    let file = |path: &str| Ok(Some(MemoryBackend::File(path.into())));
    let huge = |node| Ok(Some(MemoryBackend::Huge(node)));
    for arch in [Arch::X86, Arch::Arm64] {
        assert_eq!(fit("memory=segment,node=1", arch), huge(Some(1)));
        assert_eq!(fit("memory=segment,window=4G+1G", arch), huge(None));
        assert_eq!(fit("memory=whole", arch), huge(None));
        assert_eq!(fit("memory=bounce,ram=bar", arch), Ok(None));
    }
    let bar = "/sys/bus/pci/devices/0000:00:05.0/resource2_wc";
    let segment = "memory=segment,ram=pci:0000:00:05.0";
    assert_eq!(fit(segment, Arch::X86), file(bar));
    assert!(fit(segment, Arch::Arm64).is_err());
    assert!(fit("memory=segment,ram=bar", Arch::X86).is_err());
    assert_eq!(fit("memory=known,ram=/ram", Arch::X86), file("/ram"));
    let error = fit("memory=known,ram=/ram", Arch::Arm64).expect_err("not at 0");
    assert!(error.contains("mem-offset=0x40000000"), "{error}");
}

#[test]
fn vfio_user_needs_a_qemu_that_has_it() {
    let fronts = |texts: &[&str]| -> Vec<FrontSpec> {
        let parse = |text: &&str| vmsg_bus::keyval::from_str(text).expect("a front");
        texts.iter().map(parse).collect()
    };
    let vhost = fronts(&["vhost-user,socket=a,dev=0"]);
    let both = fronts(&["vhost-user,socket=a,dev=0", "vfio-user,socket=b,dev=1"]);
    assert_eq!(version_for(None, &vhost).ok(), Some((7, 2)));
    assert_eq!(version_for(None, &both).ok(), Some((10, 1)));
    assert_eq!(version_for(Some("11.1.3"), &both).ok(), Some((11, 1)));
    let Err(Usage(error)) = version_for(Some("10.0.2"), &both) else {
        panic!("QEMU 10.0 has no vfio-user");
    };
    assert!(
        error.contains("front b") && error.contains("10.1"),
        "{error}"
    );
}

#[test]
fn a_size_has_a_unit() {
    assert_eq!(parse_size("2G").expect("a size"), 2 * GIB);
    for text in ["", "M", "512", "0M", "-1M", "1.5G", "99999999999T", "1€"] {
        assert!(parse_size(text).is_err(), "{text}");
    }
}

#[test]
fn types_that_qemu_has_no_device_for_are_refused() {
    for (id, arch, version, fine) in [
        (1, Arch::X86, (7, 2), true),
        (2, Arch::Arm64, (7, 2), true),
        (4, Arch::X86, (7, 2), true),
        (26, Arch::X86, (7, 2), true),
        (3, Arch::X86, (7, 2), false),
        (3, Arch::X86, (11, 0), false),
        (3, Arch::X86, (11, 1), true),
        (25, Arch::X86, (7, 2), false),
        (32, Arch::Arm64, (10, 0), true),
        (99, Arch::X86, (12, 0), true),
    ] {
        let checked = check_type(id, arch, version);
        assert_eq!(checked.is_ok(), fine, "{id} {version:?}");
        if let Err(Usage(error)) = checked {
            assert!(error.contains("vfio-user front"), "{error}");
        }
    }
    let Err(Usage(error)) = check_type(25, Arch::X86, (7, 2)) else {
        panic!("QEMU 7.2 has no sound device");
    };
    assert!(
        error.contains("sound devices") && error.ends_with("--qemu-version 10.0"),
        "{error}"
    );
}
