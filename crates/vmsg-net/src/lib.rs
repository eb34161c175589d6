// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a virtio network device plugs into: user-mode stack, capture.
