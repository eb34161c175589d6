// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a device host that hangs, or takes its time, can hold up a guest behind the vfio-user front.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod vfio;

use common::Host;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vfio::client::Client;
use vfio::{Guest, NEEDS_RESET, Ram};
use virtio_msg::Channel;
use vmsg_bus::unix::{Listener, ListenerOptions};
use vmsg_bus::{BusSpec, DeviceBus, UnixSpec, keyval};
use vmsg_proxy::{FrontSpec, Proxy};

/// QEMU gives up after so long.
const BOUND: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Mood {
    /// Answers nothing from now on, on connections of before.
    hung: AtomicBool,
    /// Milliseconds that each answer takes.
    delay: AtomicU64,
    /// Requests after which it hangs.
    hangs_after: AtomicU64,
    stop: AtomicBool,
}

/// A device host with moods.
struct Moody {
    mood: Arc<Mood>,
    host: Arc<Mutex<Host>>,
    thread: Option<JoinHandle<()>>,
}

fn handle(bus: &mut DeviceBus, host: &Mutex<Host>, mood: &Mood) -> Result<(), ()> {
    let mut buf = vec![0; 512];
    let mut fds: Vec<OwnedFd> = Vec::new();
    while let Some(len) = bus.try_recv_with_fds(&mut buf, &mut fds).map_err(drop)? {
        let left = mood.hangs_after.load(Ordering::SeqCst);
        if left == 1 {
            mood.hung.store(true, Ordering::SeqCst);
        }
        mood.hangs_after
            .store(left.saturating_sub(1), Ordering::SeqCst);
        if mood.hung.load(Ordering::SeqCst) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(mood.delay.load(Ordering::SeqCst)));
        let answer = host
            .lock()
            .unwrap()
            .handle(&buf[..len], std::mem::take(&mut fds));
        if let Some(answer) = answer {
            bus.try_send(&answer).map_err(drop)?;
        }
    }
    bus.flush().map_err(drop)
}

fn serve(mut listener: Listener, host: &Mutex<Host>, mood: &Mood) {
    let mut connected: Option<DeviceBus> = None;
    while !mood.stop.load(Ordering::SeqCst) {
        if let Ok(Some(bus)) = listener.accept(Instant::now()) {
            host.lock().unwrap().end_of_connection();
            connected = Some(bus);
        }
        // Whoever hangs does not look at its connections.
        if let Some(bus) = connected
            .as_mut()
            .filter(|_| !mood.hung.load(Ordering::SeqCst))
            && handle(bus, host, mood).is_err()
        {
            connected = None;
        }
        match &mut connected {
            Some(bus) if !mood.hung.load(Ordering::SeqCst) => {
                let _ = bus.wait(Some(Duration::from_millis(2)));
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

impl Drop for Moody {
    fn drop(&mut self) {
        self.mood.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Place {
    // In this order.
    _proxy: Proxy,
    moody: Moody,
    dir: tempfile::TempDir,
}

impl Place {
    fn new(host: Host, keys: &str) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus.sock");
        let listener = Listener::bind(&path, ListenerOptions::default()).unwrap();
        let host = Arc::new(Mutex::new(host));
        let mood = Arc::new(Mood::default());
        let thread = std::thread::spawn({
            let (host, mood) = (host.clone(), mood.clone());
            move || serve(listener, &host, &mood)
        });
        let number = host.lock().unwrap().number.0;
        let spec = format!(
            "vfio-user,socket={},dev={number}{keys}",
            dir.path().join("dev.sock").display()
        );
        let spec: FrontSpec = keyval::from_str(&spec).unwrap();
        let bus = BusSpec::Unix(UnixSpec::new(path));
        Place {
            _proxy: Proxy::start(&[bus], &[spec], |_| {}).unwrap(),
            moody: Moody {
                mood,
                host,
                thread: Some(thread),
            },
            dir,
        }
    }

    fn guest(&self) -> Guest<Client> {
        Guest::new(&self.dir.path().join("dev.sock"), Ram::shared())
    }

    fn mood(&self) -> &Mood {
        &self.moody.mood
    }
}

/// What an access takes.
#[track_caller]
fn bounded<T>(what: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = what();
    let took = begun.elapsed();
    assert!(took < BOUND, "{took:?}");
    result
}

fn net() -> Host {
    let mut host = Host::net();
    host.info.vendor_id = u32::from_le_bytes(*b"vmsg");
    host
}

#[test]
fn a_write_that_a_hung_device_does_not_take_breaks_the_device_in_time_and_a_reset_heals() {
    let place = Place::new(net(), "");
    let mut guest = place.guest();
    guest.start(3);
    place.mood().hung.store(true, Ordering::SeqCst);
    let (bar, at) = guest.layout.device;
    bounded(|| guest.vmm.write_region(bar, at, &[9]));
    assert!(vfio::rung_within(
        &guest.config_call,
        vfio::client::PATIENCE
    ));
    let status = bounded(|| guest.status());
    assert_eq!(status, 0xf | NEEDS_RESET);
    // All registers can be used meanwhile.
    bounded(|| guest.read_config::<6>(0));
    bounded(|| guest.common::<2>(0x1c));
    bounded(|| guest.kick(0));
    place.mood().hung.store(false, Ordering::SeqCst);
    guest.start(3);
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn a_device_that_hangs_anywhere_in_a_set_up_holds_no_access_up_for_long() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new(net(), keys);
        let mut guest = place.guest();
        for after in [1, 2, 5, 8, 11, 14] {
            place.mood().hangs_after.store(after, Ordering::SeqCst);
            let mut slowest = Duration::ZERO;
            let mut access = |what: &mut dyn FnMut()| {
                let begun = Instant::now();
                what();
                slowest = slowest.max(begun.elapsed());
            };
            let live: [u8; 5] = [0, 1, 3, 0xb, 0xf];
            for status in live {
                access(&mut || guest.set_status(status));
                if status == 3 {
                    let offered = guest.offered();
                    for block in 0..2u32 {
                        guest.set_common(8, &block.to_le_bytes());
                        let part = (offered >> (32 * block)) as u32;
                        guest.set_common(0xc, &part.to_le_bytes());
                    }
                }
                if status == 0xb {
                    guest.queues.clear();
                    for _ in 0..3 {
                        guest.lay_out_queue();
                    }
                    access(&mut || guest.enable_queues());
                }
            }
            assert!(slowest < BOUND, "{after}: {slowest:?}");
            place.mood().hangs_after.store(0, Ordering::SeqCst);
            place.mood().hung.store(false, Ordering::SeqCst);
            guest.reset();
        }
        guest.start(3);
        assert_eq!(guest.status(), 0xf);
    }
}

#[test]
fn a_device_that_takes_its_time_for_each_answer_holds_no_access_up_for_long() {
    let place = Place::new(net(), "");
    let mut guest = place.guest();
    guest.negotiate(0);
    guest.lay_out_queue();
    place.mood().delay.store(1800, Ordering::SeqCst);
    // Windows, eventfds, the record of what is in flight, the queue: four answers and more.
    bounded(|| guest.enable_queues());
    place.mood().delay.store(0, Ordering::SeqCst);
    guest.start(1);
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn memory_comes_and_goes_in_time_while_the_device_hangs() {
    let place = Place::new(net(), "");
    let mut guest = place.guest();
    guest.start(1);
    place.mood().hung.store(true, Ordering::SeqCst);
    let file = guest.ram.file.try_clone().unwrap();
    let fd = Some(std::os::fd::AsFd::as_fd(&file));
    bounded(|| guest.vmm.map(0x1000, 0x1000, 0, fd)).unwrap();
    // Whether it is said to be done or not: not before somebody has let go, or was made to.
    let _ = bounded(|| guest.vmm.unmap(0x1000, 0x1000));
    let _ = bounded(|| guest.vmm.unmap_all());
    bounded(|| guest.vmm.map(vfio::RAM_AT, vfio::RAM, vfio::OFFSET, fd)).unwrap();
    place.mood().hung.store(false, Ordering::SeqCst);
    guest.start(1);
    assert_eq!(guest.status(), 0xf);
    let host = place.moody.host.lock().unwrap();
    assert_eq!(host.queues.len(), 1);
}
