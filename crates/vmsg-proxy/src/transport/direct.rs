// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that reaches the guest's memory itself: the session's, with that memory lent to it.

use super::Backend;
use crate::link::SessionHandle;
use crate::session::{DeviceFacts, Op, OpError, Outcome, QueueSetup};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex};
use vmsg_mem::Doorbell;

/// What one queue has.
#[derive(Debug, Default)]
struct Line {
    /// Given to the device, so that somebody can ring it.
    kick: Option<Arc<OwnedFd>>,
    /// The same, if that is done from here.
    bell: Option<Doorbell>,
    /// Rung by the device.
    call: Option<Arc<OwnedFd>>,
    started: bool,
}

impl Line {
    /// The queue does not run any more.
    fn end(&mut self) {
        self.started = false;
        self.kick = None;
        self.bell = None;
    }
}

/// The device of a session. Lending the memory is its owner's business, as is taking news from the session.
///
/// Each queue that is started gets an eventfd of its own as kick, and as call what [`set_call`](Self::set_call) says; without one the session
/// tells of used buffers ([`Event::QueueUsed`](crate::session::Event::QueueUsed)).
#[derive(Debug)]
pub struct Direct {
    session: SessionHandle,
    facts: DeviceFacts,
    lines: Vec<Line>,
}

impl Direct {
    /// Asks the session what its device is, which may take as long as
    /// [`first_contact_timeout`](crate::session::Options::first_contact_timeout).
    ///
    /// # Errors
    /// [`OpError`] of that question.
    pub fn new(session: SessionHandle) -> Result<Direct, OpError> {
        let facts = describe(&session)?;
        let lines = facts.queue_sizes.iter().map(|_| Line::default()).collect();
        Ok(Direct {
            session,
            facts,
            lines,
        })
    }

    /// The session.
    pub fn session(&self) -> &SessionHandle {
        &self.session
    }

    /// The eventfd that the device rings when it has used buffers of `queue`, from now on and after resets, too. `None`: it says so by
    /// message.
    ///
    /// # Errors
    /// [`OpError`] of telling a device whose queue is set up; the eventfd is remembered nevertheless.
    pub fn set_call(
        &mut self,
        queue: QueueIndex,
        call: Option<Arc<OwnedFd>>,
    ) -> Result<(), OpError> {
        let Some(line) = self.lines.get_mut(queue.to_usize()) else {
            return Err(OpError::Invalid("no such queue"));
        };
        line.call = call;
        if line.started {
            self.tell(queue)?;
        }
        Ok(())
    }

    fn tell(&self, queue: QueueIndex) -> Result<(), OpError> {
        let Some(line) = self.lines.get(queue.to_usize()) else {
            return Ok(());
        };
        let op = Op::SetNotify {
            queue,
            kick: line.kick.clone(),
            call: line.call.clone(),
        };
        self.session.call(op).map(drop)
    }

    /// Sets a queue up with eventfds of somebody who goes between driver and device, and kicks it.
    pub(crate) fn start_queue_with(
        &mut self,
        queue: QueueIndex,
        setup: QueueSetup,
        kick: Arc<OwnedFd>,
        call: Arc<OwnedFd>,
    ) -> Result<(), OpError> {
        let Some(line) = self.lines.get_mut(queue.to_usize()) else {
            return Err(OpError::Invalid("no such queue"));
        };
        (line.kick, line.bell) = (Some(kick), None);
        line.call = Some(call);
        self.begin(queue, setup)
    }

    fn begin(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        self.tell(queue)?;
        self.session.call(Op::SetQueue(queue, setup))?;
        if let Some(line) = self.lines.get_mut(queue.to_usize()) {
            line.started = true;
        }
        Ok(())
    }

    /// An eventfd that nobody has held before.
    fn new_kick() -> Option<(Doorbell, Arc<OwnedFd>)> {
        let bell = Doorbell::new().ok()?;
        let file = bell.try_clone().ok()?;
        Some((bell, Arc::new(OwnedFd::from(file))))
    }
}

fn describe(session: &SessionHandle) -> Result<DeviceFacts, OpError> {
    match session.call(Op::Describe)? {
        Outcome::Device(facts) => Ok(facts),
        _ => Err(OpError::NoDevice),
    }
}

impl Backend for Direct {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn set_features(&mut self, features: FeatureSet) -> Result<(), OpError> {
        self.session.call(Op::SetFeatures(features)).map(drop)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError> {
        let outcome = self.session.call(Op::SetStatus(status))?;
        if status.is_empty() {
            for line in &mut self.lines {
                line.end();
            }
            // What the next driver finds may be another build of the device.
            if let Ok(facts) = describe(&self.session) {
                self.facts = facts;
            }
        }
        match outcome {
            Outcome::Status(status) => Ok(status),
            _ => Err(OpError::BadAnswer("no status in the answer to a status")),
        }
    }

    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        let Some(line) = self.lines.get_mut(queue.to_usize()) else {
            return Err(OpError::Invalid("no such queue"));
        };
        // Without one the kicks go by message.
        (line.bell, line.kick) = Direct::new_kick().unzip();
        self.begin(queue, setup)
    }

    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        self.session.call(Op::StopQueue(queue))?;
        if let Some(line) = self.lines.get_mut(queue.to_usize()) {
            line.end();
        }
        Ok(())
    }

    fn kick(&mut self, queue: QueueIndex) {
        let line = self.lines.get(queue.to_usize());
        match line.and_then(|line| line.bell.as_ref()) {
            // Full means that it has been rung.
            Some(bell) => drop(bell.ring()),
            // Ended means that there is nobody to be told.
            None => drop(self.session.kick(queue)),
        }
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError> {
        let len = u32::try_from(data.len()).map_err(|_| OpError::Invalid("too much at once"))?;
        match self.session.call(Op::ReadConfig { offset, len })? {
            Outcome::Config(bytes) if bytes.len() == data.len() => {
                data.copy_from_slice(&bytes);
                Ok(())
            }
            _ => Err(OpError::BadAnswer("another number of bytes than asked for")),
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError> {
        let data = data.to_vec();
        self.session
            .call(Op::WriteConfig { offset, data })
            .map(drop)
    }
}
