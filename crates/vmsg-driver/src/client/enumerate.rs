// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which devices are there.

use virtio_msg::{Channel, DevNum, Message};

use super::Client;
use super::pending::MAX_PENDING;
use crate::error::Error;
use crate::wait::Wait;

/// Device numbers that are tried one by one where the bus cannot tell them: those a QEMU device side can have.
const SCANNED: u16 = 32;
/// Device numbers asked for at first. The 2025–2026 AMP buses know no other request than 0 and 32.
const FIRST_COUNT: u16 = 32;
/// Bytes of a GET_DEVICES answer without the bitmap.
const DEVICES_HEAD: usize = 14;
/// Requests that a walk through all 65,536 numbers takes at most, 32 of them at a time.
const MAX_STEPS: usize = 2048;

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
    /// [`Error::Timeout`], also from buses that do not know this request; [`Error::BadAnswer`], [`Error::Channel`].
    pub fn enumerate(&mut self, mut found: impl FnMut(DevNum)) -> Result<(), Error> {
        let most = self.max.saturating_sub(DEVICES_HEAD).saturating_mul(8);
        let most = u16::try_from(most).unwrap_or(u16::MAX) & !7;
        let mut offset = 0;
        let mut count = FIRST_COUNT;
        // Numbers below this one were told already: answers may overlap.
        let mut untold = 0;
        for _ in 0..MAX_STEPS {
            let (next, told) = self.ask(
                DevNum(0),
                Message::GetDevices { offset, count },
                |answer| match answer {
                    Message::Devices(part) if part.offset == offset => {
                        for device in part.iter().filter(|device| u32::from(device.0) >= untold) {
                            found(device);
                        }
                        untold = untold.max(u32::from(part.offset) + u32::from(part.count));
                        Some((part.next & !7, part.count))
                    }
                    _ => None,
                },
            )?;
            // 0 is the end. QEMU's device side never says so, but it comes to an empty answer, or does not get further.
            if next <= offset || told == 0 {
                break;
            }
            offset = next;
            count = most.max(8);
        }
        Ok(())
    }

    /// Asks each of the numbers 0 to 31 what it is (GET_DEVICE_INFO), all at once, for a bus that cannot tell which there are.
    /// `found` gets each number once, from the lowest up.
    ///
    /// # Errors
    /// [`Error::Timeout`] if not even one answers; [`Error::Channel`].
    pub fn scan(&mut self, mut found: impl FnMut(DevNum)) -> Result<(), Error> {
        const { assert!(MAX_PENDING >= SCANNED as usize) };
        let request = Message::GetDeviceInfo;
        let mut ids = [None; SCANNED as usize];
        let mut answers = [None; SCANNED as usize];
        let mut count = 0;
        let mut answered = |id, message: &Message<'_>| {
            // One answer for each request at most, so the place is there.
            if let (Message::DeviceInfo(info), Some(slot)) = (message, answers.get_mut(count)) {
                *slot = info.is_present().then_some(id);
                count += 1;
            }
        };
        let deadline = self.wait.now() + self.timeout;
        let mut outcome = Ok(());
        for (number, id) in (0..SCANNED).zip(&mut ids) {
            match self.start(
                request.name(),
                DevNum(number),
                &request,
                deadline,
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
            outcome = self.collect(deadline, &mut answered);
        }
        ids.iter().flatten().for_each(|&id| self.pending.forget(id));
        outcome?;
        if count == 0 {
            self.counters.timeouts += 1;
            return Err(Error::Timeout {
                request: Message::GetDeviceInfo.name(),
            });
        }
        for (number, id) in (0..SCANNED).zip(ids) {
            if id.is_some() && answers.contains(&id) {
                found(DevNum(number));
            }
        }
        Ok(())
    }
}
