// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The words of the queues: the AMP layout that a device makes, its life, and where a connection begins.

use super::super::geometry::other;
use super::Machine;
use super::part::Part;
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{self, Head, Life, Side, Status};

impl Machine {
    /// The device's part of an AMP layout.
    pub(super) fn make_layout<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        let geometry = &self.config.geometry;
        let Some(layout) = geometry.own_layout(self.config.message) else {
            return;
        };
        let amp = Part::new(memory, geometry);
        let (own, theirs) = (layout.head(Side::Device), layout.head(Side::Driver));
        // What a driver that runs on still knows is where this end was, if all is as it was.
        let as_it_was = amp::Layout::load(&amp) == Ok(Some(layout));
        let their_head = Head::load(&amp, theirs);
        let found = match as_it_was {
            true if self.found.is_some() || self.theirs_unfinished(memory) => {
                all_read(Head::load(&amp, own), their_head)
            }
            true => Head::load(&amp, own),
            false => Head::default(),
        };
        let (life, first) = Life::begin(Side::Device, layout.elements(), now, found, their_head);
        if !as_it_was {
            amp::Layout::withdraw(&amp);
            amp.store_release(own + 4, 0);
        }
        let (at, word) = first.word();
        amp.store_release(own + at, word);
        if !as_it_was {
            layout.store(&amp);
        }
        self.life = Some(life);
        self.layout = Some(layout);
    }

    /// Whether the layout that this end has made is not there any more.
    pub(super) fn has_lost_layout<M: QueueMemory>(&self, memory: &M) -> bool {
        let geometry = &self.config.geometry;
        let own = self
            .layout
            .filter(|_| geometry.is_amp() && self.config.side == Side::Device);
        own.is_some_and(|own| amp::Layout::load(&Part::new(memory, geometry)) != Ok(Some(own)))
    }

    /// Whether its queue head does not say any more that it waits.
    pub(super) fn has_lost_head<M: QueueMemory>(&self, memory: &M) -> bool {
        let geometry = &self.config.geometry;
        let own = self
            .layout
            .filter(|_| geometry.is_amp() && self.life.is_some());
        own.is_some_and(|own| {
            let head = Head::load(&Part::new(memory, geometry), own.head(self.config.side));
            !matches!(head.status(), Some(Status::Init | Status::Ready))
        })
    }

    /// A life that was begun is to be begun once more.
    pub(super) fn forget_life<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        match self.config.side {
            Side::Driver => self.life = None,
            Side::Device => self.live_again(now, memory),
        }
    }

    /// The life of a device begins once more.
    pub(super) fn live_again<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        let Some(layout) = self.layout.filter(|_| self.config.geometry.is_amp()) else {
            return;
        };
        let amp = Part::new(memory, &self.config.geometry);
        let (own, theirs) = (layout.head(Side::Device), layout.head(Side::Driver));
        let (mut found, their_head) = (Head::load(&amp, own), Head::load(&amp, theirs));
        if self.found.is_some() || self.theirs_unfinished(memory) {
            found = all_read(found, their_head);
        } else if has_begun_anew(&amp, &layout, found, their_head) {
            found.indices = 0;
        }
        if let Some(life) = &mut self.life {
            for (at, word) in life.again(now, found, their_head).map(amp::Store::word) {
                amp.store_release(own + at, word);
            }
        }
    }

    /// Zeroes the words of the queues that this end writes; false if it is not known yet where they are.
    pub(super) fn zero<M: QueueMemory>(&mut self, memory: &M) -> bool {
        let geometry = &self.config.geometry;
        if !geometry.is_amp() {
            geometry.zero(memory, self.config.side);
            return true;
        }
        let amp = Part::new(memory, geometry);
        if self.config.side == Side::Driver {
            match load_layout(&amp) {
                Ok(layout) => self.layout = layout,
                Err(error) => {
                    self.layout = None;
                    self.layout_error = Some(error);
                }
            }
        }
        let Some(layout) = self.layout else {
            return false;
        };
        let own = layout.head(self.config.side);
        for (at, word) in Life::joined().map(amp::Store::word) {
            amp.store_release(own + at, word);
        }
        true
    }

    /// What the other side stores of the queues.
    pub(super) fn their_words<M: QueueMemory>(&self, memory: &M) -> [u32; 2] {
        let geometry = &self.config.geometry;
        match self.layout.filter(|_| geometry.is_amp()) {
            Some(layout) => {
                let amp = Part::new(memory, geometry);
                let head = Head::load(&amp, layout.head(other(self.config.side)));
                [head.state, head.indices]
            }
            None if geometry.is_amp() => [0; 2],
            None => [
                self.incoming(memory)[0],
                geometry.indices(memory, self.config.side)[1],
            ],
        }
    }
}

/// The layout that the device has made, if messages fit into it.
pub(super) fn load_layout<M: QueueMemory>(
    memory: &M,
) -> Result<Option<amp::Layout>, amp::LayoutError> {
    let layout = amp::Layout::load(memory)?;
    match layout {
        Some(layout) if usize::from(layout.element_size()) < *crate::MESSAGE_SIZES.start() => {
            Err(amp::LayoutError::Elements {
                elements: layout.elements(),
                size: layout.element_size(),
            })
        }
        layout => Ok(layout),
    }
}

/// Whether the driver has zeroed its elements, as Linux's does when it begins: what is said to be there to be read is not.
fn has_begun_anew<M: QueueMemory>(
    memory: &M,
    layout: &amp::Layout,
    own: Head,
    theirs: Head,
) -> bool {
    let next = own.head();
    if next == theirs.tail() || next >= layout.elements() {
        return false;
    }
    let element = usize::from(next) * usize::from(layout.element_size());
    let mut begin = [0xff; 8];
    memory.read(layout.queue(Side::Driver) + element, &mut begin);
    begin == [0; 8]
}

/// As if all had been read that a driver of ours has left behind: it was said to another host.
fn all_read(own: Head, theirs: Head) -> Head {
    Head {
        indices: u32::from(own.tail()) | u32::from(theirs.tail()) << 16,
        ..own
    }
}
