// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stock QEMU and passt at the other end of the socket back ends.

mod wire;

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use smoltcp::socket::dhcpv4;
use smoltcp::wire::IpCidr;
use vmsg_net::socket::{Dgram, DgramConfig, Stream, StreamAddress, StreamConfig};
use vmsg_net::{Backend, Guest, VnetHeader};
use wire::{PATIENCE, World, echo_server, missing, receive, send, wait};

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Option<Running> {
    match command.stdin(Stdio::null()).spawn() {
        Ok(child) => Some(Running(child)),
        Err(error) => {
            let program = command.get_program().to_string_lossy();
            missing(&format!("{program} ({error})"));
            None
        }
    }
}

fn exists(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&paths).any(|dir| dir.join(program).exists());
    if !there {
        missing(program);
    }
    there
}

/// passt, as a user that it accepts.
fn passt(dir: &Path, socket: &Path) -> Option<Running> {
    if !exists("passt") {
        return None;
    }
    let mut command = if rustix::process::getuid().is_root() {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o777)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "passt"]);
        command
    } else {
        Command::new("passt")
    };
    command
        .args(["--foreground", "--quiet", "--socket"])
        .arg(socket)
        .args("-a 10.11.0.15 -n 24 -g 10.11.0.2 -D 10.11.0.3".split(' '))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    start(&mut command)
}

#[test]
fn passt_gives_an_address_and_carries_tcp_and_may_be_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("passt.socket");
    let stream = Stream::open(&StreamConfig::client(StreamAddress::Unix(socket.clone()))).unwrap();
    // It comes after us.
    let Some(mut running) = passt(dir.path(), &socket) else {
        return;
    };
    let mut world = World::new(stream, None, 1500);
    world.run("passt is there", |world| world.backend.link_is_up());
    let handle = world.sockets.add(dhcpv4::Socket::new());
    let mut given = None;
    world.run("an address by DHCP", |world| {
        let socket = world.sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
        if let Some(dhcpv4::Event::Configured(config)) = socket.poll() {
            given = Some((config.address, config.router));
        }
        given.is_some()
    });
    let (address, router) = given.expect("configured");
    assert_eq!(address.address(), Ipv4Addr::new(10, 11, 0, 15));
    let router = router.expect("a router");
    world.sockets.remove(handle);
    world.iface.update_ip_addrs(|addrs| {
        addrs.push(IpCidr::Ipv4(address)).expect("room");
    });
    world
        .iface
        .routes_mut()
        .add_default_ipv4_route(router)
        .expect("room");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = echo_server(listener, 2);
    // To passt the router's address is the host's loopback.
    let handle = world.connect((router, port), 40001);
    world.echo(handle, 4 << 20);
    world.sockets.remove(handle);

    drop(running);
    world.run("gone", |world| !world.backend.link_is_up());
    let _ = std::fs::remove_file(&socket);
    running = passt(dir.path(), &socket).expect("as before");
    world.run("back", |world| world.backend.link_is_up());
    let handle = world.connect((router, port), 40002);
    world.echo(handle, 100_000);
    drop(running);
}

/// QEMU without a machine: what comes from one net device goes to the other.
fn relay(one: &str, two: &str) -> Option<Running> {
    if !exists("qemu-system-x86_64") {
        return None;
    }
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args("-machine none -nodefaults -display none".split(' '))
        .args(["-netdev", &format!("{one},id=one")])
        .args(["-netdev", &format!("{two},id=two")])
        .args(["-netdev", "hubport,id=p1,hubid=1,netdev=one"])
        .args(["-netdev", "hubport,id=p2,hubid=1,netdev=two"]);
    start(&mut command)
}

fn running<B: Backend + 'static>(mut backend: B) -> Box<dyn Backend> {
    backend.set_guest(&Guest {
        running: true,
        ..Guest::NONE
    });
    Box::new(backend)
}

/// Frames of all sizes both ways through the relay.
fn through(relay: &mut Running, ends: &mut [Box<dyn Backend>; 2], longest: usize) {
    let plain = VnetHeader::default();
    let begin = Instant::now();
    // Until both links of QEMU are up, frames are lost. The first way is from the end that QEMU
    // listens for: QEMU 7.2 crashes on a frame for it before it has accepted.
    let hello = [0xee; 60];
    loop {
        let [one, two] = ends;
        one.poll(Instant::now());
        two.poll(Instant::now());
        if two.link_is_up() {
            // As many as there is room for, until QEMU comes to read them.
            send(&mut **two, 0, plain, &hello);
        }
        wait(&**one, Duration::from_millis(20));
        if receive(&mut **one, 70000)
            .iter()
            .any(|got| got.frame == hello)
        {
            break;
        }
        // A connection is over when the last of it was read.
        receive(&mut **two, 70000);
        assert!(begin.elapsed() < PATIENCE, "no way through QEMU");
        let ended = relay.0.try_wait().unwrap();
        assert!(ended.is_none(), "QEMU ended: {ended:?}");
    }
    let sizes = [60, 61, 100, 1514, 4000, 9014, 30000, 60000, 65535];
    for (number, len) in sizes.into_iter().filter(|len| *len <= longest).enumerate() {
        for turn in 0..10 {
            ends.swap(0, 1);
            let [from, to] = ends;
            let value = (number * 10 + turn).to_le_bytes()[0];
            let frame: Vec<u8> = (0..len).map(|i| i.to_le_bytes()[0] ^ value).collect();
            let mut sent = false;
            let mut got = Vec::new();
            while got.is_empty() {
                sent = sent || send(&mut **from, 0, plain, &frame);
                wait(&**to, Duration::from_millis(2));
                from.poll(Instant::now());
                let new = receive(&mut **to, 70000).into_iter();
                got.extend(new.map(|arrived| arrived.frame).filter(|new| *new != hello));
                assert!(begin.elapsed() < PATIENCE, "{len} bytes did not come");
            }
            assert!(got == [frame], "{len} bytes came otherwise");
        }
    }
}

fn free_tcp_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn free_udp_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[test]
fn qemu_s_stream_as_client_and_as_server() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    // The server must be there when QEMU 7.2 comes; the client may come first.
    let server = Stream::open(&StreamConfig::server(StreamAddress::Unix(a.clone()))).unwrap();
    let client = Stream::open(&StreamConfig::client(StreamAddress::Unix(b.clone()))).unwrap();
    let mut ends = [running(server), running(client)];
    let one = format!("stream,server=off,addr.type=unix,addr.path={}", a.display());
    let two = format!("stream,server=on,addr.type=unix,addr.path={}", b.display());
    let Some(mut qemu) = relay(&one, &two) else {
        return;
    };
    through(&mut qemu, &mut ends, 65535);
    // Another QEMU after this one.
    drop(qemu);
    let _ = std::fs::remove_file(&b);
    let mut qemu = relay(&one, &two).expect("as before");
    through(&mut qemu, &mut ends, 65535);
}

#[test]
fn qemu_s_older_socket_device_over_tcp() {
    let server = StreamAddress::Tcp("127.0.0.1".to_owned(), 0);
    let server = Stream::open(&StreamConfig::server(server)).unwrap();
    let port = server.local_addr().unwrap().port();
    let other = free_tcp_port();
    let client = StreamAddress::Tcp("127.0.0.1".to_owned(), other);
    let client = Stream::open(&StreamConfig::client(client)).unwrap();
    let mut ends = [running(server), running(client)];
    let one = format!("socket,connect=127.0.0.1:{port}");
    let two = format!("socket,listen=127.0.0.1:{other}");
    if let Some(mut qemu) = relay(&one, &two) {
        through(&mut qemu, &mut ends, 65535);
    }
}

#[test]
fn qemu_s_datagrams_over_unix_sockets_and_udp() {
    let dir = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
    let unix = Dgram::open(&DgramConfig::Unix {
        local: ours.clone(),
        remote: theirs.clone(),
    });
    let (here, there) = (free_udp_port(), free_udp_port());
    let udp = Dgram::open(&DgramConfig::Udp {
        local: format!("127.0.0.1:{here}").parse().unwrap(),
        remote: format!("127.0.0.1:{there}").parse().unwrap(),
    });
    let mut ends = [running(unix.unwrap()), running(udp.unwrap())];
    let one = format!(
        "dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        theirs.display(),
        ours.display()
    );
    let two = format!(
        "dgram,local.type=inet,local.host=127.0.0.1,local.port={there},remote.type=inet,remote.host=127.0.0.1,remote.port={here}"
    );
    if let Some(mut qemu) = relay(&one, &two) {
        through(&mut qemu, &mut ends, 60000);
    }
}

#[test]
fn qemu_s_multicast_groups() {
    let port = free_udp_port();
    let group = Dgram::open(&DgramConfig::Multicast {
        group: format!("230.0.0.7:{port}").parse().unwrap(),
        interface: Some(Ipv4Addr::LOCALHOST),
    });
    let mut group = running(group.unwrap());
    // QEMU hears its own datagrams in a group: only one of its two ends can be one.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other");
    let other = Stream::open(&StreamConfig::server(StreamAddress::Unix(path.clone()))).unwrap();
    let mut other = running(other);
    let one = format!("socket,mcast=230.0.0.7:{port},localaddr=127.0.0.1");
    let two = format!(
        "stream,server=off,addr.type=unix,addr.path={}",
        path.display()
    );
    let Some(_qemu) = relay(&one, &two) else {
        return;
    };
    let frame = [0x5a; 1514];
    let begin = Instant::now();
    let mut seen = false;
    while !seen {
        other.poll(Instant::now());
        send(&mut *other, 0, VnetHeader::default(), &frame);
        wait(&*group, Duration::from_millis(20));
        let mut got = receive(&mut *group, 70000).into_iter();
        seen = got.any(|got| got.frame == frame);
        assert!(begin.elapsed() < PATIENCE, "nothing came to the group");
    }
    let frame = [0xa5; 900];
    assert!(send(&mut *group, 0, VnetHeader::default(), &frame));
    wire::until(&mut *other, "the frame of the group", |other| {
        let mut got = receive(other, 70000).into_iter();
        got.any(|got| got.frame == frame)
    });
}
