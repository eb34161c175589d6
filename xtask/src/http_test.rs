// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::{FILE_SIZE, Server, sum_of};

fn get(server: &Server, path: &str, extra: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(server.address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let body = answer.split_off(end + 4);
    (String::from_utf8(answer).unwrap(), body)
}

#[test]
fn the_file_comes_whole_with_the_checksum_told() {
    let server = Server::start(FILE_SIZE).unwrap();
    let (head, body) = get(&server, "/file", "");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.contains(&format!("Content-Length: {FILE_SIZE}")),
        "{head}"
    );
    assert_eq!(sum_of(body.as_slice()).unwrap(), server.sha256());
    assert_eq!(server.requests(), 1);
}

#[test]
fn a_download_goes_on_where_it_stopped() {
    let server = Server::start(FILE_SIZE).unwrap();
    let (head, body) = get(&server, "/file", "Range: bytes=16777000-\r\n");
    assert!(head.starts_with("HTTP/1.1 206"), "{head}");
    assert_eq!(body.len(), FILE_SIZE - 16_777_000);
}

#[test]
fn nothing_beyond_the_gate_is_sent_until_it_opens() {
    let server = Server::start(1000).unwrap();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.write_all(b"GET /file HTTP/1.1\r\n\r\n").unwrap();
    let mut byte = [0];
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        "{error}"
    );
    stream.set_read_timeout(None).unwrap();
    server.open_to(FILE_SIZE);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), FILE_SIZE - 1000);
}

#[test]
fn other_paths_and_ranges_are_refused() {
    let server = Server::start(FILE_SIZE).unwrap();
    assert!(get(&server, "/", "").0.starts_with("HTTP/1.1 404"));
    assert!(
        get(&server, "/file", "Range: bytes=99999999999-\r\n")
            .0
            .starts_with("HTTP/1.1 416")
    );
}

#[test]
fn what_is_posted_is_summed() {
    // Example of FIPS 180-2.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(sum_of(&b"abc"[..]).unwrap(), ABC);
    let server = Server::start(0).unwrap();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream
        .write_all(b"POST /sum HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with(ABC), "{answer}");
}
