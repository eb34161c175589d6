// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that fall silent, go away, come back as others, or are not wanted any more.

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use vmsg_block::{Disk, Failure, NbdDisk, Request, Submitted};
use vmsg_mem::Pieces;

use super::held::{Memory, read, turn, wait, write};
use super::place::{LONG, SHORT, SIZE, counters, place};
use super::server::{self, FLUSH, ask, chunk, greet, read_exact, simple};

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
    assert!(begun.elapsed() < SHORT, "as long as nobody is waited for");
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
