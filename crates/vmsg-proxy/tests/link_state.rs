// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The link of a real network device goes down and up under a front end that keeps the configuration to itself.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod stage;

use stage::{Vmm, is_closed};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vmsg_bus::{BusSpec, UnixSpec, keyval};
use vmsg_device::device::Operation;
use vmsg_device::host::Host;
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_net::Null;
use vmsg_proxy::{FrontSpec, Proxy};

#[track_caller]
fn until_there(path: &Path, there: bool) {
    let end = Instant::now() + stage::PATIENCE;
    while path.exists() != there {
        assert!(Instant::now() < end, "{}: {there}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn set_up(vmm: &mut Vmm) {
    vmm.init();
    vmm.features_and_memory();
    for ring in 0..2 {
        vmm.set_ring(ring, 0);
        vmm.front.set_vring_enable(ring, true).unwrap();
    }
}

#[test]
fn the_link_of_a_device_goes_down_and_up_again_and_again() {
    play("");
}

#[test]
fn it_does_so_for_a_guest_whose_memory_is_kept_from_the_device_host() {
    play(",isolate=on,segment=2M");
}

/// `keys` are more of the front.
fn play(keys: &str) {
    let dir = tempfile::tempdir().unwrap();
    let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
    let mut host = Host::new(1).unwrap();
    let index = host
        .add_bus(
            vmsg_bus::DEFAULT_MESSAGE_SIZE,
            Some(bus.listen("test host").unwrap()),
        )
        .unwrap();
    let settings = Settings::new(Mac([0x52, 0x54, 0, 1, 2, 3]));
    let net = Net::new(&settings, Box::new(Null::default()));
    host.add_device(index, "net0", Some(1), None, Box::new(net))
        .unwrap();
    let (stop, handle) = (host.stop_handle(), host.handle());
    let thread = std::thread::spawn(move || host.run().unwrap());
    let socket = dir.path().join("net.sock");
    let spec: FrontSpec = keyval::from_str(&format!(
        "vhost-user,socket={},dev=net0{keys}",
        keyval::escape(&socket.to_string_lossy())
    ))
    .unwrap();
    let proxy = Proxy::start(&[bus], &[spec], |_| {}).unwrap();
    let set_link = |up| {
        handle
            .operate(None, "net0", Operation::SetLink(up))
            .unwrap()
    };
    // Before the guest's driver has come: told when it comes.
    let mut vmm = Vmm::over(UnixStream::connect(&socket).unwrap());
    vmm.init();
    std::thread::sleep(Duration::from_millis(400));
    set_link(false);
    vmm.features_and_memory();
    assert!(is_closed(&mut vmm.socket));
    set_link(true);
    until_there(&socket, true);
    for round in 0..4 {
        let mut vmm = Vmm::over(UnixStream::connect(&socket).unwrap());
        set_up(&mut vmm);
        set_link(false);
        assert!(is_closed(&mut vmm.socket), "{round}");
        assert!(!socket.exists());
        if round % 2 == 0 {
            std::thread::sleep(Duration::from_millis(200));
        }
        set_link(true);
        until_there(&socket, true);
    }
    drop(proxy);
    stop.stop();
    thread.join().unwrap();
}
