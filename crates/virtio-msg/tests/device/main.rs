// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device machine, rule by rule.

mod bench;
mod queues;
mod rules;
