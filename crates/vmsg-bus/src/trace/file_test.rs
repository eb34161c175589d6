// SPDX-License-Identifier: Apache-2.0 OR MIT

use crate::trace::{Item, OpenError, Reader, Side, Writer};
use crate::{Capabilities, Peer, tap::Direction};
use std::path::{Path, PathBuf};

fn path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("t.pcapng")
}

fn record(path: &Path, message: &[u8]) {
    let writer = Writer::open(path).unwrap();
    let peer = Peer::named("peer");
    let mut interface = writer.interface("b0", Side::Driver, &peer, &Capabilities::all(320));
    interface.record(Direction::Sent, message, 0);
}

/// Messages and sections.
fn read(path: &Path) -> (Vec<Vec<u8>>, usize) {
    let bytes = std::fs::read(path).unwrap();
    let mut reader = Reader::new(&bytes[..]);
    let (mut messages, mut sections) = (Vec::new(), 0);
    while let Some(item) = reader.next_item().unwrap() {
        match item {
            Item::Message(m) => messages.push(m.message.to_vec()),
            Item::Section { application } => {
                assert!(application.starts_with("vmsg "), "{application}");
                sections += 1;
            }
            _ => {}
        }
    }
    assert_eq!(reader.unfinished().1, 0);
    (messages, sections)
}

#[test]
fn a_file_that_is_there_is_continued() {
    let folder = tempfile::tempdir().unwrap();
    record(&path(&folder), b"one");
    record(&path(&folder), b"two");
    assert_eq!(
        read(&path(&folder)),
        (vec![b"one".to_vec(), b"two".to_vec()], 2)
    );
}

#[test]
fn what_a_killed_process_left_unfinished_is_cut_off_wherever_it_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    record(&path, b"one");
    let whole = std::fs::read(&path).unwrap();
    for len in 0..whole.len() {
        std::fs::write(&path, &whole[..len]).unwrap();
        record(&path, b"two");
        let (messages, _) = read(&path);
        assert_eq!(messages.last().unwrap(), b"two", "cut after {len}");
    }
}

#[test]
fn other_files_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let foreign: [&[u8]; 3] = [b"a letter to somebody", b"x", &[0; 100]];
    for bytes in foreign {
        std::fs::write(&path, bytes).unwrap();
        let error = Writer::open(&path).unwrap_err();
        assert!(
            matches!(error, OpenError::Foreign { offset: 0, .. }),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
    // Begins well, but then.
    std::fs::remove_file(&path).unwrap();
    record(&path, b"one");
    let mut bytes = std::fs::read(&path).unwrap();
    let len = bytes.len();
    bytes[len - 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = Writer::open(&path).unwrap_err();
    assert!(
        matches!(error, OpenError::Foreign { offset: 1.., .. }),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    // A length that would have all that follows be cut off as unfinished.
    let mut bytes = bytes.clone();
    bytes[len - 1] = 0;
    bytes.extend([5, 0, 0, 0, 0xfc, 0xff, 0xff, 0xff]);
    bytes.extend([7; 4000]);
    std::fs::write(&path, &bytes).unwrap();
    let error = Writer::open(&path).unwrap_err();
    assert!(error.to_string().contains("more than 1 MiB"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let error = Writer::open(folder.path()).unwrap_err();
    assert!(matches!(error, OpenError::NotAFile { .. }), "{error}");
    assert!(matches!(
        Writer::open(&folder.path().join("no/t")),
        Err(OpenError::Os { what: "open", .. })
    ));
}

#[test]
fn one_process_at_a_time_and_in_it_as_many_as_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    // As another process has it.
    let held = std::fs::File::create(&path).unwrap();
    held.lock().unwrap();
    assert!(matches!(Writer::open(&path), Err(OpenError::InUse { .. })));
    drop(held);
    let first = Writer::open(&path).unwrap();
    record(&path, b"two");
    record(&path, b"three");
    drop(first);
    let (messages, sections) = read(&path);
    assert_eq!(messages, [b"two".to_vec(), b"three".to_vec()]);
    assert_eq!(sections, 1);
}

#[test]
fn a_pipe_is_refused_without_waiting_for_its_reader() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(matches!(
        Writer::open(&path),
        Err(OpenError::NotAFile { .. })
    ));
}
