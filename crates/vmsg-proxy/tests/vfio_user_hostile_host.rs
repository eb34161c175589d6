// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host that lies, is late, says nothing, or writes all over the memory it is lent: what a guest behind a vfio-user front sees of it. No access of the
//! guest's to a register takes long, and nothing of its memory changes that the device may not write.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod vfio;

use common::Host;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vfio::client::{Client, PATIENCE};
use vfio::place::Place;
use vfio::{BUFFERS, Guest, OFFSET, RAM, RAM_AT, Ram, rung_within};
use virtio_msg::Channel;
use vmsg_bus::{BusSpec, DeviceBus, UnixSpec};
use vmsg_mem::{Access, Doorbell, Mapping};

/// QEMU gives up after 5 s. The front takes 3 s; the rest is for a busy machine.
const LONGEST: Duration = Duration::from_millis(4700);

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a host does in place of answering.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    /// Nothing, from then on.
    Silence,
    /// Nothing, once.
    Forget,
    /// Bytes that are no message.
    Noise,
    /// The answer before this one.
    Old,
    /// The answer with some bytes changed.
    Changed,
    /// The same answer many times.
    Again,
    /// All that it has are events, without end.
    Chatter,
    /// It closes the connection.
    Close,
    /// It answers after so many milliseconds, from then on.
    Late(u64),
    /// Some of all this, now and then.
    Mixed,
}

/// A host that answers as it should until it was asked often enough.
struct Liar {
    stop: Arc<AtomicBool>,
    /// Requests that are still answered well.
    honest: Arc<AtomicUsize>,
    host: Arc<Mutex<Host>>,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    fn start(path: &Path, host: Host, lie: Lie, honest: usize, seed: u64) -> Liar {
        let bus = BusSpec::Unix(UnixSpec::new(path));
        let mut listener = bus.listen("liar").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let left = Arc::new(AtomicUsize::new(honest));
        let host = Arc::new(Mutex::new(host));
        let (until, honest, shared) = (stop.clone(), left.clone(), host.clone());
        let thread = std::thread::spawn(move || {
            let mut numbers = Numbers(seed);
            while !until.load(Ordering::Relaxed) {
                match listener.accept(Instant::now()) {
                    Ok(Some(bus)) => {
                        shared.lock().unwrap().end_of_connection();
                        converse(bus, &shared, lie, &honest, &until, &mut numbers);
                    }
                    _ => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Liar {
            stop,
            honest: left,
            host,
            thread: Some(thread),
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap();
        }
    }
}

/// One connection.
fn converse(
    mut bus: DeviceBus,
    host: &Mutex<Host>,
    lie: Lie,
    honest: &AtomicUsize,
    stop: &AtomicBool,
    numbers: &mut Numbers,
) {
    let mut buf = vec![0; 512];
    let mut fds = Vec::new();
    let mut before: Vec<u8> = Vec::new();
    let mut late: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut silent = false;
    let mut chatter = false;
    while !stop.load(Ordering::Relaxed) {
        if chatter {
            // EVENT_CONFIG and EVENT_USED of this device, as fast as they go.
            for id in [0x40, 0x42, 0x7f] {
                let mut event = vec![0u8, id, 1, 0, 0, 0, 24, 0];
                event.resize(24, 0);
                let _ = bus.try_send(&event);
            }
        }
        while late.front().is_some_and(|(at, _)| *at <= Instant::now()) {
            let (_, answer) = late.pop_front().unwrap();
            let _ = bus.try_send(&answer);
        }
        let len = match bus.try_recv_with_fds(&mut buf, &mut fds) {
            Ok(Some(len)) => len,
            Ok(None) => {
                let _ = bus.flush();
                let wait = if chatter { 0 } else { 2 };
                let _ = bus.wait(Some(Duration::from_millis(wait)));
                continue;
            }
            Err(_) => return,
        };
        let fds = std::mem::take(&mut fds);
        let request = &buf[..len];
        // Its own mistakes, once it has lied, are no matter.
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut host = host
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            host.handle(request, fds)
        }));
        let Some(mut answer) = answer.ok().flatten() else {
            continue;
        };
        let lying = honest
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_err();
        if !lying {
            let _ = bus.try_send(&answer);
            before = answer;
            continue;
        }
        let lie = match lie {
            Lie::Mixed => match numbers.below(30) {
                0 => Lie::Silence,
                1 => Lie::Noise,
                2 => Lie::Old,
                3..6 => Lie::Changed,
                6 => Lie::Again,
                7 => Lie::Close,
                8 => Lie::Late(numbers.below(1500)),
                _ => {
                    let _ = bus.try_send(&answer);
                    before = answer;
                    continue;
                }
            },
            lie => lie,
        };
        match lie {
            _ if silent => {}
            Lie::Silence => silent = true,
            Lie::Forget => honest.store(20, Ordering::Relaxed),
            Lie::Noise => {
                let noise: Vec<u8> = (0..answer.len()).map(|_| numbers.next() as u8).collect();
                let _ = bus.try_send(&noise);
            }
            Lie::Old => {
                let _ = bus.try_send(&before);
            }
            Lie::Changed => {
                for _ in 0..1 + numbers.below(3) {
                    let at = numbers.below(answer.len() as u64) as usize;
                    answer[at] = numbers.next() as u8;
                }
                let _ = bus.try_send(&answer);
            }
            Lie::Again => {
                for _ in 0..200 {
                    let _ = bus.try_send(&answer);
                }
            }
            Lie::Chatter => {
                chatter = true;
                let _ = bus.try_send(&answer);
            }
            Lie::Close => return,
            Lie::Late(time) => {
                late.push_back((Instant::now() + Duration::from_millis(time), answer));
            }
            Lie::Mixed => {}
        }
    }
}

/// A driver that tries everything and expects nothing.
struct Story {
    client: Client,
    ram: Ram,
    longest: (Duration, &'static str),
}

impl Story {
    fn timed<T>(&mut self, what: &'static str, f: impl FnOnce(&mut Client, &Ram) -> T) -> T {
        let begin = Instant::now();
        let result = f(&mut self.client, &self.ram);
        self.longest = self.longest.max((begin.elapsed(), what));
        result
    }

    fn read(&mut self, what: &'static str, offset: u64, len: usize) -> Vec<u8> {
        self.timed(what, |client, _| {
            let mut bytes = vec![0; len];
            client.read_region(4, offset, &mut bytes);
            bytes
        })
    }

    fn write(&mut self, what: &'static str, offset: u64, data: &[u8]) {
        self.timed(what, |client, _| client.write_region(4, offset, data));
    }

    fn run(&mut self, rounds: usize) {
        let file = self.ram.file.try_clone().unwrap();
        let _ = self.timed("map", |client, _| {
            client.map(RAM_AT, RAM / 2, OFFSET, Some(file.as_fd()))
        });
        for round in 0..rounds {
            self.write("reset", 0x14, &[0]);
            self.read("status after reset", 0x14, 1);
            self.write("acknowledge", 0x14, &[1]);
            self.write("driver", 0x14, &[3]);
            self.read("features", 4, 4);
            self.write("select", 8, &1u32.to_le_bytes());
            self.write("accept", 0xc, &1u32.to_le_bytes());
            self.write("features ok", 0x14, &[0xb]);
            self.read("status", 0x14, 1);
            self.read("configuration", 0x2000, 8);
            self.read("generation", 0x15, 1);
            for queue in 0..3u16 {
                self.write("queue select", 0x16, &queue.to_le_bytes());
                self.write("size", 0x18, &16u16.to_le_bytes());
                let at = RAM_AT + 0x1_0000 * (1 + u64::from(queue));
                for (offset, at) in [(0x20, at), (0x28, at + 0x1000), (0x30, at + 0x2000)] {
                    self.write("address", offset, &at.to_le_bytes());
                }
                self.write("enable", 0x1c, &1u16.to_le_bytes());
                self.read("enabled", 0x1c, 2);
            }
            self.write("driver ok", 0x14, &[0xf]);
            self.write("kick", 0x3000, &[0, 0]);
            let _ = self.timed("map", |client, _| {
                client.map(
                    RAM_AT + RAM / 2,
                    RAM / 2,
                    OFFSET + RAM / 2,
                    Some(file.as_fd()),
                )
            });
            self.write("configuration", 0x2000, &[1, 2]);
            self.write("queue reset", 0x3a, &1u16.to_le_bytes());
            self.read("queue is reset", 0x3a, 2);
            let _ = self.timed("unmap", |client, _| client.unmap(RAM_AT + RAM / 2, RAM / 2));
            self.read("isr", 0x1000, 1);
            // Nobody waits for these, but for the one behind them.
            for _ in 0..4 {
                self.client.post(4, 0x14, &[0]);
                self.client.post(4, 0x3000, &[0, 0]);
            }
            self.read("status after resets", 0x14, 1);
            if round + 1 == rounds {
                self.timed("function reset", |client, _| {
                    client.ask(vfio::client::RESET, &[], &[]).ok()
                });
            }
            self.read("status", 0x14, 1);
        }
    }
}

/// One liar before one front; gives the longest that anything took.
fn suffer(keys: &str, lie: Lie, honest: usize, seed: u64) -> (Duration, &'static str) {
    let place = Place::without_host("3", keys);
    let _liar = Liar::start(
        &place.dir.path().join("bus.sock"),
        Host::net(),
        lie,
        honest,
        seed,
    );
    let begin = Instant::now();
    let (client, answer) = Client::connect(&place.socket(), None);
    let greeted = begin.elapsed();
    if answer.is_err() {
        return (greeted, "refusal");
    }
    let mut story = Story {
        client,
        ram: Ram::shared(),
        longest: (greeted, "greeting"),
    };
    // With these most of the time goes by before anything has been given up.
    let rounds = if matches!(lie, Lie::Late(_) | Lie::Forget) {
        1
    } else {
        2
    };
    story.run(rounds);
    let longest = story.longest;
    // The next client.
    let begin = Instant::now();
    drop(story);
    let (client, _) = Client::connect(&place.socket(), None);
    let greeted = begin.elapsed();
    drop(client);
    longest.max((greeted, "greeting of the next"))
}

/// All at the same time: most of it is waiting.
fn suffer_all(cases: Vec<(Lie, usize, u64)>) {
    let threads: Vec<_> = cases
        .into_iter()
        .flat_map(|(lie, honest, seed)| ["", ",isolate=on"].map(|keys| (keys, lie, honest, seed)))
        .map(|(keys, lie, honest, seed)| {
            let case = (keys, lie, honest, seed);
            (
                case,
                std::thread::spawn(move || suffer(keys, lie, honest, seed)),
            )
        })
        .collect();
    let mut longest = (Duration::ZERO, "");
    let mut bad = Vec::new();
    for (case, thread) in threads {
        let took = thread.join().unwrap();
        if took.0 >= LONGEST {
            bad.push((case, took));
        }
        longest = longest.max(took);
    }
    // Many at a time may also have been in each other's way.
    bad.retain_mut(|((keys, lie, honest, seed), took)| {
        *took = suffer(keys, *lie, *honest, *seed);
        took.0 >= LONGEST
    });
    eprintln!("longest {longest:?}");
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn a_host_that_falls_silent_at_each_step_holds_no_access_up() {
    suffer_all(
        [0, 3, 9, 14, 16, 18, 20, 24, 28, 33, 40]
            .map(|n| (Lie::Silence, n, 1))
            .into(),
    );
}

#[test]
fn a_host_that_forgets_to_answer_now_and_then_holds_no_access_up() {
    suffer_all([5, 12, 15, 22].map(|n| (Lie::Forget, n, 1)).into());
}

#[test]
fn a_host_that_is_late_holds_no_access_up() {
    let cases = [(12, 300), (20, 1900), (18, 2500)];
    suffer_all(cases.map(|(n, late)| (Lie::Late(late), n, 1)).into());
}

#[test]
fn answers_that_are_none_hold_no_access_up() {
    let lies = [
        Lie::Noise,
        Lie::Old,
        Lie::Changed,
        Lie::Again,
        Lie::Close,
        Lie::Chatter,
    ];
    let cases = lies
        .into_iter()
        .flat_map(|lie| [2, 13, 21].map(|n| (lie, n, 5)));
    suffer_all(cases.collect());
}

#[test]
fn a_host_that_does_some_of_all_this_holds_no_access_up() {
    suffer_all((0..8).map(|n| (Lie::Mixed, 12, 77 + n)).collect());
}

#[test]
fn an_access_behind_many_that_nobody_waits_for_is_not_held_up_by_all_of_them() {
    let threads: Vec<_> = [600, 1200, 1900]
        .into_iter()
        .flat_map(|late| ["", ",isolate=on"].map(|keys| (keys, late)))
        .map(|(keys, late)| {
            std::thread::spawn(move || {
                let place = Place::without_host("1", keys);
                let path = place.dir.path().join("bus.sock");
                let liar = Liar::start(&path, Host::rng(), Lie::Late(late), usize::MAX, 1);
                let mut guest = Guest::new(&place.socket(), Ram::shared());
                guest.start(1);
                liar.honest.store(0, Ordering::Relaxed);
                for _ in 0..6 {
                    guest.vmm.post(4, 0x14, &[0]);
                    guest.vmm.post(4, 0x14, &[1]);
                }
                let begin = Instant::now();
                guest.status();
                let took = begin.elapsed();
                // It heals.
                liar.honest.store(usize::MAX, Ordering::Relaxed);
                guest.start(1);
                assert_eq!(guest.status(), 0xf);
                took
            })
        })
        .collect();
    let took: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    eprintln!("{took:?}");
    assert!(took.iter().all(|took| *took < LONGEST), "{took:?}");
}

#[test]
fn a_segment_that_is_written_everywhere_all_the_time_costs_the_guest_only_what_it_lends() {
    const SECRET: u8 = 0xa7;
    let place = Place::without_host("1", ",isolate=on,segment=1M");
    let path = place.dir.path().join("bus.sock");
    let liar = Liar::start(&path, Host::rng(), Lie::Silence, usize::MAX, 1);
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    let mut numbers = Numbers(99);
    let mut longest = Duration::ZERO;
    let (mut answers, mut broken) = (0, 0);
    let begun = Instant::now();
    // Longer where there is little time for either side.
    while begun.elapsed() < Duration::from_secs(4)
        || (broken == 0 || answers <= 200) && begun.elapsed() < PATIENCE
    {
        guest.start(1);
        // All but the rings.
        let rest = BUFFERS..RAM as usize;
        guest
            .ram
            .mapping
            .ram()
            .get(rest.start, rest.len())
            .unwrap()
            .fill(SECRET);
        let (segment, base, rings, bell) = {
            let host = liar.host.lock().unwrap();
            assert!(
                host.views.is_empty() && host.backings.is_empty(),
                "only the segment is lent"
            );
            assert_eq!(host.windows.len(), 1);
            let (id, window) = host.windows.iter().next().unwrap();
            let file = host.window_files[id].try_clone().unwrap();
            let (notify, fds) = &host.notify[&0];
            assert!(notify.fds() == 2 && fds.len() == 2, "kick and call");
            let bell = Doorbell::from_fd(fds[1].try_clone().unwrap()).unwrap();
            let segment = Mapping::of_fd(file.as_fd(), 0, window.len, Access::ReadWrite).unwrap();
            (segment, window.base.0, host.queues[&0], bell)
        };
        let used = (rings.device - base) as usize;
        let available = (rings.driver - base) as usize;
        // Descriptors and buffers only, or the ring of what is used as well.
        let tame = answers < 200 || numbers.below(2) == 0;
        let stop = AtomicBool::new(false);
        let seed = numbers.next();
        let seen = std::thread::scope(|scope| {
            let host = scope.spawn(|| {
                let mut numbers = Numbers(seed);
                let ram = segment.ram();
                let mut all = vec![0; ram.len()];
                let (mut seen, mut next, mut round) = (false, 0u16, 0);
                while !stop.load(Ordering::Relaxed) {
                    if round % 16 == 0 {
                        // What is there before it is overwritten: half of a run of 16 bytes begins at a multiple of 8.
                        ram.read(0, &mut all);
                        seen |= all.chunks_exact(8).any(|bytes| bytes == [SECRET; 8]);
                    }
                    round += 1;
                    // What it was given, as it was given it.
                    let mut index = [0; 2];
                    ram.read(available + 2, &mut index);
                    if u16::from_le_bytes(index).wrapping_sub(next) <= 64 {
                        while u16::from_le_bytes(index) != next {
                            let slot = usize::from(next % 64);
                            let mut head = [0; 2];
                            ram.read(available + 4 + 2 * slot, &mut head);
                            let len = numbers.below(65) as u32;
                            ram.write(
                                used + 4 + 8 * slot,
                                &u32::from(u16::from_le_bytes(head)).to_le_bytes(),
                            );
                            ram.write(used + 8 + 8 * slot, &len.to_le_bytes());
                            next = next.wrapping_add(1);
                            ram.write(used + 2, &next.to_le_bytes());
                        }
                    }
                    for _ in 0..200 {
                        let at = numbers.below(ram.len() as u64 - 8) as usize;
                        let bytes = numbers.next().to_le_bytes();
                        let tame = tame && (available..used + 0x1000).contains(&at);
                        if !tame {
                            ram.write(at, &bytes[..1 + at % 8]);
                        }
                    }
                    if !tame {
                        let at = used + numbers.below(600) as usize;
                        ram.write(at, &numbers.next().to_le_bytes());
                    }
                    let _ = bell.ring();
                }
                seen
            });
            let end = Instant::now() + Duration::from_millis(60);
            while Instant::now() < end {
                if guest.queues[0].queue.free_descriptors() > 0 {
                    ask(&mut guest);
                }
                let begin = Instant::now();
                let status = guest.status();
                longest = longest.max(begin.elapsed());
                while let Ok(Some(_)) = guest.queues[0].queue.pop_used() {
                    answers += 1;
                }
                if status & vfio::NEEDS_RESET != 0 {
                    broken += 1;
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            host.join().unwrap()
        });
        assert!(!seen, "memory of the guest was in the segment");
        let begin = Instant::now();
        guest.reset();
        longest = longest.max(begin.elapsed());
        rung_within(&guest.config_call, Duration::ZERO);
        for n in 0..64 {
            let page = guest.ram.read(BUFFERS + n * 0x1000, 0x1000);
            assert!(page[64..].iter().all(|byte| *byte == SECRET), "page {n}");
        }
        let len = RAM as usize - BUFFERS - 64 * 0x1000;
        let beyond = guest.ram.read(BUFFERS + 64 * 0x1000, len);
        assert!(beyond.iter().all(|byte| *byte == SECRET));
    }
    eprintln!("{answers} answers, {broken} times broken, longest {longest:?}");
    assert!(broken > 0, "no lie was found out");
    assert!(answers > 200, "nothing came through");
    assert!(longest < LONGEST);
    drop(liar);
}

/// 64 bytes to be filled, the first of a page, of which nothing is changed before.
fn ask(guest: &mut Guest<Client>) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let page = NEXT.fetch_add(1, Ordering::Relaxed) % 64;
    let at = vmsg_mem::BusAddr(RAM_AT + (BUFFERS + page * 0x1000) as u64);
    let queue = &mut guest.queues[0].queue;
    if queue.add(&[], &[(at, 64)]).is_ok() && queue.publish().unwrap_or(true) {
        guest.kick(0);
    }
}
