// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve` with disks, driven from this process.

mod formats;
mod hostile;
mod images;
mod killed;
mod stand;
mod storms;
mod trouble;
