// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which devices are there.

use virtio_msg::driver::{Enumeration, EnumerationStep, SCANNED_DEVICES};
use virtio_msg::{Channel, DevNum, Message};

use super::Client;
use crate::error::Error;
use crate::wait::Wait;

impl<C: Channel, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>> Client<C, W, B> {
    /// Finds all devices of the bus: GET_DEVICES, and where nobody answers that, GET_DEVICE_INFO of the numbers 0 to 31. `found`
    /// gets each number once, from the lowest up.
    ///
    /// # Errors
    /// [`Error::Timeout`] if nothing is answered at all; [`Error::BadAnswer`], [`Error::Channel`].
    pub fn for_each_device(&mut self, mut found: impl FnMut(DevNum)) -> Result<(), Error> {
        let mut any = false;
        let listed = self.enumerate(|device| {
            any = true;
            found(device);
        });
        match listed {
            Err(Error::Timeout { .. }) if !any => self.scan(found),
            other => other,
        }
    }

    /// Finds all devices of the bus, as [`Client::for_each_device`].
    ///
    /// # Errors
    /// As [`Client::for_each_device`].
    #[cfg(feature = "std")]
    pub fn devices(&mut self) -> Result<Vec<DevNum>, Error> {
        let mut devices = Vec::new();
        self.for_each_device(|device| devices.push(device))?;
        Ok(devices)
    }

    /// Asks the bus which devices it has (GET_DEVICES), until it has no more. `found` gets each number once, from the lowest up.
    ///
    /// # Errors
    /// [`Error::Timeout`], also from buses that do not know this request; [`Error::Channel`].
    pub fn enumerate(&mut self, mut found: impl FnMut(DevNum)) -> Result<(), Error> {
        let mut enumeration = Enumeration::new(self.max);
        // Time-outs are not told to it: it would try one number after the other, where `scan` tries them all at once.
        while let EnumerationStep::Send(device, request) = enumeration.step() {
            self.ask(device, request, |answer| {
                enumeration.handle_response(answer, &mut found);
                Some(())
            })?;
        }
        Ok(())
    }

    /// Asks each of the numbers 0 to 31 what it is (GET_DEVICE_INFO), all at once, for a bus that cannot tell which there are.
    /// `found` gets each number once, from the lowest up.
    ///
    /// # Errors
    /// [`Error::Timeout`] if not even one answers; [`Error::Channel`].
    pub fn scan(&mut self, mut found: impl FnMut(DevNum)) -> Result<(), Error> {
        let request = Message::GetDeviceInfo;
        let mut ids = [None; SCANNED_DEVICES as usize];
        let mut present = [None; SCANNED_DEVICES as usize];
        let mut count = 0;
        let mut answered = |id, message: &Message<'_>| {
            // One answer for each request at most, so the place is there.
            if let (Message::DeviceInfo(info), Some(slot)) = (message, present.get_mut(count)) {
                *slot = info.is_present().then_some(id);
                count += 1;
            }
        };
        let mut outcome = Ok(());
        for (number, id) in (0..).map(DevNum).zip(&mut ids) {
            match self.start(
                request.name(),
                number,
                &request,
                &mut C::try_send,
                &mut answered,
            ) {
                Ok(started) => *id = Some(started),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        if outcome.is_ok() {
            outcome = self.collect(None, &mut answered);
        }
        for id in ids.into_iter().flatten() {
            self.requester.cancel(id);
        }
        outcome?;
        if count == 0 {
            return Err(Error::Timeout {
                request: request.name(),
            });
        }
        for (number, id) in (0..).map(DevNum).zip(ids) {
            if id.is_some() && present.contains(&id) {
                found(number);
            }
        }
        Ok(())
    }
}
