// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve` killed with SIGKILL at random moments under traffic, on each bus. The driver keeps its rings, connects to the next one and
//! lets it go on where the rings stand: every request is answered once and in order, and no frame overtakes another.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_msg::{DevNum, FeatureSet, QueueIndex, QueueSize, VqueueConfig, feature};
use vmsg_bus::BusSpec;
use vmsg_bus::control::{Resume, WindowAdd};
use vmsg_driver::{BusClient, Device, Error, Wanted};
use vmsg_mem::{Access, BusAddr, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures, Token};

const BASE: u64 = 0x4000_0000;
const RAM: u64 = 1 << 20;
const QUEUE: usize = 0x4000;
const BUFFERS: usize = 0x1_0000;
const BUFFER: usize = 2048;
const SIZE: u16 = 64;
/// Requests of a queue that are under way at a time.
const UNDER_WAY: usize = 24;
const DEVICE: DevNum = DevNum(0);
const KILLS: usize = 20;
/// Nothing takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// A bus, as `--bus` has it.
struct Bus {
    host: String,
    driver: String,
    /// What is there besides both.
    server: Option<Child>,
}

impl Bus {
    fn new(host: String, driver: String, server: Option<Child>) -> Self {
        Self {
            host,
            driver,
            server,
        }
    }

    fn both(spec: String) -> Self {
        Self::new(spec.clone(), spec, None)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn buses(dir: &Path) -> Vec<Bus> {
    let at = dir.display();
    let linux_user = |revision: &str| {
        let at = format!("dir={at},ram={at}/ram");
        Bus::both(format!(
            "linux-user,{at},mem-offset={BASE:#x},revision={revision}"
        ))
    };
    let ivshmem = |place: &str, layout: &str| {
        format!("ivshmem,{place},layout={layout},memory=known,ram={at}/ram,mem-offset={BASE:#x}")
    };
    let server = start(&["ivshmem", "server", "--socket", &format!("{at}/iv")]);
    vec![
        Bus::both(format!("unix,path={at}/bus")),
        linux_user("1"),
        linux_user("r1"),
        Bus::new(
            ivshmem(&format!("socket={at}/iv"), "amp"),
            ivshmem(&format!("socket={at}/iv"), "amp"),
            Some(server),
        ),
        // The server that the host has started outlives it.
        Bus::new(
            ivshmem(&format!("listen={at}/held"), "spsc"),
            ivshmem(&format!("socket={at}/held"), "spsc"),
            None,
        ),
    ]
}

/// A process that has said that it is ready.
fn start(args: &[&str]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .args(args)
        .env("VMSG_LOG", "error")
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut line = String::new();
    let out = child.stdout.take().expect("piped");
    BufReader::new(out).read_line(&mut line).expect("a line");
    assert!(line.starts_with("ready"), "{args:?}: {line:?}");
    child
}

fn serve(bus: &str, device: &str) -> Child {
    start(&["serve", "--bus", bus, "--device", device])
}

/// How often a driver has set its device up.
#[derive(Default)]
struct SetUps {
    count: Mutex<usize>,
    more: Condvar,
}

impl SetUps {
    fn count(&self) -> usize {
        *self.count.lock().expect("no panic")
    }

    fn one_more(&self) {
        *self.count.lock().expect("no panic") += 1;
        self.more.notify_all();
    }

    fn wait_beyond(&self, old: usize) {
        let count = self.count.lock().expect("no panic");
        let (count, _elapsed) = self
            .more
            .wait_timeout_while(count, PATIENCE, |count| *count <= old)
            .expect("no panic");
        assert!(*count > old, "no set-up in time");
    }
}

/// Kills and starts `vmsg serve`, until it was killed often enough; then it stays.
fn killer(bus: &str, device: &str, set_ups: &SetUps, over: &AtomicBool) -> Child {
    let mut child = serve(bus, device);
    let mut number = 88_172_645_463_325_252_u64;
    for kill in 0..KILLS {
        // However slow the machine is, some set-ups come to their end.
        if kill % 5 == 0 {
            set_ups.wait_beyond(kill / 5);
        }
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        // Time is what is random here: the set-up after a start takes some milliseconds.
        std::thread::sleep(Duration::from_micros(number % 40_000));
        child.kill().expect("SIGKILL");
        child.wait().expect("reaped");
        child = serve(bus, device);
    }
    over.store(true, Ordering::SeqCst);
    child
}

struct Ring<'m> {
    queue: DriverQueue<'m, Vec<DriverSlot>>,
    under_way: VecDeque<(Token, usize)>,
    free: Vec<usize>,
}

/// A driver whose memory, rings and requests outlive the device host.
struct Driver<'m> {
    bus: BusSpec,
    file: File,
    memory: &'m Mapping,
    rings: Vec<Ring<'m>>,
    link: Option<(BusClient, Device)>,
    set_ups: Arc<SetUps>,
}

fn memory(dir: &Path) -> (File, Mapping) {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(dir.join("ram")).expect("created");
    file.set_len(RAM).expect("sized");
    let memory = Mapping::of_fd(file.as_fd(), 0, RAM, Access::ReadWrite).expect("mapped");
    (file, memory)
}

impl<'m> Driver<'m> {
    fn new(bus: &str, file: File, memory: &'m Mapping, rings: usize) -> Self {
        let layout = Layout::new(SIZE, 0).expect("a size");
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let ring = |index: usize| {
            let part = memory.ram().get(index * QUEUE, layout.total_len());
            let base = BusAddr(BASE + (index * QUEUE) as u64);
            let slots = vec![DriverSlot::default(); SIZE.into()];
            let queue = DriverQueue::new(layout, features, part.expect("inside"), base, slots);
            Ring {
                queue: queue.expect("a queue"),
                under_way: VecDeque::new(),
                free: (0..UNDER_WAY)
                    .map(|slot| BUFFERS + (index * UNDER_WAY + slot) * BUFFER)
                    .collect(),
            }
        };
        Self {
            bus: bus.parse().expect("a bus"),
            file,
            memory,
            rings: (0..rings).map(ring).collect(),
            link: None,
            set_ups: Arc::default(),
        }
    }

    fn set_up(&mut self) -> Result<(), Error> {
        let connector = self.bus.connector("test").timeout(Duration::from_secs(5));
        let Ok(bus) = connector.connect() else {
            // It is not there again yet.
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        };
        let lends = bus.capabilities().runtime_windows;
        let mut client = BusClient::on_bus(bus);
        client.set_timeout(Duration::from_secs(5));
        if lends {
            let window = WindowAdd {
                id: 1,
                writable: true,
                base: BusAddr(BASE),
                len: RAM,
                file_offset: 0,
                more: false,
            };
            client.add_window(window, self.file.as_fd())?;
        }
        let wanted = Wanted {
            supported: FeatureSet::from_bits(&[feature::RING_EVENT_IDX]),
            required: FeatureSet::EMPTY,
        };
        let mut device = Device::open(&mut client, DEVICE, &wanted)?;
        for (index, ring) in (0..).map(QueueIndex).zip(&self.rings) {
            if lends {
                client.queue_resume(DEVICE, index, Resume::UsedInRing)?;
            }
            let config = ring.queue.config();
            let config = VqueueConfig {
                index,
                size: QueueSize(config.size.into()),
                descriptor: config.desc.0,
                driver: config.driver.0,
                device: config.device.0,
            };
            device.set_queue(&mut client, config)?;
        }
        device.start(&mut client)?;
        self.set_ups.one_more();
        self.link = Some((client, device));
        Ok(())
    }

    /// Makes sure that there is somebody to talk to.
    fn linked(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.link.is_none() {
            let result = self.set_up();
            assert!(Instant::now() < end, "{}: {result:?}", self.bus);
        }
    }

    /// Tells the device of a queue, unless it is away: the next one looks by itself.
    fn kick(&mut self, ring: usize) {
        let index = QueueIndex(u32::try_from(ring).expect("few"));
        if let Some((client, _)) = &mut self.link
            && client.notify_available(DEVICE, index, 0).is_err()
        {
            self.link = None;
        }
    }

    /// Puts in a buffer that `fill` has filled: `readable` bytes for the device, or all for it to write.
    fn add(&mut self, ring: usize, readable: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let own = &mut self.rings[ring];
        let Some(at) = own.free.pop() else {
            return false;
        };
        let mut bytes = [0; BUFFER];
        fill(&mut bytes);
        self.memory.ram().write(at, &bytes);
        let address = BusAddr(BASE + at as u64);
        let token = if readable > 0 {
            let len = u32::try_from(readable).expect("short");
            own.queue.add(&[(address, len)], &[])
        } else {
            let len = u32::try_from(BUFFER).expect("short");
            own.queue.add(&[], &[(address, len)])
        };
        own.under_way.push_back((token.expect("room"), at));
        if own.queue.publish().expect("a sound queue") {
            self.kick(ring);
        }
        true
    }

    /// Takes what has come back; in order, or it panics.
    fn take(&mut self, ring: usize, mut each: impl FnMut(&[u8], u32)) -> usize {
        let own = &mut self.rings[ring];
        let mut count = 0;
        while let Some(used) = own.queue.pop_used().expect("the device keeps to the rules") {
            let (token, at) = own.under_way.pop_front().expect("asked for");
            assert_eq!(used.token, token, "out of order");
            let mut bytes = [0; BUFFER];
            self.memory.ram().read(at, &mut bytes);
            each(&bytes, used.written);
            own.free.push(at);
            count += 1;
        }
        count
    }

    /// Sleeps until there may be something to take.
    fn wait(&mut self) {
        self.linked();
        for ring in &mut self.rings {
            if ring.queue.enable_notifications().expect("a sound queue") {
                return;
            }
        }
        let Some((client, _)) = &mut self.link else {
            return;
        };
        match client.wait_event(PATIENCE) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("{}: nothing comes back", self.bus),
            Err(_) => self.link = None,
        }
    }
}

#[test]
fn random_bytes_go_on_over_twenty_kills() {
    let dir = tempfile::tempdir().expect("a directory");
    for bus in buses(dir.path()) {
        let (file, memory) = memory(dir.path());
        let mut driver = Driver::new(&bus.driver, file, &memory, 1);
        let over = AtomicBool::new(false);
        let set_ups = driver.set_ups.clone();
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| killer(&bus.host, "rng", &set_ups, &over));
            let mut answered = 0;
            let mut last = 0;
            while !over.load(Ordering::SeqCst) || last < 200 {
                while driver.add(0, 0, |_| {}) {}
                driver.wait();
                let count = driver.take(0, |bytes, written| {
                    assert_eq!(written as usize, BUFFER);
                    assert!(bytes[..64].iter().any(|byte| *byte != 0), "random bytes");
                });
                answered += count;
                last += if over.load(Ordering::SeqCst) {
                    count
                } else {
                    0
                };
            }
            let count = driver.set_ups.count();
            println!("{}: {answered} answers, {count} set-ups", bus.host);
            assert!(count > 2, "{count} set-ups");
            let mut child = killer.join().expect("served");
            drop(driver.link.take());
            child.kill().expect("SIGKILL");
            child.wait().expect("reaped");
        });
    }
}

/// A frame with a number, behind the 12 bytes of its virtio header.
fn number_frame(bytes: &mut [u8], number: u64) {
    bytes[12..24].copy_from_slice(&[0xff; 12]);
    bytes[24..26].copy_from_slice(&[0x88, 0xb5]);
    bytes[26..34].copy_from_slice(&number.to_be_bytes());
}

/// Bytes of such a frame, without header.
const FRAME: usize = 60;

/// The other end of the cable: notes the numbers of each connection, and sends its own.
fn cable(listener: &UnixListener, runs: &Mutex<Vec<Vec<u64>>>, done: &AtomicBool) {
    let sent = Arc::new(AtomicU64::new(0));
    std::thread::scope(|scope| {
        for socket in listener.incoming() {
            let mut socket: UnixStream = socket.expect("connected");
            if done.load(Ordering::SeqCst) {
                return;
            }
            let mut back = socket.try_clone().expect("cloned");
            let numbers = Arc::clone(&sent);
            scope.spawn(move || {
                loop {
                    let number = numbers.fetch_add(1, Ordering::SeqCst);
                    let mut frame = [0; 12 + FRAME];
                    number_frame(&mut frame, number);
                    frame[8..12].copy_from_slice(&60_u32.to_be_bytes());
                    if back.write_all(&frame[8..]).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            let run = {
                let mut runs = runs.lock().expect("no panic");
                runs.push(Vec::new());
                runs.len() - 1
            };
            scope.spawn(move || {
                let mut frame = [0; 4 + FRAME];
                while socket.read_exact(&mut frame).is_ok() {
                    let number = frame[18..26].first_chunk().expect("eight");
                    let number = u64::from_be_bytes(*number);
                    runs.lock().expect("no panic")[run].push(number);
                }
            });
        }
    });
}

#[test]
fn frames_keep_their_order_over_twenty_kills() {
    let dir = tempfile::tempdir().expect("a directory");
    for (index, bus) in buses(dir.path()).into_iter().enumerate() {
        let (file, memory) = memory(dir.path());
        let mut driver = Driver::new(&bus.driver, file, &memory, 2);
        let path = dir.path().join(format!("cable{index}"));
        let listener = UnixListener::bind(&path).expect("a socket");
        let device = format!("net,backend=socket,path={}", path.display());
        let (over, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let runs = Mutex::new(Vec::new());
        let set_ups = driver.set_ups.clone();
        std::thread::scope(|scope| {
            let other_end = scope.spawn(|| cable(&listener, &runs, &done));
            let killer = scope.spawn(|| killer(&bus.host, &device, &set_ups, &over));
            let (mut number, mut came, mut received, mut last) = (0, None, 0, 0);
            while !over.load(Ordering::SeqCst) || last < 200 {
                while driver.add(0, 0, |_| {}) {}
                while driver.add(1, 12 + FRAME, |bytes| number_frame(bytes, number)) {
                    number += 1;
                }
                driver.wait();
                let count = driver.take(0, |bytes, written| {
                    assert_eq!(written as usize, 12 + FRAME);
                    let number = bytes[26..34].first_chunk().expect("eight");
                    let number = u64::from_be_bytes(*number);
                    assert!(came < Some(number), "{number} after {came:?}");
                    came = Some(number);
                });
                received += count;
                driver.take(1, |_, _| {});
                last += if over.load(Ordering::SeqCst) {
                    count
                } else {
                    0
                };
            }
            done.store(true, Ordering::SeqCst);
            let mut child = killer.join().expect("served");
            drop(driver.link.take());
            child.kill().expect("SIGKILL");
            child.wait().expect("reaped");
            drop(UnixStream::connect(&path));
            other_end.join().expect("no panic");
            let links = driver.set_ups.count();
            println!(
                "{}: {number} frames out, {received} in, {links} set-ups",
                bus.host
            );
            assert!(links > 2, "{links} set-ups");
        });
        let runs = runs.into_inner().expect("no panic");
        let mut before = 0;
        for run in runs.iter().filter(|run| !run.is_empty()) {
            assert!(run.is_sorted_by(|a, b| a < b), "within a connection");
            // What was under way may be sent once more by the next one; nothing older.
            assert!(
                run[0] + u64::from(SIZE) >= before,
                "{} comes after {before}",
                run[0]
            );
            before = run[run.len() - 1];
        }
        assert!(before > 0, "something was sent");
    }
}
