// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

fn text(text: &str) -> Typed {
    Typed::Text(text.as_bytes().to_vec())
}

#[test]
fn commands_stand_behind_the_escape_key() {
    let mut keys = Keys::default();
    assert_eq!(
        keys.read(b"ls\r\x1dnpwd\r\x1d3\x1dl\x1d"),
        [
            text("ls\r"),
            Typed::Next,
            text("pwd\r"),
            Typed::Choose(3),
            Typed::List
        ]
    );
    // Over two reads.
    assert_eq!(keys.read(b"q"), [Typed::Detach]);
    assert_eq!(keys.read(b"q"), [text("q")]);
    assert_eq!(keys.read(b"a\x1d\x1db"), [text("a\x1db")]);
    assert_eq!(
        keys.read(b"\x1dx\x1dd\x1dp"),
        [Typed::Help, Typed::Detach, Typed::Previous]
    );
}

#[test]
fn the_escape_key_can_be_chosen() {
    for (word, key) in [
        ("^]", "\x1d"),
        ("^a", "\x01"),
        ("^A", "\x01"),
        ("~", "~"),
        ("^_", "\x1f"),
    ] {
        let escape: Escape = word.parse().expect(word);
        let typed = Keys::new(escape).read(format!("{key}d").as_bytes());
        assert_eq!(typed, [Typed::Detach], "{word}");
        assert_eq!(
            escape.to_string().to_ascii_lowercase(),
            word.to_ascii_lowercase()
        );
    }
    let none: Escape = "none".parse().expect("a word");
    assert_eq!(Keys::new(none).read(b"\x1dd"), [text("\x1dd")]);
    for word in ["", "^1", "ab", "^]]", "\u{e4}"] {
        assert_eq!(word.parse::<Escape>(), Err(BadEscape), "{word}");
    }
}

#[test]
fn old_questions_are_not_asked_again() {
    let mut questions = Questions::default();
    assert_eq!(questions.strip(b"~ # \x1b[6n"), b"~ # ");
    assert_eq!(
        questions.strip(b"\x1b[1;31mred\x1b[0m\x1b[c\x1bZ\x1b[>0c."),
        b"\x1b[1;31mred\x1b[0m."
    );
    // In pieces.
    assert_eq!(questions.strip(b"a\x1b"), b"a");
    assert_eq!(questions.strip(b"[6"), b"");
    assert_eq!(questions.strip(b"nb"), b"b");
    assert_eq!(questions.strip(b"\x1b[2"), b"");
    assert_eq!(questions.strip(b"Jc"), b"\x1b[2Jc");
    assert_eq!(questions.strip(b"\x1b\x1b[6n!"), b"\x1b!");
    assert_eq!(questions.strip(b"\x1b["), b"");
    assert_eq!(questions.rest(), b"\x1b[");
    let long = [b"\x1b[".as_slice(), &[b'0'; 100], b"n"].concat();
    assert_eq!(questions.strip(&long), long);
}
