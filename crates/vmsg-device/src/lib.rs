// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host: devices, workers and their virtio-msg front.
