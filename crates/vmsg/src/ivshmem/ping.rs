// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem ping`: round trips through 64 bytes of the memory.
//!
//! The one who asks writes, in words of 32 bits: 0 [`MAGIC`], 4 a number of its own that is never 0, 8 its id
//! ([`NOBODY`] without doorbells), 12 the number of the ping. The one who answers writes 32 the number it found at 4, 36
//! that of 12. Whatever else somebody writes there, nobody trusts it: at worst there are no answers.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use ivshmem::{Device, PeerId};
use vmsg_mem::{DeviceSlice, QueueMemory};

use super::ears::{Ears, Woken};
use super::place::{Place, Target, bytes, seconds};
use crate::Usage;
use crate::out::Out;

/// Bytes that are used.
const SIZE: usize = 64;
/// "ping" in memory.
const MAGIC: u32 = u32::from_le_bytes(*b"ping");
/// In the place of an id: nobody to be rung.
pub(super) const NOBODY: u32 = u32::MAX;

const ASKER: usize = 4;
const ASKER_ID: usize = 8;
const ASKED: usize = 12;
const ANSWERED_TO: usize = 32;
const ANSWERED: usize = 36;

/// Round trips remembered for the median; later ones only count for the rest.
const REMEMBERED: usize = 1 << 20;

/// `vmsg ivshmem ping`.
#[derive(Debug, Args)]
pub struct PingArgs {
    #[command(flatten)]
    place: Place,
    /// Who answers, with `vmsg ivshmem ping --answer`: the id of a peer, and a vector unless it is 0; without, nobody
    /// is rung and the other side looks at intervals
    #[arg(value_name = "PEER[:VECTOR]", conflicts_with = "answer")]
    target: Option<Target>,
    /// Answer the other side, until interrupted
    #[arg(long)]
    answer: bool,
    /// Stop after so many
    #[arg(short, long, value_name = "N")]
    count: Option<u64>,
    /// Seconds from one to the next; as fast as answers come by default
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds, conflicts_with = "answer")]
    interval: Option<Duration>,
    /// Seconds without an answer, or with --answer without a ping, after which it is given up; 1 by default, with
    /// --answer never
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Where the 64 bytes are, the same on both sides: the last of the memory by default
    #[arg(long, value_name = "OFFSET", value_parser = bytes)]
    offset: Option<u64>,
}

/// Measures round trips, or answers.
pub(super) fn ping(args: &PingArgs) -> anyhow::Result<()> {
    let mut device = args.place.open()?;
    let block = block(&device, args.offset)?;
    let mut ears = Ears::new(&device)?;
    if args.answer {
        answer(args, &mut device, &block, &mut ears)
    } else {
        ask(args, &mut device, &block, &mut ears)
    }
}

fn block(device: &Device, offset: Option<u64>) -> anyhow::Result<DeviceSlice> {
    let size = device.memory().len();
    let offset = match offset {
        None => size.checked_sub(SIZE),
        Some(offset) if !offset.is_multiple_of(8) => {
            bail!(Usage(format!("--offset {offset}: must be a multiple of 8")))
        }
        Some(offset) => usize::try_from(offset).ok(),
    };
    let block = offset.and_then(|offset| device.memory().slice(offset, SIZE));
    let Some(block) = block else {
        bail!(Usage(format!(
            "{SIZE} bytes are needed, and the memory has {size}"
        )));
    };
    Ok(block)
}

/// One who asks.
struct Asker {
    number: u32,
    sent: u32,
}

impl Asker {
    fn new(block: &DeviceSlice, id: Option<PeerId>) -> anyhow::Result<Self> {
        let number = random()?;
        block.store_relaxed(0, 0);
        block.store_relaxed(ASKER_ID, id.map_or(NOBODY, |id| id.0.into()));
        block.store_relaxed(ASKED, 0);
        block.store_relaxed(ASKER, number);
        block.store_release(0, MAGIC);
        Ok(Self { number, sent: 0 })
    }

    /// Writes the next ping.
    fn ask(&mut self, block: &DeviceSlice) {
        self.sent = self.sent.wrapping_add(1);
        block.store_release(ASKED, self.sent);
        block.fence();
    }

    fn is_answered(&self, block: &DeviceSlice) -> bool {
        block.load_acquire(ANSWERED) == self.sent && block.load_relaxed(ANSWERED_TO) == self.number
    }
}

/// Looks for a ping and answers it; then says whom to ring.
fn answer_once(block: &DeviceSlice) -> Option<Option<PeerId>> {
    if block.load_acquire(0) != MAGIC {
        return None;
    }
    let asked = block.load_acquire(ASKED);
    let number = block.load_relaxed(ASKER);
    if asked == 0
        || (
            block.load_relaxed(ANSWERED),
            block.load_relaxed(ANSWERED_TO),
        ) == (asked, number)
    {
        return None;
    }
    block.store_relaxed(ANSWERED_TO, number);
    block.store_release(ANSWERED, asked);
    block.fence();
    Some(peer(block.load_relaxed(ASKER_ID)))
}

/// The peer that somebody says to be, if it can be one.
pub(super) fn peer(id: u32) -> Option<PeerId> {
    u16::try_from(id).ok().map(PeerId)
}

/// A number that is not 0 and another one each time.
pub(super) fn random() -> anyhow::Result<u32> {
    let mut bytes = [0; 4];
    let mut source = std::fs::File::open("/dev/urandom").context("/dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut bytes).context("/dev/urandom")?;
    Ok(u32::from_le_bytes(bytes).max(1))
}

fn ask(
    args: &PingArgs,
    device: &mut Device,
    block: &DeviceSlice,
    ears: &mut Ears,
) -> anyhow::Result<()> {
    let timeout = args.timeout.unwrap_or(Duration::from_secs(1));
    let mut out = Out::lock();
    let mut asker = Asker::new(block, device.id().filter(|_| device.vectors() > 0))?;
    let (mut times, mut sent, mut lost) = (Vec::new(), 0u64, 0u64);
    let mut interrupted = false;
    while !interrupted && args.count.is_none_or(|count| sent < count) {
        let begin = Instant::now();
        asker.ask(block);
        sent += 1;
        if let Some(Target { peer, vector }) = args.target {
            device.ring(peer, vector)?;
        }
        let until = begin + timeout;
        let answered = loop {
            if asker.is_answered(block) {
                break true;
            }
            if Instant::now() >= until {
                break false;
            }
            if ears.pause(device, until)? == Woken::Interrupted {
                interrupted = true;
                break false;
            }
        };
        let time = begin.elapsed();
        match answered {
            true => times.push(time),
            false if interrupted => sent -= 1,
            false => lost += 1,
        }
        if args.interval.is_some() || !answered && !interrupted {
            match answered {
                true => writeln!(out, "seq={sent} time={:.3} ms", time.as_secs_f64() * 1e3)?,
                false => writeln!(out, "seq={sent} no answer")?,
            }
        }
        times.truncate(REMEMBERED);
        // One who answers before anybody waits must not keep the user from ending this.
        interrupted |= sent % 64 == 0 && ears.is_interrupted()?;
        let next = begin + args.interval.unwrap_or_default();
        while !interrupted && Instant::now() < next {
            interrupted = ears.wait(device, Some(next))? == Woken::Interrupted;
        }
    }
    writeln!(
        out,
        "{sent} pings, {} answers{}",
        sent - lost,
        summary(&mut times)
    )?;
    if sent > 0 && lost == sent {
        bail!(
            "nobody answers; on the other side there is to be `vmsg ivshmem ping --answer` with the same --offset"
        );
    }
    Ok(())
}

fn summary(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |index: usize| times[index.min(times.len() - 1)].as_secs_f64() * 1e6;
    if times.is_empty() {
        return String::new();
    }
    format!(
        ", round trip min/median/p99/max = {:.1}/{:.1}/{:.1}/{:.1} us",
        at(0),
        at(times.len() / 2),
        at(times.len() * 99 / 100),
        at(times.len() - 1)
    )
}

fn answer(
    args: &PingArgs,
    device: &mut Device,
    block: &DeviceSlice,
    ears: &mut Ears,
) -> anyhow::Result<()> {
    let id = device.id().map_or("none".into(), |id| id.to_string());
    writeln!(
        Out::lock(),
        "answering id={id} vectors={}",
        device.vectors()
    )?;
    let (mut answered, mut last) = (0u64, Instant::now());
    let mut trouble = false;
    while args.count.is_none_or(|count| answered < count) {
        if let Some(asker) = answer_once(block) {
            answered += 1;
            last = Instant::now();
            if let Some(asker) = asker
                && let Err(error) = device.ring(asker, 0)
                && !std::mem::replace(&mut trouble, true)
            {
                tracing::warn!(%error, "the one who asks cannot be rung");
            }
            // One who changes its mind all the time must not keep the user from ending this.
            if answered % 64 != 0 {
                continue;
            }
        }
        let until = args.timeout.map(|timeout| last + timeout);
        if until.is_some_and(|until| until <= Instant::now()) {
            bail!("no ping came");
        }
        let far = Instant::now() + Duration::from_secs(3600);
        if ears.pause(device, until.unwrap_or(far))? == Woken::Interrupted {
            break;
        }
    }
    writeln!(Out::lock(), "{answered} pings answered")?;
    Ok(())
}

#[cfg(test)]
#[path = "ping_test.rs"]
mod tests;
