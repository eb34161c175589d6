// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A running `vmsg serve` with a switch, whose operator changes it while drivers of this process send frames through it.

mod changes;
mod coming;
mod command;
mod network;
mod process;
mod station;
mod waits;
