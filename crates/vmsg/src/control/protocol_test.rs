// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn parse(line: &str) -> Result<Request, String> {
    serde_json::from_str(line).map_err(|error| error.to_string())
}

#[test]
fn requests_read_as_they_are_written() {
    assert_eq!(parse(r#"{"command":"list"}"#), Ok(Request::List {}));
    let link = Request::Link {
        device: "net0".into(),
        bus: None,
        state: LinkState::Down,
    };
    let text = r#"{"command":"link","device":"net0","state":"down"}"#;
    assert_eq!(parse(text).as_ref(), Ok(&link));
    assert_eq!(serde_json::to_string(&link).expect("JSON"), text);
}

#[test]
fn what_is_not_known_is_refused_and_what_is_known_is_named() {
    for (line, names) in [
        (r#"{"command":"lnik"}"#, &["list", "link", "announce"][..]),
        (r#"{"command":"list","all":true}"#, &["all"]),
        (
            r#"{"command":"link","device":"net0","status":"up"}"#,
            &["status", "device", "bus", "state"],
        ),
        (
            r#"{"command":"link","device":"net0","state":"left"}"#,
            &["up", "down"],
        ),
        (r#"{"command":"announce"}"#, &["device"]),
        (r#"{"device":"net0"}"#, &["command"]),
        ("[1]", &[]),
        ("", &[]),
        (r#"{"command":"list"} {"command":"list"}"#, &[]),
    ] {
        let error = parse(line).expect_err(line);
        for name in names {
            assert!(error.contains(name), "{line}: {error}");
        }
    }
}

#[test]
fn an_answer_is_one_line() {
    let error = Response::error(FailureKind::NotFound, "no\nline");
    let line = error.line();
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert_eq!(
        serde_json::from_slice::<Response>(&line).expect("JSON"),
        error
    );
    assert_eq!(Response::Done {}.line(), b"{\"done\":{}}\n");
}
