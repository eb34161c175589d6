// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that say what they must not, or nothing.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Failure, NbdDisk, NbdOpenError, ProtocolError, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, pattern, read, run, turn, wait, write};
use super::server::{
    self, Asked, FLUSH, READ_ONLY, TRIM, ZEROES, answer, ask, chunk, greet, greet_with, read_exact,
    simple,
};

const SIZE: u64 = 1 << 20;
const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(30);

/// A server that does with each connection what the test says.
struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

fn place(mut each: impl FnMut(usize, UnixStream) + Send + 'static) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for (number, socket) in listener.incoming().enumerate() {
            each(number, socket.unwrap());
        }
    });
    Place { _dir: dir, socket }
}

impl Place {
    fn open(&self, timeout: Duration) -> Result<NbdDisk, NbdOpenError> {
        NbdDisk::open(&server::config(&self.socket, timeout))
    }
}

fn counters(disk: &NbdDisk) -> HashMap<&'static str, u64> {
    disk.counters().into_iter().collect()
}

/// A socket whose other side was told `bytes`, and which stays open until the other side closes it.
fn say(mut socket: UnixStream, bytes: &[u8]) {
    let _ = socket.write_all(bytes);
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}

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

#[test]
fn a_server_that_says_nothing_any_more_costs_errors_after_the_timeout() {
    let place = place(|_, mut socket| {
        // It takes every connection, and answers nothing that matters.
        thread::spawn(move || {
            greet(&mut socket, SIZE, FLUSH, true).unwrap();
            let _ = std::io::copy(&mut socket, &mut std::io::sink());
        });
    });
    let mut disk = place.open(SHORT).unwrap();
    let memory = Memory::new(4096);
    let begun = Instant::now();
    let failed = read(&mut disk, &memory, 0, 512);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    assert!(
        begun.elapsed() >= SHORT && begun.elapsed() < SHORT * 8,
        "{:?}",
        begun.elapsed()
    );
    let failed = write(&mut disk, &memory, 0, &[1; 512]);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    assert_eq!(counters(&disk)["nbd_timeouts"], 2);
}

#[test]
fn without_a_server_requests_fail_at_once_until_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let serve = |path: &std::path::Path| {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            greet(&mut socket, SIZE * 2, FLUSH, true).unwrap();
            let asked = ask(&mut socket).unwrap();
            let zeroes = [&asked.offset.to_be_bytes()[..], &asked.len.to_be_bytes()].concat();
            socket
                .write_all(&chunk(asked.cookie, true, 2, &zeroes))
                .unwrap();
        })
    };
    let server = serve(&path);
    let mut disk = NbdDisk::open(&server::config(&path, SHORT)).unwrap();
    let memory = Memory::new(4096);
    read(&mut disk, &memory, 0, 512).unwrap();
    server.join().unwrap();
    let failed = read(&mut disk, &memory, 0, 512);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    let begun = Instant::now();
    let failed = read(&mut disk, &memory, 0, 512);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    assert!(begun.elapsed() < SHORT / 2);
    let server = serve(&path);
    let end = Instant::now() + LONG;
    while counters(&disk)["nbd_connections"] < 2 {
        assert!(Instant::now() < end);
        turn(&mut disk, end);
    }
    read(&mut disk, &memory, 0, 512).unwrap();
    server.join().unwrap();
}

#[test]
fn a_slow_drip_is_no_sign_of_life() {
    let place = place(|_, mut socket| {
        thread::spawn(move || {
            greet(&mut socket, SIZE, FLUSH, true).unwrap();
            let asked = ask(&mut socket).unwrap();
            let payload = [
                &asked.offset.to_be_bytes()[..],
                &vec![1; asked.len as usize],
            ]
            .concat();
            for byte in chunk(asked.cookie, true, 1, &payload) {
                if socket.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
    });
    let mut disk = place.open(SHORT).unwrap();
    let memory = Memory::new(4096);
    let begun = Instant::now();
    let failed = read(&mut disk, &memory, 0, 4096);
    assert!(matches!(failed, Err(Failure::Gone(_))), "{failed:?}");
    assert!(begun.elapsed() < SHORT * 8, "{:?}", begun.elapsed());
}

#[test]
fn a_size_that_changed_meanwhile_is_told() {
    let place = place(|number, mut socket| {
        let size = if number == 0 { SIZE } else { SIZE / 2 };
        greet(&mut socket, size, FLUSH, false).unwrap();
        while let Ok(asked) = ask(&mut socket) {
            if number == 0 {
                return;
            }
            let data = vec![
                0;
                if asked.command == 0 {
                    asked.len as usize
                } else {
                    0
                }
            ];
            socket
                .write_all(&[simple(asked.cookie, 0), data].concat())
                .unwrap();
        }
    });
    let mut disk = place.open(LONG).unwrap();
    let memory = Memory::new(4096);
    let pieces = memory.pieces(0, 512);
    let to = Pieces::new(&pieces);
    let offset = SIZE - 512;
    assert!(matches!(
        disk.submit(1, Request::Read { offset, to }, &memory.table),
        Submitted::Pending
    ));
    disk.commit();
    let (mut changed, mut done) = (false, Vec::new());
    let end = Instant::now() + LONG;
    while done.is_empty() {
        assert!(Instant::now() < end);
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            disk.event_fd().unwrap(),
            rustix::event::PollFlags::IN,
        )];
        let left = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        rustix::event::poll(&mut fds, Some(&left)).unwrap();
        changed |= disk.poll(Instant::now());
        disk.completed(&mut done);
    }
    // What is not there any more cannot be read.
    assert!(matches!(&done[0].result, Err(Failure::Io(_))), "{done:?}");
    assert!(changed);
    assert_eq!(disk.facts().size, SIZE / 2);
    read(&mut disk, &memory, 0, 512).unwrap();
    assert!(read(&mut disk, &memory, SIZE / 2, 512).is_err());
}

#[test]
fn what_is_canceled_is_not_waited_for_and_not_overtaken() {
    let (tell, told) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let place = place(move |_, mut socket| {
        greet(&mut socket, SIZE, FLUSH, false).unwrap();
        let mut waiting = Vec::new();
        while let Ok(asked) = ask(&mut socket) {
            let mut data = vec![
                0;
                if asked.command == 1 {
                    asked.len as usize
                } else {
                    0
                }
            ];
            std::io::Read::read_exact(&mut socket, &mut data).unwrap();
            tell.send((asked.command, data)).unwrap();
            if waiting.is_empty() {
                // The first one is kept until the test says so.
                waiting.push(asked);
                gone.recv().unwrap();
            }
            socket.write_all(&simple(asked.cookie, 0)).unwrap();
        }
    });
    let mut disk = place.open(LONG).unwrap();
    let memory = Memory::new(4096);
    memory.fill(0, &[1; 512]);
    memory.fill(512, &[2; 512]);
    let (old, new) = (memory.pieces(0, 512), memory.pieces(512, 512));
    let request = |pieces| Request::Write {
        offset: 0,
        from: pieces,
    };
    assert!(matches!(
        disk.submit(1, request(Pieces::new(&old)), &memory.table),
        Submitted::Pending
    ));
    disk.commit();
    assert_eq!(told.recv().unwrap(), (1, vec![1; 512]));
    disk.cancel();
    let done = wait(&mut disk, 1);
    assert!(matches!(done[0].result, Err(Failure::Canceled)));
    assert_eq!((disk.in_flight(), disk.touching_memory()), (0, 0));
    assert!(matches!(
        disk.submit(2, request(Pieces::new(&new)), &memory.table),
        Submitted::Pending
    ));
    disk.commit();
    disk.poll(Instant::now());
    assert!(
        told.recv_timeout(Duration::from_millis(100)).is_err(),
        "it waits for the old one"
    );
    go.send(()).unwrap();
    let done = wait(&mut disk, 1);
    assert!(done[0].tag == 2 && done[0].result.is_ok());
    assert_eq!(told.recv().unwrap(), (1, vec![2; 512]));
}

/// As many requests on the wire as there may be, when the connection is lost with a write that was answered and not flushed.
#[test]
fn what_is_written_again_finds_room_beside_all_that_is_sent_again() {
    const READS: u32 = 200;
    let mut written = 0;
    let place = place(move |number, mut socket| {
        greet(&mut socket, SIZE, FLUSH, false).unwrap();
        let mut asked = 0;
        while let Ok(request) = ask(&mut socket) {
            asked += 1;
            if request.command == 1 {
                written += 1;
                read_exact::<512>(&mut socket).unwrap();
            } else if number == 0 {
                // All that it sends without an answer.
                if asked == 65 {
                    return;
                }
                continue;
            }
            let mut reply = simple(request.cookie, 0);
            if request.command == 0 {
                reply.extend(vec![u8::try_from(written).unwrap(); request.len as usize]);
            }
            if socket.write_all(&reply).is_err() {
                return;
            }
        }
    });
    let mut disk = place.open(LONG).unwrap();
    let memory = Memory::new(1 << 20);
    write(&mut disk, &memory, 0, &[1; 512]).unwrap();
    for tag in 0..READS {
        let pieces = memory.pieces(tag as usize * 512, 512);
        let (offset, to) = (0, Pieces::new(&pieces));
        let read = Request::Read { offset, to };
        assert!(matches!(
            disk.submit(tag, read, &memory.table),
            Submitted::Pending
        ));
    }
    disk.commit();
    let done = wait(&mut disk, READS as usize);
    assert!(done.iter().all(|completion| completion.result.is_ok()));
    // The write was done again before any of them.
    assert_eq!(memory.bytes(0, 512), [2; 512]);
    assert_eq!(counters(&disk)["nbd_rewritten"], 1);
}
