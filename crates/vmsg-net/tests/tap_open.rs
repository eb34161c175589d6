// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the tap back end comes by an interface: joined, created, handed over, refused.

mod netns;
mod wire;

use std::net::TcpListener;

use netns::{GUEST, HOST, ip, own_network, running};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use vmsg_net::tap::{Tap, TapConfig, TapError};
use vmsg_net::{Backend, Offloads};
use wire::{World, echo_server};

#[test]
fn existing_interfaces_are_joined_as_they_are() {
    if !own_network() {
        return;
    }
    ip("tuntap add dev t0 mode tap multi_queue");
    ip("link set t0 mtu 1400");
    // One queue of an interface that could have more.
    let mut tap = Tap::open(&TapConfig {
        ifname: "t0".to_owned(),
        ..TapConfig::default()
    })
    .unwrap();
    assert!(!tap.link_is_up(), "not created here, so left alone");
    assert_eq!((tap.offloads().mtu, tap.queue_pairs()), (1400, 1));
    tap.set_guest(&running(Offloads::ALL));
    drop(tap);
    assert!(ip("link show t0").contains("mtu 1400"), "it stays");
    let new = Tap::open(&TapConfig {
        up: Some(false),
        ..TapConfig::default()
    })
    .unwrap();
    assert_eq!(new.name(), "tap0");
    assert!(!new.link_is_up());
    let plain = Tap::open(&TapConfig {
        offloads: false,
        ..TapConfig::default()
    })
    .unwrap();
    assert_eq!((plain.name(), plain.offloads()), ("tap1", Offloads::NONE));
    let mut world = World::new(plain, Some(GUEST), 1500);
    ip(&format!("address add {HOST}/24 dev tap1"));
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = echo_server(listener, 1);
    let handle = world.connect((HOST, port), 40000);
    world.echo(handle, 100_000);
}

fn refused(config: &TapConfig) -> String {
    let error = Tap::open(config).expect_err("refused");
    error.to_string()
}

#[test]
fn errors_name_what_is_missing_and_what_helps() {
    if !own_network() {
        return;
    }
    let named = |ifname: &str| TapConfig {
        ifname: ifname.to_owned(),
        ..TapConfig::default()
    };
    for bad in ["", "a name", "much-too-long-for-one", "a/b"] {
        assert!(
            matches!(Tap::open(&named(bad)), Err(TapError::Name(_))),
            "{bad}"
        );
    }
    for queues in [0, 257] {
        let config = TapConfig {
            queues,
            ..named("t0")
        };
        assert!(refused(&config).contains("1 to 256"));
    }
    ip("tuntap add dev single mode tap");
    let two = TapConfig {
        queues: 2,
        ..named("single")
    };
    assert!(matches!(Tap::open(&two), Err(TapError::SingleQueue { .. })));
    assert!(refused(&two).contains("ip tuntap add dev single mode tap multi_queue"));
    let holder = Tap::open(&named("single")).unwrap();
    assert!(matches!(
        Tap::open(&named("single")),
        Err(TapError::Busy { .. })
    ));
    assert!(refused(&named("single")).contains("in use"));
    drop(holder);
    assert!(matches!(
        Tap::open(&named("lo")),
        Err(TapError::NotTap { .. })
    ));
    ip("tuntap add dev routed mode tun");
    assert!(matches!(
        Tap::open(&named("routed")),
        Err(TapError::NotTap { .. })
    ));
    let wrong = TapConfig {
        addresses: vec![(HOST.into(), 33)],
        ..named("t0")
    };
    assert!(refused(&wrong).contains("prefix"));
    let huge = TapConfig {
        mtu: Some(65535),
        ..named("t0")
    };
    assert!(
        refused(&huge).contains("ip link set t0 mtu 65535"),
        "{}",
        refused(&huge)
    );
    for fd in [0, 999, -1] {
        let config = TapConfig {
            fds: vec![fd],
            ..TapConfig::default()
        };
        assert!(refused(&config).starts_with(&format!("fd={fd}: ")));
    }

    ip("tuntap add dev other mode tap user 4711");
    // From here on without CAP_NET_ADMIN, as far as this thread goes.
    let mut sets = capabilities(None).expect("capabilities");
    let without = |set: CapabilitySet| set - CapabilitySet::NET_ADMIN;
    (sets.effective, sets.permitted) = (without(sets.effective), without(sets.permitted));
    sets.inheritable = without(sets.inheritable);
    set_capabilities(None, sets).expect("fewer capabilities");
    assert!(matches!(
        Tap::open(&named("t%d")),
        Err(TapError::NotPermitted { .. })
    ));
    let text = refused(&named("t%d"));
    assert!(
        text.contains("CAP_NET_ADMIN") && text.contains("ip tuntap add dev t0 mode tap user $USER"),
        "{text}"
    );
    let text = refused(&named("other"));
    assert!(
        text.contains("for user 4711") && text.contains("ip tuntap add dev other"),
        "{text}"
    );
    let single = TapConfig {
        mtu: Some(1400),
        ..named("single")
    };
    let text = refused(&single);
    assert!(
        text.contains("CAP_NET_ADMIN") && text.contains("mtu 1400"),
        "{text}"
    );
}

/// A descriptor of interface `name`, as a privileged helper would make it.
fn joined(name: &str, flags: i32) -> std::os::fd::OwnedFd {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    file.into()
}

#[test]
fn descriptors_that_were_handed_over_need_no_privilege() {
    use std::os::fd::AsRawFd;
    if !own_network() {
        return;
    }
    ip("tuntap add dev t0 mode tap multi_queue");
    ip(&format!("address add {HOST}/24 dev t0"));
    ip("link set t0 up");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let mut handed = TapConfig {
        ifname: "t0".to_owned(),
        queues: 2,
        ..TapConfig::default()
    }
    .join()
    .unwrap();
    // As another program would make it.
    handed.push(joined("t0", flags));
    let routed = joined("r0", libc::IFF_TUN | libc::IFF_NO_PI);
    let with = |fds: Vec<i32>| TapConfig {
        fds,
        ..TapConfig::default()
    };
    let numbers: Vec<i32> = handed.iter().map(AsRawFd::as_raw_fd).collect();

    let mut sets = capabilities(None).expect("capabilities");
    let without = |set: CapabilitySet| set - CapabilitySet::NET_ADMIN;
    (sets.effective, sets.permitted) = (without(sets.effective), without(sets.permitted));
    sets.inheritable = without(sets.inheritable);
    set_capabilities(None, sets).expect("fewer capabilities");
    assert!(refused(&with(vec![numbers[0], numbers[0]])).contains("twice"));
    assert!(refused(&with(vec![routed.as_raw_fd()])).contains("IFF_TAP"));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(refused(&with(vec![null.as_raw_fd()])).contains("no tap descriptor"));
    let plain = joined_plain();
    assert!(refused(&with(vec![plain.as_raw_fd()])).contains("TUNSETIFF"));

    let tap = Tap::open(&with(numbers)).unwrap();
    assert_eq!((tap.name(), tap.queue_pairs()), ("t0", 3));
    assert!(tap.link_is_up());
    assert!(tap.offloads().tso4);
    let mut world = World::new(tap, Some(GUEST), 1500);
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = echo_server(listener, 1);
    let handle = world.connect((HOST, port), 40000);
    world.echo(handle, 1 << 20);
}

/// A descriptor of the tap driver that has joined nothing.
fn joined_plain() -> std::fs::File {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap()
}
