// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem ring` and `wait`.

use std::collections::HashSet;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use clap::Args;
use ivshmem::{Device, Event, PeerId};

use super::ears::{Ears, Woken};
use super::place::{Place, Target, seconds};
use crate::out::Out;

/// `vmsg ivshmem ring`.
#[derive(Debug, Args)]
pub struct RingArgs {
    #[command(flatten)]
    place: Place,
    /// Whom: the id of a peer, and one of its vectors unless it is 0
    #[arg(value_name = "PEER[:VECTOR]")]
    target: Target,
    /// How often; rings that come close together may be heard as one
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    count: u64,
}

/// `vmsg ivshmem wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    #[command(flatten)]
    place: Place,
    /// Only this vector
    #[arg(long, value_name = "N")]
    vector: Option<u16>,
    /// Stop after so many rings; without, go on until interrupted
    #[arg(short, long, value_name = "N")]
    count: Option<u64>,
    /// Give up after so many seconds without a ring
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

/// Rings a peer.
pub(super) fn ring(args: &RingArgs) -> anyhow::Result<()> {
    let device = args.place.open()?;
    let Target { peer, vector } = args.target;
    for _ in 0..args.count {
        device.ring(peer, vector)?;
    }
    Ok(())
}

/// Prints each doorbell that rings, and who comes and goes.
pub(super) fn wait(args: &WaitArgs) -> anyhow::Result<()> {
    let mut device = args.place.open()?;
    can_hear(&device)?;
    if let Some(vector) = args.vector {
        let vectors = device.vectors();
        ensure!(
            vector < vectors,
            "there is no vector {vector} here: {vectors} of them, counted from 0"
        );
    }
    let mut ears = Ears::new(&device)?;
    let mut out = Out::lock();
    let id = device.id().map_or("unknown".into(), |id| id.to_string());
    writeln!(out, "waiting id={id} vectors={}", device.vectors())?;
    let mut peers: HashSet<PeerId> = match device.as_client() {
        Some(client) => client.peers().map(|(peer, _)| peer).collect(),
        None => HashSet::new(),
    };
    let begin = Instant::now();
    let (mut total, mut last) = (0u64, begin);
    loop {
        let time = begin.elapsed().as_secs_f64();
        for news in ears.news() {
            match news {
                // Told once for each vector.
                Event::Joined(peer) if !peers.insert(peer) => {}
                Event::Joined(peer) => writeln!(out, "{time:.6} joined peer={peer}")?,
                Event::Left(peer) => {
                    peers.remove(&peer);
                    writeln!(out, "{time:.6} left peer={peer}")?;
                }
                Event::ServerGone => writeln!(out, "{time:.6} the server is gone")?,
                _ => {}
            }
        }
        for (vector, times) in ears.rung(&device) {
            if args.vector.is_none_or(|wanted| wanted == vector) {
                writeln!(out, "{time:.6} rung vector={vector} times={times}")?;
                total = total.saturating_add(times);
                last = Instant::now();
            }
        }
        if args.count.is_some_and(|count| total >= count) {
            return Ok(());
        }
        let until = args.timeout.map(|timeout| last + timeout);
        if until.is_some_and(|until| until <= Instant::now()) {
            bail!(
                "no doorbell for {} s",
                args.timeout.unwrap_or_default().as_secs_f64()
            );
        }
        if ears.wait(&mut device, until)? == Woken::Interrupted {
            return Ok(());
        }
    }
}

/// Whether anybody can ring this end.
fn can_hear(device: &Device) -> anyhow::Result<()> {
    if device.vectors() > 0 {
        return Ok(());
    }
    match device.id() {
        Some(_) => bail!(
            "no doorbell is heard by sysfs: bind the function to vfio-pci (`vmsg ivshmem bind ADDRESS`)"
        ),
        None => Err(ivshmem::RingError::NoDoorbells.into()),
    }
}
