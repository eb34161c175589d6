// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtio-msg protocol: messages, device and driver state machines.
