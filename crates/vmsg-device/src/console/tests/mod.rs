// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device, and a driver's queues before it.

mod bench;
mod device;
mod hostile;
