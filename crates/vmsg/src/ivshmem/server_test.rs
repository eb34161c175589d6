// SPDX-License-Identifier: Apache-2.0 OR MIT

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ServerArgs,
}

fn parse(line: &str) -> Result<Options, String> {
    let words = std::iter::once("server").chain(line.split(' '));
    let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
    options(&line.args).map_err(|Usage(error)| error)
}

#[test]
fn a_socket_says_what_its_clients_are() {
    let options = parse(
        "--socket a.sock --socket b.sock,id=7,vectors=3,mode=0660 --size 1M --vectors 2 --shm NAME",
    )
    .unwrap();
    let second = Port {
        mode: 0o660,
        ..Port::new("b.sock", 3).with_id(PeerId(7))
    };
    assert_eq!(options.ports, [Port::new("a.sock", 2), second]);
    assert_eq!(options.size, 1 << 20);
    assert_eq!(options.source, Source::Shm("NAME".to_owned()));
    assert_eq!(options.linger, None);
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    for (line, words) in [
        ("--socket a --size 3M", "power of two"),
        ("--socket a --size 2K", "power of two"),
        ("--socket a --vectors 0", "0 vectors"),
        ("--socket a,vectors=257", "257 vectors"),
        ("--socket a --socket a", "given twice"),
        ("--socket a,id=1 --socket b,id=1", "id 1 is given twice"),
        ("--socket a,id=70000", "--socket a,id=70000"),
        ("--socket a,colour=red", "colour"),
        ("--socket a --shm a/b", "no name of shared memory"),
        ("--socket a --shm a --file b", "cannot be used with"),
        ("--size 1M", "--socket"),
    ] {
        let error = parse(line).unwrap_err();
        assert!(error.contains(words), "{line}: {error}");
    }
}
