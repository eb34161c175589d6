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
    assert_eq!((spec.config, spec.bus), (Some(false), 1));
    assert_eq!(spec.mode.map(|m| m.0), Some(0o660));
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
