// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server side of vfio-user: a PCI device for a VMM, served from another process over a Unix socket.
#![forbid(unsafe_code)]
