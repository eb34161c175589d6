// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Results, printed as they come and summed up at the end.

use anyhow::Result;

use crate::guest::Check;

/// How many tests may pass only when run again; more is not explained by a busy machine.
pub(crate) const SECOND_RUNS: usize = 2;

/// The results of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: usize,
    /// What failed and why, for the end of the run.
    failures: Vec<(String, String)>,
    /// What failed and then passed when it was run again, and why it failed first.
    again: Vec<String>,
}

impl Report {
    /// `count` things that are reported elsewhere have passed.
    pub(crate) fn passed(&mut self, count: usize) {
        self.passed += count;
    }

    /// `name` failed and passed when it was run again, which is no failure, but said, with `why` it failed first.
    pub(crate) fn passed_again(&mut self, name: &str, why: &str) {
        let line = format!("{name}: {why}");
        println!("again {line}");
        self.again.push(line);
    }

    /// As [`Self::passed_again`], with what the report of the first run says.
    pub(crate) fn again(&mut self, name: &str, first: &Self) {
        let lines = first
            .failures
            .iter()
            .map(|(name, why)| format!("{name}: {}", why.lines().next().unwrap_or_default()));
        self.passed_again(name, &lines.collect::<Vec<_>>().join("; "));
    }

    /// Whether nothing has failed.
    pub(crate) fn all_well(&self) -> bool {
        self.failures.is_empty()
    }

    /// Takes in whether `name` holds; a reason is wanted if not.
    pub(crate) fn check(&mut self, name: &str, holds: bool, why: impl FnOnce() -> String) {
        self.add(Check {
            name: name.to_owned(),
            failure: (!holds).then(why),
        });
    }

    /// Takes in how `name` ended.
    pub(crate) fn result(&mut self, name: &str, result: Result<()>) {
        let failure = result.err().map(|error| format!("{error:#}"));
        self.add(Check {
            name: name.to_owned(),
            failure,
        });
    }

    /// Takes in a result.
    pub(crate) fn add(&mut self, check: Check) {
        match check.failure {
            None => {
                println!("ok    {}", check.name);
                self.passed += 1;
            }
            Some(why) => {
                println!("FAIL  {}: {why}", check.name);
                self.failures.push((check.name, why));
            }
        }
    }

    /// Takes in the results of another, which are printed already.
    pub(crate) fn merge(&mut self, other: Self) {
        self.passed += other.passed;
        self.failures.extend(other.failures);
        self.again.extend(other.again);
    }

    /// Prints what failed and, as last line, the counts. Gives whether all is well: nothing failed and something
    /// passed.
    pub(crate) fn finish(&self) -> bool {
        if !self.failures.is_empty() {
            println!("\nfailed:");
            for (name, why) in &self.failures {
                println!("  {name}: {}", why.lines().next().unwrap_or_default());
            }
        }
        if !self.again.is_empty() {
            println!("\npassed when run again:");
            for line in &self.again {
                println!("  {line}");
            }
        }
        println!("{} passed, {} failed", self.passed, self.failures.len());
        self.failures.is_empty() && self.passed > 0
    }
}
