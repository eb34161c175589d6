// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Consoles of guests: which there are, and one terminal for all of them.

mod args;
mod attach;
pub(crate) mod control;
mod keys;
mod line;
mod registry;
pub(crate) mod terminal;

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{anyhow, bail};

pub use args::{ConsoleAction, ConsoleArgs};
pub(crate) use control::Console;
pub(crate) use registry::Registry;

use crate::control::{Client, Request, Response, Table};
use crate::out::Out;
use crate::trace::{clean, clean_json};

/// `vmsg console`.
pub(crate) fn run(args: &ConsoleArgs) -> anyhow::Result<()> {
    let control = args.path.as_path();
    match &args.action {
        None => attach::attach(control, &args::ConsoleAttachArgs::default()),
        Some(ConsoleAction::Attach(args)) => attach::attach(control, args),
        Some(ConsoleAction::List(args)) => {
            let consoles = consoles(control, None)?;
            let mut out = Out::lock();
            if args.json {
                for line in serde_json::to_string_pretty(&consoles)?.lines() {
                    writeln!(out, "{}", clean_json(line))?;
                }
            } else {
                table(&consoles).print(&mut out)?;
            }
            Ok(())
        }
        Some(ConsoleAction::Log(args)) => {
            // The server may have another working directory.
            let file = match args.file.to_str() {
                Some("off") => None,
                _ => Some(std::path::absolute(&args.file)?),
            };
            let console = args.name.clone();
            let request = Request::ConsoleLog { console, file };
            Client::connect(control)?.have(&request).map(|_| ())
        }
    }
}

/// The consoles that the program at `control` has. `patience` is how long its answer may take, if not as long as others.
fn consoles(control: &Path, patience: Option<Duration>) -> anyhow::Result<Vec<Console>> {
    let mut client = Client::connect(control)?;
    if let Some(patience) = patience {
        client.set_patience(patience)?;
    }
    match client.have(&Request::Consoles {})? {
        Response::Consoles(consoles) => Ok(consoles),
        _ => bail!("{} does not tell its consoles", control.display()),
    }
}

/// The console called `name`, or the first that can be attached to.
fn choose<'c>(consoles: &'c [Console], name: Option<&str>) -> anyhow::Result<&'c Console> {
    let found = match name {
        Some(name) => consoles.iter().find(|console| console.name == name),
        None => consoles.iter().find(|console| console.socket.is_some()),
    };
    found.ok_or_else(|| {
        let names: Vec<String> = consoles.iter().map(|c| clean(&c.name)).collect();
        match (names.as_slice(), name) {
            ([], _) => anyhow!("there are no consoles; `serve --device console` makes one"),
            (_, None) => anyhow!("none of the consoles has a socket"),
            (names, Some(name)) => {
                let known = names.join(", ");
                anyhow!("there is no console {}; known: {known}", clean(name))
            }
        }
    })
}

/// Consoles for people.
pub(crate) fn table(consoles: &[Console]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "OPEN",
        "SIZE",
        "CLIENTS",
        "TO GUEST",
        "FROM GUEST",
        "LOST",
        "SOCKET",
        "PTY",
        "LOG",
    ]);
    let path = |path: &Option<std::path::PathBuf>| match path {
        Some(path) => path.display().to_string(),
        None => "-".to_owned(),
    };
    for console in consoles {
        table.row([
            console.name.clone(),
            if console.open { "yes" } else { "no" }.to_owned(),
            console
                .size
                .map_or("-".to_owned(), |(cols, rows)| format!("{cols}x{rows}")),
            console.clients.to_string(),
            console.input.to_string(),
            console.output.to_string(),
            console.lost.saturating_add(console.log_failed).to_string(),
            path(&console.socket),
            path(&console.pty),
            path(&console.log),
        ]);
    }
    table
}
