// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver side of virtio-msg as a library.
