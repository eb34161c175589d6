// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A receiver that panics, and a sender that does.

use super::*;
use crate::device::{DeviceError, Identity, Progress};

/// Panics when it is given something.
struct Panicking {
    /// Only when a frame is committed.
    late: bool,
    hub: Shared,
}

struct PanickingSink(Option<Vec<vmsg_mem::RamSlice<'static>>>);

impl RxSink for PanickingSink {
    fn offer(&mut self, _: Target<'_>, _: usize) -> Option<Pieces<'_>> {
        self.0.as_deref().map(Pieces::new)
    }
    fn commit(&mut self, _: &VnetHeader, _: usize) {
        panic!("bad commit")
    }
}

impl Device for Panicking {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 1,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn activate(&mut self, _: &FeatureSet) {}
    fn reset(&mut self) {}
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Blocked)
    }
    fn placed(&mut self, key: u64) {
        self.hub.hub().keys.insert(1, key);
    }
    fn accept(
        &mut self,
        _: &mut Io<'_>,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<Result<(), Closed>, DeviceError> {
        if self.late {
            fill(&mut PanickingSink(Some(Vec::new())));
            unreachable!("a panic of the sink comes through");
        }
        panic!("bad accept")
    }
}

#[test]
fn a_receiver_that_panics_breaks_alone() {
    for late in [false, true] {
        let mut party = Party::new(3);
        party.tell(1, Command::Remove).expect("removed");
        let hub = party.hub.clone();
        party.add(1, Box::new(Panicking { late, hub }));
        party.send(0, &[frame(1), frame(2)]);
        let text = if late { "bad commit" } else { "bad accept" };
        let mut notices = party.notices.iter();
        let told = notices.any(|(slot, notice)| {
            *slot == Slot(1) && matches!(notice, Notice::Broken { why, .. } if why.contains(text))
        });
        assert!(told, "{:?}", party.notices);
        party.assert_others_go_on_after(2);
    }
}

#[test]
fn a_sender_that_panics_while_it_fills_breaks_alone() {
    let mut party = Party::new(3);
    party.hub.hub().hook = Some(Box::new(|_, _| panic!("bad switch")));
    party.send(0, &[frame(1)]);
    assert!(party.is_broken(0), "{:?}", party.notices);
    assert!(!party.is_broken(1) && !party.is_broken(2));
    assert_eq!(party.used(1, 0), [frame(1)], "it was committed before");
    party.hub.hub().hook = None;
    party.send(2, &[frame(3)]);
    assert_eq!(party.used(1, 0), [frame(3)]);
    assert_eq!(party.used(2, 1).len(), 1);
}
