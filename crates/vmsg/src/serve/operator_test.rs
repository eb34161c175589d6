// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtio_msg::{FeatureSet, feature};
use vmsg_bus::{BusSpec, UnixSpec, keyval};
use vmsg_device::device::{Device as Served, DeviceError, Identity, Io, Progress, Upcoming};
use vmsg_device::host::Host;

use super::*;
use crate::console::Registry;

/// Something is under way in it until it is told otherwise.
struct Busy(Arc<AtomicBool>);

impl Served for Busy {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: 1,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::from_bits(&[feature::VERSION_1])
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn activate(&mut self, _: &FeatureSet) {}
    fn reset(&mut self) {}
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Idle)
    }
    fn prepare(&mut self, _: Upcoming<'_>, _: &mut Io<'_>) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
    fn next_timeout(&self) -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(10))
    }
}

#[test]
fn the_name_of_a_device_that_takes_long_to_go_is_free_when_it_is_gone() {
    let busy = Arc::new(AtomicBool::new(true));
    let mut host = Host::new(1).expect("a host");
    let bus = host.add_bus(64, None).expect("a bus");
    let device = Box::new(Busy(Arc::clone(&busy)));
    host.add_device(bus, "dice", None, None, device)
        .expect("added");
    let spec = || keyval::from_str::<DeviceSpec>("rng,id=dice,bus=b0").expect("sound");
    let buses = vec![NamedBus {
        name: "b0".to_owned(),
        spec: BusSpec::Unix(UnixSpec::new("b0")),
    }];
    let network = Network {
        workers: 1,
        devices: vec![spec()],
        ..Network::default()
    };
    let known = Known {
        consoles: Registry::default(),
        control: None,
        disks: crate::serve::disk::Disks::default(),
        awaited: late::Awaited::default(),
    };
    let (fabric, names, keeping) = (Fabric::default(), Names::default(), Keeping::default());
    let operator = Operator::new(host.handle(), buses, fabric, network, names, keeping, known);
    let stop = host.stop_handle();
    let host = std::thread::spawn(move || host.run().expect("epoll works"));
    let failure = operator.remove_device("dice", None).expect_err("busy");
    assert_eq!(failure.kind, FailureKind::Unavailable);
    assert!(
        failure.message.contains("`dice` is not gone yet"),
        "{failure:?}"
    );
    busy.store(false, Ordering::Relaxed);
    let end = Instant::now() + Duration::from_secs(120);
    let added = loop {
        match operator.add_device(spec()) {
            Ok(added) => break added,
            Err(failure) => assert!(Instant::now() < end, "{failure:?}"),
        }
        std::thread::yield_now();
    };
    // Its number was another one's.
    let Response::Added(added) = added else {
        panic!("{added:?}");
    };
    assert_eq!((added.id.as_str(), added.number), ("dice", 1));
    stop.stop();
    host.join().expect("the host ends well");
}
