// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of the server, on the host.
