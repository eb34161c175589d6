// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices with their ports come and go while others talk.

use std::collections::BTreeSet;

use vmsg_device::host::{AddError, HandleError};
use vmsg_device::net::{Net, Settings};
use vmsg_net::switch::{PortConfig, Rule, SwitchConfig};
use vmsg_net::{Mac, Null};

use crate::frames::{self, BROADCAST};
use crate::stand::{PATIENCE, Stand, Station};

#[test]
fn devices_come_and_go_under_traffic_and_nobody_hangs() {
    let mut config = SwitchConfig::new("s0");
    config.rules = vec![Rule::allow_all()];
    let stand = Stand::new(config);
    let mut one = stand.plug(PortConfig::new("one"), 0);
    let mut two = stand.plug(PortConfig::new("two"), 1);
    let mut numbers = BTreeSet::from([one.number, two.number]);
    for round in 0..40_u16 {
        let mut guest = stand.plug(PortConfig::new("guest"), 2);
        assert!(
            numbers.insert(guest.number),
            "never again: {}",
            guest.number
        );
        one.exchange(&mut guest, 16);
        guest.exchange(&mut one, 16);
        // It goes with frames in its queues, and frames on their way to it.
        let noise: Vec<Vec<u8>> = (0..24).map(|_| guest.frame(BROADCAST)).collect();
        guest.send(&noise);
        let burst: Vec<Vec<u8>> = (0..24).map(|_| one.frame(frames::mac(2))).collect();
        one.send(&burst);
        let hand = stand.handle.clone();
        let remover = std::thread::spawn(move || hand.remove_device(Some(0), "guest"));
        one.drain();
        two.drain();
        one.exchange(&mut two, 16);
        two.exchange(&mut one, 16);
        remover.join().expect("no panic").expect("an answer");
        // Its driver hears of it, and gets no answer but that.
        let error = guest.net().wait(PATIENCE);
        while let Ok(true) = error {
            guest.drain();
            if let Err(error) = guest.net().wait(PATIENCE) {
                assert!(Station::is_gone(&error), "{error}");
                break;
            }
        }
        let mut byte = [0];
        let error = guest.net().read_config(0, &mut byte);
        assert!(error.is_err_and(|error| Station::is_gone(&error)));
        let there = guest.net().client().devices().expect("an answer");
        assert_eq!(there, [one.number, two.number], "{round}");
        assert!(!stand.ports().contains_key("guest"));
        let again = stand.handle.remove_device(None, "guest");
        assert_eq!(again, Err(HandleError::NoDevice("guest".into())));
        drop(guest);
    }
}

#[test]
fn what_cannot_be_added_is_named() {
    let stand = Stand::new(SwitchConfig::new("s0"));
    let net = || {
        Box::new(Net::new(
            &Settings::new(Mac(frames::mac(1))),
            Box::new(Null::default()),
        ))
    };
    let handle = &stand.handle;
    let number = handle
        .add_device(0, "a", None, None, net())
        .expect("a device");
    let taken = handle.add_device(0, "a", None, None, net());
    assert_eq!(
        taken,
        Err(HandleError::Add(AddError::NameTaken("a".into())))
    );
    let taken = handle.add_device(0, "b", Some(number.0), None, net());
    let expected = AddError::NumberTaken(number.0, "a".into());
    assert_eq!(taken, Err(HandleError::Add(expected)));
    let none = handle.add_device(1, "b", None, None, net());
    assert_eq!(none, Err(HandleError::NoBus(1)));
    let none = handle.add_device(0, "b", None, Some(1), net());
    assert_eq!(none, Err(HandleError::NoWorker(1)));
    let none = handle.add_resident(1, net());
    assert_eq!(none, Err(HandleError::NoWorker(1)));
    handle.remove_device(None, "a").expect("gone");
    let spent = handle.add_device(0, "a", Some(number.0), None, net());
    assert_eq!(
        spent,
        Err(HandleError::Add(AddError::NumberSpent(number.0)))
    );
    handle
        .add_device(0, "a", None, None, net())
        .expect("the name is free");
}
