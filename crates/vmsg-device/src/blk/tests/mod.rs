// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device, a driver's queues before it and a made-up disk behind it.

mod bench;
mod disk;
mod life;
mod random;
mod requests;
