// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg trace`: what was recorded with `trace=FILE`, one line a message.

mod decode;
mod follow;
mod line;
mod pairs;
mod show;

pub(crate) use self::line::{clean, clean_json};

use std::fs::File;

use anyhow::{Context, bail};
use vmsg_bus::trace::Reader;

use crate::Usage;
use crate::cli::TraceArgs;
use follow::{Follow, Woken};
use show::Show;

/// Shows a trace.
pub(crate) fn run(args: TraceArgs) -> anyhow::Result<()> {
    for name in &args.types {
        if !decode::is_name(name) {
            bail!(Usage(format!(
                "--type {name}: there is no such message; known: {}",
                decode::NAMES.join(", ")
            )));
        }
    }
    let path = args.file.clone();
    let context = || path.display().to_string();
    let file = File::open(&path).with_context(context)?;
    // Watched before it is read: nothing that is appended meanwhile is missed.
    let follow = args
        .follow
        .then(|| Follow::new(&path))
        .transpose()
        .with_context(context)?;
    let mut reader = Reader::new(file);
    let mut show = Show::new(args);
    loop {
        let result = show.all(&mut reader);
        // All that is good comes before what is wrong.
        show.flush()?;
        result.with_context(context)?;
        let Some(follow) = &follow else { break };
        if follow.wait()? == Woken::NobodyReads {
            return Ok(());
        }
        let len = reader.get_ref().metadata().with_context(context)?.len();
        if len < reader.unfinished().0 {
            bail!("{}: the file was cut short", path.display());
        }
        reader.reread().with_context(context)?;
    }
    match reader.unfinished() {
        (_, 0) => Ok(()),
        (offset, bytes) => bail!(
            "{}: at offset {offset}: the file ends in the middle of a block, of which {bytes} bytes are there",
            path.display()
        ),
    }
}
