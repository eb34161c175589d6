// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::path::Path;

use proptest::prelude::*;

use super::{NbdAddress, NbdUri, NbdUriError};

fn parse(text: &str) -> Result<NbdUri, NbdUriError> {
    text.parse()
}

fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
    NbdUri {
        address: NbdAddress::Tcp {
            host: host.to_owned(),
            port,
        },
        export: export.to_owned(),
    }
}

fn unix(path: &str, export: &str) -> NbdUri {
    NbdUri {
        address: NbdAddress::Unix(Path::new(path).to_owned()),
        export: export.to_owned(),
    }
}

#[test]
fn the_examples_of_the_format_are_understood() {
    for (text, meant) in [
        (
            "nbd://example.com:10809/export",
            tcp("example.com", 10809, "export"),
        ),
        ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
        ("nbd://example.com/", tcp("example.com", 10809, "")),
        ("nbd://example.com", tcp("example.com", 10809, "")),
        (
            "nbd://example.com//disk",
            tcp("example.com", 10809, "/disk"),
        ),
        (
            "nbd://example.com/hello%20world",
            tcp("example.com", 10809, "hello world"),
        ),
        ("NBD://[::1]:7/x", tcp("::1", 7, "x")),
        ("nbd://[fe80::1%25eth0]", tcp("fe80::1%eth0", 10809, "")),
        (
            "nbd+unix:///export?socket=nbd.sock",
            unix("nbd.sock", "export"),
        ),
        ("nbd+unix://?socket=/a%2cb", unix("/a,b", "")),
        ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract", "")),
    ] {
        assert_eq!(parse(text), Ok(meant), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let long = format!("nbd://h/{}", "x".repeat(4097));
    let long_socket = format!("nbd+unix:///?socket={}", "x".repeat(108));
    for (text, wrong) in [
        ("/dev/sda", NbdUriError::Scheme),
        ("http://h/", NbdUriError::Scheme),
        ("nbds://h/", NbdUriError::Tls),
        ("nbds+unix:///?socket=x", NbdUriError::Tls),
        ("nbd://h/?tls-type=psk", NbdUriError::Tls),
        ("nbd://alice@h/", NbdUriError::Tls),
        ("nbd:///export", NbdUriError::NoHost),
        ("nbd://h:0/", NbdUriError::Port("0".to_owned())),
        ("nbd://h:+1/", NbdUriError::Port("+1".to_owned())),
        ("nbd://h:65536/", NbdUriError::Port("65536".to_owned())),
        ("nbd://[::1/", NbdUriError::Host("[::1".to_owned())),
        ("nbd://[x]/", NbdUriError::Host("[x]".to_owned())),
        ("nbd://[::1]x/", NbdUriError::Host("[::1]x".to_owned())),
        ("nbd://a b/", NbdUriError::Host("a b".to_owned())),
        ("nbd+unix://h/?socket=x", NbdUriError::HostOfSocket),
        ("nbd+unix:///x", NbdUriError::NoSocket),
        ("nbd+unix:///?socket=", NbdUriError::Socket),
        ("nbd+unix:///?socket=a%00b", NbdUriError::Socket),
        (&long_socket, NbdUriError::Socket),
        (
            "nbd://h/?socket=x",
            NbdUriError::Parameter("socket".to_owned()),
        ),
        (
            "nbd+unix:///?socket=x&socket=y",
            NbdUriError::Parameter("socket".to_owned()),
        ),
        (
            "nbd+unix:///?socket=x&colour=red",
            NbdUriError::Parameter("colour".to_owned()),
        ),
        ("nbd://h/%4", NbdUriError::Encoding("%4".to_owned())),
        ("nbd://h/%+f", NbdUriError::Encoding("%+f".to_owned())),
        ("nbd://h/%ff", NbdUriError::Encoding("%ff".to_owned())),
        ("nbd://h/%00", NbdUriError::Export),
        (&long, NbdUriError::Export),
        ("nbd://h/x#y", NbdUriError::Fragment),
    ] {
        assert_eq!(parse(text), Err(wrong), "{text}");
    }
}

#[test]
fn a_path_is_not_meant_as_a_uri() {
    for text in ["nbd://", "nbds://h", "nbd+unix:///x", "NBD+x://"] {
        assert!(NbdUri::is_meant(text), "{text}");
    }
    for text in ["", "nbd", "nbd:/x", "/nbd://x", "./nbd://x", "http://nbd"] {
        assert!(!NbdUri::is_meant(text), "{text}");
    }
}

proptest! {
    #[test]
    fn what_is_shown_is_read_again(export in "[^\0]{0,40}", path in "[^\0]{1,25}", port in 1u16.., v6: [u16; 8]) {
        let v6 = std::net::Ipv6Addr::from(v6).to_string();
        for uri in [tcp("host.example", port, &export), tcp(&v6, port, &export), unix(&path, &export)] {
            prop_assert_eq!(parse(&uri.to_string()), Ok(uri));
        }
    }

    #[test]
    fn any_text_has_an_answer(text in "(nbd|nbds|nbd\\+unix)?(://)?\\PC*") {
        if let Ok(uri) = parse(&text) {
            prop_assert_eq!(parse(&uri.to_string()), Ok(uri));
        }
    }
}
