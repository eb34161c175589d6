// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the machine's own apt sources and keeps what a private apt needs of them.
//!
//! Both formats of sources.list(5) are understood: deb822 stanzas (`*.sources`) and one-line entries (`*.list`).
//! Kept are the entries of the Debian archive itself (the release, its updates and its security archive) with their
//! signatures; restrictions to an architecture are dropped, since the private apt serves another one as well.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The sources of the private apt.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sources {
    /// One-line entries.
    pub(crate) list: String,
    /// Stanzas.
    pub(crate) stanzas: String,
}

impl Sources {
    /// Reads `sources.list` and `sources.list.d` in `etc` (normally `/etc/apt`) for the Debian release `codename`.
    pub(crate) fn read(etc: &Path, codename: &str) -> Result<Self> {
        let mut sources = Self::default();
        let mut files = vec![etc.join("sources.list")];
        let parts = etc.join("sources.list.d");
        if parts.is_dir() {
            for entry in
                fs::read_dir(&parts).with_context(|| format!("cannot read {}", parts.display()))?
            {
                files.push(entry?.path());
            }
        }
        files.sort();
        for file in files.iter().filter(|f| f.is_file()) {
            let stanzas = match file.extension().and_then(|e| e.to_str()) {
                Some("list") => false,
                Some("sources") => true,
                _ => continue,
            };
            let text = fs::read_to_string(file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            if stanzas {
                sources.add_stanzas(&text, codename);
            } else {
                sources.add_list(&text, codename);
            }
        }
        Ok(sources)
    }

    /// The archive of the release's own suite, with the suites of Debian 13 and its backports in place of it.
    pub(crate) fn of_trixie_with_backports(&self) -> Self {
        const SUITES: &str = "trixie trixie-updates trixie-backports";
        let mut sources = Self::default();
        // One entry of each archive: suites of updates lie in the same one, that of security does not.
        let mut seen = Vec::new();
        for line in self.list.lines() {
            let Some((head, suite)) = line
                .strip_suffix(" main")
                .and_then(|line| line.rsplit_once(' '))
            else {
                continue;
            };
            if !suite.contains(['-', '/']) && !seen.contains(&head) {
                seen.push(head);
                for suite in SUITES.split(' ') {
                    sources.list.push_str(&format!("{head} {suite} main\n"));
                }
            }
        }
        for stanza in self.stanzas.split("\n\n") {
            let own = |line: &&str| {
                line.strip_prefix("Suites: ")
                    .is_some_and(|s| s.split(' ').any(|s| !s.contains(['-', '/'])))
            };
            if let Some(suites) = stanza.lines().find(own) {
                let stanza = stanza.replace(suites, &format!("Suites: {SUITES}"));
                sources
                    .stanzas
                    .push_str(&format!("{}\n\n", stanza.trim_end()));
            }
        }
        sources
    }

    /// Whether there is no entry at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty() && self.stanzas.is_empty()
    }

    fn add_list(&mut self, text: &str, codename: &str) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some(rest) = line
                .strip_prefix("deb")
                .filter(|r| r.starts_with([' ', '\t']))
            else {
                continue;
            };
            let rest = rest.trim_start();
            let (options, rest) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
                Some((options, rest)) => (options, rest),
                None => ("", rest),
            };
            let mut words = rest.split_whitespace();
            let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
                continue;
            };
            if !is_own_suite(suite, codename) || !words.any(|c| c == "main") {
                continue;
            }
            let options: Vec<&str> = options
                .split_whitespace()
                .filter(|o| !o.starts_with("arch"))
                .collect();
            let options = if options.is_empty() {
                String::new()
            } else {
                format!("[{}] ", options.join(" "))
            };
            self.list
                .push_str(&format!("deb {options}{uri} {suite} main\n"));
        }
    }

    fn add_stanzas(&mut self, text: &str, codename: &str) {
        // Comment lines may stand anywhere, inside of a field too (deb822(5)).
        let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
        for stanza in lines
            .split(|l| l.trim().is_empty())
            .filter(|s| !s.is_empty())
        {
            let mut kept = String::new();
            let (mut types, mut suites, mut components) = (false, false, false);
            let mut enabled = true;
            for (name, value) in fields(stanza) {
                let mut words = value.split_whitespace();
                match name.to_ascii_lowercase().as_str() {
                    "types" => types = words.any(|w| w == "deb"),
                    "components" => components = words.any(|w| w == "main"),
                    "enabled" => enabled = !matches!(value.trim(), "no" | "false" | "0" | "off"),
                    "architectures" | "architectures-add" | "architectures-remove" => {}
                    "suites" => {
                        let own: Vec<&str> = words.filter(|w| is_own_suite(w, codename)).collect();
                        suites = !own.is_empty();
                        kept.push_str(&format!("Suites: {}\n", own.join(" ")));
                    }
                    _ => kept.push_str(&format!("{name}:{value}\n")),
                }
            }
            if types && suites && components && enabled {
                self.stanzas
                    .push_str(&format!("Types: deb\nComponents: main\n{kept}\n"));
            }
        }
    }
}

/// The fields of a stanza; a value keeps its continuation lines as they stand.
fn fields<'a>(stanza: &[&'a str]) -> Vec<(&'a str, String)> {
    let mut fields: Vec<(&str, String)> = Vec::new();
    for line in stanza {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim(), value.to_owned()));
        }
    }
    fields
}

fn is_own_suite(suite: &str, codename: &str) -> bool {
    let base = suite
        .strip_suffix("-updates")
        .or_else(|| suite.strip_suffix("-security"))
        .or_else(|| suite.strip_suffix("/updates"))
        .unwrap_or(suite);
    base == codename
        || matches!(
            base,
            "stable" | "oldstable" | "testing" | "unstable" | "sid"
        )
}

#[cfg(test)]
#[path = "sources_test.rs"]
mod tests;
