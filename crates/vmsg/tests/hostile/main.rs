// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The worst that a driver can do to a running `vmsg serve`.
//!
//! Each test attacks one process from the byte formats, while an honest driver
//! keeps using a device of the same worker. Afterwards the process has no more
//! descriptors, memory and log lines than is decent, does not use the
//! processor, and every device can be used by the next driver.

mod connections;
mod host;
mod link;
mod memory;
mod messages;
mod net;
mod net_pairs;
mod notify;
mod peer;
mod rings;
