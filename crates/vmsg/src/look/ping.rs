// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ping`.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::{connect, silence};
use crate::Usage;
use crate::buses::{self, is_r1};
use crate::cli::PingArgs;
use crate::out::Out;
use crate::signals::Interrupt;

/// Round trips remembered for the percentiles; later ones only count for the rest.
const REMEMBERED: usize = 1 << 20;

/// Sends PING messages and says how long each took.
pub(crate) fn ping(args: PingArgs) -> anyhow::Result<()> {
    if !(0.0..=86_400.0).contains(&args.interval) {
        bail!(Usage(format!(
            "--interval {}: must be from 0 to 86400 seconds",
            args.interval
        )));
    }
    let interval = Duration::from_secs_f64(args.interval);
    let interrupt = Interrupt::new()?;
    let spec = buses::parse(&args.bus)?;
    buses::for_driver(&args.bus, &spec)?;
    let mut client = connect(&spec, args.timeout.map(Duration::from_millis))?;
    let peer = client.channel().peer_name().to_owned();
    let mut out = Out::lock();
    writeln!(out, "PING {} ({peer})", args.bus)?;
    if is_r1(&spec) {
        writeln!(out, "r1 has no PING: the status of device 0 is asked")?;
    }
    let mut times: Vec<Duration> = Vec::new();
    let (mut sent, mut lost) = (0u64, 0u64);
    let begin = Instant::now();
    while args.count.is_none_or(|count| sent < count) {
        let due = begin + interval.saturating_mul(u32::try_from(sent).unwrap_or(u32::MAX));
        if interrupt.wait_until(due)? {
            break;
        }
        sent += 1;
        // Any number will do, as long as each is another one.
        let data = u32::try_from(sent & u64::from(u32::MAX)).expect("masked");
        match client.ping(data) {
            Ok(time) => {
                writeln!(out, "seq={sent} time={:.3} ms", ms(time))?;
                if times.len() < REMEMBERED {
                    times.push(time);
                }
            }
            Err(
                error @ (vmsg_driver::Error::Timeout { .. } | vmsg_driver::Error::BadAnswer { .. }),
            ) => {
                lost += 1;
                writeln!(out, "seq={sent} {error}")?;
            }
            Err(error) => {
                summary(&mut out, &args.bus, sent, lost + 1, &mut times)?;
                return Err(error.into());
            }
        }
    }
    summary(&mut out, &args.bus, sent, lost, &mut times)?;
    if sent > 0 && lost == sent {
        match silence(&spec) {
            Some(hint) => bail!("no answer from {}; {hint}", args.bus),
            None => bail!("no answer from {}", args.bus),
        }
    }
    Ok(())
}

fn summary(
    out: &mut impl Write,
    bus: &str,
    sent: u64,
    lost: u64,
    times: &mut [Duration],
) -> std::io::Result<()> {
    let received = sent - lost;
    let loss = (lost * 100).checked_div(sent).unwrap_or(0);
    writeln!(out, "\n--- {bus} ping statistics ---")?;
    writeln!(
        out,
        "{sent} messages sent, {received} received, {loss}% loss"
    )?;
    times.sort_unstable();
    if let (Some(min), Some(max)) = (times.first(), times.last()) {
        let sum: Duration = times.iter().sum();
        let avg = sum.div_f64(times.len() as f64);
        writeln!(
            out,
            "round-trip min/avg/p99/max = {:.3}/{:.3}/{:.3}/{:.3} ms",
            ms(*min),
            ms(avg),
            ms(percentile(times, 99)),
            ms(*max)
        )?;
    }
    Ok(())
}

/// The time that `percent` of the sorted `times` do not exceed.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times[rank.min(times.len()) - 1]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_reads_as_ping_prints_it() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let mut out = Vec::new();
        summary(&mut out, "b", 101, 1, &mut times).expect("written");
        let text = String::from_utf8(out).expect("text");
        assert!(
            text.contains("101 messages sent, 100 received, 0% loss"),
            "{text}"
        );
        assert!(text.contains("= 1.000/50.500/99.000/100.000 ms"), "{text}");
    }

    #[test]
    fn nothing_received_has_no_times() {
        let mut out = Vec::new();
        summary(&mut out, "b", 2, 2, &mut []).expect("written");
        let text = String::from_utf8(out).expect("text");
        assert!(
            text.contains("100% loss") && !text.contains("round-trip"),
            "{text}"
        );
    }
}
