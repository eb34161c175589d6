// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmsg_net::switch::{MAX_TABLE, Rule, SwitchConfig};

use super::{is_default, text};
use crate::Usage;

/// `--switch id=…,…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct SwitchSpec {
    /// Its name; `s0`, `s1`, … by default.
    #[serde(skip_serializing_if = "is_default")]
    pub id: Option<String>,
    /// Which worker serves all its ports, counted from 0.
    #[serde(skip_serializing_if = "is_default")]
    pub worker: Option<usize>,
    /// Where frames to addresses go that are not known: `flood`, `drop`, or the name of an uplink; `flood` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub unknown: Option<String>,
    /// Seconds until an address is forgotten of which nothing is heard; 300 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub age: Option<u64>,
    /// Addresses that are known at a time; 8192 by default.
    #[serde(skip_serializing_if = "is_default")]
    pub table: Option<usize>,
    /// Who may send to whom, as `net0 > net1`, `net0 <> net1`, `web* > *`; without any, nobody to anybody.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub allow: Vec<String>,
    /// Exceptions to all `allow`, likewise.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub deny: Vec<String>,
    /// Rules behind all of these, in their order, of which the last one counts: `+net0 > net1` allows, `-net0 <> net1` denies.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub rule: Vec<String>,
}

/// The longest that an address may be remembered, in seconds: twenty days.
const LONGEST_AGE: u64 = 20 * 24 * 3600;

impl SwitchSpec {
    /// Looks for values that cannot be.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        self.config().map(|_| ())
    }

    /// The settings of the switch.
    pub(crate) fn config(&self) -> Result<SwitchConfig, Usage> {
        let mut config = SwitchConfig::new(self.id.clone().unwrap_or_default());
        if let Some(table) = self.table {
            if !(1..=MAX_TABLE).contains(&table) {
                return Err(Usage(format!(
                    "table={table}: 1 to {MAX_TABLE} are possible"
                )));
            }
            config.table = table;
        }
        if let Some(age) = self.age {
            if !(1..=LONGEST_AGE).contains(&age) {
                return Err(Usage(format!(
                    "age={age}: 1 to {LONGEST_AGE} seconds are possible"
                )));
            }
            config.age = Duration::from_secs(age);
        }
        if let Some(unknown) = &self.unknown {
            config.unknown = unknown.parse().unwrap_or_else(|never| match never {});
        }
        for (allow, key, texts) in [(true, "allow", &self.allow), (false, "deny", &self.deny)] {
            for text in texts {
                let rules =
                    Rule::parse(allow, text).map_err(|error| Usage(format!("{key}=: {error}")))?;
                config.rules.extend(rules);
            }
        }
        for text in &self.rule {
            let refuse = |error: &dyn std::fmt::Display| Usage(format!("rule=: {error}"));
            let (allow, rule) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
                (Some(rule), _) => (true, rule),
                (_, Some(rule)) => (false, rule),
                _ => {
                    return Err(refuse(&format_args!(
                        "`{text}` begins neither with `+` (it allows) nor with `-` (it denies)"
                    )));
                }
            };
            config
                .rules
                .extend(Rule::parse(allow, rule).map_err(|error| refuse(&error))?);
        }
        Ok(config)
    }
}
