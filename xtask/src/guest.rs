// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest: a stock kernel in a stock QEMU that runs a script and reports on its console.
//!
//! The script's language is in `guest/library.sh`. On the console, `MARK name detail` tells the host how far the
//! script is, `CHECK name ok` and `CHECK name FAIL why` are results; the host can answer with lines of its own.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::initrd;
use crate::kit::Kit;
use crate::proof::Console;
use crate::qemu::{self, Hardware};
use crate::scene::{Id, Line, Scene, Stream};

/// Longest time from QEMU's start to the script's first line: two to six seconds, a multiple when the host is busy.
const BOOT: Duration = Duration::from_secs(120);
/// Longest time from the script's end to QEMU's.
const POWER_OFF: Duration = Duration::from_secs(30);

/// A running guest.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its QEMU.
    pub(crate) id: Id,
    name: String,
    machine: &'static str,
}

/// One result of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// What was checked, in a word.
    pub(crate) name: String,
    /// Why it does not hold; none if it does.
    pub(crate) failure: Option<String>,
}

impl Guest {
    /// Starts a guest named `name` that runs `script` with `settings` as shell variables.
    pub(crate) fn start(
        scene: &mut Scene,
        name: &str,
        kit: &Kit,
        hardware: Hardware<'_>,
        script: &str,
        settings: &[(&str, String)],
    ) -> Result<Self> {
        let file = format!("{name}.initrd");
        fs::write(
            scene.dir().join(&file),
            initrd::build(kit, script, settings)?,
        )
        .with_context(|| format!("cannot write {file}"))?;
        let command = qemu::command(kit, qemu::version(&kit.qemu)?, hardware, &file)?;
        let id = scene.start(name, &command)?;
        Ok(Self {
            id,
            name: name.to_owned(),
            machine: kit.machine.name(),
        })
    }

    /// Its name in the run.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the kernel is up and gives its version.
    pub(crate) fn booted(&self, scene: &mut Scene) -> Result<String> {
        Ok(self.mark(scene, "booted", BOOT)?.0)
    }

    /// Waits for the mark `name` and gives what stands after it, and when it came.
    pub(crate) fn mark(
        &self,
        scene: &mut Scene,
        name: &str,
        within: Duration,
    ) -> Result<(String, Duration)> {
        scene.expect(
            (self.id, Stream::Out),
            &format!("the mark '{name}' of the guest"),
            within,
            |line| {
                let (mark, detail) = mark(&line.text)?;
                (mark == name).then(|| (detail.to_owned(), line.at))
            },
        )
    }

    /// Waits for a line of the console.
    pub(crate) fn expect<T>(
        &self,
        scene: &mut Scene,
        what: &str,
        within: Duration,
        pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        scene.expect((self.id, Stream::Out), what, within, pick)
    }

    /// Writes a line to the guest's console.
    pub(crate) fn tell(&self, scene: &mut Scene, line: &str) -> Result<()> {
        scene.tell(self.id, line)
    }

    /// Waits for the script's end and QEMU's, and gives all results.
    pub(crate) fn finish(self, scene: &mut Scene, within: Duration) -> Result<Vec<Check>> {
        self.mark(scene, "done", within)?;
        scene
            .wait_end(self.id, POWER_OFF)
            .context("the guest does not power off")?;
        // Only a run that failed needs it again, and that does not come here.
        let _ = fs::remove_file(scene.dir().join(format!("{}.initrd", self.name)));
        Ok(self.checks(scene))
    }

    /// The results so far.
    pub(crate) fn checks(&self, scene: &Scene) -> Vec<Check> {
        scene
            .lines(self.id, Stream::Out)
            .iter()
            .filter_map(|l| check(&l.text))
            .map(|c| Check {
                name: format!("{}/{}/{}", self.machine, self.name, c.name),
                ..c
            })
            .collect()
    }
}

impl Console for &Guest {
    fn expect<T>(
        &mut self,
        scene: &mut Scene,
        what: &str,
        within: Duration,
        pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        Guest::expect(self, scene, what, within, pick)
    }
}

/// The name and the detail in a `MARK` line.
pub(crate) fn mark(line: &str) -> Option<(&str, &str)> {
    let rest = line.split_once("MARK ")?.1.trim_end();
    Some(rest.split_once(' ').unwrap_or((rest, "")))
}

/// The result in a `CHECK` line.
pub(crate) fn check(line: &str) -> Option<Check> {
    let mut words = line.split_once("CHECK ")?.1.trim_end().splitn(3, ' ');
    let name = words.next()?.to_owned();
    let failure = match words.next() {
        Some("ok") => None,
        _ => Some(words.next().unwrap_or("no reason given").to_owned()),
    };
    Some(Check { name, failure })
}

#[cfg(test)]
#[path = "guest_test.rs"]
mod tests;
