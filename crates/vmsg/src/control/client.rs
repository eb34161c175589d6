// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ctl`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use super::list;
use super::protocol::{Request, Response};
use crate::cli::{CtlAction, CtlArgs};
use crate::out::Out;
use crate::trace::{clean, clean_json};

/// Longer than the server waits for the device host.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an answer: that of a few thousand devices.
const MAX_ANSWER: u64 = 64 << 20;

/// Makes one request of a running `vmsg serve`.
pub(crate) fn run(args: CtlArgs) -> anyhow::Result<()> {
    let mut json = false;
    let request = match args.action {
        CtlAction::List(list) => {
            json = list.json;
            Request::List {}
        }
        CtlAction::Link(link) => {
            let (bus, device) = split(&link.device);
            Request::Link {
                device,
                bus,
                state: link.state,
            }
        }
        CtlAction::Announce(announce) => {
            let (bus, device) = split(&announce.device);
            Request::Announce { device, bus }
        }
    };
    match ask(&args.path, &request)? {
        Response::Done {} => Ok(()),
        Response::Devices(devices) => {
            let mut out = Out::lock();
            if json {
                let text = serde_json::to_string_pretty(&devices)?;
                for line in text.lines() {
                    writeln!(out, "{}", clean_json(line))?;
                }
            } else {
                list::print(&mut out, &devices)?;
            }
            Ok(())
        }
        Response::Error(failure) => bail!("{}", clean(&failure.message)),
    }
}

/// `ID`, or `BUS/ID`.
fn split(text: &str) -> (Option<String>, String) {
    match text.split_once('/') {
        Some((bus, device)) => (Some(bus.to_owned()), device.to_owned()),
        None => (None, text.to_owned()),
    }
}

fn ask(path: &Path, request: &Request) -> anyhow::Result<Response> {
    let mut stream = UnixStream::connect(path)
        .with_context(|| format!("nobody answers at {}", path.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    // A server that is busy has said so and closed; its words are better than a broken pipe.
    let sent = stream.write_all(&line);
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER))
        .read_until(b'\n', &mut answer)
        .context("no answer")?;
    if answer.is_empty() {
        sent.context("the request was not taken")?;
        bail!("{} closed the connection without an answer", path.display());
    }
    serde_json::from_slice(&answer).map_err(|error| {
        anyhow!(
            "the answer is not understood: {}",
            clean(&error.to_string())
        )
    })
}
