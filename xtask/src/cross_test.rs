// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::Rust;

#[test]
fn the_toolchain_has_a_library_for_its_own_host_and_none_for_a_machine_that_does_not_exist() {
    let rust = Rust::here().unwrap();
    assert!(Rust::has_library(&rust.sysroot, &rust.host), "{rust:?}");
    assert!(!Rust::has_library(&rust.sysroot, "pdp11-unknown-linux-gnu"));
    assert!(
        rust.release.split('.').count() >= 3,
        "{} is no version",
        rust.release
    );
}
