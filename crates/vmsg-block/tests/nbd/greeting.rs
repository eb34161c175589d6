// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that negotiate badly, say no, or are not there.

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Failure, NbdDisk, NbdOpenError, ProtocolError, Request};

use super::held::{Memory, run, write};
use super::place::{LONG, SHORT, SIZE, place, say};
use super::server::{self, FLUSH, READ_ONLY, TRIM, answer, greet, greet_with, read_exact};

fn protocol_error(bytes: &'static [u8]) -> ProtocolError {
    let place = place(move |_, socket| say(socket, bytes));
    match place.open(LONG) {
        Err(NbdOpenError::Protocol { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_does_not_speak_the_protocol_is_named_at_once() {
    assert_eq!(
        protocol_error(b"HTTP/1.1 400 Bad Request\r\n"),
        ProtocolError::Greeting
    );
    let old = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00";
    assert_eq!(protocol_error(old), ProtocolError::Oldstyle);
    assert_eq!(
        protocol_error(b"NBDMAGICIHAVEOPT\x00\x00"),
        ProtocolError::NotFixed
    );
    let garbage = b"NBDMAGICIHAVEOPT\x00\x03garbage garbage garbage garbage";
    assert!(matches!(
        protocol_error(garbage),
        ProtocolError::OptionMagic(_)
    ));
    let other = b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00";
    assert_eq!(
        protocol_error(other),
        ProtocolError::OtherOption {
            asked: 8,
            answered: 7
        }
    );
    let long = b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x01\xff\xff\xff\xff";
    assert_eq!(protocol_error(long), ProtocolError::LongAnswer(u32::MAX));
}

#[test]
fn an_export_without_a_block_is_no_disk() {
    for size in [0, 511] {
        let place = place(move |_, mut socket| {
            greet(&mut socket, size, FLUSH, false).unwrap();
            say(socket, &[]);
        });
        let error = place.open(LONG).unwrap_err();
        assert!(
            matches!(&error, NbdOpenError::Unusable { .. })
                && error.to_string().contains(&format!("has {size} bytes")),
            "{error}"
        );
    }
}

#[test]
fn a_server_that_says_no_is_quoted() {
    let place = place(|_, mut socket| {
        socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
        read_exact::<20>(&mut socket).unwrap();
        answer(&mut socket, 8, 0x8000_0001, &[]).unwrap();
        read_exact::<24>(&mut socket).unwrap();
        answer(&mut socket, 7, 0x8000_0006, b"no\x1b[2Jthing here").unwrap();
        say(socket, &[]);
    });
    let error = place.open(LONG).unwrap_err();
    assert!(matches!(&error, NbdOpenError::Refused { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("there is no such export") && text.contains("no [2Jthing here"),
        "{text}"
    );
}

#[test]
fn a_server_without_go_is_asked_by_name() {
    let place = place(|_, mut socket| {
        socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
        read_exact::<20>(&mut socket).unwrap();
        answer(&mut socket, 8, 0x8000_0001, &[]).unwrap();
        read_exact::<24>(&mut socket).unwrap();
        answer(&mut socket, 7, 0x8000_0001, &[]).unwrap();
        read_exact::<16>(&mut socket).unwrap();
        say(socket, &[&SIZE.to_be_bytes()[..], &[0, 1]].concat());
    });
    let disk = place.open(LONG).unwrap();
    let facts = disk.facts();
    assert_eq!((facts.size, facts.block_size), (SIZE, 512));
    assert!(!facts.discard && !facts.write_zeroes);
}

#[test]
fn what_cannot_be_written_is_not_opened_for_writing() {
    let place = place(|_, mut socket| {
        greet_with(
            &mut socket,
            SIZE + 1000,
            READ_ONLY | FLUSH | TRIM,
            true,
            (4096, 65_536, 1 << 20),
        )
        .unwrap();
        say(socket, &[]);
    });
    assert!(matches!(place.open(LONG), Err(NbdOpenError::ReadOnly(_))));
    let config = vmsg_block::NbdConfig {
        read_only: true,
        ..server::config(&place.socket, LONG)
    };
    let mut disk = NbdDisk::open(&config).unwrap();
    let facts = disk.facts();
    assert!(facts.read_only && !facts.discard && !facts.write_zeroes);
    assert_eq!(
        (facts.size, facts.block_size, facts.physical_block_size),
        (SIZE, 4096, 65_536)
    );
    let memory = Memory::new(4096);
    assert!(matches!(
        write(&mut disk, &memory, 0, &[0; 4096]),
        Err(Failure::ReadOnly)
    ));
    run(&mut disk, Request::Flush, &memory).unwrap();
}

#[test]
fn nobody_there_is_an_error_after_the_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let error = NbdDisk::open(&server::config(&dir.path().join("none"), SHORT)).unwrap_err();
    assert!(
        matches!(&error, NbdOpenError::Unreachable { .. }),
        "{error}"
    );
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < SHORT * 10);
    // Somebody who says nothing is nobody, too.
    let silent = place(|_, socket| say(socket, &[]));
    let error = silent.open(SHORT).unwrap_err();
    assert!(
        error.to_string().contains("it does not say what it has"),
        "{error}"
    );
}

#[test]
fn a_server_that_comes_late_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let path = socket.clone();
    let server = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        let (mut socket, _) = UnixListener::bind(path).unwrap().accept().unwrap();
        greet(&mut socket, SIZE, FLUSH, true).unwrap();
        socket
    });
    NbdDisk::open(&server::config(&socket, LONG)).unwrap();
    server.join().unwrap();
}
