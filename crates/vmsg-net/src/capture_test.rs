// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::{Arc, Mutex};

use super::*;
use crate::Cable;

/// A file that others can look into while it is written, and that can be full.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<(Vec<u8>, Option<usize>)>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (file, limit) = &mut *self.0.lock().unwrap();
        if limit.is_some_and(|limit| file.len() + bytes.len() > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        file.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    #[allow(clippy::type_complexity, reason = "said in words")]
    /// Magic, snap length, link type; then length on the wire and bytes of each record.
    fn parse(&self) -> ((u32, u32, u32), Vec<(u32, Vec<u8>)>) {
        let (file, _) = &*self.0.lock().unwrap();
        let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().unwrap());
        let mut records = Vec::new();
        let mut at = 24;
        while at < file.len() {
            let len = word(at + 8) as usize;
            assert!(word(at) > 1_700_000_000, "a time of today");
            assert!(word(at + 4) < 1_000_000);
            records.push((word(at + 12), file[at + 16..at + 16 + len].to_vec()));
            at += 16 + len;
        }
        assert_eq!(at, file.len(), "whole records only");
        ((word(0), word(16), word(20)), records)
    }
}

struct Buffers<'a> {
    memory: [RamSlice<'a>; 1],
    frames: Vec<Vec<u8>>,
}

impl RxSink for Buffers<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        Some(Pieces::new(&self.memory)).filter(|room| len <= room.len())
    }

    fn commit(&mut self, _: &VnetHeader, len: usize) {
        let mut frame = vec![0; len];
        self.memory[0].read(0, &mut frame);
        self.frames.push(frame);
    }
}

fn send(backend: &mut impl Backend, bytes: &[u8]) {
    let memory: Vec<_> = (0..bytes.len().div_ceil(8))
        .map(|_| AtomicU64::new(0))
        .collect();
    let pieces = [RamSlice::from_atomics(&memory)];
    let payload = Pieces::new(&pieces).take(bytes.len());
    payload.write(bytes);
    let header = VnetHeader::default();
    assert_eq!(
        backend.transmit(Instant::now(), 0, &[TxFrame { header, payload }]),
        1
    );
}

fn receive(backend: &mut impl Backend) -> Vec<Vec<u8>> {
    let memory: Vec<_> = (0..1000).map(|_| AtomicU64::new(0)).collect();
    let mut sink = Buffers {
        memory: [RamSlice::from_atomics(&memory)],
        frames: Vec::new(),
    };
    backend.receive(Instant::now(), &mut sink);
    sink.frames
}

#[test]
fn frames_of_both_directions_are_in_the_file_at_once() {
    let file = Shared::default();
    let (near, mut far) = Cable::pair().unwrap();
    let config = CaptureConfig {
        snaplen: 100,
        ..CaptureConfig::default()
    };
    let mut near = Capture::new(near, file.clone(), config).unwrap();
    send(&mut near, &[1; 60]);
    assert_eq!(file.parse().1.len(), 1);
    send(&mut far, &[2; 300]);
    assert_eq!(receive(&mut near), [[2; 300]], "the guest gets all of it");
    let ((magic, snaplen, link), records) = file.parse();
    assert_eq!((magic, snaplen, link), (0xa1b2_c3d4, 100, 1));
    assert_eq!(records, [(60, vec![1; 60]), (300, vec![2; 100])]);
    assert_eq!(receive(&mut far), [[1; 60]]);
}

#[test]
fn a_buffer_is_written_when_it_is_full_and_at_the_end() {
    let file = Shared::default();
    let (near, _far) = Cable::pair().unwrap();
    let config = CaptureConfig {
        buffer: 200,
        ..CaptureConfig::default()
    };
    let mut near = Capture::new(near, file.clone(), config).unwrap();
    send(&mut near, &[1; 100]);
    assert_eq!(file.parse().1.len(), 0);
    send(&mut near, &[2; 100]);
    assert_eq!(file.parse().1.len(), 2);
    send(&mut near, &[3; 100]);
    drop(near);
    assert_eq!(file.parse().1.len(), 3);
}

#[test]
fn traffic_goes_on_when_the_disk_is_full() {
    let file = Shared::default();
    file.0.lock().unwrap().1 = Some(150);
    let (near, mut far) = Cable::pair().unwrap();
    let mut near = Capture::new(near, file.clone(), CaptureConfig::default()).unwrap();
    send(&mut near, &[1; 60]);
    assert!(near.is_capturing());
    send(&mut near, &[2; 60]);
    assert!(!near.is_capturing());
    send(&mut near, &[3; 60]);
    send(&mut far, &[4; 60]);
    assert_eq!(receive(&mut near), [[4; 60]]);
    assert_eq!(receive(&mut far).len(), 3);
    assert_eq!(file.parse().1.len(), 1);
}

#[test]
fn a_capture_goes_on_where_the_process_before_left_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net.pcap");
    for _ in 0..2 {
        let mut capture =
            Capture::resume(crate::Null::default(), &path, CaptureConfig::default()).unwrap();
        send(&mut capture, &[7; 60]);
    }
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 24 + 2 * (16 + 60), "one header, two records");
    std::fs::write(&path, [1; 100]).unwrap();
    let refused = Capture::resume(crate::Null::default(), &path, CaptureConfig::default());
    assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::InvalidData);
}
