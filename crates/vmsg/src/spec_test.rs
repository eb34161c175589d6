// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn net(text: &str) -> NetSpec {
    match vmsg_bus::keyval::from_str(text).expect("a valid specification") {
        DeviceSpec::Net(net) => net,
        DeviceSpec::Rng(_) => panic!("not a network device"),
    }
}

#[test]
fn the_readme_s_devices_are_read() {
    let spec = net("net,id=net0,backend=user,pcap=net.pcap");
    assert_eq!(spec.id.as_deref(), Some("net0"));
    assert_eq!(spec.backend, NetBackend::User);
    assert_eq!(spec.pcap, Some(PathBuf::from("net.pcap")));
    assert!(matches!(
        vmsg_bus::keyval::from_str("rng"),
        Ok(DeviceSpec::Rng(_))
    ));
}

#[test]
fn unknown_kinds_and_keys_name_the_known_ones() {
    let error = vmsg_bus::keyval::from_str::<DeviceSpec>("nett")
        .expect_err("refused")
        .to_string();
    assert!(error.contains("net") && error.contains("rng"), "{error}");
    let error = vmsg_bus::keyval::from_str::<DeviceSpec>("rng,idd=x")
        .expect_err("refused")
        .to_string();
    assert!(error.contains("idd") && error.contains("num"), "{error}");
}

#[test]
fn forwards_are_read_as_qemu_writes_them() {
    let spec = net("net,hostfwd=tcp::8080-:80,hostfwd=udp:127.0.0.1:53-10.0.2.20:5353");
    let config = spec.user_config().expect("valid");
    assert_eq!(
        config.forwards[0].host,
        "127.0.0.1:8080".parse().expect("an address")
    );
    assert_eq!(config.forwards[0].guest_port, 80);
    assert_eq!(config.forwards[1].protocol, Protocol::Udp);
    assert_eq!(
        config.forwards[1].guest_addr,
        Some(Ipv4Addr::new(10, 0, 2, 20).into())
    );
    for bad in ["8080-:80", "sctp::1-:2", "tcp::x-:2", "tcp::1"] {
        let error = net(&format!("net,hostfwd={bad}"))
            .user_config()
            .expect_err(bad)
            .to_string();
        assert!(
            error.contains(bad) && error.contains("write it as"),
            "{error}"
        );
    }
}

#[test]
fn a_mac_address_is_given_or_always_the_same() {
    assert_eq!(
        net("net").mac("net0").expect("derived"),
        net("net").mac("net0").expect("derived")
    );
    assert_ne!(
        net("net").mac("net0").expect("derived"),
        net("net").mac("net1").expect("derived")
    );
    let given = net("net,mac=52:54:00:12:34:56").mac("net0").expect("valid");
    assert_eq!(given.to_string(), "52:54:00:12:34:56");
    assert!(net("net,mac=01:00:5e:00:00:01").mac("net0").is_err());
}

#[test]
fn keys_of_another_back_end_are_named() {
    assert_eq!(
        net("net,backend=none,restrict=on").foreign_key(),
        Some("restrict")
    );
    assert_eq!(
        net("net,backend=none,mac=52:54:00:12:34:56").foreign_key(),
        None
    );
}

#[test]
fn ipv6_has_keys_of_its_own() {
    let spec = net(
        "net,ipv6-net=fd12:3::/64,ipv6-host=fd12:3::1,ipv6-dns=fd12:3::53,tcp-flows=7,\
         hostfwd=tcp:[::1]:8080-[fd12:3::9]:80,hostfwd=udp::53-[::]:53",
    );
    let config = spec.user_config().unwrap();
    assert!(config.ipv6);
    assert_eq!(config.net6, ("fd12:3::".parse().unwrap(), 64));
    assert_eq!(config.host6, "fd12:3::1".parse().ok());
    assert_eq!(config.dns6, "fd12:3::53".parse().ok());
    assert_eq!(config.limits.tcp_flows, 7);
    assert_eq!(config.forwards[0].host, "[::1]:8080".parse().unwrap());
    assert_eq!(config.forwards[0].guest_addr, "fd12:3::9".parse().ok());
    assert_eq!(config.forwards[1].guest_addr, "::".parse().ok());
    assert!(!net("net,ipv6=off").user_config().unwrap().ipv6);
    assert!(net("net,ipv6-net=fd12:3::").user_config().is_err());
}
