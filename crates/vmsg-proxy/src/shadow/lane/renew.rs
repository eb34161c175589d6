// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue whose device is gone, and that another device begins at its beginning.

use super::{Common, Flight, Halt, Lane};
use vmsg_queue::QueueError;

impl Lane<'_> {
    /// Begins the queue in the segment anew, for another device: with all that the one before had and has not given back, in the order in which it
    /// was given. What it has given back is the guest's, and is not done again. Nobody uses the segment now.
    pub(in crate::shadow) fn renew(&mut self) -> Result<(), Halt> {
        while let Some(used) = self.next_used()? {
            self.returning = None;
            let flight = std::mem::take(&mut self.flights[used.token.index()]);
            self.done.push_back((flight, used.written));
        }
        let under_way = self.flights.iter_mut().filter(|f| f.head.is_some());
        let mut under_way: Vec<Flight> = under_way.map(std::mem::take).collect();
        under_way.sort_unstable_by_key(|flight| flight.order);
        let given = self.give_again(&mut under_way);
        // Where that goes wrong nothing is brought back any more, but wiped at the end.
        self.done
            .extend(under_way.drain(..).map(|flight| (flight, 0)));
        given.map_err(|error| self.device_fault(&error))
    }

    /// Leaves those in the list that could not be given.
    fn give_again(&mut self, list: &mut Vec<Flight>) -> Result<(), QueueError> {
        self.rings.fill(0);
        self.device_armed = false;
        self.device = self.make.queue(self.rings)?;
        list.reverse();
        while let Some(flight) = list.pop() {
            let (readable, writable) = flight.parts.split_at(flight.readable);
            match self.device.add(readable, writable) {
                Ok(token) => self.flights[token.index()] = flight,
                Err(error) => {
                    list.push(flight);
                    return Err(error);
                }
            }
        }
        // Whoever sets the queue up looks into it.
        self.device.publish().map(drop)
    }

    /// Brings the next request of a device that is gone back to the guest: how many bytes it wrote.
    pub(super) fn arrive_late(&mut self, common: &mut Common<'_>) -> Result<u32, Halt> {
        let Some((mut flight, written)) = self.done.pop_front() else {
            return Ok(0);
        };
        let landed = self.land(common, &mut flight, written);
        if landed.is_err() {
            self.done.push_front((flight, written));
        }
        landed.map(|()| written)
    }
}
