// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn parse(text: &str) -> Result<Proposal, Malformed> {
    Proposal::parse(format!("{text}\0").as_bytes())
}

#[test]
fn only_what_was_proposed_is_answered() {
    let mut out = Vec::new();
    let options = Options::default();
    for (proposal, answer) in [
        ("{}", "{\"capabilities\":{}}"),
        (
            "{\"capabilities\":{\"write_multiple\":false,\"twin_socket\":{\"supported\":true}}}",
            "{\"capabilities\":{}}",
        ),
        (
            "{\"capabilities\":{\"write_multiple\":true}}",
            "{\"capabilities\":{\"write_multiple\":true}}",
        ),
        (
            "{\"capabilities\":{\"max_dma_maps\":7,\"max_msg_fds\":1}}",
            "{\"capabilities\":{\"max_msg_fds\":16,\"max_dma_maps\":7}}",
        ),
    ] {
        out.clear();
        parse(proposal)
            .expect("understood")
            .answer(&options, &mut out);
        assert_eq!(out, format!("{answer}\0").as_bytes());
    }
    out.clear();
    Proposal::parse(b"")
        .expect("nothing")
        .answer(&options, &mut out);
    assert!(out.is_empty());
}

#[test]
fn limits_are_taken_from_the_object_they_belong_to() {
    let text = "{\"max_msg_fds\":3,\"x\":{\"max_msg_fds\":4},\"capabilities\":{\"y\":{\"max_msg_fds\":5},\"max_msg_fds\":6,\"max_data_xfer_size\":99999999999}}";
    let negotiated = parse(text).expect("understood").negotiated(1);
    let expected = Negotiated {
        minor: 1,
        max_msg_fds: 6,
        max_data_xfer_size: u32::MAX,
    };
    assert_eq!(negotiated, expected);
}

#[test]
fn the_nul_is_where_it_belongs() {
    for data in [&b"{}"[..], b"{}\0\0", b"\0{}\0", b"{\0}\0"] {
        assert_eq!(Proposal::parse(data), Err(Malformed::Nul));
    }
}

#[test]
fn what_is_no_json_or_of_another_kind_is_an_error() {
    let deep = "[".repeat(3000);
    for text in [
        " ",
        "{",
        "{}{}",
        "[]",
        "{\"capabilities\":1}",
        "{\"capabilities\":[]}",
        "{\"capabilities\":{\"max_msg_fds\":-1}}",
        "{\"capabilities\":{\"max_msg_fds\":\"1\"}}",
        "{\"capabilities\":{\"write_multiple\":1}}",
        "{\"x\":\"\u{80}",
        deep.as_str(),
    ] {
        assert!(matches!(parse(text), Err(Malformed::Json(..))), "{text}");
    }
}
