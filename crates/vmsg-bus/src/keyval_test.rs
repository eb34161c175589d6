// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Debug, Deserialize, PartialEq, Default)]
#[serde(rename_all = "kebab-case", default)]
struct Net {
    id: Option<String>,
    backend: Backend,
    host_fwd: Vec<String>,
    mtu: u16,
    size: u64,
    shift: i8,
    on_link: bool,
    path: PathBuf,
}

#[derive(Debug, Deserialize, PartialEq, Default)]
#[serde(rename_all = "kebab-case")]
enum Backend {
    #[default]
    User,
    Tap,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Device {
    Net(Net),
    Rng,
    #[serde(rename_all = "kebab-case")]
    Blk {
        path: PathBuf,
        read_only: Option<bool>,
    },
}

#[derive(Debug, Deserialize, PartialEq)]
struct Port(u16);

#[derive(Debug, Deserialize, PartialEq)]
struct Needs {
    port: Port,
}

fn text<T: DeserializeOwned + fmt::Debug>(spec: &str) -> String {
    from_str::<T>(spec).unwrap_err().to_string()
}

#[test]
fn the_first_item_names_the_variant_and_the_rest_fills_it() {
    let device: Device =
        from_str("net,id=net0,backend=tap,host-fwd=tcp::1-:2,host-fwd=udp::3-:4,mtu=1500,on-link")
            .unwrap();
    assert_eq!(
        device,
        Device::Net(Net {
            id: Some("net0".into()),
            backend: Backend::Tap,
            host_fwd: vec!["tcp::1-:2".into(), "udp::3-:4".into()],
            mtu: 1500,
            on_link: true,
            ..Net::default()
        })
    );
    assert_eq!(from_str::<Device>("rng").unwrap(), Device::Rng);
    assert_eq!(
        from_str::<Device>("blk,path=/a=b,read-only=off").unwrap(),
        Device::Blk {
            path: "/a=b".into(),
            read_only: Some(false)
        }
    );
}

#[test]
fn the_first_item_without_key_is_the_first_field_of_a_struct() {
    assert_eq!(
        from_str::<Net>("net7,mtu=9").unwrap().id.as_deref(),
        Some("net7")
    );
    assert!(text::<Net>("net7,id=net8").contains("`id` is given more than once"));
}

#[test]
fn a_doubled_comma_is_a_comma() {
    let net: Net = from_str("path=a,,b,,,id=x").unwrap();
    assert_eq!(net.path, PathBuf::from("a,b,"));
    assert_eq!(net.id.as_deref(), Some("x"));
    assert_eq!(
        from_str::<Net>(&format!("path={}", escape("a,b,,")))
            .unwrap()
            .path,
        PathBuf::from("a,b,,")
    );
}

#[test]
fn numbers_take_suffixes_hex_and_signs() {
    let net: Net = from_str("size=2G,mtu=0x5dc,shift=-3").unwrap();
    assert_eq!((net.size, net.mtu, net.shift), (2 << 30, 1500, -3));
    assert_eq!(from_str::<u32>("64K").unwrap(), 65536);
}

#[test]
fn bad_values_say_where_and_what_was_expected() {
    assert_eq!(
        text::<Net>("size=lots"),
        "`size=lots`: expected a number such as 264, 0x40, 64K, 2M or 1G, not `lots`"
    );
    assert_eq!(
        text::<Net>("mtu=65536"),
        "`mtu=65536`: 65536 is too large, the most is 65535"
    );
    assert_eq!(
        text::<Net>("shift=-200"),
        "`shift=-200`: -200 is out of range, -128 to 127"
    );
    assert_eq!(
        text::<Net>("on-link=maybe"),
        "`on-link=maybe`: expected `on` or `off`, not `maybe`"
    );
    assert_eq!(
        text::<Net>("backend=tup"),
        "`backend=tup`: unknown value `tup`, known: `user`, `tap`; did you mean `tap`?"
    );
    assert_eq!(text::<Net>("id,size"), "`size` needs a value: `size=…`");
    assert_eq!(text::<Net>("mtu=1,mtu=2"), "`mtu` is given more than once");
    assert_eq!(text::<Needs>(""), "`port=…` is missing");
    assert!(text::<Net>("size=20000000000000000000").contains("expected a number"));
    assert!(text::<Net>("size=16777216T").contains("expected a number"));
    assert!(text::<Net>("size=0x+1").contains("expected a number"));
    assert!(text::<Net>("size=é").contains("expected a number"));
}

#[test]
fn unknown_keys_and_names_are_refused_with_the_known_ones() {
    assert_eq!(
        text::<Device>("blk,pth=x"),
        "unknown key `pth`, known: `path`, `read-only`; did you mean `path`?"
    );
    assert_eq!(
        text::<Device>("sound"),
        "unknown name `sound`, known: `net`, `rng`, `blk`"
    );
    assert_eq!(
        text::<Device>("rng,id=1"),
        "unknown key `id`: none is expected here"
    );
    assert_eq!(
        text::<Device>("id=1"),
        "the first item must be one of `net`, `rng`, `blk`"
    );
    assert_eq!(
        text::<Device>(""),
        "the first item must be one of `net`, `rng`, `blk`"
    );
}

#[test]
fn broken_lines_are_refused() {
    assert!(text::<Net>("mtu=1,").contains("empty item"));
    assert!(text::<Net>("=1").contains("no key"));
    assert!(text::<u32>("1,2").contains("not expected"));
}

#[test]
fn newtypes_and_maps_work() {
    assert_eq!(
        from_str::<Needs>("port=80").unwrap(),
        Needs { port: Port(80) }
    );
    assert_eq!(from_str::<Needs>("80").unwrap(), Needs { port: Port(80) });
    let map: BTreeMap<String, String> = from_str("x,a=b").unwrap();
    assert_eq!(
        map.into_iter().collect::<Vec<_>>(),
        [("a".into(), "b".into()), ("type".into(), "x".into())]
    );
}

#[test]
fn internally_tagged_enums_take_the_name_as_type() {
    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(tag = "type", rename_all = "lowercase")]
    enum Tagged {
        Disk { size: u32, ro: bool },
    }
    assert_eq!(
        from_str::<Tagged>("disk,size=5,ro").unwrap(),
        Tagged::Disk { size: 5, ro: true }
    );
}

#[test]
fn any_line_gives_a_value_or_an_error() {
    proptest::proptest!(|(line in "[a-z,=0-9KMG\\-\u{e9}]{0,40}")| {
        let _ = from_str::<Net>(&line);
        let _ = from_str::<Device>(&line);
        let _ = from_str::<BTreeMap<String, Vec<String>>>(&line);
    });
}
