// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of the client by messages, with clients that lay them out as specified, as QEMU does, or that misbehave.

mod support;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::*;
use vmsg_vfio_user::{Connection, Dma, DmaError, End, Errno, Options};

/// What a client does with a question about its memory.
type Client = fn(&mut [u8], &Message) -> Vec<u8>;

const BASE: u64 = 0x10_0000;

fn error(ask: &Message, errno: Errno) -> Vec<u8> {
    let errno = errno.raw_os_error().unsigned_abs();
    header(ask.id, ask.command, 16, REPLY | ERROR, errno)
}

fn place(memory: &[u8], address: u64, count: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
    let end = start.checked_add(count)?;
    (end <= memory.len()).then_some(start..end)
}

/// The byte count has 64 bits, more than 1 MiB is refused.
fn as_specified(memory: &mut [u8], ask: &Message) -> Vec<u8> {
    let (address, count) = (ask.u64_at(0), ask.u64_at(8));
    if count > 1 << 20 {
        return error(ask, Errno::TOOBIG);
    }
    let Some(range) = place(memory, address, usize::try_from(count).expect("1 MiB")) else {
        return error(ask, Errno::FAULT);
    };
    let mut payload = ask.payload[..16].to_vec();
    if ask.command == DMA_WRITE {
        memory[range].copy_from_slice(&ask.payload[16..]);
    } else {
        payload.extend_from_slice(&memory[range]);
    }
    message(ask.id, ask.command, REPLY, &payload)
}

/// The byte count has 32 bits, what follows is 4 bytes longer than it says.
fn as_qemu(memory: &mut [u8], ask: &Message) -> Vec<u8> {
    let count = usize::try_from(ask.u32_at(8)).expect("fits");
    let Some(range) = place(memory, ask.u64_at(0), count) else {
        return error(ask, Errno::NODEV);
    };
    assert!(ask.payload.len() >= 16);
    if ask.command == DMA_WRITE {
        assert!(count <= ask.payload.len() - 16);
        memory[range].copy_from_slice(&ask.payload[12..12 + count]);
        return message(ask.id, ask.command, REPLY, b"");
    }
    let mut payload = ask.payload[..12].to_vec();
    payload.extend_from_slice(&memory[range]);
    payload.extend([0; 4]);
    message(ask.id, ask.command, REPLY, &payload)
}

/// A server in a thread, and a client in another that answers questions about its memory until the server is gone.
struct Scene {
    dma: Dma,
    stop: mpsc::Sender<()>,
    server: JoinHandle<Option<End>>,
    client: JoinHandle<(Vec<u8>, u32)>,
}

impl Scene {
    fn new(client: Client, memory: Vec<u8>) -> Scene {
        let (stream, server) = UnixStream::pair().expect("a pair");
        let mut options = Options::default();
        options.dma_timeout = Duration::from_secs(120);
        let mut connection = Connection::new(server, options).expect("a connection");
        let dma = connection.dma();
        assert_eq!(
            dma.read(BASE, &mut [0]),
            Err(DmaError::Refused(Errno::NOTCONN))
        );
        send(&stream, &message(0, VERSION, 0, &version(QEMU)), &[]);
        while connection.negotiated().is_none() {
            connection.turn(&mut Recorder::new(), 1).expect("not ended");
        }
        receive(&stream).expect("an answer").ok();
        let (stop, stopped) = mpsc::channel();
        Scene {
            dma,
            stop,
            server: thread::spawn(move || serve(connection, &stopped)),
            client: thread::spawn(move || answer(&stream, client, memory)),
        }
    }

    /// Gives the memory of the client and how many questions it was asked.
    fn end(self) -> (Vec<u8>, u32) {
        drop(self.stop);
        assert!(self.server.join().expect("no panic").is_none());
        self.client.join().expect("no panic")
    }
}

fn serve(mut connection: Connection, stopped: &mpsc::Receiver<()>) -> Option<End> {
    let mut device = Recorder::new();
    while let Err(mpsc::TryRecvError::Empty) = stopped.try_recv() {
        match connection.turn(&mut device, 8) {
            Err(end) => return Some(end),
            Ok(_) => {
                let mut fds = [PollFd::new(&connection, PollFlags::IN)];
                let soon = Timespec {
                    tv_sec: 0,
                    tv_nsec: 5_000_000,
                };
                poll(&mut fds, Some(&soon)).expect("poll");
            }
        }
    }
    None
}

fn answer(stream: &UnixStream, client: Client, mut memory: Vec<u8>) -> (Vec<u8>, u32) {
    let mut asked = 0;
    while let Some(ask) = receive(stream) {
        assert_eq!(ask.flags, 0);
        asked += 1;
        let answer = client(&mut memory, &ask);
        if !answer.is_empty() {
            send(stream, &answer, &[]);
        }
    }
    (memory, asked)
}

fn numbered(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from(at % 251).expect("below 251"))
        .collect()
}

#[test]
fn memory_is_read_and_written_whatever_the_layout() {
    for client in [as_specified as Client, as_qemu] {
        let memory = numbered(300_000);
        let scene = Scene::new(client, memory.clone());
        let mut read = vec![0; 200_001];
        scene.dma.read(BASE + 7, &mut read).expect("it is there");
        assert_eq!(read, memory[7..200_008]);
        let mut word = [0; 3];
        scene.dma.read(BASE, &mut word).expect("it is there");
        assert_eq!(word, memory[..3]);
        scene
            .dma
            .write(BASE + 100_000, &[0xee; 150_000])
            .expect("it is there");
        scene.dma.write(BASE, b"!").expect("it is there");
        let (after, asked) = scene.end();
        let mut expected = memory;
        expected[100_000..250_000].fill(0xee);
        expected[0] = b'!';
        assert!(after == expected);
        // A probe, then 64 KiB at a time.
        assert_eq!(asked, 1 + 4 + 1 + 3 + 1);
    }
}

#[test]
fn memory_of_zeros_does_not_hide_the_layout() {
    for client in [as_specified as Client, as_qemu] {
        let mut memory = vec![0; 4096];
        memory[6] = 6;
        let scene = Scene::new(client, memory);
        let mut read = [0xff; 9];
        scene.dma.read(BASE, &mut read).expect("it is there");
        assert_eq!(read, [0, 0, 0, 0, 0, 0, 6, 0, 0]);
        scene
            .dma
            .write(BASE + 1, &[1, 2, 3, 4, 5])
            .expect("it is there");
        assert_eq!(scene.end().0[..8], [0, 1, 2, 3, 4, 5, 6, 0]);
    }
}

#[test]
fn the_first_access_may_be_refused_and_teaches_nothing() {
    for client in [as_specified as Client, as_qemu] {
        let scene = Scene::new(client, numbered(64));
        let nowhere = scene.dma.read(1, &mut [0; 8]);
        assert!(matches!(
            nowhere,
            Err(DmaError::Refused(Errno::FAULT | Errno::NODEV))
        ));
        let nowhere = scene.dma.write(1, &[0; 8]);
        assert!(matches!(
            nowhere,
            Err(DmaError::Refused(Errno::FAULT | Errno::NODEV))
        ));
        scene.dma.write(BASE + 8, b"01234567").expect("it is there");
        let mut read = [0; 10];
        scene.dma.read(BASE + 7, &mut read).expect("it is there");
        assert_eq!(&read, b"\x0701234567\x10");
        let over_the_end = scene.dma.read(u64::MAX, &mut [0; 2]);
        assert_eq!(over_the_end, Err(DmaError::Refused(Errno::FAULT)));
        scene.dma.read(0, &mut []).expect("nothing is always there");
        scene.end();
    }
}

#[test]
fn a_client_that_refuses_any_large_count_with_its_own_error_is_understood() {
    fn client(memory: &mut [u8], ask: &Message) -> Vec<u8> {
        if ask.u64_at(8) > 1 << 20 {
            return error(ask, Errno::INVAL);
        }
        as_specified(memory, ask)
    }
    let scene = Scene::new(client, numbered(64));
    let mut read = [0; 5];
    scene.dma.read(BASE + 3, &mut read).expect("it is there");
    assert_eq!(read, [3, 4, 5, 6, 7]);
    scene.end();
}

#[test]
fn answers_that_make_no_sense_are_refusals() {
    let clients: [Client; 5] = [
        |_, ask| message(ask.id, ask.command, REPLY, b""),
        |_, ask| message(ask.id, ask.command, REPLY, &ask.payload[..11]),
        |_, ask| {
            message(
                ask.id,
                ask.command,
                REPLY,
                &[&ask.payload[..16], &[0; 9]].concat(),
            )
        },
        |_, ask| {
            message(
                ask.id,
                ask.command,
                REPLY,
                &[&[1; 8], &ask.payload[8..16], &[0; 4]].concat(),
            )
        },
        |_, ask| message(ask.id, ask.command, REPLY, &vec![0; 2 << 20]),
    ];
    for client in clients {
        let scene = Scene::new(client, Vec::new());
        let result = scene.dma.read(BASE, &mut [0; 4]);
        assert_eq!(result, Err(DmaError::Refused(Errno::PROTO)));
        scene.end();
    }
    for errno in [0, 4096, u32::MAX] {
        let client: Client = match errno {
            0 => |_, ask| header(ask.id, ask.command, 16, REPLY | ERROR, 0),
            4096 => |_, ask| header(ask.id, ask.command, 16, REPLY | ERROR, 4096),
            _ => |_, ask| header(ask.id, ask.command, 16, REPLY | ERROR, u32::MAX),
        };
        let scene = Scene::new(client, Vec::new());
        let result = scene.dma.read(BASE, &mut [0; 4]);
        assert_eq!(result, Err(DmaError::Refused(Errno::IO)));
        scene.end();
    }
}

#[test]
fn an_answer_to_another_question_is_not_taken() {
    fn client(memory: &mut [u8], ask: &Message) -> Vec<u8> {
        let mut stray = message(ask.id.wrapping_add(1), ask.command, REPLY, &ask.payload);
        stray.extend(message(ask.id, DMA_WRITE, REPLY, &ask.payload));
        stray.extend(as_specified(memory, ask));
        stray.extend(as_specified(memory, ask));
        stray
    }
    let scene = Scene::new(client, numbered(64));
    let mut read = [0; 4];
    scene.dma.read(BASE + 1, &mut read).expect("it is there");
    assert_eq!(read, [1, 2, 3, 4]);
    scene.end();
}

#[test]
fn many_threads_get_each_their_own() {
    let memory = numbered(8 * 4096);
    let scene = Scene::new(as_qemu, memory.clone());
    thread::scope(|scope| {
        for n in 0..8u64 {
            let (dma, memory) = (scene.dma.clone(), &memory);
            scope.spawn(move || {
                let start = usize::try_from(n * 4096).expect("fits");
                for len in 1..100 {
                    let mut read = vec![0; len];
                    dma.read(BASE + n * 4096, &mut read).expect("it is there");
                    assert_eq!(read, memory[start..start + len]);
                }
            });
        }
    });
    scene.end();
}

/// Somebody who waits for a client that does not answer, and when they stop.
fn waiting(dma: &Dma) -> JoinHandle<(Result<(), DmaError>, Duration)> {
    let dma = dma.clone();
    thread::spawn(move || {
        let start = Instant::now();
        (dma.read(BASE, &mut [0; 8]), start.elapsed())
    })
}

#[test]
fn waiting_ends_at_once_when_it_is_cancelled_and_later_calls_work() {
    static ASKED: AtomicBool = AtomicBool::new(false);
    fn client(memory: &mut [u8], ask: &Message) -> Vec<u8> {
        // The first question is never answered.
        if !ASKED.swap(true, Ordering::Relaxed) {
            return Vec::new();
        }
        as_specified(memory, ask)
    }
    let scene = Scene::new(client, vec![1; 64]);
    let waiting = waiting(&scene.dma);
    while !ASKED.load(Ordering::Relaxed) {
        thread::yield_now();
    }
    scene.dma.cancel();
    let (result, took) = waiting.join().expect("no panic");
    assert_eq!(result, Err(DmaError::Cancelled));
    assert!(took < Duration::from_secs(60));
    let mut first = [0];
    scene.dma.read(BASE, &mut first).expect("it is there");
    assert_eq!(first, [1]);
    scene.end();
}

#[test]
fn waiting_ends_at_once_with_the_connection() {
    let scene = Scene::new(|_, _| Vec::new(), Vec::new());
    let waiting = waiting(&scene.dma);
    let dma = scene.dma.clone();
    scene.end();
    let (result, took) = waiting.join().expect("no panic");
    assert_eq!(result, Err(DmaError::Gone));
    assert!(took < Duration::from_secs(60));
    assert_eq!(dma.write(BASE, b"x"), Err(DmaError::Gone));
}

#[test]
fn a_client_that_does_not_answer_is_waited_for_until_the_bound() {
    let mut options = Options::default();
    options.dma_timeout = Duration::from_millis(60);
    let mut pair = Pair::silent(options);
    pair.ask(VERSION, &version(QEMU)).ok();
    let dma = pair.connection.dma();
    let (result, took) = waiting(&dma).join().expect("no panic");
    assert_eq!(result, Err(DmaError::TimedOut));
    assert!(took >= Duration::from_millis(60) && took < Duration::from_secs(60));
    // The answer that comes too late is one to nothing.
    let ask = pair.receive().expect("the question");
    assert_eq!(ask.command, DMA_READ);
    pair.send(&message(ask.id, DMA_READ, REPLY, &ask.payload), &[]);
    assert_eq!(pair.connection.counters().stray_replies, 1);
    pair.check_alive();
}

#[test]
fn a_client_that_does_not_read_is_waited_for_until_the_bound_and_misses_nothing_else() {
    let mut options = Options::default();
    options.dma_timeout = Duration::from_millis(60);
    let mut pair = Pair::silent(options);
    pair.ask(VERSION, &version(QEMU)).ok();
    let ask = message(1, REGION_READ, 0, &access(0, RAM, 4096, b""));
    let mut asked = 0;
    while !pair.connection.interest().write {
        pair.send(&ask, &[]);
        asked += 1;
    }
    let dma = pair.connection.dma();
    for _ in 0..3 {
        let (result, _) = waiting(&dma).join().expect("no panic");
        assert_eq!(result, Err(DmaError::TimedOut));
    }
    let cancelled = waiting(&dma);
    while !cancelled.is_finished() {
        dma.cancel();
        thread::yield_now();
    }
    let (result, _) = cancelled.join().expect("no panic");
    assert!(matches!(
        result,
        Err(DmaError::Cancelled | DmaError::TimedOut)
    ));
    // It reads at last: its answers are there, and no question that nobody asks any more.
    while asked > 0 {
        match pair.receive() {
            Some(answer) => {
                assert_eq!(answer.ok().command, REGION_READ);
                asked -= 1;
            }
            None => assert!(pair.turn().is_ok()),
        }
    }
    pair.check_alive();
}

#[test]
fn room_in_the_socket_is_found_without_a_turn() {
    let mut options = Options::default();
    options.dma_timeout = Duration::from_secs(120);
    let mut pair = Pair::silent(options);
    pair.ask(VERSION, &version(QEMU)).ok();
    let ask = message(1, REGION_READ, 0, &access(0, RAM, 4096, b""));
    while !pair.connection.interest().write {
        pair.send(&ask, &[]);
    }
    let dma = pair.connection.dma();
    let waiting = waiting(&dma);
    // The server sleeps; the client reads, and comes to the question.
    let question = loop {
        match pair.receive() {
            Some(message) if message.command == DMA_READ => break message,
            Some(_) => {}
            None => thread::yield_now(),
        }
    };
    pair.send(&header(question.id, DMA_READ, 16, REPLY | ERROR, 1), &[]);
    // It asks again, to see whether the address or the probe was refused.
    let question = loop {
        match pair.receive() {
            Some(message) => break message,
            None => thread::yield_now(),
        }
    };
    pair.send(&header(question.id, DMA_READ, 16, REPLY | ERROR, 1), &[]);
    let (result, _) = waiting.join().expect("no panic");
    assert_eq!(result, Err(DmaError::Refused(Errno::PERM)));
}
