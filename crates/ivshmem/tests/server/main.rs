// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server and its clients, good and bad, in one process.

mod bad_clients;
mod clients;
mod places;
mod support;
