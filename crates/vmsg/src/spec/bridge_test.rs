// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;
use crate::spec::DeviceSpec;

fn spec(text: &str) -> VhostUserSpec {
    match vmsg_bus::keyval::from_str(text).expect("a valid specification") {
        DeviceSpec::VhostUser(spec) => *spec,
        _ => panic!("not a daemon's device"),
    }
}

#[test]
fn types_have_names_and_numbers() {
    for (text, id) in [
        ("fs", 26),
        ("26", 26),
        ("blk", 2),
        ("snd", 25),
        ("sound", 25),
        ("99", 99),
    ] {
        let spec = spec(&format!("vhost-user,socket=s,type={text}"));
        assert_eq!(spec.settings("x").expect(text).device_id, id);
    }
}

#[test]
fn tag_address_and_mac_become_the_configuration() {
    let config = |text: &str| {
        let settings = spec(text).settings("net0").expect(text);
        settings.config.expect("one")
    };
    let fs = config("vhost-user,socket=s,type=fs,tag=share");
    assert_eq!((&fs[..6], fs.len()), (&b"share\0"[..], 40));
    assert_eq!(fs[36..], [1, 0, 0, 0]);
    let vsock = config("vhost-user,socket=s,type=vsock,cid=52");
    assert_eq!(vsock, [52, 0, 0, 0, 0, 0, 0, 0]);
    let net = config("vhost-user,socket=s,type=net,mac=52:54:00:12:34:56");
    assert_eq!(net[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(
        config("vhost-user,socket=s,type=gpio,config=08000000aAff0000"),
        [8, 0, 0, 0, 0xaa, 0xff, 0, 0]
    );
}

#[test]
fn a_table_says_device_type() {
    let table: toml::Table = toml::from_str("socket = 's'\ndevice-type = 26\ntag = 'x'").unwrap();
    let spec: DeviceSpec = crate::spec::typed("vhost-user", table).expect("valid");
    let text = vmsg_bus::keyval::to_string(&spec).expect("text");
    assert_eq!(text, "vhost-user,socket=s,type=26,tag=x");
}

#[test]
fn what_cannot_be_is_named() {
    for (text, words) in [
        ("vhost-user,socket=s", "type= is missing"),
        ("vhost-user,type=fs", "socket= is missing"),
        (
            "vhost-user,type=net,socket=s,server=on,reconnect=1",
            "reconnect= cannot be with server=on",
        ),
        ("vhost-user,socket=s,type=fish", "`blk`"),
        ("vhost-user,socket=s,type=blk,tag=x", "type=fs"),
        ("vhost-user,socket=s,type=fs,tag=x,config=00", "leave one"),
        (
            "vhost-user,socket=s,type=blk,queue-size=100",
            "power of two",
        ),
        ("vhost-user,socket=s,type=blk,queues=1000", "256"),
        ("vhost-user,socket=s,type=blk,config=0", "hexadecimal"),
        ("vhost-user,socket=s,type=vsock,cid=2", "cid=2"),
        ("vhost-user,socket=s,type=input", "type=input"),
    ] {
        let Usage(error) = spec(text).check().expect_err(text);
        assert!(error.contains(words), "{text}: {error}");
    }
}
