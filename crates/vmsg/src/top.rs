// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg top`: what passes switches and devices of a running `vmsg serve` or `vmsg up`, second by second.

mod keys;
mod live;
mod rates;
mod view;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::Usage;
use crate::cli::TopArgs;
use crate::console::terminal::Raw;
use crate::control::{Client, Request, Response};
use crate::out::Out;
use crate::signals::Interrupt;
use crate::trace::clean_json;

use rates::{Rates, Sample};
use view::View;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(8);

/// Shows what passes switches and devices.
pub(crate) fn run(args: TopArgs) -> anyhow::Result<()> {
    if !(0.1..=3600.0).contains(&args.interval) {
        let text = format!(
            "--interval {}: 0.1 to 3600 seconds are possible",
            args.interval
        );
        return Err(Usage(text).into());
    }
    let interval = Duration::from_secs_f64(args.interval);
    if args.once || args.json || !Raw::is_possible() {
        return print(&args, interval);
    }
    live::run(&args.path, interval, view(&args))
}

/// What is to be seen at first.
fn view(args: &TopArgs) -> View {
    View {
        queues: args.queues,
        ..View::default()
    }
}

/// Where samples come from.
struct Source {
    client: Client,
}

impl Source {
    fn connect(path: &Path) -> anyhow::Result<Self> {
        let client = Client::connect(path)?;
        client.set_patience(PATIENCE)?;
        Ok(Self { client })
    }

    fn sample(&mut self) -> anyhow::Result<Sample> {
        let (switches, devices) = (
            self.client.have(&Request::Switches {})?,
            self.client.have(&Request::List {})?,
        );
        let (Response::Switches(switches), Response::Devices(devices)) = (switches, devices) else {
            bail!("the answer is another one than was asked for");
        };
        Ok(Sample {
            at: Instant::now(),
            switches,
            devices,
        })
    }
}

/// A table, or a line of JSON, for each interval.
fn print(args: &TopArgs, interval: Duration) -> anyhow::Result<()> {
    let interrupt = Interrupt::new()?;
    let mut source = Source::connect(&args.path)?;
    let mut before = source.sample()?;
    loop {
        if interrupt.wait_until(before.at + interval)? {
            return Ok(());
        }
        let now = source.sample().context("it has ended")?;
        let rates = Rates::between(Some(&before), &now);
        let mut out = Out::lock();
        if args.json {
            let line = serde_json::to_string(&rates)?;
            writeln!(out, "{}", clean_json(&line))?;
        } else {
            for line in view(args).lines(&rates, None) {
                writeln!(out, "{}", line.text)?;
            }
            if !args.once {
                writeln!(out)?;
            }
        }
        out.flush()?;
        if args.once {
            return Ok(());
        }
        before = now;
    }
}
