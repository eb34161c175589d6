// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;

fn message(frame: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(frame);
    bytes
}

#[test]
fn a_stream_may_be_cut_anywhere() {
    let frames: Vec<Vec<u8>> = [14usize, 60, 1514, 3, 9000]
        .iter()
        .map(|len| (0..*len).map(|i| u8::try_from(i % 253).unwrap()).collect())
        .collect();
    let whole: Vec<u8> = frames.iter().flat_map(|frame| message(frame)).collect();
    for cut in 0..whole.len() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut input = Input::new();
        let mut got = Vec::new();
        for part in [&whole[..cut], &whole[cut..]] {
            theirs.write_all(part).unwrap();
            while input.receive(ours.as_fd()) == Ok(Received::Some) {
                loop {
                    match input.next().unwrap() {
                        Next::Frame(frame) => got.push(frame.to_vec()),
                        Next::Runt => got.push(vec![0, 1, 2]),
                        Next::Incomplete => break,
                    }
                    assert!(input.has_next());
                    input.consume();
                }
                assert!(!input.has_next());
            }
        }
        assert_eq!(got, frames, "cut at {cut}");
        drop(theirs);
        assert_eq!(input.receive(ours.as_fd()), Ok(Received::Closed));
    }
}

#[test]
fn the_longest_frame_fits_at_any_place_and_longer_ones_are_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let longest = vec![7; LONGEST];
    let writer = std::thread::spawn(move || {
        for len in 0..200 {
            let small = vec![1; 14 + len * 50];
            theirs.write_all(&message(&small)).unwrap();
            theirs.write_all(&message(&longest)).unwrap();
        }
        theirs
    });
    let mut input = Input::new();
    let mut lengths = Vec::new();
    while lengths.len() < 400 {
        match input.next().unwrap() {
            Next::Frame(frame) => {
                let value = if frame.len() == LONGEST { 7 } else { 1 };
                assert!(frame.iter().all(|byte| *byte == value));
                lengths.push(frame.len());
                input.consume();
            }
            _ => assert!(input.receive(ours.as_fd()).is_ok()),
        }
    }
    assert!(lengths.iter().skip(1).step_by(2).all(|len| *len == LONGEST));
    let mut theirs = writer.join().unwrap();
    for bad in [0, LONGEST + 1, 1 << 31, u32::MAX as usize] {
        let bad = u32::try_from(bad).unwrap();
        theirs.write_all(&bad.to_be_bytes()).unwrap();
        assert_eq!(input.receive(ours.as_fd()), Ok(Received::Some));
        assert!(input.has_next());
        assert_eq!(input.next(), Err(BadLength(bad)));
        // Nothing gets past it.
        input.consume();
        assert_eq!(input.next(), Err(BadLength(bad)));
        input.clear();
    }
}
