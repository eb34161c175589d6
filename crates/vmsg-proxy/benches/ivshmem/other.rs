// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other process: this program once more, told what to be.

use crate::wait_for;
use ivshmem::client::{Client, Limits};
use ivshmem::{Event, PeerId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::thread::CpuSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, Message, decode};
use vmsg_bus::{BusSpec, DeviceBus, Listener};
use vmsg_device::host::Host;
use vmsg_mem::{Access, Mapping};

/// The first argument of another process.
const OTHER: &str = "--other";

/// Bytes of a file with two words, each in a cache line of its own.
pub(crate) const WORDS: u64 = 4096;
pub(crate) const THERE: usize = 0;
pub(crate) const BACK: usize = 2048;

/// How long somebody polls before sleeping, where both sides are to poll.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// A process that ends when dropped.
pub(crate) struct Other(Child);

impl Other {
    /// On those CPUs, where this thread runs from then on only for a moment.
    pub(crate) fn start(cpus: &CpuSet, own: &CpuSet, what: &[&str]) -> Self {
        Self::with(cpus, own, what, Stdio::null(), Stdio::null())
    }

    fn with(cpus: &CpuSet, own: &CpuSet, what: &[&str], stdin: Stdio, stdout: Stdio) -> Self {
        crate::measure::run_on(cpus);
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg(OTHER).args(what).stdin(stdin).stdout(stdout);
        let child = command.spawn().expect("a process");
        crate::measure::run_on(own);
        Self(child)
    }

    /// Answers one eventfd by another; gives both.
    pub(crate) fn bells(cpus: &CpuSet, own: &CpuSet) -> (Self, OwnedFd, OwnedFd) {
        use rustix::event::{EventfdFlags, eventfd};
        let bell = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let (there, back) = (bell(), bell());
        let lent = |bell: &OwnedFd| Stdio::from(bell.try_clone().expect("a descriptor"));
        let other = Self::with(cpus, own, &["bells"], lent(&there), lent(&back));
        (other, there, back)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What this process is to be instead of the benchmark, if it is another one. Does not return then.
pub(crate) fn be_if_told() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        [OTHER, "bells"] => bells(),
        [OTHER, "doorbells", socket, peer] => {
            doorbells(Path::new(socket), peer.parse().expect("an id"));
        }
        [OTHER, "words", path] => words(Path::new(path)),
        [OTHER, "echo", bus, micros] => {
            let spin = Duration::from_micros(micros.parse().expect("a time"));
            echo(&bus.parse().expect("a bus"), spin);
        }
        [OTHER, "host", bus] => host(&bus.parse().expect("a bus")),
        [OTHER, "driver", bus] => driver(&bus.parse().expect("a bus")),
        _ => return,
    }
    std::process::exit(0);
}

fn bells() {
    let (there, back) = (std::io::stdin(), std::io::stdout());
    loop {
        rustix::io::read(there.as_fd(), &mut [0; 8]).expect("an eventfd");
        rustix::io::write(back.as_fd(), &1u64.to_ne_bytes()).expect("an eventfd");
    }
}

/// A client of an ivshmem server with one vector, which it waits for.
pub(crate) struct Ringer {
    client: Client,
    epoll: OwnedFd,
}

impl Ringer {
    pub(crate) fn new(socket: &Path) -> Self {
        let limits = Limits {
            vectors: Some(crate::VECTORS),
            ..Limits::default()
        };
        let client = Client::connect_with(socket, limits, Duration::from_secs(5));
        let client = client.expect("a server");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
        let fd = client.vector_fd(0).expect("a doorbell");
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, fd, EventData::new_u64(0), flags).expect("epoll");
        Self { client, epoll }
    }

    pub(crate) fn id(&self) -> PeerId {
        self.client.id()
    }

    /// Waits until the server has told of another client; gives its id.
    pub(crate) fn other(&mut self) -> PeerId {
        loop {
            match self.client.poll() {
                Some(Event::Joined(peer)) if peer != self.client.id() => return peer,
                Some(_) => {}
                None => wait_for(self.client.poll_fd()),
            }
        }
    }

    pub(crate) fn ring(&self, peer: PeerId) {
        self.client.ring(peer, 0).expect("a peer");
    }

    pub(crate) fn wait(&self) {
        let mut space = [MaybeUninit::<epoll::Event>::uninit()];
        let (events, _) = epoll::wait(&self.epoll, &mut space, None).expect("epoll");
        assert!(!events.is_empty(), "rung");
    }
}

fn doorbells(socket: &Path, peer: u16) {
    let ringer = Ringer::new(socket);
    let peer = PeerId(peer);
    ringer.ring(peer);
    loop {
        ringer.wait();
        ringer.ring(peer);
    }
}

/// Memory of two processes.
pub(crate) fn shared(path: &Path) -> Mapping {
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).open(path).expect("a file");
    Mapping::of_fd(file.as_fd(), 0, WORDS, Access::ReadWrite).expect("mapped")
}

fn words(path: &Path) {
    let memory = shared(path);
    let word = |at| memory.ram().atomic_u32(at).expect("a word inside");
    let (there, back) = (word(THERE), word(BACK));
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let now = there.load(Ordering::Acquire);
        if now != last {
            back.store(now, Ordering::Release);
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > POLL {
            // Nobody measures; whoever begins waits for the first one.
            std::thread::sleep(Duration::from_micros(200));
        } else {
            std::hint::spin_loop();
        }
    }
}

fn echo(bus: &BusSpec, spin: Duration) {
    let mut listener = bus.listen("benchmark").expect("a bus");
    loop {
        answer(&mut listener, spin);
    }
}

/// Answers one driver until it is gone.
fn answer(listener: &mut Listener, spin: Duration) {
    let mut bus: DeviceBus = loop {
        match listener.accept(Instant::now()).expect("a bus") {
            Some(bus) => break bus,
            None => wait_for(listener.as_fd()),
        }
    };
    let (mut buf, mut out) = (vec![0; bus.max_message_size()], [0; 64]);
    let mut until = Instant::now() + spin;
    loop {
        let Ok(received) = bus.try_recv(&mut buf) else {
            return;
        };
        if let Some(len) = received {
            let Ok(frame) = decode(&buf[..len], buf.len()) else {
                continue;
            };
            if let Message::Ping { data } = frame.message {
                let len = frame.response(Message::Pong { data }).encode(&mut out);
                bus.try_send(&out[..len.expect("short")]).expect("room");
                if bus.flush().is_err() {
                    return;
                }
            }
            if !spin.is_zero() {
                until = Instant::now() + spin;
            }
        } else if spin.is_zero() || Instant::now() > until {
            bus.wait(None).expect("a bus");
        } else {
            std::hint::spin_loop();
        }
    }
}

fn host(bus: &BusSpec) {
    let listener = bus.listen("benchmark").expect("a bus");
    let mut host = Host::new(1).expect("a host");
    host.add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
        .expect("a bus");
    host.run().expect("served");
}

fn driver(bus: &BusSpec) {
    let mut bus = crate::connect(bus);
    let mut buf = vec![0; bus.max_message_size()];
    loop {
        match bus.try_recv(&mut buf) {
            Ok(Some(_)) => {}
            Ok(None) => drop(bus.wait(None).expect("a bus")),
            Err(_) => return,
        }
    }
}

/// Asleep until there is something to read.
pub(crate) fn readable(fd: BorrowedFd<'_>, timeout: Duration) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec::try_from(timeout).expect("a short time");
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    )
    .expect("poll");
}
