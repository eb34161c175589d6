// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings and devices that are stopped.

use super::guest::{Guest, GuestError, op};
use crate::session::{Op, OpError};
use std::time::Instant;
use virtio_msg::{DeviceStatus, QueueIndex};

impl Guest {
    pub(super) fn reset(&mut self) -> Result<(), GuestError> {
        for ring in &mut self.rings {
            ring.running = false;
            ring.enabled = false;
            ring.forget();
        }
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<(), GuestError> {
        self.live = false;
        self.negotiated = false;
        let result = self.quiesce(
            Op::SetStatus(DeviceStatus::RESET),
            "setting the device status",
        );
        if let Some(copies) = &self.copies {
            // Whatever the device does now, it does not concern the guest any more.
            copies.reset();
        }
        result
    }

    /// Has the device let go of queues. Who has asked for that is told when it is done, and takes the memory for other things then: so a device
    /// that has requests under way is waited for, and the front end with it, but not for ever. Where the device has copies it is not waited for:
    /// the guest's memory is not touched any more in any case.
    fn quiesce(&mut self, op_quiesce: Op, what: &'static str) -> Result<(), GuestError> {
        // All rings together have that time.
        let now = Instant::now();
        let until = *self.stops_until.get_or_insert(now + self.stop_patience);
        let mut told = false;
        loop {
            match self.session.call(op_quiesce.clone()) {
                Err(OpError::Busy) if self.copies.is_none() && Instant::now() < until => {
                    if !std::mem::replace(&mut told, true)
                        && let Some(unsaid) = self.limit.admit()
                    {
                        tracing::warn!(
                            unsaid,
                            "the device has requests under way that do not end: the front end, and its guest, wait up to {} s",
                            self.stop_patience.as_secs()
                        );
                    }
                }
                Err(OpError::Busy) if self.copies.is_none() => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::error!(
                            unsaid,
                            "the device has requests under way that do not end; the front end is told that it was stopped, \
and what these requests read may still be written to the guest's memory: better end this guest"
                        );
                    }
                    return Err(op(what)(OpError::Busy));
                }
                result => {
                    if result.is_ok() {
                        self.stops_until = None;
                    }
                    return result.map(drop).map_err(op(what));
                }
            }
        }
    }

    /// Stops a ring but keeps what is known of it.
    pub(super) fn pause(&mut self, index: u32) -> Result<(), GuestError> {
        let memory = self.memory.clone();
        let ring = self.ring(index)?;
        if !ring.running {
            return Ok(());
        }
        ring.running = false;
        let used_at = ring.setup(&memory).map(|(_, used_at)| used_at);
        let last = self.rings.iter().all(|ring| !ring.running);
        let stopped = if last {
            // A whole reset, so that features can be negotiated again.
            self.reset_device()
        } else {
            let stopped = self.quiesce(Op::StopQueue(QueueIndex(index)), "stopping a ring");
            self.stop_copies(index);
            stopped
        };
        // The device does not move any more: all it took was given back up to here, and the rest is processed again. If it was not to be
        // stopped, this is the best that is known.
        let used = used_at.and_then(|at| memory.read_u16(at)).unwrap_or(0);
        self.ring(index)?.base = Some(used);
        stopped
    }

    /// GET_VRING_BASE.
    pub(super) fn stop(&mut self, index: u32) -> Result<u16, GuestError> {
        self.ring(index)?;
        if let Err(error) = self.pause(index) {
            // The front end needs its answer: where the device was stands in the ring.
            if let Some(unsaid) = self.limit.admit() {
                tracing::warn!(ring = index, %error, unsaid, "stopping");
            }
        }
        let ring = self.ring(index)?;
        let base = ring.base.unwrap_or(0);
        ring.forget();
        Ok(base)
    }
}
