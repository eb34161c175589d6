// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device, a driver's queues before it and a made-up back end behind it.

mod bench;
mod control;
mod link;
mod pairs;
mod queues;
mod random;
