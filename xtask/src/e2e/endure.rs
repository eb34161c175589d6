// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest pings and downloads while something is done to the other side again and again.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{ALL_CHECKS, STEP, Stage};
use crate::guest::Guest;
use crate::http;
use crate::qemu::Board;
use crate::report::Report;
use crate::scene::{Line, Scene, Stream};

/// What the guest runs.
pub(super) const ENDURE: &str = include_str!("../guest/endure.sh");
/// Interval of its pings.
const PING_INTERVAL: Duration = Duration::from_millis(200);

/// A guest pings and downloads at the same time while `act` is done to the other side `times` times, each time in the
/// middle of the download and after pings have come through again.
pub(super) fn endure(
    stage: &mut Stage,
    report: &mut Report,
    board: &Board,
    times: usize,
    act: impl FnMut(&mut Scene, usize) -> Result<()>,
) -> Result<()> {
    hold_back(stage, times);
    let guest = stage.guest("endure", board, ENDURE)?;
    let outcome = withstand(stage, &guest, times, act)?;
    stage.finish(guest, report)?;
    outcome.tell(stage, report)
}

/// The file is let through in as many parts as are needed for the download to last until the end.
pub(super) fn hold_back(stage: &Stage, times: usize) {
    stage.server.open_to(http::FILE_SIZE / (times + 1));
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Outcome {
    times: usize,
    boots: usize,
    /// Ping's own words.
    counts: String,
    /// From the beginning of an act to the next answer.
    longest: Duration,
    gaps: Duration,
    /// Connections that the download needed.
    connections: usize,
}

/// The same in a guest that is about to run [`ENDURE`], behind a file that is held back; its end is left to others.
pub(super) fn withstand(
    stage: &mut Stage,
    guest: &Guest,
    times: usize,
    mut act: impl FnMut(&mut Scene, usize) -> Result<()>,
) -> Result<Outcome> {
    let part = http::FILE_SIZE / (times + 1);
    let connections = stage.server.requests();
    guest.mark(&mut stage.scene, "under-way", STEP)?;
    let mut longest = Duration::ZERO;
    let mut gaps = Duration::ZERO;
    for n in 1..=times {
        let before = ping_answer(guest, &mut stage.scene)?;
        let begun = stage.scene.now();
        act(&mut stage.scene, n).with_context(|| format!("time {n}"))?;
        let ready = stage.scene.now();
        // Answers that came earlier are from before.
        let back = loop {
            let (number, at) =
                ping_answer(guest, &mut stage.scene).with_context(|| format!("after time {n}"))?;
            if number > before.0 && at > ready {
                break at;
            }
        };
        longest = longest.max(back - begun);
        gaps += back - begun;
        stage.server.open_to(part * (n + 1));
    }
    stage.server.open_to(http::FILE_SIZE);
    guest.mark(&mut stage.scene, "fetched", ALL_CHECKS)?;
    guest.tell(&mut stage.scene, "that is all")?;
    let counts = guest.expect(&mut stage.scene, "ping's statistics", STEP, |line| {
        line.text
            .contains("packets transmitted")
            .then(|| line.text.clone())
    })?;
    let console = stage.scene.lines(guest.id, Stream::Out);
    Ok(Outcome {
        times,
        boots: console
            .iter()
            .filter(|l| l.text.contains("MARK booted"))
            .count(),
        counts,
        longest,
        gaps,
        connections: stage.server.requests() - connections,
    })
}

impl Outcome {
    /// Reports and prints it.
    pub(super) fn tell(&self, stage: &Stage, report: &mut Report) -> Result<()> {
        let Self {
            times,
            counts,
            gaps,
            connections,
            ..
        } = self;
        let name = |check: &str| format!("{}/endure/{check}", stage.kit.machine.name());
        report.check(&name("no-reboot"), self.boots == 1, || {
            format!("{} boots", self.boots)
        });
        let (sent, lost) =
            ping_counts(counts).with_context(|| format!("not ping's statistics: {counts}"))?;
        // While the other side is away pings get lost, and with each end one that it had taken and not yet answered.
        let allowed = gaps.as_millis() / PING_INTERVAL.as_millis() + 2 * *times as u128;
        report.check(
            &name("pings-lost-in-gaps-only"),
            u128::from(lost) <= allowed,
            || format!("{counts}; {allowed} may be lost in gaps of {gaps:.1?}"),
        );
        report.check(&name("connection-kept"), *connections == 1, || {
            format!("the download needed {connections} connections")
        });
        println!(
            "      {times} times: longest gap {:.2?}, {lost} of {sent} pings lost, download over {connections} \
             connection(s)",
            self.longest
        );
        Ok(())
    }
}

/// The next answer to a ping: its sequence number and when it came.
fn ping_answer(guest: &Guest, scene: &mut Scene) -> Result<(u64, Duration)> {
    guest.expect(scene, "an answer to a ping", STEP, sequence)
}

/// `64 bytes from 10.0.2.2: seq=7 ttl=255 time=1.2 ms`
fn sequence(line: &Line) -> Option<(u64, Duration)> {
    let number = line
        .text
        .split_once("bytes from 10.0.2.2: seq=")?
        .1
        .split_whitespace()
        .next()?;
    Some((number.parse().ok()?, line.at))
}

/// Sent and lost in `10 packets transmitted, 9 packets received, 10% packet loss`.
fn ping_counts(line: &str) -> Option<(u64, u64)> {
    let number = |before: &str| {
        line.split(before)
            .next()?
            .split_whitespace()
            .next_back()?
            .parse::<u64>()
            .ok()
    };
    let sent = number(" packets transmitted")?;
    Some((sent, sent.checked_sub(number(" packets received")?)?))
}

#[cfg(test)]
#[path = "endure_test.rs"]
mod tests;
