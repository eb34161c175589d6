// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use vmsg_net::socket::{DgramConfig, StreamAddress, StreamConfig};
use vmsg_net::tap::TapConfig;
use vmsg_net::user::Protocol;

use vmsg_bus::keyval;

use super::*;
use crate::control::LinkState;

fn net(text: &str) -> NetSpec {
    match vmsg_bus::keyval::from_str(text).expect("a valid specification") {
        DeviceSpec::Net(net) => *net,
        _ => panic!("not a network device"),
    }
}

impl NetSpec {
    fn tap(&self) -> Result<TapConfig, crate::Usage> {
        self.backend_keys().tap_config(self.queues)
    }
}

#[test]
fn the_readme_s_devices_are_read() {
    let spec = net("net,id=net0,backend=user,pcap=net.pcap");
    assert_eq!(spec.id.as_deref(), Some("net0"));
    assert_eq!(spec.backend, Some(NetBackend::User));
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
    let config = spec.backend_keys().user_config().expect("valid");
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
            .backend_keys()
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
    let refused = |text: &str| {
        net(text)
            .backend_keys()
            .check_keys()
            .expect_err(text)
            .to_string()
    };
    let error = refused("net,backend=none,restrict=on");
    assert!(error.contains("restrict= needs backend=user"), "{error}");
    let error = refused("net,backend=tap,ifname=tap0,hostfwd=tcp::1-:2");
    assert!(
        error.contains("backend=tap knows `ifname`, `fd`"),
        "{error}"
    );
    let error = refused("net,backend=tap,host=10.0.0.1");
    assert!(error.contains("backend=user or backend=socket"), "{error}");
    for good in [
        "net,backend=none,mac=52:54:00:12:34:56",
        "net,backend=socket,host=localhost,port=1234",
        "net,backend=tap,ifname=tap0,mtu=9000,queues=4,up=off",
    ] {
        net(good).backend_keys().check_keys().expect(good);
    }
}

#[test]
fn tap_interfaces_are_named_or_handed_over() {
    let config = net("net,backend=tap,ifname=vm%d,queues=4,mtu=9000,addr=10.1.0.1/24,addr=fd01::1/64,up=off,offloads=off")
        .tap()
        .expect("valid");
    let expected = TapConfig {
        ifname: "vm%d".to_owned(),
        fds: Vec::new(),
        queues: 4,
        up: Some(false),
        addresses: vec![
            ("10.1.0.1".parse().unwrap(), 24),
            ("fd01::1".parse().unwrap(), 64),
        ],
        mtu: Some(9000),
        offloads: false,
    };
    assert_eq!(config, expected);
    assert_eq!(
        net("net,backend=tap").tap().expect("valid"),
        TapConfig::default()
    );
    assert_eq!(net("net,backend=tap,fd=7").tap().expect("valid").fds, [7]);
    assert_eq!(
        net("net,backend=tap,fds=3:4:5").tap().expect("valid").fds,
        [3, 4, 5]
    );
    for bad in [
        "fd=3,fds=4",
        "fd=3,ifname=x",
        "fds=3-4",
        "fds=3:4,queues=3",
        "addr=10.0.0.1",
    ] {
        let text = format!("net,backend=tap,{bad}");
        net(&text).tap().expect_err(bad);
    }
}

#[test]
fn sockets_have_two_modes_with_keys_of_their_own() {
    let config = |text: &str| {
        net(&format!("net,backend=socket,{text}"))
            .backend_keys()
            .socket_config()
    };
    let unix = StreamAddress::Unix("/run/passt".into());
    let tcp = StreamAddress::Tcp("::1".to_owned(), 99);
    let endpoint = |text: &str| text.parse().expect("an address");
    for (text, expected) in [
        (
            "path=/run/passt",
            SocketConfig::Stream(StreamConfig::client(unix.clone())),
        ),
        (
            "mode=stream,path=/run/passt,server=on",
            SocketConfig::Stream(StreamConfig::server(unix.clone())),
        ),
        (
            "host=::1,port=99,reconnect=5",
            SocketConfig::Stream(StreamConfig {
                reconnect: Some(Duration::from_secs(5)),
                ..StreamConfig::client(tcp.clone())
            }),
        ),
        (
            "host=::1,port=99,reconnect=0",
            SocketConfig::Stream(StreamConfig {
                reconnect: None,
                ..StreamConfig::client(tcp)
            }),
        ),
        (
            "mode=dgram,local=./a,remote=/b",
            SocketConfig::Dgram(DgramConfig::Unix {
                local: "./a".into(),
                remote: "/b".into(),
            }),
        ),
        (
            "mode=dgram,local=0.0.0.0:1,remote=10.0.0.1:2",
            SocketConfig::Dgram(DgramConfig::Udp {
                local: endpoint("0.0.0.0:1"),
                remote: endpoint("10.0.0.1:2"),
            }),
        ),
        (
            "mode=dgram,mcast=230.0.0.1:1234,localaddr=127.0.0.1",
            SocketConfig::Dgram(DgramConfig::Multicast {
                group: "230.0.0.1:1234".parse().expect("an address"),
                interface: Some(Ipv4Addr::LOCALHOST),
            }),
        ),
    ] {
        assert_eq!(config(text).expect(text), expected, "{text}");
    }
    for (text, named) in [
        ("mode=stream", "path="),
        ("path=a,host=b,port=1", "path="),
        ("host=b", "port="),
        ("path=a,server=on,reconnect=1", "reconnect="),
        ("path=a,local=/b", "mode=dgram"),
        ("mode=dgram,path=a", "mode=dgram knows `local`"),
        ("mode=dgram,local=/a", "remote="),
        ("mode=dgram,local=/a,remote=1.1.1.1:1", "both"),
        ("mode=dgram,local=a,remote=b", "ADDRESS:PORT"),
        ("mode=dgram,local=/a,remote=/b,localaddr=1.1.1.1", "mcast="),
        ("mode=dgram,local=/a,remote=/b,mcast=230.0.0.1:1", "mcast="),
    ] {
        let error = config(text).expect_err(text).to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
}

#[test]
fn ipv6_has_keys_of_its_own() {
    let spec = net(
        "net,ipv6-net=fd12:3::/64,ipv6-host=fd12:3::1,ipv6-dns=fd12:3::53,tcp-flows=7,\
         hostfwd=tcp:[::1]:8080-[fd12:3::9]:80,hostfwd=udp::53-[::]:53",
    );
    let config = spec.backend_keys().user_config().unwrap();
    assert!(config.ipv6);
    assert_eq!(config.net6, ("fd12:3::".parse().unwrap(), 64));
    assert_eq!(config.host6, "fd12:3::1".parse().ok());
    assert_eq!(config.dns6, "fd12:3::53".parse().ok());
    assert_eq!(config.limits.tcp_flows, 7);
    assert_eq!(config.forwards[0].host, "[::1]:8080".parse().unwrap());
    assert_eq!(config.forwards[0].guest_addr, "fd12:3::9".parse().ok());
    assert_eq!(config.forwards[1].guest_addr, "::".parse().ok());
    assert!(
        !net("net,ipv6=off")
            .backend_keys()
            .user_config()
            .unwrap()
            .ipv6
    );
    assert!(
        net("net,ipv6-net=fd12:3::")
            .backend_keys()
            .user_config()
            .is_err()
    );
}

#[test]
fn a_line_has_a_speed_and_perhaps_a_duplex() {
    let spec = net("net,link=down,speed=1000,duplex=half,rss=off,hash=on,queues=4");
    assert_eq!(spec.link, LinkState::Down);
    assert_eq!(spec.line().ok(), Some(Some(1000)));
    assert_eq!(spec.duplex, Some(Duplex::Half));
    assert_eq!((spec.rss, spec.hash), (Some(false), Some(true)));
    assert_eq!(net("net").link, LinkState::Up);
    assert_eq!(net("net").line().ok(), Some(None));
    assert!(net("net,duplex=full").line().is_err());
    assert!(net("net,speed=4294967295").line().is_err());
}

#[test]
fn specifications_are_written_as_they_are_read() {
    fn check<T>(text: &str)
    where
        T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug,
    {
        let spec: T = keyval::from_str(text).expect(text);
        assert_eq!(keyval::to_string(&spec).expect(text), text);
        // The same as a table, with the name of a type in it.
        let json = serde_json::to_value(&spec).expect(text);
        assert_eq!(serde_json::from_value::<T>(json).expect(text), spec);
    }
    for text in [
        "net",
        "rng,id=rng7,num=3,bus=b1,worker=2",
        "net,id=a,,b,mac=52:54:00:12:34:56,link=down,speed=1000,duplex=half,rss=off,switch=s0",
        "net,backend=user,mtu=9000,restrict=on,hostfwd=tcp::1-:2,hostfwd=udp::3-:4",
        "net,queues=4,backend=tap,ifname=vm%d,addr=10.0.0.1/24,up=off,offloads=off",
        "net,backend=socket,mode=dgram,mcast=230.0.0.1:1234,localaddr=127.0.0.1",
        "net,backend=socket,path=/x=y,server=on",
        "net,backend=vhost-user,offloads=off,path=/x,reconnect=3",
    ] {
        check::<DeviceSpec>(text);
    }
    check::<UplinkSpec>("id=up0,switch=s0,backend=tap,ifname=tap0");
    check::<SwitchSpec>(
        "id=s0,worker=1,unknown=up0,age=10,table=64,allow=a <> b,allow=b > c,deny=* > d",
    );
    for text in [
        "",
        "id=net0,switch=s0,vlan=10,pin=on,pin=52:54:00:12:34:56,rate-in=100M,rate-out=1G,storm=10",
        "id=net0,trunk=10:20-30,native=5,mac=52:54:00:12:34:56,macs=4,capture=/a,,b,link=down",
        "trunk=all",
    ] {
        check::<PortSpec>(text);
    }
    check::<PortSetSpec>(
        "port=net0,switch=s0,vlan=off,pin=off,rate-in=off,rate-out=8K,storm=off,link=up",
    );
}

#[test]
fn tables_say_the_same_in_their_own_words() {
    let port: PortSpec = serde_json::from_str(
        r#"{"id":"p","trunk":[10,"20-30"],"pin":[true,"52:54:00:12:34:56"],"mac":"52:54:00:12:34:57","rate-in":8000,"macs":3}"#,
    )
    .expect("valid");
    let text =
        "id=p,trunk=10:20-30,pin=on,pin=52:54:00:12:34:56,mac=52:54:00:12:34:57,rate-in=8K,macs=3";
    assert_eq!(keyval::from_str::<PortSpec>(text).expect("valid"), port);
    let switch: SwitchSpec =
        serde_json::from_str(r#"{"allow":"a > b","deny":["b > a"]}"#).expect("valid");
    assert_eq!(
        keyval::from_str::<SwitchSpec>("allow=a > b,deny=b > a").expect("valid"),
        switch
    );
    let table =
        serde_json::json!({"id": "net0", "mtu": 9000, "hostfwd": ["tcp::1-:2"], "restrict": true});
    let device: DeviceSpec = typed("net", table).expect("valid");
    assert_eq!(
        keyval::from_str::<DeviceSpec>("net,id=net0,mtu=9000,hostfwd=tcp::1-:2,restrict")
            .expect("valid"),
        device
    );
    let refused = |kind: &str, key: &str| {
        let table = serde_json::json!({key: 1});
        typed::<DeviceSpec, _>(kind, table)
            .expect_err(key)
            .to_string()
    };
    let error = refused("nett", "id");
    assert!(error.contains("nett") && error.contains("`rng`"), "{error}");
    let error = refused("rng", "mtu");
    assert!(error.contains("mtu") && error.contains("`num`"), "{error}");
    for bad in [
        "trunk=0",
        "trunk=10:",
        "pin=off",
        "pin=01:00:5e:00:00:01",
        "rate-in=0",
        "rate-in=1.5M",
        "mac=x",
        "vlan=70000",
        "link=left",
        "rate=1",
    ] {
        keyval::from_str::<PortSpec>(bad).expect_err(bad);
    }
}

#[test]
fn a_port_is_changed_as_it_was_said() {
    use vmsg_net::switch::{PortChange, Vlans};
    let own = vmsg_net::Mac([2, 0, 0, 0, 0, 1]);
    let change = |text: &str| {
        let set: PortSetSpec = keyval::from_str(&format!("port=p,{text}")).expect(text);
        set.change(Some(own))
    };
    let expected = PortChange {
        vlan: Some(Vlans::Plain),
        pin: Some(vec![own]),
        statics: Some(Vec::new()),
        rate_in: Some(None),
        rate_out: Some("10M".parse().ok()),
        storm: Some(Some(7)),
        link: Some(false),
        ..PortChange::default()
    };
    let text = "vlan=off,pin=on,mac=off,rate-in=off,rate-out=10M,storm=7,link=down";
    assert_eq!(change(text).expect("valid"), expected);
    assert_eq!(
        change("vlan=5").expect("valid").vlan,
        Some(Vlans::Access(5))
    );
    assert_eq!(change("trunk=off").expect("valid").vlan, Some(Vlans::Plain));
    for bad in ["pin=off,pin=on", "vlan=5,trunk=6", "native=3", "vlan=0"] {
        change(bad).expect_err(bad);
    }
    let nothing: PortSetSpec = keyval::from_str("port=p").expect("valid");
    let error = nothing.change(None).expect_err("nothing to do").to_string();
    assert!(error.contains("`rate-in`"), "{error}");
    let pinned: PortSetSpec = keyval::from_str("port=p,pin=on").expect("valid");
    assert!(pinned.change(None).is_err(), "an uplink has no address");
}

#[test]
fn a_vhost_user_back_end_needs_a_path() {
    let config = |text: &str| {
        net(&format!("net,backend=vhost-user,{text}"))
            .backend_keys()
            .vhost_user_config()
    };
    let config_of = config("path=/run/ovs,server=on,offloads=off").expect("valid");
    assert_eq!(config_of.path, PathBuf::from("/run/ovs"));
    assert!(config_of.server && !config_of.offloads);
    let reconnect = config("path=/a,reconnect=5").expect("valid").reconnect;
    assert_eq!(reconnect, Duration::from_secs(5));
    for bad in [
        "server=on",
        "path=/a,reconnect=0",
        "path=/a,server=on,reconnect=1",
    ] {
        config(bad).expect_err(bad);
    }
    let foreign = net("net,backend=vhost-user,host=a")
        .backend_keys()
        .check(None);
    assert!(foreign.is_err());
}
