// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared memory for virtio-msg: windows, address spaces, message queues.
