// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages on their way to stdout.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};

use vmsg_bus::trace::{Captured, Item, Reader, Way};

use super::decode::Decoded;
use super::line::{Clock, clean, clean_json, hex, microseconds};
use super::pairs::Pairs;
use crate::cli::TraceArgs;
use crate::out::Out;

/// Shows the messages that are wanted.
pub(super) struct Show {
    args: TraceArgs,
    out: BufWriter<Out>,
    clock: Clock,
    pairs: Pairs,
    /// Interfaces that were introduced.
    introduced: HashSet<usize>,
    /// Interfaces there are.
    interfaces: usize,
}

impl Show {
    pub(super) fn new(args: TraceArgs) -> Self {
        Self {
            clock: Clock::new(args.absolute),
            args,
            out: BufWriter::with_capacity(1 << 16, Out::lock()),
            pairs: Pairs::default(),
            introduced: HashSet::new(),
            interfaces: 0,
        }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Shows all that is there.
    pub(super) fn all(&mut self, reader: &mut Reader<File>) -> anyhow::Result<()> {
        while let Some(item) = reader.next_item()? {
            match item {
                Item::Interface { interface, .. } => self.interfaces = interface + 1,
                Item::Message(message) => self.message(&message)?,
                Item::Foreign { offset, why } => {
                    self.note(&format!("at offset {offset}: {why}"))?;
                }
                Item::Statistics {
                    interface,
                    seen,
                    lost,
                } if lost > 0 => self.note(&format!(
                    "interface {interface}: {lost} of {seen} messages were not recorded"
                ))?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Something to know that is no message; programs get only messages.
    fn note(&mut self, text: &str) -> io::Result<()> {
        if self.args.json {
            return Ok(());
        }
        writeln!(self.out, "# {text}")
    }

    fn message(&mut self, captured: &Captured<'_>) -> io::Result<()> {
        let decoded = Decoded::new(captured);
        let took = decoded
            .as_ref()
            .ok()
            .and_then(|decoded| self.pairs.see(captured, decoded));
        let since = self.clock.since_first(captured.time);
        if captured.lost > 0 {
            let (lost, interface) = (captured.lost, captured.interface);
            self.note(&format!(
                "interface {interface}: {lost} messages are missing here"
            ))?;
        }
        if !self.is_wanted(decoded.as_ref().ok()) {
            return Ok(());
        }
        if self.args.json {
            return self.json(captured, &decoded, since, took);
        }
        if self.introduced.insert(captured.interface) {
            let source = captured.source;
            self.note(&format!(
                "interface {}: {} ({})",
                captured.interface,
                clean(&source.name),
                clean(&source.description)
            ))?;
        }
        self.line(captured, &decoded, since, took)
    }

    fn is_wanted(&self, decoded: Option<&Decoded>) -> bool {
        let of_device = self
            .args
            .dev
            .is_none_or(|dev| decoded.is_some_and(|decoded| decoded.about == Some(dev)));
        let of_type = self.args.types.is_empty()
            || decoded.is_some_and(|decoded| {
                let name = decoded.name;
                self.args.types.iter().any(|t| t.eq_ignore_ascii_case(name))
            });
        of_device && of_type
    }

    /// `     41.778  +12.003  [0] → dev 0 #3 GET_DEVICE_INFO`
    fn line(
        &mut self,
        captured: &Captured<'_>,
        decoded: &Result<Decoded, String>,
        since: i128,
        took: Option<u64>,
    ) -> io::Result<()> {
        let out = &mut self.out;
        self.clock.write(out, captured.time, since)?;
        match took {
            Some(took) => write!(out, " {:>12}", format!("+{}", microseconds(took.into())))?,
            None => write!(out, " {:>12}", "")?,
        }
        if self.interfaces > 1 {
            write!(out, " [{}]", captured.interface)?;
        }
        let arrow = match captured.way {
            Way::ToDevice => '→',
            Way::ToDriver => '←',
        };
        write!(out, " {arrow} ")?;
        match decoded {
            Ok(decoded) => write!(out, "{}", clean(&decoded.text))?,
            Err(why) => write!(out, "undecodable ({why}): {}", hex(captured.message))?,
        }
        match captured.fds {
            0 => {}
            1 => write!(out, " (1 descriptor)")?,
            fds => write!(out, " ({fds} descriptors)")?,
        }
        writeln!(out)
    }

    fn json(
        &mut self,
        captured: &Captured<'_>,
        decoded: &Result<Decoded, String>,
        since: i128,
        took: Option<u64>,
    ) -> io::Result<()> {
        let mut object = serde_json::json!({
            "time_ns": captured.time,
            "since_first_ns": i64::try_from(since).unwrap_or(i64::MAX),
            "interface": captured.interface,
            "interface_name": captured.source.name,
            "direction": match captured.way {
                Way::ToDevice => "to-device",
                Way::ToDriver => "to-driver",
            },
            "layout": super::decode::layout(captured.layout),
            "fds": captured.fds,
            "bytes": hex(captured.message),
        });
        let mut set = |key: &str, value: serde_json::Value| object[key] = value;
        if captured.lost > 0 {
            set("lost_before", captured.lost.into());
        }
        match decoded {
            Ok(decoded) => {
                set("bus", decoded.bus.into());
                set("dev", decoded.dev.into());
                set("token", decoded.token.into());
                set("id", decoded.id.into());
                set("name", decoded.name.into());
                set("kind", super::decode::kind(decoded.kind).into());
                set("text", decoded.text.as_str().into());
                if let Some(took) = took {
                    set("response_time_ns", took.into());
                }
            }
            Err(why) => set("error", why.as_str().into()),
        }
        // What JSON lets pass, a terminal may not.
        writeln!(self.out, "{}", clean_json(&object.to_string()))
    }
}
