// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem copy`: a file through the memory.

mod layout;
mod receiver;
mod sender;

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use ivshmem::{Device, PeerId};
use vmsg_mem::DeviceSlice;

use super::ears::{Ears, Interrupted, Woken};
use super::ping::random;
use super::place::{Place, Target, bytes, seconds, size};
use crate::Usage;
use crate::out::Out;
use layout::{Area, CopyError, LEAST, Side, State};
use receiver::Receiver;
use sender::Sender;

/// Bytes that are moved at a time.
const CHUNK: usize = 64 << 10;
/// Bytes of memory that are used unless the user says otherwise.
const USUAL_SPACE: usize = 1 << 20;

/// `vmsg ivshmem copy`.
#[derive(Debug, Args)]
pub struct CopyArgs {
    #[command(flatten)]
    place: Place,
    /// The file that is sent, or that is written
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Receive what the other side sends; the file is replaced when all of it is there
    #[arg(long)]
    receive: bool,
    /// Whom to ring: the id of a peer, and one of its vectors unless it is 0; otherwise whoever turns up
    #[arg(long, value_name = "PEER[:VECTOR]")]
    to: Option<Target>,
    /// Where in the memory, the same on both sides: its second half by default
    #[arg(long, value_name = "OFFSET", value_parser = bytes)]
    offset: Option<u64>,
    /// How much memory to use, the same on both sides: up to 1 MiB by default
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    space: Option<u64>,
    /// Receive no file larger than this
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "16G", requires = "receive")]
    limit: u64,
    /// Give up when nothing has moved for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    timeout: Duration,
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is nothing to be done until the other side does something.
    Idle,
    /// Something the other side may wait for.
    Moved,
    /// All is done.
    Done,
}

/// Sends or receives a file.
pub(super) fn copy(args: &CopyArgs) -> anyhow::Result<()> {
    if args.receive {
        receive(args)
    } else {
        send(args)
    }
}

fn send(args: &CopyArgs) -> anyhow::Result<()> {
    let path = args.path.display().to_string();
    let file = File::open(&args.path).with_context(|| path.clone())?;
    let metadata = file.metadata().with_context(|| path.clone())?;
    if !metadata.is_file() {
        bail!("{path} is not a regular file");
    }
    let bytes = metadata.len();
    let mut device = args.place.open()?;
    let memory = memory(&device, args)?;
    let area = area(&memory, Side::Sender, &device, bytes)?;
    let mut sender = Sender::new(area, file, bytes);
    let begin = run(args, &mut device, &mut sender)?;
    let digest = sender.digest().unwrap_or_default();
    report("sent", &path, bytes, begin, &digest)
}

fn receive(args: &CopyArgs) -> anyhow::Result<()> {
    let mut device = args.place.open()?;
    let memory = memory(&device, args)?;
    let target = Temporary::beside(&args.path)?;
    let area = area(&memory, Side::Receiver, &device, 0)?;
    let mut receiver = Receiver::new(area, &target.file, args.limit);
    let begin = run(args, &mut device, &mut receiver)?;
    let received = receiver.received();
    // The sender is told when the file is where it belongs.
    let kept = target.keep(&args.path);
    let state = if kept.is_ok() {
        State::Done
    } else {
        State::GivenUp
    };
    receiver.area().set_state(state);
    let mut notified = Notified::default();
    notified.ring(args, &device, receiver.area());
    kept?;
    let digest = receiver.digest().unwrap_or_default();
    let path = args.path.display().to_string();
    report("received", &path, received, begin, &digest)
}

fn report(
    what: &str,
    path: &str,
    bytes: u64,
    begin: Instant,
    digest: &[u8; 32],
) -> anyhow::Result<()> {
    let seconds = begin.elapsed().as_secs_f64();
    let rate = bytes as f64 / seconds.max(1e-9) / 1e6;
    let sum = digest.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    writeln!(
        Out::lock(),
        "{what} {path}: {bytes} bytes in {seconds:.3} s, {rate:.1} MB/s, sha256 {sum}"
    )?;
    Ok(())
}

/// The part of the memory that is used.
fn memory(device: &Device, args: &CopyArgs) -> anyhow::Result<DeviceSlice> {
    let all = device.memory().len();
    let number = |number: Option<u64>, usual: usize| match number {
        Some(number) => usize::try_from(number).unwrap_or(usize::MAX),
        None => usual,
    };
    let offset = number(args.offset, all / 2);
    let space = number(args.space, all.saturating_sub(offset).min(USUAL_SPACE));
    if !offset.is_multiple_of(8) || space < LEAST {
        bail!(Usage(format!(
            "the offset {offset} must be a multiple of 8, and {space} bytes at least {LEAST}"
        )));
    }
    match device.memory().slice(offset, space) {
        Some(memory) => Ok(memory),
        None => bail!(Usage(format!(
            "{space} bytes from {offset} on are not all in the memory, which has {}",
            size(all as u64)
        ))),
    }
}

fn area(memory: &DeviceSlice, side: Side, device: &Device, bytes: u64) -> anyhow::Result<Area> {
    let id = device.id().filter(|_| device.vectors() > 0);
    Area::new(memory, side, random()?, id, bytes).context("too little memory")
}

/// One side.
trait Work {
    fn step(&mut self) -> Result<Step, CopyError>;
    fn area(&self) -> &Area;
}

impl<R: std::io::Read> Work for Sender<R> {
    fn step(&mut self) -> Result<Step, CopyError> {
        Sender::step(self)
    }
    fn area(&self) -> &Area {
        Sender::area(self)
    }
}

impl<W: Write> Work for Receiver<W> {
    fn step(&mut self) -> Result<Step, CopyError> {
        Receiver::step(self)
    }
    fn area(&self) -> &Area {
        Receiver::area(self)
    }
}

/// Works until all is done; returns when it began to move. The other side is told of a failure.
fn run(args: &CopyArgs, device: &mut Device, work: &mut impl Work) -> anyhow::Result<Instant> {
    let mut notified = Notified::default();
    let result = work_on(args, device, work, &mut notified);
    if let Err(error) = &result {
        let wrong = matches!(error.downcast_ref::<CopyError>(), Some(CopyError::Wrong));
        work.area()
            .set_state(if wrong { State::Wrong } else { State::GivenUp });
        notified.ring(args, device, work.area());
    }
    result
}

fn work_on(
    args: &CopyArgs,
    device: &mut Device,
    work: &mut impl Work,
    notified: &mut Notified,
) -> anyhow::Result<Instant> {
    let mut ears = Ears::new(device)?;
    notified.ring(args, device, work.area());
    let mut began = None;
    let mut last = Instant::now();
    loop {
        let step = work.step()?;
        if began.is_none() && work.area().is_together() {
            began = Some(Instant::now());
        }
        match step {
            Step::Done => return Ok(began.unwrap_or(last)),
            Step::Moved => {
                notified.ring(args, device, work.area());
                // One who is somebody else each time does not get anything done.
                if began.is_some() {
                    last = Instant::now();
                    // One who moves all the time must not keep the user from ending this.
                    if ears.is_interrupted()? {
                        bail!(Interrupted);
                    }
                    continue;
                }
            }
            Step::Idle => {}
        }
        if device.memory().is_lost() {
            bail!("the memory is gone: its file was truncated, or the function taken away");
        }
        let until = last + args.timeout;
        if Instant::now() >= until {
            match began {
                Some(_) => bail!("the other side stands still"),
                None => bail!(
                    "nobody is there; on the other side there is to be `vmsg ivshmem copy`, one of the two with \
                     --receive, with the same --offset and --space"
                ),
            }
        }
        if ears.pause(device, until)? == Woken::Interrupted {
            bail!(Interrupted);
        }
    }
}

/// Rings the other side, and complains once if that does not work.
#[derive(Default)]
struct Notified {
    complained: bool,
}

impl Notified {
    fn ring(&mut self, args: &CopyArgs, device: &Device, area: &Area) {
        let target = args.to.or_else(|| {
            let peer: PeerId = area.other()?;
            Some(Target { peer, vector: 0 })
        });
        let Some(Target { peer, vector }) = target else {
            return;
        };
        // Before the two are together it may be somebody who has left, and it is only to save time.
        if let Err(error) = device.ring(peer, vector)
            && (area.is_together() || args.to.is_some())
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::warn!(%error, "the other side looks at intervals only");
        }
    }
}

/// A file that is gone unless it is kept.
struct Temporary {
    file: File,
    path: Cell<Option<PathBuf>>,
}

impl Temporary {
    /// A new file in the directory of `path`.
    fn beside(path: &Path) -> anyhow::Result<Self> {
        let Some(name) = path.file_name() else {
            bail!(Usage(format!("{} is not a file", path.display())));
        };
        if path.is_dir() {
            bail!(Usage(format!("{} is a directory", path.display())));
        }
        let name = format!(".{}.{}", name.to_string_lossy(), std::process::id());
        let temporary = path.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .with_context(|| temporary.display().to_string())?;
        let path = Cell::new(Some(temporary));
        Ok(Self { file, path })
    }

    /// Puts it in the place of `path`.
    fn keep(&self, path: &Path) -> anyhow::Result<()> {
        let Some(temporary) = self.path.take() else {
            return Ok(());
        };
        let renamed = fs::rename(&temporary, path);
        if renamed.is_err() {
            self.path.set(Some(temporary));
        }
        renamed.with_context(|| path.display().to_string())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // Nothing else can be done about it.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
#[path = "copy_test.rs"]
mod tests;
