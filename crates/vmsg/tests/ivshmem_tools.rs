// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem peek, poke, dump, ring, wait, ping, copy` as a person runs them on the host: over a server and over a
//! file.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use tempfile::TempDir;

fn command(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
    command
        .arg("ivshmem")
        .args(words)
        .current_dir(dir)
        .env_remove("NOTIFY_SOCKET")
        .env_remove("VMSG_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs one to its end.
fn run(dir: &Path, words: &[&str]) -> Output {
    command(dir, words).output().expect("vmsg runs")
}

/// The same; it must succeed. What it printed.
fn told(dir: &Path, words: &[&str]) -> String {
    let output = run(dir, words);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {err}");
    String::from_utf8(output.stdout).expect("text")
}

/// The same; it must fail with this exit status. What it complained of.
fn refused(dir: &Path, words: &[&str], status: i32) -> String {
    let output = run(dir, words);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {err}");
    err
}

/// One that goes on beside the test, and is killed if that leaves it behind.
struct Beside {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Beside {
    fn start(dir: &Path, words: &[&str]) -> Self {
        let mut child = command(dir, words)
            .stdout(Stdio::piped())
            .spawn()
            .expect("vmsg starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("text");
        line
    }

    /// The number behind `id=` in its first line.
    fn id(&mut self) -> String {
        let line = self.line();
        let id = line.split(' ').find_map(|word| word.strip_prefix("id="));
        id.unwrap_or_else(|| panic!("no id in {line:?}")).to_owned()
    }

    /// Waits for its end, a good one; what it printed since.
    fn end(mut self) -> String {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).expect("text");
        assert!(self.child.wait().expect("a child").success(), "{rest}");
        rest
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with a server on iv.sock.
fn served() -> (TempDir, Beside) {
    let dir = tempfile::tempdir().expect("directory");
    let words = [
        "server",
        "--socket",
        "iv.sock",
        "--size",
        "1M",
        "--vectors",
        "2",
    ];
    let mut server = Beside::start(dir.path(), &words);
    assert_eq!(server.line(), "ready ivshmem=iv.sock\n");
    (dir, server)
}

/// Longer than the memory.
fn content() -> Vec<u8> {
    (0..2_500_001usize)
        .map(|at| (at * 31 + at / 257).to_le_bytes()[0])
        .collect()
}

#[test]
fn what_one_stores_another_one_loads() {
    let (dir, _server) = served();
    let dir = dir.path();
    told(
        dir,
        &["poke", "--socket", "iv.sock", "0x1000", "4", "0x6c6c6548"],
    );
    told(dir, &["poke", "--socket", "iv.sock", "0x1004", "1", "0x6f"]);
    let word = told(dir, &["peek", "--socket", "iv.sock", "4K", "8"]);
    assert_eq!(word, "0x0000006f6c6c6548\n");
    let text = told(dir, &["dump", "--socket", "iv.sock", "0x1000", "16"]);
    assert_eq!(
        text,
        "00001000  48 65 6c 6c 6f 00 00 00  00 00 00 00 00 00 00 00  |Hello...........|\n"
    );
    let info = told(dir, &["info", "--socket", "iv.sock"]);
    assert!(info.contains("1 MiB (ordinary memory)") && info.contains("vectors 2"));
}

#[test]
fn doorbells_are_told_with_their_vector_and_how_often() {
    let (dir, _server) = served();
    let dir = dir.path();
    let mut waiting = Beside::start(
        dir,
        &[
            "wait",
            "--socket",
            "iv.sock",
            "--timeout",
            "20",
            "--count",
            "3",
        ],
    );
    let id = waiting.id();
    told(dir, &["ring", "--socket", "iv.sock", &id]);
    let target = format!("{id}:1");
    told(
        dir,
        &["ring", "--socket", "iv.sock", &target, "--count", "2"],
    );
    let said = waiting.end();
    let times = |vector: u32| -> u32 {
        let front = format!("vector={vector} times=");
        said.lines()
            .filter_map(|line| line.split_once(&front)?.1.parse::<u32>().ok())
            .sum()
    };
    assert_eq!((times(0), times(1)), (1, 2), "{said}");
    assert!(said.contains("joined peer="), "{said}");
    let error = refused(dir, &["ring", "--socket", "iv.sock", "4711"], 1);
    assert!(error.contains("no peer has the id 4711"), "{error}");
    let error = refused(dir, &["ring", "--socket", "iv.sock", "x"], 2);
    assert!(error.contains("3:1"), "{error}");
    for offset in ["x", "0xg"] {
        let error = refused(dir, &["peek", offset, "--socket", "iv.sock"], 2);
        assert!(
            error.contains("64K") && !error.contains("bytes="),
            "{error}"
        );
    }
    let error = refused(
        dir,
        &["wait", "--socket", "iv.sock", "--timeout", "0.05"],
        1,
    );
    assert!(error.contains("no doorbell for 0.05 s"), "{error}");
}

#[test]
fn round_trips_are_measured_with_doorbells_and_without() {
    let (dir, _server) = served();
    let dir = dir.path();
    for (way, place) in [("--socket", "iv.sock"), ("--file", "memory")] {
        fs::write(dir.join("memory"), [0; 4096]).expect("written");
        let mut answering = Beside::start(
            dir,
            &[
                "ping",
                "--answer",
                way,
                place,
                "--count",
                "50",
                "--timeout",
                "20",
            ],
        );
        let id = answering.id();
        let mut words = vec!["ping", way, place, "--count", "50", "--timeout", "20"];
        if way == "--socket" {
            words.push(&id);
        }
        let said = told(dir, &words);
        assert!(said.contains("50 pings, 50 answers, round trip"), "{said}");
        assert_eq!(answering.end(), "50 pings answered\n");
    }
    let words = ["ping", "--file", "memory", "--count", "1", "--timeout"];
    let error = refused(dir, &[&words[..], &["0.05"]].concat(), 1);
    assert!(error.contains("nobody answers"), "{error}");
}

#[test]
fn files_are_copied_in_either_order_with_their_checksum() {
    let (dir, _server) = served();
    let dir = dir.path();
    let file = content();
    fs::write(dir.join("file"), &file).expect("written");
    for (way, place) in [("--socket", "iv.sock"), ("--file", "memory")] {
        fs::write(dir.join("memory"), vec![0; 1 << 16]).expect("written");
        let receive = ["copy", "--receive", "copy", way, place];
        let receiver = Beside::start(dir, &receive);
        let sent = told(dir, &["copy", "file", way, place]);
        let received = receiver.end();
        let sum = |text: &str| text.split("sha256 ").nth(1).map(str::to_owned);
        assert_eq!(sum(&sent), sum(&received));
        assert_eq!(sum(&sent).expect("a checksum").trim().len(), 64);
        assert!(fs::read(dir.join("copy")).expect("there") == file);

        fs::remove_file(dir.join("copy")).expect("there");
        let sender = Beside::start(dir, &["copy", "file", way, place]);
        told(dir, &receive);
        sender.end();
        assert!(fs::read(dir.join("copy")).expect("there") == file);
    }
}

#[test]
fn a_copy_that_cannot_be_says_so_and_leaves_nothing() {
    let (dir, _server) = served();
    let dir = dir.path();
    fs::write(dir.join("file"), content()).expect("written");
    let words = ["copy", "file", "--socket", "iv.sock", "--timeout", "0.1"];
    let error = refused(dir, &words, 1);
    assert!(error.contains("nobody is there"), "{error}");

    let sender = Beside::start(dir, &["copy", "file", "--socket", "iv.sock"]);
    let receive = ["copy", "--receive", "copy", "--socket", "iv.sock"];
    let error = refused(dir, &[&receive[..], &["--limit", "1M"]].concat(), 1);
    assert!(error.contains("2500001 bytes is offered"), "{error}");
    let mut sender = sender;
    assert!(!sender.child.wait().expect("a child").success());
    let names = fs::read_dir(dir).expect("read");
    let names: Vec<_> = names
        .map(|entry| {
            entry
                .expect("read")
                .file_name()
                .into_string()
                .expect("text")
        })
        .filter(|name| name.contains("copy"))
        .collect();
    assert_eq!(names, Vec::<String>::new());
}

#[test]
fn a_sender_that_is_killed_is_noticed() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    fs::write(dir.join("memory"), vec![0; 4096]).expect("written");
    let sparse = fs::File::create(dir.join("large")).expect("made");
    sparse.set_len(1 << 30).expect("set");
    let mut sender = Beside::start(dir, &["copy", "large", "--file", "memory"]);
    let mut receiver = command(
        dir,
        &[
            "copy",
            "--receive",
            "copy",
            "--file",
            "memory",
            "--timeout",
            "4",
        ],
    );
    let mut receiver = receiver
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmsg starts");
    // Once the receiver's position has moved, it is under way: 24 bytes into its block, in the memory's second half.
    let moved = || {
        let memory = fs::read(dir.join("memory")).expect("read");
        memory[2048 + 128 + 24..][..4] != [0; 4]
    };
    while !moved() {
        let ended = receiver.try_wait().expect("a child");
        assert!(ended.is_none(), "it did not wait for the sender");
        std::thread::yield_now();
    }
    sender.child.kill().expect("killed");
    let output = receiver.wait_with_output().expect("a child");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("the other side stands still"), "{error}");
    assert!(!dir.join("copy").exists());
}

#[test]
fn mistakes_are_told_from_what_went_wrong() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    fs::write(dir.join("memory"), [0; 4096]).expect("written");
    let place = ["--file", "memory"];
    let refused = |words: &[&str], status| refused(dir, &[words, &place[..]].concat(), status);
    for words in [
        &["peek", "2"][..],
        &["peek", "4096"],
        &["peek", "0", "3"],
        &["poke", "0", "1", "256"],
        &["dump", "0", "4097"],
        &["ping", "--offset", "4090"],
        &["copy", "memory", "--space", "100"],
        &["peek", "0", "--shm", "also"],
    ] {
        refused(words, 2);
    }
    let error = refused(&["wait"], 1);
    assert!(error.contains("there are no doorbells here"), "{error}");
    let error = refused(&["copy", "absent"], 1);
    assert!(error.contains("absent"), "{error}");
    let output = run(dir, &["peek", "0"]);
    assert_eq!(output.status.code(), Some(2), "no memory is named");
    let error = self::refused(dir, &["peek", "0", "--file", "absent"], 1);
    assert!(error.contains("absent does not exist"), "{error}");
    let error = self::refused(dir, &["info", "--pci", "nonsense"], 2);
    assert!(error.contains("0000:00:04.0"), "{error}");
}

#[test]
fn one_who_is_somebody_else_all_the_time_holds_nobody_up() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    fs::write(dir.join("memory"), vec![0; 4096]).expect("written");
    fs::write(dir.join("file"), content()).expect("written");
    let memory = fs::File::options()
        .write(true)
        .open(dir.join("memory"))
        .expect("there");
    let words = ["copy", "file", "--file", "memory", "--timeout", "0.3"];
    let mut sender = command(dir, &words)
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmsg starts");
    // The receiver's block: its magic, and its number 8 bytes further on.
    let block = 2048 + 128;
    memory.write_all_at(b"cpRX", block).expect("written");
    let mut number = 0u32;
    while sender.try_wait().expect("a child").is_none() {
        number = number.wrapping_add(1);
        memory
            .write_all_at(&number.to_le_bytes(), block + 8)
            .expect("written");
    }
    let output = sender.wait_with_output().expect("a child");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("nobody is there"), "{error}");
}
