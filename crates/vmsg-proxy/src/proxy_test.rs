// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use vmsg_bus::keyval;

#[test]
fn fronts_are_written_as_on_a_command_line() {
    let spec: FrontSpec = keyval::from_str("vhost-user,socket=net.sock,dev=net0").unwrap();
    assert_eq!(spec.dev.0, Target::Name("net0".into()));
    assert_eq!(spec.name(), "net");
    let spec: FrontSpec =
        keyval::from_str("vhost-user,socket=/run/rng.sock,dev=1,config=off,mode=0660,bus=1")
            .unwrap();
    assert_eq!(spec.dev.0, Target::Number(DevNum(1)));
    assert_eq!((spec.config, spec.bus), (Some(false), BusRef::Index(1)));
    assert_eq!(spec.mode.map(|m| m.0), Some(0o660));
    let spec: FrontSpec = keyval::from_str("vhost-user,socket=a,dev=1,bus=b0").unwrap();
    assert_eq!(spec.bus, BusRef::Name("b0".into()));
}

#[test]
fn a_front_is_refused_what_its_kind_does_not_have() {
    let spec = |text: &str| keyval::from_str::<FrontSpec>(text).unwrap();
    let good = spec("vfio-user,socket=a,dev=1,isolate=on,segment=8M");
    assert_eq!((good.isolate, good.segment), (Some(true), Some(8 << 20)));
    good.check().unwrap();
    let good = spec("vhost-user,socket=a,dev=1,isolate=on,segment=8M");
    good.check().unwrap();
    for (text, word) in [
        ("vfio-user,socket=a,dev=1,config=on", "config="),
        ("vfio-user,socket=a,dev=1,segment=4K", "between 1M"),
        ("vfio-user,socket=a,dev=1,segment=1048577", "4096"),
    ] {
        let error = spec(text).check().unwrap_err().to_string();
        assert!(error.contains(word), "{text}: {error}");
    }
}

#[test]
fn a_bus_that_has_the_memory_in_common_cannot_isolate() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let bus: BusSpec = format!("linux-user,dir={at},ram={at}/ram").parse().unwrap();
    let fronts = specs(&[format!("vfio-user,socket={at}/a.sock,dev=1,isolate=on")]);
    let error = Proxy::start(&[bus], &fronts, |_| ()).unwrap_err();
    assert!(error.to_string().contains("unix bus"), "{error}");
    assert!(!dir.path().join("a.sock").exists());
}

#[test]
fn memory_for_copies_needs_copies() {
    let fits = |front: &str, bus: &str| {
        let spec: FrontSpec = keyval::from_str(front).unwrap();
        spec.check().unwrap();
        let bus: BusSpec = bus.parse().unwrap();
        spec.check_bus(&bus).map_err(|error| error.to_string())
    };
    let segment = "vhost-user,socket=a,dev=1,segment=64M";
    let isolated = "vhost-user,socket=a,dev=1,isolate=on";
    let lent = "vfio-user,socket=a,dev=1,isolate=off";
    let unix = "unix,path=b";
    let bounce = "ivshmem,socket=b,memory=bounce,ram=bar";
    let shown = "ivshmem,socket=b,memory=segment,ram=bar";
    for (front, bus) in [
        (isolated, unix),
        (lent, unix),
        (segment, bounce),
        (isolated, bounce),
        (lent, shown),
    ] {
        fits(front, bus).unwrap();
    }
    for (front, bus, word) in [
        (segment, unix, "isolate=on"),
        (segment, shown, "isolate=on"),
        (isolated, shown, "memory=bounce"),
        (lent, bounce, "isolate=off"),
    ] {
        let error = fits(front, bus).unwrap_err();
        assert!(error.contains(word), "{front} {bus}: {error}");
    }
}

#[test]
fn memory_in_common_is_wiped_at_the_start_and_too_little_of_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let ram = dir.path().join("ram");
    std::fs::write(&ram, vec![7; 3 << 20]).unwrap();
    let bus =
        format!("ivshmem,file={at}/messages,size=64K,memory=bounce,ram={at}/ram,ram-offset=64K");
    let bus: BusSpec = bus.parse().unwrap();
    let mut fronts = specs(&[
        format!("vhost-user,socket={at}/a.sock,dev=0,segment=1M"),
        format!("vfio-user,socket={at}/b.sock,dev=1,segment=1M"),
    ]);
    let proxy = Proxy::start(std::slice::from_ref(&bus), &fronts, |_| ()).unwrap();
    assert_eq!(proxy.connections(), 1);
    let bytes = std::fs::read(&ram).unwrap();
    let (first, last) = (64 << 10, (64 << 10) + (2 << 20));
    assert!(bytes[first..last].iter().all(|byte| *byte == 0));
    let others = bytes[..first].iter().chain(&bytes[last..]);
    assert!(others.into_iter().all(|byte| *byte == 7));
    drop(proxy);
    fronts[1].segment = Some(2 << 20);
    let error = Proxy::start(&[bus], &fronts, |_| ()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("segment=") && error.contains("3145728"),
        "{error}"
    );
}

#[test]
fn mistakes_are_named() {
    let error = |text: &str| keyval::from_str::<FrontSpec>(text).unwrap_err().to_string();
    assert!(
        error("vhost-user,socket=a").contains("dev"),
        "{}",
        error("vhost-user,socket=a")
    );
    assert!(
        error("vhost-usr,socket=a,dev=1").contains("vhost-user"),
        "{}",
        error("vhost-usr,socket=a,dev=1")
    );
    assert!(error("vhost-user,socket=a,dev=70000").contains("65535"));
    assert!(error("vhost-user,socket=a,dev=1,sokcet=b").contains("socket"));
}

fn specs(texts: &[String]) -> Vec<FrontSpec> {
    texts
        .iter()
        .map(|text| keyval::from_str(text).unwrap())
        .collect()
}

#[test]
fn two_fronts_on_one_socket_fail_before_any_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let bus: BusSpec = format!("unix,path={at}/b0.sock").parse().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let fronts = specs(&[
        format!("vhost-user,socket={at}/a.sock,dev=1"),
        format!("vhost-user,socket={at}/sub/../a.sock,dev=2"),
    ]);
    let mut ready = 0;
    let error = Proxy::start(&[bus], &fronts, |_| ready += 1).unwrap_err();
    assert!(matches!(error, ProxyError::SameSocket(_)), "{error}");
    assert_eq!(ready, 0);
    assert!(!dir.path().join("a.sock").exists());
}

#[test]
fn nothing_says_ready_if_the_last_front_cannot_listen_and_a_missing_folder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let bus: BusSpec = format!("unix,path={at}/b0.sock").parse().unwrap();
    let fronts = specs(&[
        format!("vhost-user,socket={at}/a.sock,dev=1"),
        format!("vhost-user,socket={at}/missing/b.sock,dev=2"),
    ]);
    let mut ready = 0;
    let error = Proxy::start(&[bus], &fronts, |_| ready += 1).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("no folder `{at}/missing`")),
        "{error}"
    );
    assert_eq!(ready, 0);
    assert!(!dir.path().join("a.sock").exists(), "nothing stays");
}

#[test]
fn fronts_share_the_one_connection_of_a_bus_for_one_driver() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let buses: Vec<BusSpec> = [
        format!("linux-user,dir={at}"),
        format!("unix,path={at}/b0.sock"),
    ]
    .iter()
    .map(|text| text.parse().unwrap())
    .collect();
    let fronts = specs(&[
        format!("vhost-user,socket={at}/a.sock,dev=0"),
        format!("vhost-user,socket={at}/b.sock,dev=1,bus=1"),
        format!("vhost-user,socket={at}/c.sock,dev=2,bus=0"),
        format!("vhost-user,socket={at}/d.sock,dev=3,bus=1"),
    ]);
    let proxy = Proxy::start(&buses, &fronts, |_| {}).unwrap();
    assert_eq!(proxy.connections(), 3);
    assert_eq!(proxy.fronts().count(), 4);
    let unknown = specs(&[format!("vhost-user,socket={at}/e.sock,dev=0,bus=2")]);
    assert!(matches!(
        Proxy::start(&buses, &unknown, |_| {}),
        Err(ProxyError::NoSuchBus { .. })
    ));
}
