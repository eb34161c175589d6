// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::trace::{Item, Reader, Way};
use std::sync::mpsc;

/// Takes what is written once it is let; may fail first.
struct Gate {
    file: Arc<Mutex<Vec<u8>>>,
    /// Each message lets one attempt go on: true to succeed.
    let_go: mpsc::Receiver<bool>,
    /// Told at each attempt.
    tried: mpsc::Sender<()>,
}

impl Sink for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let _ = self.tried.send(());
        match self.let_go.recv() {
            Ok(false) => Err(io::ErrorKind::StorageFull.into()),
            // Nobody holds it back any more.
            Ok(true) | Err(_) => {
                self.file.lock().unwrap().extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

struct Setup {
    writer: Writer,
    file: Arc<Mutex<Vec<u8>>>,
    let_go: mpsc::Sender<bool>,
    tried: mpsc::Receiver<()>,
}

fn gated() -> Setup {
    let (let_go, may_go) = mpsc::channel();
    let (tell, tried) = mpsc::channel();
    let file = Arc::new(Mutex::new(Vec::new()));
    let gate = Gate {
        file: Arc::clone(&file),
        let_go: may_go,
        tried: tell,
    };
    let writer = Writer::to(Path::new("test"), gate, 0).unwrap();
    Setup {
        writer,
        file,
        let_go,
        tried,
    }
}

fn interface(writer: &Writer) -> Interface {
    let peer = Peer::named("peer");
    writer.interface("b0", Side::Device, &peer, &Capabilities::all(320))
}

/// The sequence number in a message, and how many were lost before it.
type Numbered = (u32, u64);

/// The messages, and the statistics: seen and lost.
fn read(file: &[u8]) -> (Vec<Numbered>, Option<(u64, u64)>) {
    let mut reader = Reader::new(file);
    let (mut messages, mut statistics) = (Vec::new(), None);
    while let Some(item) = reader.next_item().unwrap() {
        match item {
            Item::Message(m) => {
                let number = u32::from_le_bytes(*m.message.first_chunk().unwrap());
                messages.push((number, m.lost));
            }
            Item::Statistics { seen, lost, .. } => statistics = Some((seen, lost)),
            Item::Foreign { why, .. } => panic!("{why}"),
            _ => {}
        }
    }
    assert_eq!(reader.unfinished().1, 0);
    (messages, statistics)
}

#[test]
fn a_file_that_hangs_holds_up_nobody_and_what_is_missing_is_counted() {
    let setup = gated();
    let mut interface = interface(&setup.writer);
    // The thread has the first buffer in its hands and hangs.
    setup.tried.recv().unwrap();
    let mut number = 0u32;
    let mut message = [0; 320];
    let mut send = |interface: &mut Interface| {
        message[..4].copy_from_slice(&number.to_le_bytes());
        interface.record(Direction::Received, &message, 0);
        number += 1;
    };
    // More than the buffer holds, and it returns all the same.
    let many = 2 * BUFFER / 320;
    for _ in 0..many {
        send(&mut interface);
    }
    let (seen, lost) = interface.counts();
    assert_eq!(seen, many as u64);
    assert!(lost > 0);
    let kept = seen - lost;
    // It goes on: everything that was kept is written, and then there is room again.
    setup.let_go.send(true).unwrap();
    setup.tried.recv().unwrap();
    setup.let_go.send(true).unwrap();
    // The buffer was handed over before the second attempt.
    send(&mut interface);
    drop(setup.let_go);
    drop(interface);
    drop(setup.writer);
    let (messages, statistics) = read(&setup.file.lock().unwrap());
    assert_eq!(messages.len() as u64, kept + 1);
    for (i, message) in messages[..messages.len() - 1].iter().enumerate() {
        assert_eq!(*message, (u32::try_from(i).unwrap(), 0));
    }
    assert_eq!(
        *messages.last().unwrap(),
        (u32::try_from(many).unwrap(), lost)
    );
    assert_eq!(statistics, Some((seen + 1, lost)));
}

#[test]
fn a_full_disk_loses_nothing_that_fits_the_buffer() {
    let setup = gated();
    let mut interface = interface(&setup.writer);
    interface.record(Direction::Sent, &1u32.to_le_bytes(), 0);
    setup.tried.recv().unwrap();
    setup.let_go.send(false).unwrap();
    interface.record(Direction::Sent, &2u32.to_le_bytes(), 0);
    // After a moment it is tried again.
    setup.tried.recv().unwrap();
    setup.let_go.send(true).unwrap();
    drop(setup.let_go);
    drop(interface);
    drop(setup.writer);
    let (messages, statistics) = read(&setup.file.lock().unwrap());
    assert_eq!(messages, [(1, 0), (2, 0)]);
    assert_eq!(statistics, Some((2, 0)));
}

#[test]
fn the_end_of_a_trace_does_not_wait_for_a_file_that_hangs() {
    let setup = gated();
    let interface = interface(&setup.writer);
    setup.tried.recv().unwrap();
    drop(interface);
    // Returns, though nobody lets the file go on.
    drop(setup.writer);
    assert!(setup.file.lock().unwrap().is_empty());
}

#[test]
fn a_message_comes_back_as_it_was_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.pcapng");
    let writer = Writer::open(&path).unwrap();
    let mut device = interface(&writer);
    let peer = Peer {
        name: "it\u{1b}s".to_owned(),
        pid: Some(7),
        uid: Some(0),
        observer: false,
    };
    let mut driver = writer.interface("b1", Side::Driver, &peer, &Capabilities::all(48));
    device.record(Direction::Received, b"12345", 2);
    driver.set_layout(Layout::R1);
    driver.record(Direction::Received, &[9; 40], 0);
    driver.record(Direction::Sent, &[0xff; 65536], 300);
    drop((device, driver, writer));
    let bytes = std::fs::read(&path).unwrap();
    let mut reader = Reader::new(&bytes[..]);
    let mut messages = Vec::new();
    while let Some(item) = reader.next_item().unwrap() {
        if let Item::Message(m) = item {
            let name = m.source.name.clone();
            messages.push((name, m.way, m.layout, m.fds, m.message.to_vec()));
        }
    }
    let driver_name = "b1/it\u{1b}s (pid 7)".to_owned();
    assert_eq!(
        messages,
        [
            (
                "b0/peer".to_owned(),
                Way::ToDevice,
                Layout::Revision1,
                2,
                b"12345".to_vec()
            ),
            (
                driver_name.clone(),
                Way::ToDriver,
                Layout::R1,
                0,
                vec![9; 40]
            ),
            (
                driver_name,
                Way::ToDevice,
                Layout::R1,
                255,
                vec![0xff; 65536]
            ),
        ]
    );
}
