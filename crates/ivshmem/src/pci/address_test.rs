// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn addresses_are_read_and_written_as_sysfs_has_them() {
    for (text, full) in [
        ("0000:00:04.0", "0000:00:04.0"),
        ("00:1f.7", "0000:00:1f.7"),
        ("10000:e1:00.0", "10000:e1:00.0"),
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), full);
    }
}

#[test]
fn what_is_no_address_is_refused_with_an_example() {
    for text in [
        "",
        "4",
        "00:04",
        "00:20.0",
        "00:04.8",
        "0:04.0",
        "000:00:04.0",
        "00:04.0 ",
        "../../etc/passwd",
        "00:+4.0",
        "zz:04.0",
        "123456789:00:04.0",
    ] {
        let error = text.parse::<Address>().unwrap_err();
        assert!(error.to_string().contains("0000:00:04.0"), "{error}");
    }
}
