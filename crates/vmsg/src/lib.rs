// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vmsg command: serve, proxy, ls, ping.
