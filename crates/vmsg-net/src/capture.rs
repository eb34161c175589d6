// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes what passes a back end to a file, as QEMU's `filter-dump` does.
//!
//! The format is classic pcap (draft-ietf-opsawg-pcap) with microseconds, for Ethernet. Large
//! segments and partial checksums are recorded as they are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use vmsg_mem::{Pieces, RamSlice};

use crate::{Backend, Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

/// Longest frame: an IPv4 packet of 65535 bytes behind an Ethernet header with a VLAN tag.
const LONGEST: usize = 65535 + 18;

/// How to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    /// Bytes recorded of each frame at most (`maxlen=`); 65536.
    pub snaplen: u32,
    /// Bytes kept back before they are written to the file. With 0, the default, everything is in
    /// the file when a call of the back end returns, so that nothing is missing if the process is
    /// killed; whole records only are written in any case.
    pub buffer: usize,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            snaplen: 65536,
            buffer: 0,
        }
    }
}

/// What a capture file begins with: magic number, version 2.4, two zeros, snaplen, Ethernet.
fn file_header(snaplen: u32) -> [u8; 24] {
    let mut header = [0; 24];
    let words = [0xa1b2_c3d4, 2 | 4 << 16, 0, 0, snaplen, 1];
    for (bytes, word) in header.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&u32::to_ne_bytes(word));
    }
    if cfg!(target_endian = "big") {
        // Major and minor version are two halves in this order.
        header[4..8].copy_from_slice(&[0, 2, 0, 4]);
    }
    header
}

/// A capture file.
pub(crate) struct PcapWriter<W> {
    /// `None` after an error.
    file: Option<W>,
    config: CaptureConfig,
    pending: Vec<u8>,
}

impl PcapWriter<File> {
    /// Goes on behind what a file that was opened to read and append has; begins it if that is nothing.
    pub(crate) fn resume(mut file: File, config: CaptureConfig) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Self::new(file, config);
        }
        let mut header = [0; 24];
        file.read_exact(&mut header)?;
        if header != file_header(config.snaplen) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is there and is not a capture of this kind; move it away",
            ));
        }
        Ok(Self::after_header(file, config))
    }
}

impl<W: Write> PcapWriter<W> {
    /// Begins a file.
    pub(crate) fn new(mut file: W, config: CaptureConfig) -> io::Result<Self> {
        file.write_all(&file_header(config.snaplen))?;
        Ok(Self::after_header(file, config))
    }

    fn after_header(file: W, config: CaptureConfig) -> Self {
        Self {
            file: Some(file),
            config,
            pending: Vec::new(),
        }
    }

    /// False after an error.
    pub(crate) const fn is_writing(&self) -> bool {
        self.file.is_some()
    }

    /// Bytes that are kept back at present.
    pub(crate) const fn pending(&self) -> usize {
        self.pending.len()
    }

    fn record(&mut self, frame: Pieces<'_>) {
        self.record_behind(&[], frame);
    }

    /// Records a frame that begins with `head` and goes on with `rest`.
    pub(crate) fn record_behind(&mut self, head: &[u8], rest: Pieces<'_>) {
        if self.file.is_none() {
            return;
        }
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let full = u32::try_from(head.len().saturating_add(rest.len())).unwrap_or(u32::MAX);
        let len = full.min(self.config.snaplen);
        // Seconds are unsigned: until 2106.
        let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        for word in [seconds, time.subsec_micros(), len, full] {
            self.pending.extend_from_slice(&word.to_ne_bytes());
        }
        let at = self.pending.len();
        self.pending.resize(at + len as usize, 0);
        let recorded = &mut self.pending[at..];
        let (first, behind) = recorded.split_at_mut(head.len().min(recorded.len()));
        first.copy_from_slice(&head[..first.len()]);
        rest.read(behind);
    }

    /// Writes what is kept back, if that is more than `least` bytes.
    pub(crate) fn flush(&mut self, least: usize) {
        if self.pending.len() <= least {
            return;
        }
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(&self.pending)
        {
            tracing::error!(%error, "capture stops, as its file cannot be written");
            self.file = None;
        }
        self.pending.clear();
    }
}

/// A back end whose frames are written to a file. If that fails, for example since the disk is
/// full, the capture ends with a message and the traffic goes on.
pub struct Capture<B, W: Write = File> {
    inner: B,
    writer: PcapWriter<W>,
    /// Frames for the guest are put together here, as the guest's memory may change.
    memory: Vec<AtomicU64>,
}

impl<B: Backend> Capture<B, File> {
    /// Captures to a new file at `path`; what was there is overwritten.
    ///
    /// # Errors
    ///
    /// If the file cannot be created or written.
    pub fn create(inner: B, path: impl AsRef<Path>, config: CaptureConfig) -> io::Result<Self> {
        Self::new(inner, File::create(path)?, config)
    }

    /// Goes on with the capture at `path` that a process before this one began;
    /// begins a new one if there is none.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or written; `InvalidData` if it is something
    /// else than a capture with the same settings.
    pub fn resume(inner: B, path: impl AsRef<Path>, config: CaptureConfig) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        Ok(Self::around(inner, PcapWriter::resume(file, config)?))
    }
}

impl<B: Backend, W: Write + Send> Capture<B, W> {
    /// Captures to `file`, from its present position on.
    ///
    /// # Errors
    ///
    /// If the header cannot be written.
    pub fn new(inner: B, file: W, config: CaptureConfig) -> io::Result<Self> {
        Ok(Self::around(inner, PcapWriter::new(file, config)?))
    }

    fn around(inner: B, writer: PcapWriter<W>) -> Self {
        Self {
            inner,
            writer,
            memory: (0..LONGEST.div_ceil(8))
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    /// The back end behind the capture.
    pub const fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    /// False once writing has failed.
    pub const fn is_capturing(&self) -> bool {
        self.writer.file.is_some()
    }

    fn record_all(&mut self, frames: &[TxFrame<'_>]) {
        for frame in frames {
            self.writer.record(frame.payload);
        }
        self.writer.flush(self.writer.config.buffer);
    }
}

/// Stands before the guest's buffers.
struct Tap<'a, W> {
    sink: &'a mut dyn RxSink,
    writer: &'a mut PcapWriter<W>,
    memory: [RamSlice<'a>; 1],
    /// Whom the present offer is for.
    target: Kept,
}

/// A [`Target`] that outlives its offer.
enum Kept {
    Pair(u16),
    Head([u8; Target::HEAD], usize),
}

impl Kept {
    fn new(target: Target<'_>) -> Self {
        match target {
            Target::Pair(pair) => Self::Pair(pair),
            Target::Head(head) => {
                let mut kept = [0; Target::HEAD];
                let len = head.len().min(kept.len());
                kept[..len].copy_from_slice(&head[..len]);
                Self::Head(kept, len)
            }
        }
    }

    fn target(&self) -> Target<'_> {
        match self {
            Self::Pair(pair) => Target::Pair(*pair),
            Self::Head(head, len) => Target::Head(&head[..*len]),
        }
    }
}

impl<W: Write> RxSink for Tap<'_, W> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        if len > LONGEST {
            return None;
        }
        self.sink.offer(to, len)?;
        self.target = Kept::new(to);
        Some(Pieces::new(&self.memory).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let frame = Pieces::new(&self.memory).take(len);
        // The room was there a moment ago, and nothing has used it since.
        let Some(room) = self.sink.offer(self.target.target(), frame.len()) else {
            return;
        };
        frame.copy_to(room);
        self.sink.commit(header, frame.len());
        self.writer.record(frame);
    }
}

impl<B: Backend, W: Write + Send> Backend for Capture<B, W> {
    fn queue_pairs(&self) -> u16 {
        self.inner.queue_pairs()
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn set_guest(&mut self, guest: &Guest) {
        self.inner.set_guest(guest);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.inner.next_timeout()
    }

    fn poll(&mut self, now: Instant) {
        self.inner.poll(now);
    }

    fn link_is_up(&self) -> bool {
        self.inner.link_is_up()
    }

    fn transmit(&mut self, now: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        let taken = self.inner.transmit(now, pair, frames);
        self.record_all(&frames[..taken]);
        taken
    }

    fn transmit_to(
        &mut self,
        now: Instant,
        pair: u16,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> usize {
        let taken = self.inner.transmit_to(now, pair, frames, others);
        self.record_all(&frames[..taken]);
        taken
    }

    fn set_key(&mut self, key: u64) {
        self.inner.set_key(key);
    }

    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize {
        if !self.is_capturing() {
            return self.inner.receive(now, sink);
        }
        let mut tap = Tap {
            sink,
            memory: [RamSlice::from_atomics(&self.memory)],
            writer: &mut self.writer,
            target: Kept::Pair(0),
        };
        let frames = self.inner.receive(now, &mut tap);
        self.writer.flush(self.writer.config.buffer);
        frames
    }

    fn has_frames(&self) -> bool {
        self.inner.has_frames()
    }

    fn shutdown(&mut self) {
        self.inner.shutdown();
        self.writer.flush(0);
    }
}

impl<B, W: Write> Drop for Capture<B, W> {
    fn drop(&mut self) {
        self.writer.flush(0);
    }
}

#[cfg(test)]
#[path = "capture_test.rs"]
mod tests;
