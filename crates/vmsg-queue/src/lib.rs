// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtqueues over windows of shared memory, device and driver side.
