// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_net::Null;

use super::super::protocol::{Device, Failure};
use super::*;

/// A host with two buses and a control socket.
struct Bench {
    folder: tempfile::TempDir,
    server: Option<Server>,
    stop: Stop,
    host: Option<JoinHandle<()>>,
}

impl Bench {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut host = Host::new(1).expect("a host");
        let net = |pairs| {
            let settings = Settings {
                queue_pairs: pairs,
                ..Settings::new(Mac([2, 0, 0, 0, 0, 1]))
            };
            Box::new(Net::new(&settings, Box::new(Null::default())))
        };
        for _ in 0..2 {
            let bus = host.add_bus(64, None).expect("a bus");
            let net = net(2);
            host.add_device(bus, "net0", None, None, net)
                .expect("a device");
        }
        host.add_device(0, "rng0", None, None, Box::new(Rng::new()))
            .expect("a device");
        host.add_device(1, "net1", Some(7), None, net(1))
            .expect("a device");
        let path = folder.path().join("ctl");
        let service = crate::serve::service_of(host.handle(), &["b0", "b1"]);
        let server = Server::start(&path, service).expect("a server");
        let stop = host.stop_handle();
        let host = std::thread::spawn(move || host.run().expect("epoll works"));
        Self {
            folder,
            server: Some(server),
            stop,
            host: Some(host),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("ctl")
    }

    fn connect(&self) -> Peer {
        let stream = UnixStream::connect(self.path()).expect("a server");
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a timeout");
        Peer(BufReader::new(stream))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server = None;
        self.stop.stop();
        if let Some(host) = self.host.take() {
            host.join().expect("the host ends well");
        }
    }
}

struct Peer(BufReader<UnixStream>);

impl Peer {
    fn send(&mut self, line: &[u8]) {
        self.0.get_mut().write_all(line).expect("sent");
    }

    fn answer(&mut self) -> Response {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    }

    fn ask(&mut self, line: &str) -> Response {
        self.send(format!("{line}\n").as_bytes());
        self.answer()
    }

    fn failure(&mut self, line: &str) -> Failure {
        match self.ask(line) {
            Response::Error(failure) => failure,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn devices(&mut self) -> Vec<Device> {
        match self.ask(r#"{"command":"list"}"#) {
            Response::Devices(devices) => devices,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn devices_are_listed_with_their_counters() {
    let bench = Bench::start();
    let mode = std::fs::metadata(bench.path())
        .expect("a socket")
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let devices = bench.connect().devices();
    let names: Vec<(&str, &str, u16, usize)> = devices
        .iter()
        .map(|device| {
            let pairs = device.pairs.len();
            (
                device.bus.as_str(),
                device.id.as_str(),
                device.number,
                pairs,
            )
        })
        .collect();
    assert_eq!(
        names,
        [
            ("b0", "net0", 0, 2),
            ("b0", "rng0", 1, 0),
            ("b1", "net0", 0, 2),
            ("b1", "net1", 7, 1)
        ]
    );
    assert_eq!(devices[0].pairs[1]["rx_frames"], 0);
    assert_eq!(devices[0].counters["link_changes"], 0);
    assert_eq!(devices[0].kind, "net");
    assert_eq!(devices[1].link, None);
}

#[test]
fn a_link_goes_down_and_up() {
    let bench = Bench::start();
    let mut peer = bench.connect();
    let link = |peer: &mut Peer| peer.devices()[3].link.expect("a link").up;
    assert!(link(&mut peer));
    let down = r#"{"command":"link","device":"net1","state":"down"}"#;
    assert_eq!(peer.ask(down), Response::Done {});
    assert!(!link(&mut peer));
    assert_eq!(peer.devices()[3].counters["link_changes"], 1);
    let up = r#"{"command":"link","device":"net1","bus":"b1","state":"up"}"#;
    assert_eq!(peer.ask(up), Response::Done {});
    assert!(link(&mut peer));
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let bench = Bench::start();
    let mut peer = bench.connect();
    for (line, kind, words) in [
        (
            r#"{"command":"link","device":"net9","state":"up"}"#,
            FailureKind::NotFound,
            "net9",
        ),
        (
            r#"{"command":"link","device":"net0","state":"up"}"#,
            FailureKind::NotFound,
            "more than one bus",
        ),
        (
            r#"{"command":"link","device":"net0","bus":"b7","state":"up"}"#,
            FailureKind::NotFound,
            "`b0`, `b1`",
        ),
        (
            r#"{"command":"link","device":"rng0","state":"up"}"#,
            FailureKind::Refused,
            "has no link",
        ),
        (
            r#"{"command":"announce","device":"net1"}"#,
            FailureKind::Refused,
            "no driver",
        ),
        (r#"{"command":"stop"}"#, FailureKind::BadRequest, "announce"),
        ("\u{0}\u{1}", FailureKind::BadRequest, ""),
    ] {
        let failure = peer.failure(line);
        assert_eq!(failure.kind, kind, "{line}");
        assert!(failure.message.contains(words), "{}", failure.message);
    }
    assert_eq!(peer.devices().len(), 4, "the connection still works");
}

#[test]
fn a_line_that_is_too_long_is_one_error_and_those_behind_it_are_read() {
    let bench = Bench::start();
    let mut peer = bench.connect();
    for len in [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 5 * MAX_LINE] {
        let mut line = vec![b'x'; len];
        line.extend(b"\n\n  \n{\"command\":\"list\"}\n");
        peer.send(&line);
        assert!(matches!(peer.answer(), Response::Error(_)), "{len}");
        assert!(matches!(peer.answer(), Response::Devices(_)), "{len}");
    }
}

#[test]
fn requests_may_come_in_pieces_and_together() {
    let bench = Bench::start();
    let mut peer = bench.connect();
    for byte in b"{\"command\":\"list\"}\n" {
        peer.send(&[*byte]);
    }
    assert!(matches!(peer.answer(), Response::Devices(_)));
    peer.send(&b"{\"command\":\"list\"}\nnothing\n".repeat(20));
    for _ in 0..20 {
        assert!(matches!(peer.answer(), Response::Devices(_)));
        assert!(matches!(peer.answer(), Response::Error(_)));
    }
}

#[test]
fn clients_that_do_nothing_are_bounded_and_do_not_stop_others() {
    let bench = Bench::start();
    // One asks and never reads.
    let mut greedy = bench.connect();
    greedy.0.get_mut().set_nonblocking(true).expect("a flag");
    while greedy
        .0
        .get_mut()
        .write(b"{\"command\":\"list\"}\n")
        .is_ok()
    {}
    let idle: Vec<Peer> = (0..MAX_CLIENTS - 2).map(|_| bench.connect()).collect();
    let mut last = bench.connect();
    assert_eq!(last.devices().len(), 4);
    let mut refused = bench.connect();
    assert!(matches!(
        refused.answer(),
        Response::Error(Failure {
            kind: FailureKind::Busy,
            ..
        })
    ));
    drop(idle);
    // Those that have gone make room, once the server has seen it.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let mut next = bench.connect();
        // Who is refused may be cut off before it has asked.
        let _ = next.0.get_mut().write_all(b"{\"command\":\"list\"}\n");
        let mut line = String::new();
        let _ = next.0.read_line(&mut line);
        match serde_json::from_str(&line) {
            Ok(Response::Devices(devices)) => {
                assert_eq!(devices.len(), 4);
                break;
            }
            other => assert!(Instant::now() < end, "{other:?}"),
        }
    }
    assert_eq!(last.devices().len(), 4);
}

#[test]
fn a_socket_that_nobody_serves_is_replaced_and_one_that_is_served_is_not() {
    let bench = Bench::start();
    let path = bench.path();
    let error = listen(&path).expect_err("it is served");
    assert!(format!("{error:#}").contains("is in use by"), "{error:#}");
    let left = bench.folder.path().join("left");
    drop(UnixListener::bind(&left).expect("a socket"));
    listen(&left).expect("nobody is there");
    let file = bench.folder.path().join("file");
    std::fs::write(&file, "precious").expect("a file");
    listen(&file).expect_err("no socket");
    assert_eq!(std::fs::read_to_string(&file).expect("a file"), "precious");
    // Where somebody listens who takes no connections.
    let busy = bench.folder.path().join("busy");
    let stranger = UnixListener::bind(&busy).expect("a socket");
    rustix::net::listen(&stranger, 0).expect("it listens");
    let _waiting = UnixStream::connect(&busy).expect("room for one");
    let error = listen(&busy).expect_err("it is served");
    assert!(format!("{error:#}").contains("is in use by"), "{error:#}");
    drop(bench);
    assert!(!path.exists(), "the socket goes with the server");
}

#[test]
fn what_somebody_has_put_in_the_place_of_the_socket_stays() {
    let mut bench = Bench::start();
    let path = bench.path();
    std::fs::remove_file(&path).expect("it is there");
    std::fs::write(&path, "precious").expect("a file");
    bench.server = None;
    assert_eq!(std::fs::read_to_string(&path).expect("a file"), "precious");
}

#[test]
fn a_client_that_asks_for_much_and_reads_late_gets_all_of_it() {
    let bench = Bench::start();
    let mut peer = bench.connect();
    let stream = peer.0.get_ref().try_clone().expect("a descriptor");
    let asking = std::thread::spawn(move || {
        let lines = b"{\"command\":\"list\"}\n".repeat(1000);
        (&stream).write_all(&lines).expect("read in the end");
        stream.shutdown(std::net::Shutdown::Write).expect("open");
    });
    // Others are served meanwhile.
    bench.connect().devices();
    for _ in 0..1000 {
        assert!(matches!(peer.answer(), Response::Devices(list) if list.len() == 4));
    }
    asking.join().expect("no panic");
    let mut rest = String::new();
    assert_eq!(peer.0.read_line(&mut rest).expect("the end"), 0, "{rest}");
}

/// Takes long for one request, and no time for others.
struct Slow {
    begun: std::sync::Barrier,
    go_on: std::sync::Barrier,
}

impl Service for Slow {
    fn carry_out(&self, request: Request) -> Response {
        if matches!(request, Request::Switches {}) {
            self.begun.wait();
            self.go_on.wait();
        }
        Response::Done {}
    }
}

#[test]
fn what_takes_long_for_one_client_is_not_waited_for_by_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ctl");
    let service = Arc::new(Slow {
        begun: std::sync::Barrier::new(2),
        go_on: std::sync::Barrier::new(2),
    });
    let shared: Arc<dyn Service> = Arc::<Slow>::clone(&service);
    let server = Server::start(&path, shared).expect("a server");
    let connect = || {
        Peer(BufReader::new(
            UnixStream::connect(&path).expect("a server"),
        ))
    };
    let mut slow = connect();
    slow.send(b"{\"command\":\"switches\"}\n{\"command\":\"list\"}\n");
    service.begun.wait();
    for _ in 0..3 {
        assert_eq!(connect().ask(r#"{"command":"list"}"#), Response::Done {});
    }
    service.go_on.wait();
    assert_eq!(slow.answer(), Response::Done {});
    assert_eq!(slow.answer(), Response::Done {});
    drop(server);
    assert!(!path.exists());
}
