// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The drivers of this crate on the device host of this workspace: the whole stack.

mod host;

use std::time::{Duration, Instant};

use host::{MAC, MTU, NET, PAIRS, PATIENCE, RNG, client, connect, over_loopback, over_unix};
use virtio_msg::{DevNum, DeviceStatus};
use vmsg_bus::Capabilities;
use vmsg_bus::loopback::Options;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::rng::RngDriver;
use vmsg_driver::{BusClient, DmaPool, Error, Fault, QueueOptions};
use vmsg_mem::BusAddr;

fn pool() -> DmaPool {
    DmaPool::new("test", BusAddr(0x1_0000_0000), 4 << 20).unwrap()
}

#[test]
fn devices_are_listed_with_their_names() {
    let host = over_unix();
    let mut client = connect(&host, "ls");
    assert_eq!(client.devices().unwrap(), [RNG, NET]);
    assert_eq!(client.device_name(RNG).unwrap(), "rng0");
    assert_eq!(client.device_name(NET).unwrap(), "net0");
    assert!(matches!(
        client.device_name(DevNum(1)),
        Err(Error::NoDevice(DevNum(1)))
    ));
    assert!(matches!(
        client.device_info(DevNum(1)),
        Err(Error::NoDevice(DevNum(1)))
    ));
    let info = client.device_info(NET).unwrap();
    assert_eq!(
        (info.device_id, info.max_queues),
        (1, 2 * u32::from(PAIRS) + 1)
    );
    let mut mac = [0; 6];
    client.read_config(NET, 0, &mut mac).unwrap();
    assert_eq!(mac, MAC);
    for data in 0..100 {
        client.ping(data).unwrap();
    }
}

#[test]
fn a_device_is_held_by_the_first_and_the_other_hears_by_whom() {
    let host = over_unix();
    let mut one = connect(&host, "the first");
    let mut two = connect(&host, "the second");
    one.claim(RNG).unwrap();
    match two.claim(RNG) {
        Err(error @ Error::Held { .. }) => {
            assert!(error.to_string().contains("the first"), "{error}")
        }
        other => panic!("{other:?}"),
    }
    // What would change the device is dropped, and the status stays as it is.
    assert_eq!(
        two.set_status(RNG, DeviceStatus::ACKNOWLEDGE).unwrap(),
        DeviceStatus::RESET
    );
    one.release(RNG).unwrap();
    two.claim(RNG).unwrap();
}

fn random_bytes(mut client: BusClient, options: QueueOptions) {
    let pool = pool();
    pool.lend(&mut client, 7).unwrap();
    let free = pool.free_bytes();
    let mut rng = RngDriver::new(client, RNG, &pool, &options).unwrap();
    let mut bytes = vec![0; 20_000];
    rng.fill(&mut bytes, PATIENCE).unwrap();
    let kinds = (0..=255u8).filter(|value| bytes.contains(value)).count();
    assert_eq!(kinds, 256);
    drop(rng);
    assert_eq!(pool.free_bytes(), free);
}

#[test]
fn random_bytes_come_with_kicks_and_calls_over_eventfds() {
    let host = over_unix();
    random_bytes(connect(&host, "rng"), QueueOptions::default());
}

#[test]
fn random_bytes_come_with_kicks_and_calls_as_messages() {
    let host = over_unix();
    random_bytes(
        connect(&host, "rng"),
        QueueOptions {
            doorbells: false,
            ..QueueOptions::default()
        },
    );
}

#[test]
fn random_bytes_come_over_the_smallest_bus() {
    let options = Options {
        capabilities: Capabilities::all(48),
        slots: 3,
        ..Options::default()
    };
    let (_host, bus) = over_loopback(&options);
    random_bytes(
        client(bus),
        QueueOptions {
            size: 1,
            ..QueueOptions::default()
        },
    );
}

/// Sends `count` frames of changing lengths and takes them back, at most 200 under way.
fn echo(
    net: &mut NetDriver<'_, vmsg_bus::DriverBus, vmsg_driver::Sleep, Vec<u8>>,
    count: usize,
    asleep: bool,
) {
    let frame = |n: usize| {
        let mut frame = vec![0; 60 + n % 1300];
        frame[..8].copy_from_slice(&n.to_le_bytes());
        frame
    };
    let (mut sent, mut got) = (0, 0);
    let start = Instant::now();
    while got < count {
        let batch: Vec<Vec<u8>> = (sent..count.min(got + 200)).map(frame).collect();
        sent += net.transmit(batch.iter().map(Vec::as_slice)).unwrap();
        let mut buffer = [0; 2048];
        let received = net
            .receive(64, |received| {
                assert_eq!(received.copy_to(&mut buffer), frame(got));
                got += 1;
            })
            .unwrap();
        if received == 0 && asleep {
            net.wait(PATIENCE).unwrap();
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{got} of {sent} frames came back"
        );
    }
    assert_eq!(net.counters().bad, 0);
}

#[test]
fn frames_come_back_in_order_polling_and_asleep() {
    let host = over_unix();
    for doorbells in [true, false] {
        let mut client = connect(&host, "net");
        let pool = pool();
        pool.lend(&mut client, 1).unwrap();
        let mut options = NetOptions::default();
        options.queue.doorbells = doorbells;
        let mut net = NetDriver::new(client, NET, &pool, &options).unwrap();
        assert_eq!(net.mac().unwrap(), Some(MAC));
        let mut mtu = [0; 2];
        net.read_config(10, &mut mtu).unwrap();
        assert_eq!(u16::from_le_bytes(mtu), MTU);
        let messages = net.client().channel().counters().sent;
        echo(&mut net, 5000, false);
        echo(&mut net, 2000, true);
        let start = Instant::now();
        while net.in_flight().unwrap() > 0 {
            net.wait_sent(PATIENCE).unwrap();
            assert!(start.elapsed() < PATIENCE);
        }
        assert_eq!((net.counters().sent, net.counters().received), (7000, 7000));
        // With eventfds no message goes over the bus for a kick; without, kicks are messages.
        let messages = net.client().channel().counters().sent - messages;
        assert_eq!(messages == 0, doorbells, "{messages} messages");
    }
}

#[test]
fn a_frame_of_a_whole_buffer_comes_back_and_a_longer_one_is_refused() {
    let (_host, bus) = over_loopback(&Options::default());
    let mut client = client(bus);
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    let options = NetOptions {
        buffer_len: 256,
        ..NetOptions::default()
    };
    let mut net = NetDriver::new(client, NET, &pool, &options).unwrap();
    let frame: Vec<u8> = (0..244).collect();
    let too_long = vec![0; 245];
    assert!(matches!(
        net.transmit([too_long.as_slice()]),
        Err(Error::NoRoom {
            need: 257,
            have: 256,
            ..
        })
    ));
    assert_eq!(net.transmit([frame.as_slice()]).unwrap(), 1);
    assert!(net.wait(PATIENCE).unwrap());
    let mut buffer = [0; 512];
    let count = net
        .receive(8, |received| {
            assert_eq!(received.copy_to(&mut buffer), frame)
        })
        .unwrap();
    assert_eq!(count, 1);
}

#[test]
fn a_frame_over_several_receive_buffers_comes_back_whole() {
    let (_host, bus) = over_loopback(&Options::default());
    let mut client = client(bus);
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    let options = NetOptions {
        rx_buffer_len: Some(256),
        ..NetOptions::default()
    };
    let mut net = NetDriver::new(client, NET, &pool, &options).unwrap();
    echo(&mut net, 1000, false);
    echo(&mut net, 500, true);
}

#[test]
fn commands_over_the_control_queue_are_acknowledged_or_refused() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    let mut net = NetDriver::new(client, NET, &pool, &NetOptions::default()).unwrap();
    let mac = [0x52, 0x54, 0, 9, 9, 9];
    // VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET; then a class that does not exist.
    assert_eq!(net.control(1, 1, &mac, PATIENCE).unwrap(), 0);
    assert_eq!(net.control(99, 1, &mac, PATIENCE).unwrap(), 1);
    // A multicast address is none that an interface can have.
    assert_eq!(net.control(1, 1, &[0xff; 6], PATIENCE).unwrap(), 1);
    assert_eq!(net.control(0, 0, &[1], PATIENCE).unwrap(), 0);
}

#[test]
fn an_address_that_a_driver_sets_shows_and_is_gone_with_it() {
    let host = over_unix();
    let mut first = connect(&host, "first");
    let pool = pool();
    pool.lend(&mut first, 1).unwrap();
    let mut net = NetDriver::new(first, NET, &pool, &NetOptions::default()).unwrap();
    let mac = [0x52, 0x54, 0, 9, 9, 9];
    assert_eq!(net.control(1, 1, &mac, PATIENCE).unwrap(), 0);
    // The acknowledgement comes from the queue, the configuration by another way.
    let deadline = Instant::now() + PATIENCE;
    while net.mac().unwrap() != Some(mac) {
        assert!(
            Instant::now() < deadline,
            "the configuration has the old address"
        );
    }
    drop(net);
    let mut second = connect(&host, "second");
    let mut read = [0; 6];
    second.read_config(NET, 0, &mut read).unwrap();
    assert_eq!(read, MAC, "the next driver finds the device as it was");
}

#[test]
fn a_driver_asleep_notices_that_the_host_is_gone() {
    let host = over_unix();
    let mut client = connect(&host, "net");
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    let mut net = NetDriver::new(client, NET, &pool, &NetOptions::default()).unwrap();
    assert!(!net.wait(Duration::from_millis(1)).unwrap());
    let stopper = std::thread::spawn(move || drop(host));
    let start = Instant::now();
    let error = net.wait(PATIENCE).unwrap_err();
    assert_eq!(error.fault(), Fault::Gone);
    assert!(start.elapsed() < PATIENCE);
    stopper.join().unwrap();
}

#[test]
fn a_window_is_taken_back_when_nothing_uses_it() {
    let host = over_unix();
    let mut client = connect(&host, "windows");
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    match pool.lend(&mut client, 1) {
        Err(Error::Refused {
            request: "WINDOW_ADD",
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    client.remove_window(1).unwrap();
    assert!(client.remove_window(1).is_err());
    pool.lend(&mut client, 1).unwrap();
}

#[test]
fn a_driver_of_another_type_leaves_the_device_alone() {
    let host = over_unix();
    let mut holder = connect(&host, "holder");
    holder.set_status(NET, DeviceStatus::ACKNOWLEDGE).unwrap();
    let pool = pool();
    let refused = RngDriver::new(connect(&host, "rng"), NET, &pool, &QueueOptions::default());
    assert!(matches!(refused, Err(Error::NoDevice(NET))));
    assert_eq!(holder.status(NET).unwrap(), DeviceStatus::ACKNOWLEDGE);
}

/// The test plays the device on the receive queue, whose ring is the first thing in the pool: what the device may do is what
/// anybody can do who has the memory.
fn with_liar(lie: impl FnOnce(vmsg_mem::RamSlice<'_>, usize)) -> (Result<usize, Error>, u64) {
    let (_host, bus) = over_loopback(&Options::default());
    let mut client = client(bus);
    let pool = pool();
    pool.lend(&mut client, 1).unwrap();
    let mut net = NetDriver::new(client, NET, &pool, &NetOptions::default()).unwrap();
    let used = vmsg_queue::Layout::new(256, 0).unwrap().device_offset();
    lie(pool.ram(), used);
    let mut frames = 0;
    let result = net.receive(1000, |frame| {
        frames += 1;
        let mut bytes = [0; 4096];
        frame.copy_to(&mut bytes);
    });
    if let Ok(count) = result {
        assert_eq!(count, frames);
    }
    (result, net.counters().bad)
}

/// Writes used elements (id, length) and shows them as `index` of them.
fn use_chains(ram: vmsg_mem::RamSlice<'_>, used: usize, elements: &[(u32, u32)], index: u16) {
    for (n, (id, len)) in elements.iter().enumerate() {
        ram.write(used + 4 + 8 * n, &id.to_le_bytes());
        ram.write(used + 8 + 8 * n, &len.to_le_bytes());
    }
    ram.atomic_u16(used + 2)
        .unwrap()
        .store(index.to_le(), std::sync::atomic::Ordering::Release);
}

#[test]
fn a_device_that_lies_about_its_used_ring_breaks_the_queue_and_no_more() {
    type Elements = &'static [(u32, u32)];
    let lies: [(Elements, u16); 5] = [
        // More than it was given; one that it was not given; more bytes than there is room for; twice the same.
        (&[], 5000),
        (&[(256, 64)], 1),
        (&[(u32::MAX, 64)], 1),
        (&[(0, 2049)], 1),
        (&[(0, 64), (0, 64)], 2),
    ];
    for (elements, index) in lies {
        let (result, _) = with_liar(|ram, used| use_chains(ram, used, elements, index));
        let error = result.unwrap_err();
        assert_eq!(error.fault(), Fault::Peer, "{elements:?}: {error}");
    }
}

#[test]
fn frames_that_cannot_be_are_counted_and_their_buffers_used_again() {
    // Too short for a header; nothing at all.
    let (result, bad) = with_liar(|ram, used| use_chains(ram, used, &[(0, 11), (1, 0)], 2));
    assert_eq!((result.unwrap(), bad), (0, 2));
    // The header of whatever buffer it is says how many buffers there are: none, or more than there are.
    for buffers in [0u16, 3, u16::MAX] {
        let (result, bad) = with_liar(|ram, used| {
            for at in (0..ram.len()).step_by(2048) {
                // All of the pool but the pages of the ring.
                if at >= 16384 {
                    ram.write(at + 10, &buffers.to_le_bytes());
                }
            }
            use_chains(ram, used, &[(0, 64), (1, 64)], 2);
        });
        let expected = if buffers == 0 { 2 } else { 1 };
        assert_eq!((result.unwrap(), bad), (0, expected), "{buffers} buffers");
    }
}

#[test]
fn a_driver_asleep_notices_that_its_device_is_removed() {
    for doorbells in [true, false] {
        let host = over_unix();
        let mut client = connect(&host, "net");
        let pool = pool();
        pool.lend(&mut client, 1).unwrap();
        let mut options = NetOptions::default();
        options.queue.doorbells = doorbells;
        let mut net = NetDriver::new(client, NET, &pool, &options).unwrap();
        assert!(!net.wait(Duration::from_millis(1)).unwrap());
        let handle = host.handle.clone();
        let remover = std::thread::spawn(move || handle.remove_device(None, "net0"));
        let start = Instant::now();
        let error = net.wait(PATIENCE).unwrap_err();
        assert!(matches!(error, Error::NoDevice(NET)), "{error:?}");
        assert!(start.elapsed() < PATIENCE);
        remover.join().unwrap().unwrap();
        // Others are served as before, and the pool is free.
        assert_eq!(net.client().devices().unwrap(), [RNG]);
        drop(net);
        let mut client = connect(&host, "rng");
        pool.lend(&mut client, 1).unwrap();
        let mut rng = RngDriver::new(client, RNG, &pool, &QueueOptions::default()).unwrap();
        let mut bytes = [0; 64];
        rng.fill(&mut bytes, PATIENCE).unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}
