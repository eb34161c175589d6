// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;

use vmsg_mem::{Mapping, QueueMemory};

use super::*;

/// More than the ring holds several times, and no multiple of anything.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at * 7 + at / 251).to_le_bytes()[0])
        .collect()
}

fn memory(bytes: usize) -> DeviceSlice {
    let (mapping, _fd) = Mapping::memfd("copy", 1 << 20, true).expect("memory");
    DeviceSlice::of_ram(Arc::new(mapping), 0, bytes).expect("inside")
}

fn sender<'f>(memory: &DeviceSlice, number: u32, file: &'f [u8]) -> Sender<&'f [u8]> {
    let size = file.len() as u64;
    let area = Area::new(memory, Side::Sender, number, Some(PeerId(1)), size).expect("room");
    Sender::new(area, file, size)
}

fn receiver(memory: &DeviceSlice, number: u32) -> Receiver<Vec<u8>> {
    let area = Area::new(memory, Side::Receiver, number, None, 0).expect("room");
    Receiver::new(area, Vec::new(), 1 << 20)
}

/// Steps both sides in turn until the receiver is done, then the sender.
fn run_both(sender: &mut Sender<&[u8]>, receiver: &mut Receiver<Vec<u8>>) {
    for _ in 0..100_000 {
        sender.step().expect("nothing is wrong");
        if receiver.step().expect("nothing is wrong") == Step::Done {
            receiver.area().set_state(State::Done);
            assert_eq!(sender.step().expect("right"), Step::Done);
            assert_eq!(sender.digest(), receiver.digest());
            return;
        }
    }
    panic!("it never ends");
}

#[test]
fn a_file_arrives_whole_whatever_the_size_of_the_ring() {
    for (space, bytes) in [
        (LEAST, 1000),
        (4000, 100_001),
        (1 << 20, 300_000),
        (4096, 0),
        (4096, 4096 - 256),
    ] {
        let (memory, file) = (memory(space), content(bytes));
        let mut sender = sender(&memory, 5, &file);
        let mut receiver = receiver(&memory, 6);
        run_both(&mut sender, &mut receiver);
        assert_eq!(receiver.received(), bytes as u64);
        assert!(
            receiver.into_sink() == file,
            "{bytes} bytes through {space}"
        );
    }
}

#[test]
fn either_side_may_be_first_and_what_others_left_behind_is_no_peer() {
    let (memory, file) = (memory(4096), content(10_000));
    let mut old = sender(&memory, 1, b"old");
    let mut old_receiver = receiver(&memory, 2);
    run_both(&mut old, &mut old_receiver);

    let mut receiver_first = receiver(&memory, 3);
    for _ in 0..10 {
        receiver_first.step().expect("it waits");
    }
    assert!(!receiver_first.area().is_together(), "with a dead sender");
    let mut sender_second = sender(&memory, 4, &file);
    run_both(&mut sender_second, &mut receiver_first);

    let mut sender_first = sender(&memory, 7, &file);
    for _ in 0..10 {
        sender_first.step().expect("it waits");
    }
    assert!(!sender_first.area().is_together(), "with a dead receiver");
    let mut receiver_second = receiver(&memory, 8);
    run_both(&mut sender_first, &mut receiver_second);
    assert!(receiver_second.into_sink() == file);
}

#[test]
fn a_side_that_begins_anew_ends_the_copy_of_the_other() {
    let (memory, file) = (memory(4096), content(10_000));
    let mut one = sender(&memory, 1, &file);
    let mut other = receiver(&memory, 2);
    for _ in 0..4 {
        one.step().expect("right");
        other.step().expect("right");
    }
    let _again = receiver(&memory, 3);
    assert!(matches!(one.step(), Err(CopyError::Replaced)));
}

/// A receiver that is together with a sender of 1000 bytes whose block the test writes.
fn with_hostile_sender() -> (DeviceSlice, Receiver<Vec<u8>>) {
    let memory = memory(4096);
    let mut hostile = sender(&memory, 1, &[7; 1000]);
    let mut receiver = receiver(&memory, 2);
    while !receiver.area().is_together() {
        hostile.step().expect("right");
        receiver.step().expect("right");
    }
    (memory, receiver)
}

fn failure(receiver: &mut Receiver<Vec<u8>>) -> CopyError {
    for _ in 0..100 {
        if let Err(error) = receiver.step() {
            return error;
        }
    }
    panic!("it is not noticed");
}

/// Offsets in the sender's block.
const STATE: usize = 20;
const POSITION: usize = 24;
const DIGEST: usize = 64;

#[test]
fn positions_of_a_hostile_sender_lead_nowhere() {
    for position in [1001, 3841, u32::MAX, 1 << 31] {
        let (memory, mut receiver) = with_hostile_sender();
        memory.store_relaxed(POSITION, position);
        let error = failure(&mut receiver);
        assert!(matches!(error, CopyError::Nonsense(_)), "{error}");
        assert!(receiver.into_sink().len() <= 1000);
    }
    // Backwards, after something was taken.
    let (memory, mut receiver) = with_hostile_sender();
    memory.store_relaxed(STATE, 1);
    memory.store_relaxed(POSITION, 500);
    while receiver.received() < 500 {
        receiver.step().expect("right so far");
    }
    memory.store_relaxed(POSITION, 499);
    assert!(matches!(failure(&mut receiver), CopyError::Nonsense(_)));
}

#[test]
fn a_wrong_digest_and_wrong_states_are_named() {
    let (memory, mut receiver) = with_hostile_sender();
    memory.store_relaxed(POSITION, 1000);
    memory.store_relaxed(STATE, 2);
    memory.store_relaxed(DIGEST, 0x1234_5678);
    assert!(matches!(failure(&mut receiver), CopyError::Wrong));

    let (memory, mut receiver) = with_hostile_sender();
    let taken = u32::try_from(receiver.received()).expect("small");
    memory.store_relaxed(POSITION, taken);
    memory.store_relaxed(STATE, 2);
    if taken < 1000 {
        assert!(matches!(failure(&mut receiver), CopyError::Nonsense(_)));
    }
    for (state, nonsense) in [(0, true), (9, true), (3, true), (4, false)] {
        let (memory, mut receiver) = with_hostile_sender();
        memory.store_relaxed(STATE, state);
        let error = failure(&mut receiver);
        assert_eq!(matches!(error, CopyError::Nonsense(_)), nonsense, "{error}");
    }
}

#[test]
fn a_file_beyond_the_limit_is_refused_before_a_byte_is_written() {
    let memory = memory(4096);
    let area = Area::new(&memory, Side::Sender, 1, None, u64::MAX).expect("room");
    let mut hostile = Sender::new(area, &[][..], 0);
    let mut receiver = receiver(&memory, 2);
    let error = loop {
        hostile.step().expect("right");
        if let Err(error) = receiver.step() {
            break error;
        }
    };
    assert!(matches!(error, CopyError::TooLarge { .. }));
    assert!(receiver.into_sink().is_empty());
}

#[test]
fn a_hostile_receiver_gets_no_more_than_the_file() {
    // Where the receiver's block has its words.
    const RECEIVER: usize = 128;
    let file = content(10_000);
    for (offset, value) in [
        (STATE, 2),
        (STATE, 77),
        (POSITION, 1),
        (POSITION, u32::MAX - 5000),
        (8, 99),
    ] {
        let memory = memory(4096);
        let mut one = sender(&memory, 1, &file);
        let mut other = receiver(&memory, 2);
        while !one.area().is_together() {
            other.step().expect("right");
            one.step().expect("right");
        }
        let sent = memory.load_relaxed(POSITION);
        let value = if offset == POSITION {
            value.wrapping_add(sent)
        } else {
            value
        };
        memory.store_relaxed(RECEIVER + offset, value);
        let failed = (0..100).any(|_| one.step().is_err());
        assert!(failed, "{value} at {offset} is not noticed");
    }
}

#[test]
fn any_bytes_anywhere_are_borne() {
    let file = content(5000);
    for seed in 0u32..300 {
        let memory = memory(1024);
        let mut one = sender(&memory, 1, &file);
        let mut other = receiver(&memory, 2);
        let mut word = seed;
        for _ in 0..100 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if word % 7 == 0 {
                let at = usize::try_from(word >> 16).expect("small") % 64 * 4;
                memory.store_relaxed(at, word);
            }
            let (a, b) = (one.step(), other.step());
            if a.is_err() && b.is_err() {
                break;
            }
        }
        assert!(other.received() <= 1 << 20);
    }
}

#[test]
fn a_file_that_gets_shorter_while_it_is_sent_is_no_success() {
    let memory = memory(4096);
    let area = Area::new(&memory, Side::Sender, 1, None, 100).expect("room");
    let mut short = Sender::new(area, &[1; 99][..], 100);
    let mut other = receiver(&memory, 2);
    let error = loop {
        other.step().expect("right");
        if let Err(error) = short.step() {
            break error;
        }
    };
    assert!(matches!(error, CopyError::Changed));
}

#[test]
fn what_was_received_in_part_leaves_no_file() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("file");
    fs::write(&path, b"before").expect("written");
    let files = || fs::read_dir(dir.path()).expect("read").count();
    let part = Temporary::beside(&path).expect("made");
    (&part.file).write_all(b"part").expect("written");
    assert_eq!(files(), 2);
    drop(part);
    assert_eq!(files(), 1);
    assert_eq!(fs::read(&path).expect("read"), b"before");
    let whole = Temporary::beside(&path).expect("made");
    (&whole.file).write_all(b"after").expect("written");
    whole.keep(&path).expect("renamed");
    assert_eq!(files(), 1);
    assert_eq!(fs::read(&path).expect("read"), b"after");
    assert!(Temporary::beside(dir.path()).is_err());
}
