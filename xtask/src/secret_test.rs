// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use memchr::memmem::Finder;
use rustix::process::{Pid, Signal, kill_process};

use super::{CHUNK, LENGTH, random, scan, search};

#[test]
fn bytes_across_two_reads_are_found() {
    let secret = random().expect("random bytes");
    let mut content = vec![0; CHUNK + 100];
    content[CHUNK - 10..CHUNK - 10 + LENGTH].copy_from_slice(&secret);
    let mut at = 0;
    let mut pieces = |size: usize| {
        at = 0;
        let content = &content;
        scan(&Finder::new(&secret), |buffer| {
            let count = size.min(buffer.len()).min(content.len() - at);
            buffer[..count].copy_from_slice(&content[at..at + count]);
            at += count;
            Ok(count)
        })
        .1
    };
    assert!(pieces(CHUNK));
    assert!(pieces(1000));
    assert!(!scan(&Finder::new(&secret), |_| Ok(0)).1);
}

#[test]
fn what_a_child_of_the_process_has_in_memory_or_in_a_file_is_found() {
    let secret = random().expect("random bytes");
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&secret).expect("writes");
    // A shell that waits for its child; the child has the file open, by its standard input.
    let mut shell = Command::new("sh")
        .args(["-c", "sleep 100 > /dev/null 2>&1 & echo $!; wait"])
        .stdin(Stdio::from(file))
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut child = String::new();
    BufReader::new(shell.stdout.take().expect("a pipe"))
        .read_line(&mut child)
        .expect("the child's id");
    let found = search(shell.id(), &secret).expect("it can be read");
    let other = search(shell.id(), &random().expect("random bytes")).expect("it can be read");
    let child = child.trim().parse().ok().and_then(Pid::from_raw);
    kill_process(child.expect("the child's id"), Signal::KILL).expect("it runs");
    shell.wait().expect("it ends with its child");
    assert!(!found.open.is_empty(), "{found:?}");
    assert!(
        other.open.is_empty() && other.mapped.is_empty(),
        "{other:?}"
    );
}
