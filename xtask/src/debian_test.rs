// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{Debian, kernel_packages};

#[test]
fn only_debian_itself_is_debian() {
    let debian =
        "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nVERSION_CODENAME=trixie\nID=debian\n";
    assert_eq!(Debian::from_os_release(debian).unwrap().codename, "trixie");
    assert!(
        Debian::from_os_release("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n").is_none()
    );
    assert!(Debian::from_os_release("").is_none());
}

#[test]
fn a_metapackage_leads_to_the_concrete_kernel() {
    assert_eq!(
        kernel_packages(" linux-image-6.1.0-9-cloud-amd64 (= 6.1.192-2)"),
        ["linux-image-6.1.0-9-cloud-amd64"]
    );
    assert_eq!(
        kernel_packages(" kmod, linux-base (>= 4.3~), linux-modules-6.18-amd64 | x"),
        ["linux-modules-6.18-amd64"]
    );
}
