// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the link costs on a bus without eventfds of its own: from a kick to the message at the device, and from the device's message to
//! the call. `cargo bench -p vmsg-proxy --bench kick`

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use virtio_msg::{
    Channel, DevNum, DeviceInfo, DeviceStatus, FeatureBlocks, FeatureSet, Frame, Message,
    QueueIndex, QueueSize, Token, U32, VqueueInfo, decode,
};
use vmsg_bus::{Capabilities, DeviceBus, loopback};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Op, Options, QueueSetup, ResumeAt, Session, Target};

const ROUNDS: u32 = 100_000;
const LIVE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK);

/// Answers what an attach and a set-up ask, counts kicks, and gives EVENT_USED for each.
fn serve(mut bus: DeviceBus, kicks: &AtomicU64, stop: &AtomicBool) {
    let mut buf = [0; 64];
    let mut set = virtio_msg::VqueueConfig::default();
    while !stop.load(Ordering::Relaxed) {
        let Ok(Some(len)) = bus.try_recv(&mut buf) else {
            let _ = bus.wait(Some(Duration::from_millis(50)));
            continue;
        };
        let Ok(frame) = decode(&buf[..len], 48) else {
            continue;
        };
        let mut words = [U32::new(0), U32::new(0)];
        let answer = match frame.message {
            Message::GetDeviceInfo => Message::DeviceInfo(DeviceInfo {
                device_id: 4,
                feature_bits: 64,
                max_queues: 1,
                ..DeviceInfo::ABSENT
            }),
            Message::GetDeviceFeatures { first, count } => {
                words[1].set(1);
                Message::DeviceFeatures(FeatureBlocks {
                    first,
                    count,
                    words: &words,
                })
            }
            Message::SetDriverFeatures(_) => Message::DriverFeaturesSet,
            Message::SetDeviceStatus(status) => Message::DeviceStatusSet(status),
            Message::SetVqueue(config) => {
                set = config;
                Message::VqueueSet
            }
            Message::GetVqueue(index) => Message::Vqueue(VqueueInfo {
                index,
                max_size: QueueSize(256),
                size: set.size,
                descriptor: set.descriptor,
                driver: set.driver,
                device: set.device,
            }),
            Message::EventAvail { queue, .. } => {
                kicks.fetch_add(1, Ordering::Relaxed);
                let used = Frame::new(frame.dev_num, Token(0), Message::EventUsed { queue });
                let mut out = [0; 48];
                let len = used.encode(&mut out).expect("12 bytes");
                let _ = bus.try_send(&out[..len]);
                let _ = bus.flush();
                continue;
            }
            _ => continue,
        };
        let mut out = [0; 48];
        let len = frame.response(answer).encode(&mut out).expect("fits");
        let _ = bus.try_send(&out[..len]);
        let _ = bus.flush();
    }
}

/// Processor time of the thread called `name`.
fn processor_time(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    for task in tasks.flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim_end() == name {
            let ns = read("schedstat");
            let ns = ns.split(' ').next().and_then(|ns| ns.parse().ok());
            return Duration::from_nanos(ns.unwrap_or(0));
        }
    }
    Duration::ZERO
}

fn bell() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"))
}

fn main() {
    let options = loopback::Options {
        capabilities: Capabilities::from_bits(0, 48),
        ..loopback::Options::default()
    };
    let (driver, device) = loopback::pair(&options).expect("a bus");
    let (kicks, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| serve(device, &kicks, &stop));
        let session = Session::new(Target::Number(DevNum(0)), Options::default());
        let link = Link::start("bench", session, Source::Given(Box::new(driver))).expect("a link");
        let handle = link.handle();
        let (kick, call) = (bell(), bell());
        let setup = QueueSetup {
            size: 256,
            descriptor: 0x1000,
            driver: 0x2000,
            device: 0x3000,
            resume: ResumeAt::Start,
        };
        for op in [
            Op::Describe,
            Op::SetFeatures(FeatureSet::from_bits(&[32])),
            Op::SetNotify {
                queue: QueueIndex(0),
                kick: Some(kick.clone()),
                call: Some(call.clone()),
            },
            Op::SetQueue(QueueIndex(0), setup),
            Op::SetStatus(LIVE),
        ] {
            handle.call(op).expect("done");
        }
        let take = || {
            let mut fds = [PollFd::new(&call, PollFlags::IN)];
            poll(&mut fds, None).expect("poll");
            let _ = rustix::io::read(&call, &mut [0; 8]);
        };
        let ring = || rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("write");
        take();
        let (begin, before) = (Instant::now(), processor_time("link bench"));
        for _ in 0..ROUNDS {
            ring();
            take();
        }
        let (time, used) = (begin.elapsed(), processor_time("link bench") - before);
        println!(
            "kick, device, call: {:.2} µs a round, {:.2} µs of the link's thread",
            time.as_secs_f64() * 1e6 / f64::from(ROUNDS),
            used.as_secs_f64() * 1e6 / f64::from(ROUNDS)
        );
        let before = (kicks.load(Ordering::Relaxed), processor_time("link bench"));
        let begin = Instant::now();
        for _ in 0..ROUNDS * 10 {
            ring();
        }
        let time = begin.elapsed();
        let used = processor_time("link bench") - before.1;
        println!(
            "kicks as fast as they go: {} became {} messages in {:.0} ms, {:.0} ms of the link's thread",
            ROUNDS * 10,
            kicks.load(Ordering::Relaxed) - before.0,
            time.as_secs_f64() * 1e3,
            used.as_secs_f64() * 1e3
        );
        stop.store(true, Ordering::Relaxed);
        drop(link);
    });
}
