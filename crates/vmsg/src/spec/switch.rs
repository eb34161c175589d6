// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch.

use serde::{Deserialize, Serialize};

use super::is_default;
use super::text;
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
    /// Who may reach whom, as `net0 > net1`, `net0 <> net1`, `web* > *`; without any, nobody.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Exceptions to `allow`, likewise.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
}

/// Addresses that a switch may know at most: some 100 MiB.
const LARGEST_TABLE: usize = 1 << 20;

impl SwitchSpec {
    /// Looks for values that cannot be.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        let refuse = |text: String| Err(Usage(text));
        match self.table {
            Some(table) if !(16..=LARGEST_TABLE).contains(&table) => {
                return refuse(format!("table={table}: 16 to {LARGEST_TABLE} are possible"));
            }
            _ => {}
        }
        match self.age {
            Some(age) if !(1..=1_000_000).contains(&age) => {
                return refuse(format!("age={age}: 1 to 1000000 seconds are possible"));
            }
            _ => {}
        }
        Ok(())
    }
}
