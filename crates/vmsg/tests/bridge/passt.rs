// SPDX-License-Identifier: Apache-2.0 OR MIT
//! passt as a network device, where there is one that has vhost-user (2025 and later).

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant as Now;
use smoltcp::wire::{EthernetAddress, IpCidr};
use virtio_msg::DevNum;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::{BusClient, DmaPool, QueueOptions};

use crate::station::{BASE, PATIENCE, Process, Station, until};

const DEVICE: DevNum = DevNum(0);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 15);
/// To passt this is the host's loopback.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 2);

/// A passt that has vhost-user: in `PATH`, or where `VMSG_PASST` says.
fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let named = std::env::var_os("VMSG_PASST").map(PathBuf::from);
    let all = std::env::split_paths(&path).map(|dir| dir.join("passt"));
    let found = named.into_iter().chain(all).find(|program| {
        let help = Command::new(program).arg("--help").output();
        help.is_ok_and(|help| {
            let text = [help.stdout, help.stderr].concat();
            String::from_utf8_lossy(&text).contains("--vhost-user")
        })
    });
    if found.is_none() {
        eprintln!("no passt that has vhost-user: not tried");
    }
    found
}

/// passt at the socket `net`, as a user that it accepts.
fn passt(station: &Station, program: &Path) -> Process {
    let socket = station.path("net");
    let _ = std::fs::remove_file(&socket);
    let mut command = if rustix::process::geteuid().is_root() {
        let open = PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(station.dir.path(), open).expect("opened");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(station.path("passt.log"));
    command
        .args(["--foreground", "--vhost-user", "--socket"])
        .arg(&socket)
        .args("-a 10.11.0.15 -n 24 -g 10.11.0.2 -D 10.11.0.3".split(' '))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.expect("a log"));
    let process = Process::start(&mut command);
    until("the daemon's socket", || socket.exists().then_some(()));
    process
}

/// A TCP/IP stack's network card.
struct Card<'p> {
    driver: NetDriver<'p, vmsg_bus::DriverBus, vmsg_driver::Sleep, Vec<u8>>,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Frame(Vec<u8>);

impl phy::RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Out<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl phy::Device for Card<'_> {
    type RxToken<'a>
        = Frame
    where
        Self: 'a;
    type TxToken<'a>
        = Out<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Now) -> Option<(Frame, Out<'_>)> {
        Some((Frame(self.received.pop_front()?), Out(&mut self.sent)))
    }

    fn transmit(&mut self, _now: Now) -> Option<Out<'_>> {
        (self.sent.len() < 64).then_some(Out(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // passt says VIRTIO_NET_HDR_F_DATA_VALID, and leaves the checksums out.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.udp = Checksum::Tx;
        capabilities
    }
}

/// A machine on the network.
struct Machine<'p> {
    card: Card<'p>,
    interface: Interface,
    sockets: SocketSet<'static>,
    began: Instant,
}

impl<'p> Machine<'p> {
    fn new(client: BusClient, pool: &'p DmaPool, doorbells: bool) -> Self {
        let options = NetOptions {
            queue: QueueOptions {
                doorbells,
                ..QueueOptions::default()
            },
            ..NetOptions::default()
        };
        let mut driver = NetDriver::new(client, DEVICE, pool, &options).expect("a driver");
        let mac = driver.mac().expect("read").expect("an address");
        let mut card = Card {
            driver,
            received: VecDeque::new(),
            sent: VecDeque::new(),
        };
        let config = Config::new(EthernetAddress(mac).into());
        let interface = Interface::new(config, &mut card, Now::ZERO);
        Self {
            card,
            interface,
            sockets: SocketSet::new(Vec::new()),
            began: Instant::now(),
        }
    }

    fn run(&mut self, what: &str, mut done: impl FnMut(&mut SocketSet<'_>) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&mut self.sockets) {
            assert!(Instant::now() < end, "{what}");
            let time = i64::try_from(self.began.elapsed().as_micros()).expect("short");
            let now = Now::from_micros(time);
            let received = &mut self.card.received;
            let frames = self.card.driver.receive(64, |frame| {
                let mut bytes = vec![0; 1600];
                let len = frame.copy_to(&mut bytes).len();
                bytes.truncate(len);
                received.push_back(bytes);
            });
            frames.expect("sound");
            self.interface.poll(now, &mut self.card, &mut self.sockets);
            let sent = self.card.sent.iter().map(Vec::as_slice);
            let count = self.card.driver.transmit(sent).expect("sound");
            self.card.sent.drain(..count);
            if self.card.received.is_empty() && self.card.sent.is_empty() {
                let delay = self.interface.poll_delay(now, &self.sockets);
                let delay = delay.map_or(50, |delay| delay.total_millis()).min(50);
                let delay = Duration::from_millis(delay);
                self.card.driver.wait(delay).expect("the bus");
            }
        }
    }

    fn lease(&mut self) {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let mut given = None;
        self.run("an address by DHCP", |sockets| {
            let socket = sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
            if let Some(dhcpv4::Event::Configured(config)) = socket.poll() {
                given = Some((config.address, config.router));
            }
            given.is_some()
        });
        self.sockets.remove(handle);
        let (address, router) = given.expect("configured");
        assert_eq!((address.address(), router), (OWN, Some(ROUTER)));
        self.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::Ipv4(address)).expect("room");
        });
    }

    fn connect(&mut self, to: u16, from: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let context = self.interface.context();
        socket.connect(context, (ROUTER, to), from).expect("begun");
        self.sockets.add(socket)
    }

    /// Sends `bytes` bytes to somebody who sends them back.
    fn echo(&mut self, to: u16, from: u16, bytes: usize) {
        let handle = self.connect(to, from);
        let byte = |at: usize| u8::try_from(at * 7 % 251).expect("small");
        let (mut sent, mut received) = (0, 0);
        self.run("an echo", |sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            while sent < bytes && socket.can_send() {
                let len = (bytes - sent).min(8192);
                let data: Vec<u8> = (sent..sent + len).map(byte).collect();
                sent += socket.send_slice(&data).expect("open");
            }
            while socket.can_recv() {
                let mut data = [0; 8192];
                let len = socket.recv_slice(&mut data).expect("open");
                let right = data[..len].iter().enumerate();
                assert!(right.into_iter().all(|(at, is)| *is == byte(received + at)));
                received += len;
            }
            received == bytes
        });
        self.sockets.remove(handle);
    }
}

/// Sends back what comes on any connection.
fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut bytes = [0; 65_536];
                while let Ok(len @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..len]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[test]
fn passt_gives_an_address_and_carries_tcp_and_both_sides_may_be_started_again() {
    let Some(program) = find() else {
        return;
    };
    let station = Station::new();
    let port = echo_server();
    let mut daemon = passt(&station, &program);
    let spec = format!(
        "vhost-user,type=net,socket={}",
        station.path("net").display()
    );
    for (doorbells, from) in [(true, 40_001), (false, 40_011)] {
        let _serve = station.serve(&spec);
        let pool = DmaPool::new("test", BASE, 8 << 20).expect("memory");
        let mut machine = Machine::new(station.client(&pool), &pool, doorbells);
        machine.lease();
        machine.echo(port, from, 2 << 20);
        daemon.kill();
        until("the end of the daemon", || {
            station.log().contains("the daemon is gone").then_some(())
        });
        daemon = passt(&station, &program);
        // The same driver, the same queues: what was under way at the end is lost, what comes now is not.
        machine.echo(port, from + 1, 100_000);
    }
}
