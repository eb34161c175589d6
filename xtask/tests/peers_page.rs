// SPDX-License-Identifier: Apache-2.0 OR MIT
//! docs/peers.md and the tests it names.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the tests of a short name are; those of `machine` and `driver` are in several files.
fn source(name: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(match name {
            "peers" => "crates/vmsg/tests/peers.rs".to_owned(),
            "ivshmem" => "crates/vmsg/tests/peers/ivshmem.rs".to_owned(),
            "golden" => "crates/vmsg/tests/ivshmem_golden.rs".to_owned(),
            "devices" => "crates/vmsg/tests/peers/devices.rs".to_owned(),
            "session" => "crates/vmsg-proxy/tests/peers.rs".to_owned(),
            "front" => "crates/vmsg-proxy/tests/vhost_user.rs".to_owned(),
            "qemu" => "crates/vmsg-bus/tests/linux_user_qemu.rs".to_owned(),
            "host" => "crates/vmsg-device/src/host/core_test.rs".to_owned(),
            "removal" => "crates/vmsg-device/src/host/removal_test.rs".to_owned(),
            "machine" => format!("crates/virtio-msg/tests/device/{file}.rs"),
            "driver" => format!("crates/vmsg-driver/tests/{file}.rs"),
            _ => panic!("the page explains no name `{name}`"),
        })
}

#[test]
fn every_test_that_the_page_on_peers_names_exists() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/peers.md");
    let page = fs::read_to_string(page).expect("the page");
    let mut names = 0;
    for path in page.split('`').skip(1).step_by(2) {
        let Some((name, rest)) = path.split_once("::") else {
            continue;
        };
        let (file, test) = rest.split_once("::").unwrap_or(("", rest));
        let source = source(name, file);
        let text = fs::read_to_string(&source).unwrap_or_else(|e| panic!("{path}: {e}"));
        // A function, or a line of the table that makes such functions.
        let found = text.contains(&format!("fn {test}()")) || text.contains(&format!(" {test}: "));
        assert!(found, "no test {path} in {}", source.display());
        names += 1;
    }
    assert!(names > 60, "{names} tests on the page");
}
