// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::super::{from_str, take};
use super::*;

#[derive(Clone, Debug, PartialEq, Default, Deserialize, Serialize)]
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

#[derive(Clone, Copy, Debug, PartialEq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Backend {
    #[default]
    User,
    Tap,
}

#[derive(Debug, PartialEq, Deserialize, Serialize)]
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

proptest! {
    #[test]
    fn what_is_written_reads_the_same(
        id in prop::option::of(".*"),
        tap: bool,
        host_fwd in prop::collection::vec("[a,=:]*|.*", 0..4),
        mtu: u16,
        size: u64,
        shift: i8,
        on_link: bool,
        path in "[,/=a-z]*",
    ) {
        let net = Net {
            id,
            backend: if tap { Backend::Tap } else { Backend::User },
            host_fwd,
            mtu,
            size,
            shift,
            on_link,
            path: path.into(),
        };
        let text = to_string(&net).unwrap();
        prop_assert_eq!(&from_str::<Net>(&text).unwrap(), &net);
        let device = Device::Net(net);
        let text = to_string(&device).unwrap();
        prop_assert_eq!(from_str::<Device>(&text).unwrap(), device);
        // A key that is taken away leaves the rest as it is.
        let (taken, rest) = take(&format!("{text},name=n,,1"), "name").unwrap();
        prop_assert_eq!((taken.as_deref(), rest), (Some("n,1"), text));
    }
}

#[test]
fn variants_with_and_without_keys_are_written() {
    assert_eq!(to_string(&Device::Rng).unwrap(), "rng");
    let disk = Device::Blk {
        path: "/a,b".into(),
        read_only: None,
    };
    assert_eq!(to_string(&disk).unwrap(), "blk,path=/a,,b");
    assert_eq!(from_str::<Device>("blk,path=/a,,b").unwrap(), disk);
    assert_eq!(to_string(&Backend::Tap).unwrap(), "tap");
    assert_eq!(to_string("alone").unwrap(), "alone");
    assert_eq!(to_string(&None::<u8>).unwrap(), "");
}

#[test]
fn what_one_line_cannot_have_is_refused() {
    #[derive(Serialize)]
    struct Outer {
        inner: Net,
    }
    let inner = Net::default();
    to_string(&Outer { inner }).unwrap_err();
    to_string(&[[1, 2], [3, 4]]).unwrap_err();
    to_string("a=b").unwrap_err();
    to_string("").unwrap_err();
    to_string(&BTreeMap::from([("a=b", 1)])).unwrap_err();
    to_string(&BTreeMap::from([(",a", 1)])).unwrap_err();
    assert_eq!(to_string(&BTreeMap::from([("a", 1)])).unwrap(), "a=1");
}

#[test]
fn a_key_is_taken_once() {
    assert_eq!(take("unix,path=x", "id").unwrap().0, None);
    take("unix,id=a,id=b", "id").unwrap_err();
    take("unix,id", "id").unwrap_err();
    let (id, rest) = take("id=a,,b,unix,path=c,,d,flag", "id").unwrap();
    assert_eq!(
        (id.as_deref(), rest.as_str()),
        (Some("a,b"), "unix,path=c,,d,flag")
    );
}
