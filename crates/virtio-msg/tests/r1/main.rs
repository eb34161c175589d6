// SPDX-License-Identifier: Apache-2.0 OR MIT
//! r1: the codec and the two adapters, against recorded messages and against scripted peers.

mod chain;
mod device;
mod driver;
mod golden_device;
mod golden_driver;
mod recorded;
mod recovery;
mod stack;
