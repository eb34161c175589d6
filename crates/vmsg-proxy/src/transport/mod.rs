// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of a virtio device, over whatever stands behind them.
