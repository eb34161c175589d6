// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes over the socket: messages of 8 bytes with at most one descriptor each.
