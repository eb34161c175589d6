// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the back end, or from other devices, to the driver.

use vmsg_mem::AddressSpace;
use vmsg_net::{Backend, Closed, RxSink, Wanted};
use vmsg_queue::{ChainStorage, Need};

use super::lanes::{Lane, Lanes};
use super::sink::{Buffers, Discard, Reason};
use super::{Net, receive_queue};
use crate::device::{ActiveQueue, DeviceError, Io};

/// Batches before others have their turn.
const ROUNDS: usize = 4;

impl Net {
    /// Gives the driver what the back end has for it, as far as there are
    /// buffers and others need not have a turn.
    pub(super) fn receive(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for _ in 0..ROUNDS {
            if !self.backend.has_frames() {
                return Ok(());
            }
            let delivered = match self.destination(io) {
                Destination::Driver => self.deliver(io)?,
                Destination::Nowhere(reason) => Some(self.discard(io, reason)),
                Destination::Later => return Ok(()),
            };
            match delivered {
                Some(frames) if frames > 0 => {}
                Some(_) => return Ok(()),
                // Buffers came just now.
                None => {}
            }
        }
        // Whoever it is: each queue's turn ends here.
        if let Some(queue) = io.queues.iter().position(Option::is_some) {
            io.again(queue);
        }
        Ok(())
    }

    fn destination(&mut self, io: &Io<'_>) -> Destination {
        if !self.config.link_is_up() {
            return Destination::Nowhere(Reason::LinkDown);
        }
        let pairs = self.session.receiving_pairs();
        if (0..pairs).any(|pair| matches!(io.queues.get(receive_queue(pair)), Some(Some(_)))) {
            self.session.has_received = true;
            return Destination::Driver;
        }
        if self.session.has_received {
            // All receive queues are being reset (VIRTIO 1.3, 5.1.6.5.6.2).
            Destination::Nowhere(Reason::NoQueue)
        } else {
            Destination::Later
        }
    }

    /// One round of frames into the driver's buffers; how many there were, or
    /// `None` if there were none and the driver has new buffers.
    fn deliver(&mut self, io: &mut Io<'_>) -> Result<Option<usize>, DeviceError> {
        let Io {
            queues,
            space,
            storage,
            now,
            notices,
            ..
        } = io;
        let space: AddressSpace<'_> = *space;
        let (backend, mut sink) = self.open(queues, space, storage, None);
        let delivered = backend.receive(*now, &mut sink);
        // The driver has to say when it has more buffers than those that do not suffice.
        let starved = delivered == 0 && backend.has_frames();
        let refilled = sink.close(starved, notices)?;
        Ok((delivered > 0 || !refilled).then_some(delivered))
    }

    /// Another device puts frames straight into the driver's buffers. What does not fit is the driver's loss: nobody waits for it to
    /// have more.
    pub(super) fn take_in(
        &mut self,
        io: &mut Io<'_>,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<Result<(), Closed>, DeviceError> {
        match self.destination(io) {
            Destination::Driver => {}
            Destination::Nowhere(Reason::LinkDown) => return Ok(Err(Closed::LinkDown)),
            Destination::Nowhere(_) | Destination::Later => return Ok(Err(Closed::NoDriver)),
        }
        let Io {
            queues,
            space,
            storage,
            wanted,
            notices,
            ..
        } = io;
        let (_, mut sink) = self.open(queues, *space, storage, *wanted);
        fill(&mut sink);
        sink.close(false, notices)?;
        Ok(Ok(()))
    }

    /// The buffers of all pairs that have any, and who may put frames into them.
    fn open<'a>(
        &'a mut self,
        queues: &'a mut [Option<ActiveQueue>],
        space: AddressSpace<'a>,
        storage: &'a mut ChainStorage,
        wanted: Option<Wanted>,
    ) -> (&'a mut dyn Backend, Buffers<'a>) {
        let pairs = self.session.receiving_pairs();
        let header = self.session.header;
        let need = wanted.map(|wanted| Need {
            count: wanted.frames,
            bytes: wanted.bytes.saturating_add(wanted.frames * header),
            longest: wanted.longest.saturating_add(header),
        });
        let mut storages = std::iter::once(storage).chain(&mut self.storages);
        let mut lanes = queues
            .chunks_mut(2)
            .take(pairs)
            .enumerate()
            .map(|(pair, queues)| {
                let storage = storages.next()?;
                let active = queues.first_mut()?.as_mut()?;
                Some(Lane::new(pair, active, storage, need))
            });
        // Without more of them nothing is allocated.
        let lanes = Lanes {
            first: lanes.next().flatten(),
            more: lanes.collect(),
        };
        let buffers = Buffers {
            lanes,
            spare: &mut self.spare,
            space,
            room: Vec::new(),
            present: None,
            scratch: &self.scratch,
            session: &self.session,
            own: self.config.mac(),
            counters: &self.counters,
            error: None,
        };
        (self.backend.as_mut(), buffers)
    }

    /// Takes a round of frames and drops them; returns how many.
    fn discard(&mut self, io: &Io<'_>, reason: Reason) -> usize {
        let mut sink = Discard::new(&self.scratch, &self.counters.device, reason);
        self.backend.receive(io.now, &mut sink)
    }
}

/// What becomes of the back end's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    Driver,
    /// They are dropped.
    Nowhere(Reason),
    /// The back end keeps them: the driver has not come so far yet.
    Later,
}
