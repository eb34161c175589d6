// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem server` as a process: how it begins, what it says, how it ends, and what is left when it is killed.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ivshmem::client::Limits;
use ivshmem::{Client, Event, PeerId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::{Pid, Signal, kill_process};

/// Much more than anything here takes.
const LONG: Duration = Duration::from_secs(120);

fn command(dir: &Path, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .args(["ivshmem", "server"])
        .args(words.split(' '))
        .current_dir(dir)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null());
    command
}

/// A server that is killed at the end of its test.
struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Server {
    /// Starts one and waits until it is ready.
    fn start(dir: &Path, words: &str) -> Self {
        Self::spawn(command(dir, words))
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut server = Self { child, out };
        assert_eq!(server.line(), "ready ivshmem=iv.sock\n");
        server
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// What it says until its end, and whether that was a good one.
    fn end(&mut self) -> (String, bool) {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        (rest, self.child.wait().unwrap().success())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("iv.sock");
    (dir, path)
}

fn client(path: &Path) -> Client {
    client_of(path, 1)
}

fn client_of(path: &Path, vectors: u16) -> Client {
    let limits = Limits {
        vectors: Some(vectors),
        ..Limits::default()
    };
    Client::connect_with(path, limits, LONG).unwrap()
}

fn next(client: &mut Client) -> Event {
    let until = Instant::now() + LONG;
    loop {
        if let Some(event) = client.poll() {
            return event;
        }
        assert!(Instant::now() < until);
        is_readable(client.poll_fd(), LONG);
    }
}

fn is_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).unwrap() > 0
}

fn words_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn it_tells_what_it_has_done_and_takes_its_socket_away() {
    let (dir, path) = place();
    let seat = "--socket seat.sock,id=4,vectors=3";
    let mut server = Server::start(dir.path(), &format!("--socket iv.sock {seat} --size 64K"));
    assert_eq!(server.line(), "ready ivshmem=seat.sock\n");
    let first = client(&path);
    let seated = client_of(&dir.path().join("seat.sock"), 3);
    assert_eq!((first.id(), seated.id()), (PeerId(0), PeerId(4)));
    assert_eq!((first.vectors(), seated.vectors()), (1, 3));
    server.signal(Signal::USR1);
    let stats = "stats clients=2 socket=iv.sock,clients=1,joined=1,stalled=0,spoke=0,refused=0 \
                 socket=seat.sock,id=4,clients=1,joined=1,stalled=0,spoke=0,refused=0\n";
    assert_eq!(server.line(), stats);
    server.signal(Signal::TERM);
    assert_eq!(server.end(), (stats.to_owned(), true));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_service_manager_is_told_when_it_is_ready() {
    let (dir, _) = place();
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(LONG)).unwrap();
    let mut command = command(dir.path(), "--socket iv.sock");
    command.env("NOTIFY_SOCKET", dir.path().join("notify"));
    let _server = Server::spawn(command);
    let mut bytes = [0; 100];
    let count = manager.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"READY=1\n");
}

#[test]
fn a_second_one_is_refused_by_name() {
    let (dir, path) = place();
    let server = Server::start(dir.path(), "--socket iv.sock");
    let output = command(dir.path(), "--socket iv.sock").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let name = format!("`iv.sock` is in use by process {}", server.child.id());
    assert!(words_of(&output).contains(&name), "{}", words_of(&output));
    client(&path);
}

#[test]
fn doorbells_outlive_a_killed_one_and_the_next_gives_other_ids_for_the_same_memory() {
    let (dir, path) = place();
    let words = "--socket iv.sock --size 64K --file memory";
    let mut server = Server::start(dir.path(), words);
    let mut first = client(&path);
    let second = client(&path);
    assert_eq!(next(&mut first), Event::Joined(PeerId(1)));
    server.signal(Signal::KILL);
    // The next one does not have to wait for the end of the first.
    let _next = Server::start(dir.path(), words);
    assert!(!server.end().1);
    assert_eq!(next(&mut first), Event::ServerGone);
    for (from, to, id) in [(&first, &second, PeerId(1)), (&second, &first, PeerId(0))] {
        from.ring(id, 0).unwrap();
        assert!(is_readable(to.vector_fd(0).unwrap(), LONG));
    }
    let third = client(&path);
    assert_eq!(third.id(), PeerId(2));
    rustix::io::pwrite(first.memory_fd(), b"same", 4096).unwrap();
    let mut read = [0; 4];
    rustix::io::pread(third.memory_fd(), &mut read, 4096).unwrap();
    assert_eq!(&read, b"same");
}

#[test]
fn many_that_start_one_in_the_background_get_the_same() {
    let (dir, path) = place();
    let words = "--socket iv.sock --socket seat.sock,id=9 --size 64K --linger 5 --background";
    let starters: Vec<Child> = (0..6)
        .map(|_| {
            let mut command = command(dir.path(), words);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut clients = Vec::new();
    for starter in starters {
        let output = starter.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", words_of(&output));
        assert_eq!(
            output.stdout,
            b"ready ivshmem=iv.sock\nready ivshmem=seat.sock\n"
        );
        clients.push(client(&path));
    }
    let ids: Vec<_> = clients.iter().map(Client::id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5].map(PeerId));
    // Longer than it lingers, but somebody is there.
    let mut last = clients.pop().unwrap();
    drop(clients);
    // But for the seat.
    while last.peers().count() > 1 {
        next(&mut last);
    }
    assert!(!is_readable(last.poll_fd(), Duration::from_millis(5500)));
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&changes, dir.path(), WatchFlags::DELETE).unwrap();
    drop(last);
    while path.exists() {
        assert!(is_readable(changes.as_fd(), LONG), "it does not end");
        rustix::io::read(&changes, &mut [0; 4096]).unwrap();
    }
}

#[test]
fn one_in_the_background_says_why_it_cannot_begin() {
    let (dir, path) = place();
    fs::write(&path, "a file").unwrap();
    let output = command(dir.path(), "--socket iv.sock --background")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = words_of(&output);
    assert!(
        words.contains("`iv.sock` exists and is not a socket"),
        "{words}"
    );
    let output = command(dir.path(), "--socket iv.sock --size 5")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn one_that_has_no_descriptors_left_goes_on_when_there_are_some_again() {
    let (dir, path) = place();
    let mut limited = Command::new("sh");
    let words =
        "ulimit -n 40 && exec \"$0\" ivshmem server --socket iv.sock --size 64K --stall 600";
    limited
        .args(["-c", words, env!("CARGO_BIN_EXE_vmsg")])
        .current_dir(dir.path())
        .env_remove("NOTIFY_SOCKET")
        .env("VMSG_LOG", "error")
        .stdin(Stdio::null());
    let mut server = Server::spawn(limited);
    // None of them reads, so that the descriptors that are sent to them are in the way as well.
    let many: Vec<UnixStream> = (0..60)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    let stat = format!("/proc/{}/stat", server.child.id());
    let used = || {
        // User and system time: proc(5), fields 14 and 15.
        let stat = fs::read_to_string(&stat).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
        fields
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().unwrap())
            .sum::<u64>()
    };
    let before = used();
    // Nothing will come: this only passes the time.
    let mut one = many[0].try_clone().unwrap();
    one.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = [0; 8];
    one.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
    one.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    while one.read_exact(&mut bytes).is_ok() {}
    // A hundred ticks are a second of a processor.
    let spent = used() - before;
    assert!(
        spent < 50,
        "{spent} ticks in a second in which nothing can be done"
    );
    drop((one, many));
    // Not one of them may be left behind.
    for _ in 0..300 {
        drop(UnixStream::connect(&path).unwrap());
    }
    let until = Instant::now() + LONG;
    let good = loop {
        match Client::connect(&path, LONG) {
            Ok(client) => break client,
            // As long as those are not heard that have gone.
            Err(error) => assert!(error.is_transient() && Instant::now() < until, "{error}"),
        }
    };
    good.ring(good.id(), 0).unwrap();
    assert!(is_readable(good.vector_fd(0).unwrap(), LONG));
    server.signal(Signal::TERM);
    let (stats, well) = server.end();
    assert!(well && stats.contains("stalled=0,spoke=0"), "{stats}");
}
