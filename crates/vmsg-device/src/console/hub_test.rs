// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::super::client::WAITING;
use super::super::{Report, Serial};
use super::*;

struct Bench {
    folder: TempDir,
    hub: Hub,
}

fn bench(change: impl FnOnce(&Path, &mut HubConfig)) -> Bench {
    let folder = TempDir::new().expect("a folder");
    let mut config = HubConfig {
        name: "con0".to_owned(),
        socket: Some(folder.path().join("socket")),
        ..HubConfig::default()
    };
    change(folder.path(), &mut config);
    let hub = Hub::open(&config).expect("a hub");
    Bench { folder, hub }
}

impl Bench {
    fn client(&mut self) -> UnixStream {
        let client = UnixStream::connect(self.folder.path().join("socket")).expect("connected");
        client.set_nonblocking(true).expect("a socket");
        self.turn();
        client
    }

    /// Waits for work, and does it.
    fn turn(&mut self) {
        wait(&self.hub);
        self.hub.poll();
    }

    fn report(&self) -> Report {
        self.hub.handle().report()
    }
}

/// Waits until the hub has work.
fn wait(hub: &Hub) {
    assert!(has_work(hub, 10), "nothing happens");
}

fn has_work(hub: &Hub, seconds: i64) -> bool {
    let fd = hub.event_fd();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&timeout)).expect("poll") > 0
}

fn seen(client: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match client.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

fn typed(hub: &mut Hub) -> Vec<u8> {
    let bytes = hub.input().iter().copied().collect::<Vec<_>>();
    hub.consume(bytes.len());
    bytes
}

#[test]
fn the_socket_is_for_this_user_alone_and_goes_with_the_hub() {
    let bench = bench(|_, _| {});
    let path = bench.folder.path().join("socket");
    let mode = fs::metadata(&path).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let handle = bench.hub.handle();
    assert!(!handle.is_ended());
    drop(bench.hub);
    assert!(handle.is_ended());
    assert!(!path.exists());
}

#[test]
fn who_attaches_sees_what_was_and_what_comes() {
    let mut bench = bench(|_, _| {});
    bench.hub.output(b"one\n");
    let mut first = bench.client();
    bench.hub.output(b"two\n");
    let mut second = bench.client();
    bench.hub.output(b"three\n");
    assert_eq!(seen(&mut first), b"one\ntwo\nthree\n");
    assert_eq!(seen(&mut second), b"one\ntwo\nthree\n");
    bench.hub.output(&vec![b'x'; 2 * BACKLOG]);
    bench.hub.output(b"\nlast line\n");
    let mut third = bench.client();
    assert_eq!(seen(&mut third), b"last line\n");
    assert_eq!(bench.report().clients, 3);
    drop((first, second));
    bench.turn();
    assert_eq!(bench.report().clients, 1);
    assert!(!has_work(&bench.hub, 0), "who has gone is forgotten");
}

#[test]
fn who_does_not_read_loses_what_others_have() {
    let mut bench = bench(|_, _| {});
    let mut slow = bench.client();
    let mut quick = bench.client();
    let line = vec![b'.'; 4096];
    let mut all = 0;
    // More than socket buffers and the queue hold.
    while bench.report().lost < 100_000 {
        bench.hub.output(&line);
        all += line.len();
        assert_eq!(seen(&mut quick).len(), line.len());
        assert!(all < 64 * WAITING, "nothing is ever lost");
    }
    let lost = bench.report().lost;
    let mut got = Vec::new();
    while has_work(&bench.hub, 0) || got.len() < all - usize::try_from(lost).expect("small") {
        got.extend(seen(&mut slow));
        bench.hub.poll();
    }
    got.extend(seen(&mut slow));
    let words = format!("\r\n[vmsg: {lost} bytes lost]\r\n");
    assert!(got.ends_with(words.as_bytes()));
    assert_eq!(
        got.len(),
        all - usize::try_from(lost).expect("small") + words.len()
    );
    bench.hub.output(b"again");
    assert_eq!(seen(&mut slow), b"again");
    assert_eq!(bench.report().lost, lost);
}

#[test]
fn what_is_typed_waits_in_a_short_queue_and_then_with_the_client() {
    let mut bench = bench(|_, _| {});
    let mut first = bench.client();
    let mut second = bench.client();
    let text: Vec<u8> = (0..3 * MAX_INPUT).map(|n| n.to_le_bytes()[0]).collect();
    first.write_all(&text).expect("the socket has room");
    bench.turn();
    assert_eq!(bench.hub.input().len(), MAX_INPUT);
    assert!(!has_work(&bench.hub, 0), "a client that waits is no work");
    second.write_all(b"me too").expect("room");
    // It goes although there is no room for what it has sent.
    drop(first);
    bench.turn();
    assert!(!has_work(&bench.hub, 0));
    let mut got = Vec::new();
    while !bench.hub.input().is_empty() {
        got.extend(typed(&mut bench.hub));
    }
    assert_eq!(got.len(), text.len() + 6);
    let firsts: Vec<u8> = {
        let at = got
            .windows(6)
            .position(|part| part == b"me too")
            .expect("whole");
        got.drain(at..at + 6);
        got
    };
    assert_eq!(firsts, text);
    assert_eq!(bench.report().clients, 1);
    assert_eq!(bench.report().input, text.len() as u64 + 6);
}

#[test]
fn who_has_said_all_may_still_listen() {
    let mut bench = bench(|_, _| {});
    let mut client = bench.client();
    client.write_all(b"ls\n").expect("room");
    client
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket");
    bench.turn();
    assert_eq!(typed(&mut bench.hub), b"ls\n");
    assert!(!has_work(&bench.hub, 0));
    bench.hub.output(b"file\n");
    assert_eq!(seen(&mut client), b"file\n");
    drop(client);
    bench.turn();
    assert_eq!(bench.report().clients, 0);
}

#[test]
fn there_is_an_end_to_how_many_clients_there_are() {
    let mut bench = bench(|_, _| {});
    let clients: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| bench.client()).collect();
    let mut late = bench.client();
    assert!(seen(&mut late).starts_with(b"[vmsg: there are 32 clients already]"));
    assert_eq!(bench.report().clients, MAX_CLIENTS);
    drop(clients);
    bench.turn();
    while has_work(&bench.hub, 0) {
        bench.hub.poll();
    }
    let mut next = bench.client();
    bench.hub.output(b"room");
    assert_eq!(seen(&mut next), b"room");
}

#[test]
fn a_log_has_everything_and_can_be_changed_while_it_runs() {
    let mut bench = bench(|folder, config| config.log = Some(folder.join("log")));
    let log = bench.folder.path().join("log");
    bench.hub.output(b"one\n");
    assert_eq!(fs::read(&log).expect("a log"), b"one\n");
    assert_eq!(fs::metadata(&log).expect("a log").mode() & 0o777, 0o600);
    let handle = bench.hub.handle();
    let other = bench.folder.path().join("other");
    fs::write(&other, b"zero\n").expect("a file");
    handle.set_log(Some(&other)).expect("a log");
    bench.hub.output(b"two\n");
    assert_eq!(fs::read(&other).expect("a log"), b"zero\ntwo\n");
    assert_eq!(handle.report().log, Some(other));
    handle.set_log(None).expect("none");
    bench.turn();
    bench.hub.output(b"three\n");
    assert_eq!(fs::read(&log).expect("a log"), b"one\n");
    assert_eq!(handle.report().log, None);
    let nowhere = bench.folder.path().join("no/such/folder");
    assert!(handle.set_log(Some(&nowhere)).is_err());
}

#[test]
fn a_log_that_is_full_is_counted_and_holds_nothing_up() {
    let mut bench = bench(|_, config| config.log = Some("/dev/full".into()));
    let mut client = bench.client();
    bench.hub.output(b"on and on");
    assert_eq!(seen(&mut client), b"on and on");
    assert_eq!(bench.report().log_failed, 9);
}

#[test]
fn a_pseudoterminal_outlives_who_opens_it() {
    let mut bench = bench(|folder, config| config.pty = Some(folder.join("pty")));
    let link = bench.folder.path().join("pty");
    let open = |bench: &mut Bench| {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags_nonblock()
            .open(&link)
            .expect("a terminal");
        bench.turn();
        file
    };
    bench.hub.output(b"before\n");
    for round in 0..3 {
        let mut terminal = open(&mut bench);
        let replayed = seen(&mut terminal);
        assert!(replayed.starts_with(b"before\n"), "{replayed:?}");
        bench.hub.output(b"now\n");
        assert_eq!(seen(&mut terminal), b"now\n", "round {round}");
        terminal.write_all(b"typed").expect("room");
        bench.turn();
        assert_eq!(typed(&mut bench.hub), b"typed");
        // Left unread: who comes next sees it once, as what was before.
        bench.hub.output(b"late\n");
        drop(terminal);
        bench.turn();
        while has_work(&bench.hub, 0) {
            bench.hub.poll();
        }
    }
    let mut terminal = open(&mut bench);
    assert_eq!(
        seen(&mut terminal),
        b"before\nnow\nlate\nnow\nlate\nnow\nlate\n"
    );
    drop(bench.hub);
    assert!(fs::symlink_metadata(&link).is_err());
}

trait Nonblock {
    fn custom_flags_nonblock(&mut self) -> &mut Self;
}

impl Nonblock for fs::OpenOptions {
    fn custom_flags_nonblock(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
        self.custom_flags(i32::from_ne_bytes(flags.bits().to_ne_bytes()))
    }
}

#[test]
fn a_file_is_not_replaced_by_a_pseudoterminal() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("file");
    fs::write(&path, b"precious").expect("a file");
    let config = HubConfig {
        pty: Some(path.clone()),
        ..HubConfig::default()
    };
    assert!(matches!(Hub::open(&config), Err(HubError::Pty { .. })));
    assert_eq!(fs::read(&path).expect("a file"), b"precious");
}

#[test]
fn a_size_is_known_to_all() {
    let bench = bench(|_, _| {});
    assert_eq!(bench.hub.size(), None);
    let size = Size {
        cols: 132,
        rows: 43,
    };
    bench.hub.handle().set_size(size);
    assert!(has_work(&bench.hub, 0));
    assert_eq!(bench.hub.size(), Some(size));
    assert_eq!(bench.report().size, Some(size));
}

#[test]
fn a_serial_line_has_clients_and_may_come_and_go() {
    let folder = TempDir::new().expect("a folder");
    let socket = folder.path().join("socket");
    let hub = Hub::open(&HubConfig {
        name: "vm1".to_owned(),
        socket: Some(socket.clone()),
        ..HubConfig::default()
    });
    let mut serial = Serial::new(hub.expect("a hub")).expect("a serial line");
    let mut client = UnixStream::connect(&socket).expect("connected");
    client.set_nonblocking(true).expect("a socket");
    client.write_all(b"root\n").expect("room");
    serial.poll();
    serial.poll();
    for round in 0..2 {
        let (mut guest, line) = UnixStream::pair().expect("a pair");
        guest.set_nonblocking(true).expect("a socket");
        serial.attach(line).expect("attached");
        guest.write_all(b"login: ").expect("room");
        serial.poll();
        assert_eq!(seen(&mut client), b"login: ");
        if round == 1 {
            client.write_all(b"root\n").expect("room");
            serial.poll();
        }
        assert_eq!(seen(&mut guest), b"root\n");
        drop(guest);
        serial.poll();
        assert!(!serial.is_attached());
        assert!(!serial.hub().handle().report().guest_open);
    }
}

#[test]
fn names_fit_into_paths() {
    for good in ["a", "org.qemu.guest_agent.0", "x-1"] {
        assert!(is_plain_name(good), "{good}");
    }
    for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", &"x".repeat(65)] {
        assert!(!is_plain_name(bad), "{bad}");
    }
    assert_eq!(
        default_socket(Path::new("/run/c.sock"), "con0"),
        Path::new("/run/c.sock.con0.console")
    );
}
