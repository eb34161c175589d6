// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn skip(text: &str) -> Result<(), JsonError> {
    let mut reader = Reader::new(text);
    reader.skip()?;
    reader.end()
}

#[test]
fn what_is_well_formed_is_skipped() {
    for text in [
        "{}",
        " { \"a\" : [ ] , \"b\":[1,-2.5e+3,\"x\\\"y\",true,false,null,{\"c\":{}}] } ",
        "\"\\\\\"",
        "\"ü\\ü\"",
        "0",
        "[[[[]]]]",
    ] {
        assert_eq!(skip(text), Ok(()), "{text}");
    }
}

#[test]
fn what_is_not_well_formed_is_an_error() {
    for text in [
        "",
        " ",
        "{",
        "}",
        "[",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "[1,]",
        "[1 2]",
        "\"",
        "\"\\",
        "\"\\\"",
        "\"\n\"",
        "tru",
        "nul",
        "-",
        "1.",
        "1e",
        "1 1",
        "{}{}",
        "+1",
        ".5",
    ] {
        assert!(matches!(skip(text), Err(JsonError::Syntax(_))), "{text}");
    }
}

#[test]
fn nesting_has_a_bound() {
    let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert_eq!(skip(&nested(16)), Ok(()));
    assert_eq!(skip(&nested(17)), Err(JsonError::Depth));
    assert_eq!(skip(&"{\"a\":".repeat(100_000)), Err(JsonError::Depth));
    let flat = format!("[{}1]", "[],".repeat(10_000));
    assert_eq!(skip(&flat), Ok(()), "only depth counts");
}

#[test]
fn values_of_another_kind_are_errors() {
    for text in [
        "-1",
        "1.5",
        "1e3",
        "true",
        "\"1\"",
        "18446744073709551616",
        "{}",
    ] {
        let number = Reader::new(text).unsigned();
        assert!(
            matches!(number, Err(JsonError::Kind(0))),
            "{text}: {number:?}"
        );
    }
    assert_eq!(
        Reader::new(" 18446744073709551615").unsigned(),
        Ok(u64::MAX)
    );
    assert_eq!(Reader::new("1").boolean(), Err(JsonError::Kind(0)));
    assert_eq!(Reader::new("false").boolean(), Ok(false));
    assert_eq!(
        Reader::new("[]").object(|_, _| Ok(())),
        Err(JsonError::Kind(0))
    );
}
