// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host under attack, and who uses it honestly.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use virtio_msg::DevNum;
use vmsg_bus::unix::Connector;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::rng::RngDriver;
use vmsg_driver::{BusClient, DmaPool, QueueOptions};
use vmsg_mem::BusAddr;

/// The honest driver's entropy device.
pub(crate) const HONEST: DevNum = DevNum(0);
/// An entropy device to be attacked.
pub(crate) const RNG: DevNum = DevNum(1);
/// A network device to be attacked, with a network behind it.
pub(crate) const NET: DevNum = DevNum(2);

/// How long an honest request may take, whatever others do. Generous: the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of log that an attack may cause, and in each second that it takes: a few kinds of them, each at most every two seconds.
const LINES: usize = 60;
const LINES_A_SECOND: u64 = 2;
/// KiB of memory that may stay in use after an attack.
const GROWTH: u64 = 40 << 10;

/// A running `vmsg serve` with one worker, and an honest driver on it.
pub(crate) struct Host {
    child: Child,
    log: Option<JoinHandle<Vec<String>>>,
    folder: TempDir,
    honest: Option<Honest>,
    monitor: BusClient,
    fds: usize,
    memory: u64,
    begin: Instant,
}

impl Host {
    pub(crate) fn start() -> Self {
        Self::start_with("restrict=on")
    }

    /// Started so that the network device has these settings.
    pub(crate) fn start_with(net: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .current_dir(folder.path())
            .args(["serve", "--bus", "unix,path=b0.sock", "--keep", "0"])
            .args(["--control", "ctl.sock"])
            .args(["--device", "rng,num=0", "--device", "rng,num=1"])
            .args(["--device", &format!("net,num=2,{net}")])
            .env_remove("VMSG_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmsg starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let log = std::thread::spawn(move || stderr.lines().map_while(Result::ok).collect());
        let mut ready = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut ready)
            .expect("text");
        assert!(ready.starts_with("ready "), "{ready}");
        let path = folder.path().join("b0.sock");
        let monitor = connect(path.clone(), "monitor");
        let honest = Honest::start(path);
        let mut host = Self {
            child,
            log: Some(log),
            folder,
            honest: Some(honest),
            monitor,
            fds: 0,
            memory: 0,
            begin: Instant::now(),
        };
        host.ping();
        host.fds = host.count_fds();
        host.memory = host.resident();
        host
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("b0.sock")
    }

    /// The control socket.
    pub(crate) fn control(&self) -> PathBuf {
        self.folder.path().join("ctl.sock")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What came before is done, as far as control is concerned.
    pub(crate) fn ping(&mut self) {
        self.monitor.ping(1).expect("an answer");
    }

    pub(crate) fn count_fds(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.pid());
        fs::read_dir(folder).expect("a process").count()
    }

    /// KiB of memory in use.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a process");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a line");
        let number = line.trim().trim_end_matches(" kB");
        number.parse().expect("a number")
    }

    /// Processor time used so far.
    fn processor(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("a process");
        // The fields after the name in parentheses; utime and stime are the 14th and 15th of all.
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("a number"))
            .sum();
        Duration::from_millis(ticks * 10)
    }

    /// Asserts that nothing is done while nobody asks for anything, once what was asked before is done.
    pub(crate) fn assert_idle(&mut self) {
        self.ping();
        let window = Duration::from_millis(200);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let begin = self.processor();
            // Time itself is what is measured here.
            std::thread::sleep(window);
            let used = self.processor() - begin;
            if used <= window / 3 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{used:?} of {window:?} used for nothing, again and again"
            );
        }
    }

    /// Ends the attack: the honest driver had no trouble, and everything is as before.
    pub(crate) fn finish(mut self) {
        let (requests, longest) = self.honest.take().expect("finished once").finish();
        assert!(requests > 0);
        assert!(longest < PATIENCE, "an honest request took {longest:?}");
        use_rng(&self.path(), RNG);
        use_net(&self.path());
        // Those of the honest driver, at least, are free.
        let deadline = Instant::now() + PATIENCE;
        while self.count_fds() >= self.fds {
            self.ping();
            let (have, had) = (self.count_fds(), self.fds);
            assert!(
                Instant::now() < deadline,
                "{have} descriptors, before {had}"
            );
        }
        let memory = self.resident();
        assert!(
            memory < self.memory + GROWTH,
            "{memory} KiB in use, before {}",
            self.memory
        );
        self.assert_idle();
        assert!(self.child.try_wait().expect("a child").is_none());
        let killed = Command::new("kill")
            .args(["-TERM", &self.pid().to_string()])
            .status()
            .expect("kill runs");
        assert!(killed.success());
        let log = self.log.take().expect("taken once");
        let log = log.join().expect("a log");
        let status = self.child.wait().expect("a child");
        assert!(status.success(), "{status}: {log:#?}");
        let lines = LINES_A_SECOND * self.begin.elapsed().as_secs();
        let lines = LINES + usize::try_from(lines).expect("not for ever");
        assert!(log.len() < lines, "{} lines: {log:#?}", log.len());
        for line in &log {
            assert!(!line.contains("panicked"), "{line}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            if let Some(Ok(log)) = self.log.take().map(JoinHandle::join) {
                let end = log.len().min(40);
                eprintln!("log of the host, {} lines: {:#?}", log.len(), &log[..end]);
            }
        } else if self.honest.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            panic!("the attack was not finished");
        }
    }
}

/// A patient client.
pub(crate) fn connect(path: PathBuf, name: &str) -> BusClient {
    let bus = Connector::new(path, name).connect().expect("a connection");
    let mut client = BusClient::on_bus(bus);
    client.set_timeout(PATIENCE);
    client
}

fn pool(client: &mut BusClient) -> DmaPool {
    let pool = DmaPool::new("honest", BusAddr(0x1000_0000), 2 << 20).expect("memory");
    pool.lend(client, 1).expect("lent");
    pool
}

/// Shows that an entropy device works.
pub(crate) fn use_rng(path: &std::path::Path, device: DevNum) {
    let mut client = connect(path.to_owned(), "next");
    let pool = pool(&mut client);
    client.claim(device).expect("a free device");
    let mut rng =
        RngDriver::new(client, device, &pool, &QueueOptions::default()).expect("a device");
    let mut bytes = [0; 10_000];
    rng.fill(&mut bytes, PATIENCE).expect("random bytes");
    assert!(bytes.iter().any(|byte| *byte != 0));
}

/// Shows that the network device works: it answers who asks for the gateway.
pub(crate) fn use_net(path: &std::path::Path) {
    let mut client = connect(path.to_owned(), "next");
    let pool = pool(&mut client);
    client.claim(NET).expect("a free device");
    let options = NetOptions {
        queue: QueueOptions {
            size: 64,
            ..QueueOptions::default()
        },
        ..NetOptions::default()
    };
    let mut net = NetDriver::new(client, NET, &pool, &options).expect("a device");
    assert_eq!(net.transmit([arp_request().as_slice()]).expect("sent"), 1);
    let deadline = Instant::now() + PATIENCE;
    let mut answered = false;
    while !answered {
        assert!(Instant::now() < deadline, "no answer");
        net.wait(PATIENCE).expect("a device");
        net.receive(64, |frame| {
            let mut bytes = [0; 22];
            frame.copy_to(&mut bytes);
            // An ARP answer.
            answered |= bytes[12..14] == [8, 6] && bytes[20..22] == [0, 2];
        })
        .expect("a device");
    }
}

/// Who has 10.0.2.2? Tell 10.0.2.15.
pub(crate) fn arp_request() -> Vec<u8> {
    let mac = [0x52, 0x54, 0, 9, 9, 9];
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend([10, 0, 2, 15]);
    frame.extend([0; 6]);
    frame.extend([10, 0, 2, 2]);
    frame.resize(60, 0);
    frame
}

/// A driver that keeps using its device.
struct Honest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Honest {
    fn start(path: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let (ready, wait) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut client = connect(path, "honest");
            let pool = pool(&mut client);
            let options = QueueOptions::default();
            let mut rng = RngDriver::new(client, HONEST, &pool, &options).expect("a device");
            let mut longest = Duration::ZERO;
            let mut requests = 0;
            let mut bytes = [0; 64];
            loop {
                // The last request comes after the attack.
                let last = until.load(Ordering::Acquire);
                let begin = Instant::now();
                rng.fill(&mut bytes, PATIENCE).expect("random bytes");
                rng.client().ping(requests).expect("an answer");
                longest = longest.max(begin.elapsed());
                requests = requests.wrapping_add(1);
                let _ = ready.send(());
                if last {
                    return (u64::from(requests), longest);
                }
                // Honest drivers leave some of the processor to others.
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        wait.recv().expect("an honest driver");
        Self { stop, thread }
    }

    fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("an honest driver")
    }
}

/// Waits until `fd` is readable; false if that takes too long.
pub(crate) fn readable(fd: impl AsFd, patience: Duration) -> bool {
    let timeout = rustix::event::Timespec {
        tv_sec: patience.as_secs().try_into().expect("seconds"),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut fds = [rustix::event::PollFd::new(
        &fd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, Some(&timeout)).expect("poll") > 0
}
