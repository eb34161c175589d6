// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that say what they must not, and errors of their media.

use std::io::Write as _;

use vmsg_block::{Failure, NbdDisk, Request};

use super::held::{Memory, pattern, read, run, write};
use super::place::{LONG, SIZE, counters, place};
use super::server::{Asked, FLUSH, TRIM, ZEROES, ask, chunk, greet, simple};

/// What a server answers to the first read, and whether it keeps to the protocol. On later connections it answers well.
fn answers(
    structured: bool,
    bytes: impl Fn(Asked) -> Vec<u8> + Send + 'static,
) -> (NbdDisk, Vec<u8>) {
    let place = place(move |number, mut socket| {
        greet(&mut socket, SIZE, FLUSH | TRIM | ZEROES, structured).unwrap();
        let mut first = true;
        while let Ok(asked) = ask(&mut socket) {
            if number == 0 && first {
                first = false;
                if socket.write_all(&bytes(asked)).is_err() {
                    return;
                }
                continue;
            }
            let mut payload = asked.offset.to_be_bytes().to_vec();
            payload.extend_from_slice(&pattern(asked.offset, asked.len as usize));
            let reply = match (asked.command, structured) {
                (0, true) => chunk(asked.cookie, true, 1, &payload),
                (0, false) => [
                    simple(asked.cookie, 0),
                    pattern(asked.offset, asked.len as usize),
                ]
                .concat(),
                _ => simple(asked.cookie, 0),
            };
            if socket.write_all(&reply).is_err() {
                return;
            }
        }
    });
    let mut disk = place.open(LONG).unwrap();
    let memory = Memory::new(64 << 10);
    let got = read(&mut disk, &memory, 8192, 8192).unwrap();
    (disk, got)
}

#[test]
fn nonsense_costs_the_connection_and_the_request_goes_to_the_next() {
    let data = |cookie, last, offset: u64, len: usize| {
        chunk(
            cookie,
            last,
            1,
            &[&offset.to_be_bytes()[..], &vec![1; len]].concat(),
        )
    };
    let hole = |cookie, last, offset: u64, len: u32| {
        chunk(
            cookie,
            last,
            2,
            &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat(),
        )
    };
    type Reply = Box<dyn Fn(Asked) -> Vec<u8> + Send>;
    let replies: Vec<(bool, Reply)> = vec![
        (false, Box::new(|_| vec![0x55; 100_000])),
        (false, Box::new(|asked| simple(asked.cookie ^ 1, 0))),
        (false, Box::new(|asked| simple(asked.cookie | 1 << 63, 0))),
        (
            false,
            Box::new(move |asked| data(asked.cookie, true, asked.offset, 8192)),
        ),
        (
            true,
            Box::new(|asked| [simple(asked.cookie, 0), vec![0; 8192]].concat()),
        ),
        (true, Box::new(|asked| chunk(asked.cookie, true, 0, &[]))),
        (true, Box::new(|asked| chunk(asked.cookie, false, 0, &[]))),
        (
            true,
            Box::new(|asked| chunk(asked.cookie, true, 5, &[0; 12])),
        ),
        (
            true,
            Box::new(|asked| chunk(asked.cookie, true, 1, &[0; 8])),
        ),
        (
            true,
            Box::new(move |asked| data(asked.cookie, true, asked.offset - 1, 100)),
        ),
        (
            true,
            Box::new(move |asked| data(asked.cookie, true, asked.offset + 8000, 200)),
        ),
        (
            true,
            Box::new(move |asked| data(asked.cookie, true, u64::MAX, 200)),
        ),
        (
            true,
            Box::new(move |asked| data(asked.cookie, true, asked.offset, 100)),
        ),
        (
            true,
            Box::new(move |asked| {
                [
                    data(asked.cookie, false, asked.offset, 8000),
                    data(asked.cookie, true, asked.offset, 8000),
                ]
                .concat()
            }),
        ),
        (
            true,
            Box::new(move |asked| hole(asked.cookie, true, asked.offset, 0)),
        ),
        (
            true,
            Box::new(move |asked| hole(asked.cookie, true, asked.offset, u32::MAX)),
        ),
        (
            true,
            Box::new(|asked| chunk(asked.cookie, true, 0x8001, &[0; 6])),
        ),
        (
            true,
            Box::new(|asked| chunk(asked.cookie, true, 0x8001, &[0, 0, 0, 5, 255, 255])),
        ),
        (
            true,
            Box::new(|asked| chunk(asked.cookie, true, 0x8001, &[5; 100_000])),
        ),
    ];
    for (number, (structured, reply)) in replies.into_iter().enumerate() {
        let (disk, got) = answers(structured, reply);
        assert!(got == pattern(8192, 8192), "reply {number}");
        let counters = counters(&disk);
        assert_eq!(
            (counters["nbd_violations"], counters["nbd_connections"]),
            (1, 2),
            "reply {number}"
        );
    }
}

#[test]
fn errors_without_end_are_one_error() {
    let place = place(|_, mut socket| {
        greet(&mut socket, SIZE, FLUSH, true).unwrap();
        let asked = ask(&mut socket).unwrap();
        let error = chunk(asked.cookie, false, 0x8001, &[0, 0, 0, 5, 0, 0]);
        while socket.write_all(&error).is_ok() {}
    });
    let mut disk = place.open(LONG).unwrap();
    let failed = read(&mut disk, &Memory::new(4096), 0, 512);
    assert!(
        matches!(&failed, Err(Failure::Io(error)) if error.raw_os_error() == Some(5)),
        "{failed:?}"
    );
    assert_eq!(counters(&disk)["nbd_violations"], 1);
}

#[test]
fn a_server_that_is_shutting_down_is_left_for_the_next() {
    let (disk, got) = answers(true, |asked| {
        chunk(asked.cookie, true, 0x8001, &[0, 0, 0, 108, 0, 0])
    });
    assert!(got == pattern(8192, 8192));
    assert_eq!(counters(&disk)["nbd_violations"], 0);
}

#[test]
fn errors_of_the_medium_are_told_with_the_words_of_the_server() {
    for structured in [true, false] {
        let place = place(move |_, mut socket| {
            greet(&mut socket, SIZE, FLUSH, structured).unwrap();
            while let Ok(asked) = ask(&mut socket) {
                let _ = std::io::copy(
                    &mut std::io::Read::take(
                        &mut socket,
                        if asked.command == 1 {
                            asked.len.into()
                        } else {
                            0
                        },
                    ),
                    &mut std::io::sink(),
                );
                let reply = if structured {
                    chunk(asked.cookie, true, 0x8001, b"\0\0\0\x1c\0\x04full")
                } else {
                    simple(asked.cookie, 28)
                };
                socket.write_all(&reply).unwrap();
            }
        });
        let mut disk = place.open(LONG).unwrap();
        let memory = Memory::new(4096);
        for result in [
            read(&mut disk, &memory, 0, 512).map(drop),
            write(&mut disk, &memory, 0, &[1; 512]),
            run(&mut disk, Request::Flush, &memory),
        ] {
            let Err(Failure::Io(error)) = result else {
                panic!("{result:?}")
            };
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
            assert_eq!(error.to_string().contains("full"), structured, "{error}");
        }
        assert_eq!(counters(&disk)["nbd_connections"], 1);
    }
}
