// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small HTTP server on the host's loopback, from which guests fetch a file.
//!
//! Answers `POST /sum` with the SHA-256 of what was sent, and serves `GET /file` (and `Range: bytes=N-`, with which an interrupted download goes on) of known content, up to a
//! *gate*: bytes beyond it are held back until the gate is opened further. So a test can have a download under way for
//! as long as it needs, without a clock.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The size of the file in bytes.
pub(crate) const FILE_SIZE: usize = 16 << 20;
/// How much is written to a connection at once, in bytes.
const CHUNK: usize = 64 << 10;
/// Requests with longer heads are refused.
const MAX_HEAD: u64 = 16 << 10;

/// A running server. Its threads end with the program.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    sha256: String,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    content: Vec<u8>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Bytes from here on are held back.
    gate: usize,
    /// Requests answered with (a part of) the file.
    requests: usize,
}

impl Server {
    /// Starts a server on a free port, with the gate at `gate` bytes.
    pub(crate) fn start(gate: usize) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on 127.0.0.1")?;
        let content = content();
        let sha256 = Sha256::digest(&content)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let shared = Arc::new(Shared {
            content,
            state: Mutex::new(State { gate, requests: 0 }),
            changed: Condvar::new(),
        });
        let address = listener.local_addr()?;
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                // A connection that breaks is the client's affair.
                thread::spawn(move || drop(shared.answer(&stream)));
            }
        });
        Ok(Self {
            address,
            sha256,
            shared,
        })
    }

    /// The TCP port on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// The SHA-256 of the file, in hex.
    pub(crate) fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Lets bytes up to `gate` through.
    pub(crate) fn open_to(&self, gate: usize) {
        self.shared.lock().gate = gate;
        self.shared.changed.notify_all();
    }

    /// How many requests have been answered with the file or a part of it.
    pub(crate) fn requests(&self) -> usize {
        self.shared.lock().requests
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut head = BufReader::new(stream).take(MAX_HEAD);
        let mut request = String::new();
        head.read_line(&mut request)?;
        let (mut from, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            head.read_line(&mut line)?;
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':') {
                match name.to_ascii_lowercase().as_str() {
                    "range" => from = range_start(value).unwrap_or(0),
                    "content-length" => length = value.trim().parse().unwrap_or(0),
                    _ => {}
                }
            }
        }
        if request.starts_with("POST /sum ") {
            head.set_limit(length);
            let sum = sum_of(head)?;
            let size = sum.len();
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{sum}"
            );
        }
        if !request.starts_with("GET /file ") || from > self.content.len() {
            let why = if from > self.content.len() {
                "416 Range Not Satisfiable"
            } else {
                "404 Not Found"
            };
            return write!(
                stream,
                "HTTP/1.1 {why}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        let size = self.content.len();
        let length = size - from;
        let status = if from == 0 {
            "200 OK".to_owned()
        } else {
            format!(
                "206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}",
                size - 1
            )
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )?;
        self.lock().requests += 1;
        let mut at = from;
        while at < size {
            let open = {
                let state = self.changed.wait_while(self.lock(), |s| s.gate <= at);
                state.unwrap_or_else(PoisonError::into_inner).gate.min(size)
            };
            let end = open.min(at + CHUNK);
            stream.write_all(&self.content[at..end])?;
            at = end;
        }
        Ok(())
    }
}

/// The SHA-256 of all that can be read, in hex.
pub(crate) fn sum_of(mut from: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            length => hash.update(&chunk[..length]),
        }
    }
}

/// `bytes=N-` gives N.
fn range_start(value: &str) -> Option<usize> {
    value
        .trim()
        .strip_prefix("bytes=")?
        .split('-')
        .next()?
        .parse()
        .ok()
}

/// The file: the same bytes in every run, not compressible, no two blocks alike (xorshift64).
fn content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = Vec::with_capacity(FILE_SIZE);
    while content.len() < FILE_SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content
}

#[cfg(test)]
#[path = "http_test.rs"]
mod tests;
