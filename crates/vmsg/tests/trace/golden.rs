// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The recorded conversations of other implementations.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use virtio_msg::r1;
use vmsg_bus::trace::Layout;

use crate::tshark::{self, packets};
use crate::{direction, interface};

fn files(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../virtio-msg/tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(root.join(folder))
        .expect("the recordings")
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    files
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    Some(
        digits
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |byte, d| byte << 4 | d))
            .collect(),
    )
}

/// Messages of a file: whether it goes to the device, and its bytes. Forms of lines: golden/README.md.
fn messages(path: &Path, header: usize, whole: Option<usize>) -> Vec<(bool, Vec<u8>)> {
    let text = std::fs::read_to_string(path).expect("a text");
    let of_device = path.to_string_lossy().ends_with(".device.txt");
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .map(|line| {
            let (head, payload) = line.split_once('|').unwrap_or((line, ""));
            if payload.is_empty() && !line.contains('|') {
                let mut parts = line.split_whitespace();
                let to_device = parts.next() == Some("d>D");
                return (to_device, unhex(parts.next().expect("bytes")).expect("hex"));
            }
            let words: Vec<&str> = head.split_whitespace().collect();
            let mut bytes = unhex(&words[words.len() - header..].concat()).expect("hex");
            bytes.extend(unhex(payload).expect("hex"));
            // Zeros at the end were cut off.
            let len = whole.unwrap_or_else(|| usize::from(bytes[6]) | usize::from(bytes[7]) << 8);
            bytes.resize(bytes.len().max(len), 0);
            (words[0] == ">" || (words[0] != "<" && !of_device), bytes)
        })
        .collect()
}

type Recording = (PathBuf, Vec<(bool, Vec<u8>)>);

/// Wireshark finds fault with exactly those messages that the decoder refuses. Says how many there are, of both kinds.
fn same_verdict(layout: Layout, recordings: &[Recording]) -> (usize, usize) {
    let folder = TempDir::new().expect("a folder");
    let trace = folder.path().join("t");
    for (_, messages) in recordings {
        let mut interface = interface(&trace, layout);
        for (to_device, message) in messages {
            interface.record(direction(*to_device), message, 0);
        }
    }
    let messages = recordings
        .iter()
        .flat_map(|(path, messages)| messages.iter().map(move |(_, message)| (path, message)));
    let packets = packets(&trace);
    assert_eq!(packets.len(), messages.clone().count());
    let (mut good, mut bad) = (0, 0);
    for ((path, message), packet) in messages.zip(&packets) {
        let decoded = match layout {
            Layout::R1 => r1::decode(message).map(|frame| frame.message.name()),
            _ => virtio_msg::decode(message, 65536).map(|frame| frame.message.name()),
        };
        let place = || format!("{}: {message:02x?} {decoded:?}", path.display());
        assert_eq!(packet.is_malformed(), decoded.is_err(), "{}", place());
        match decoded {
            Ok(name) => {
                assert_eq!(packet.text("virtio_msg.name"), name, "{}", place());
                good += 1;
            }
            Err(_) => bad += 1,
        }
    }
    (good, bad)
}

#[test]
fn recorded_conversations_have_no_malformed_message() {
    if !tshark::is_there() {
        return;
    }
    let recordings: Vec<Recording> = [files("linux"), files("qemu")]
        .concat()
        .into_iter()
        .map(|path| (path.clone(), messages(&path, 8, None)))
        .collect();
    let (good, bad) = same_verdict(Layout::Revision1, &recordings);
    // Linux drivers get responses to events, which are no messages: golden/README.md.
    let answers = recordings
        .iter()
        .flat_map(|(_, messages)| messages)
        .filter(|(_, message)| message[0] & 1 == 1 && message[1] == 0x41);
    assert_eq!(bad, answers.count());
    assert!(good > 500, "{good}");
}

#[test]
fn recorded_r1_conversations_have_no_malformed_message() {
    if !tshark::is_there() {
        return;
    }
    let recordings: Vec<Recording> = files("r1")
        .into_iter()
        .map(|path| (path.clone(), messages(&path, 4, Some(40))))
        .collect();
    let (good, bad) = same_verdict(Layout::R1, &recordings);
    assert_eq!(bad, 0);
    assert!(good > 100, "{good}");
}
