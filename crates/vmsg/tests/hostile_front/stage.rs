// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host and the proxy under attack, and a guest that uses the latter honestly.

use crate::vmm::{GUEST, LONGEST, RAM, Ram, Vmm, descriptor, rings};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Lines of log that an attack may cause: some twenty about each front, and what a start has to say.
const LINES: usize = 160;
/// And in each second that it takes: of each kind about each front one in two seconds.
const LINES_A_SECOND: u64 = 4;
/// KiB of memory that may stay in use after an attack.
const GROWTH: u64 = 40 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// Front of an entropy device whose guest's memory is lent.
pub(crate) const LENT: &str = "lent";
/// The same with copies.
pub(crate) const ISOLATED: &str = "isolated";
/// Of a network device whose guest's memory is lent.
pub(crate) const NET: &str = "net";
const HONEST: &str = "honest";

/// A process under attack.
struct Process {
    child: Child,
    log: Option<JoinHandle<Vec<String>>>,
    before: Use,
    begin: Instant,
}

/// What a process uses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Use {
    pub(crate) fds: usize,
    pub(crate) threads: usize,
    /// KiB.
    pub(crate) memory: u64,
    pub(crate) mappings: usize,
}

impl Process {
    fn start(folder: &TempDir, args: &[&str], ready: usize) -> Process {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .current_dir(folder.path())
            .args(args)
            .env_remove("VMSG_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = std::thread::spawn(move || stderr.lines().map_while(Result::ok).collect());
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        for _ in 0..ready {
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            assert!(line.starts_with("ready"), "{line}");
        }
        Process {
            child,
            log: Some(log),
            before: Use::default(),
            begin: Instant::now(),
        }
    }

    fn usage(&self) -> Use {
        let count = |what| {
            let folder = format!("/proc/{}/{what}", self.child.id());
            fs::read_dir(folder).unwrap().count()
        };
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        // What is of files goes with them.
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let memory = line
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        Use {
            fds: count("fd"),
            threads: count("task"),
            memory,
            mappings: maps.lines().count(),
        }
    }

    fn processor(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The fields after the name in parentheses; utime and stime are the 14th and 15th of all.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Until it uses no more than before, and nothing of the processor.
    fn assert_calm(&self, name: &str) {
        let end = Instant::now() + PATIENCE;
        let window = Duration::from_millis(150);
        loop {
            let begin = self.processor();
            // Time itself is what is measured here.
            std::thread::sleep(window);
            let used = self.processor() - begin;
            let now = self.usage();
            let calm = used <= window / 3
                && now.fds <= self.before.fds
                && now.threads <= self.before.threads
                && now.mappings <= self.before.mappings + 40
                && now.memory <= self.before.memory + GROWTH;
            if calm {
                return;
            }
            assert!(
                Instant::now() < end,
                "{name}: {used:?} of {window:?}, {now:?}, before {:?}",
                self.before
            );
        }
    }

    fn finish(&mut self, name: &str) {
        assert!(self.child.try_wait().unwrap().is_none(), "{name} is gone");
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begin = Instant::now();
        let status = self.child.wait().unwrap();
        assert!(begin.elapsed() < PATIENCE, "{name} took its time to end");
        let log = self.log.take().unwrap().join().unwrap();
        assert!(status.success(), "{name}: {status}: {log:#?}");
        for line in &log {
            assert!(
                !line.contains("panic") && !line.contains("mistake"),
                "{name}: {line}"
            );
        }
        let lines = LINES_A_SECOND * self.begin.elapsed().as_secs();
        let lines = LINES + lines as usize;
        assert!(log.len() < lines, "{name}: {} lines: {log:#?}", log.len());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking()
            && let Some(Ok(log)) = self.log.take().map(JoinHandle::join)
        {
            let end = log.len().min(60);
            eprintln!("{} lines: {:#?}", log.len(), &log[..end]);
        }
    }
}

pub(crate) struct Stage {
    honest: Option<Honest>,
    proxy: Process,
    host: Process,
    folder: TempDir,
}

impl Stage {
    pub(crate) fn start() -> Stage {
        let folder = TempDir::new().unwrap();
        let serve = ["serve", "--bus", "unix,path=b.sock", "--keep", "0"];
        let mut args = serve.to_vec();
        for device in [
            "rng,num=0",
            "rng,num=1",
            "rng,num=2",
            "net,num=3,restrict=on",
        ] {
            args.extend(["--device", device]);
        }
        let host = Process::start(&folder, &args, 1);
        let mut args = vec!["proxy", "--bus", "unix,path=b.sock"];
        for front in [
            "vfio-user,socket=honest,dev=0",
            "vfio-user,socket=lent,dev=1",
            "vfio-user,socket=isolated,dev=2,isolate=on,segment=8M",
            "vfio-user,socket=net,dev=3",
        ] {
            args.extend(["--front", front]);
        }
        let proxy = Process::start(&folder, &args, 4);
        let mut stage = Stage {
            honest: None,
            proxy,
            host,
            folder,
        };
        // What is made once is there.
        for front in [LENT, ISOLATED, NET] {
            stage.use_front(front);
        }
        stage.honest = Some(Honest::start(stage.socket(HONEST)));
        stage.proxy.before = stage.proxy.usage();
        stage.host.before = stage.host.usage();
        stage
    }

    pub(crate) fn socket(&self, front: &str) -> PathBuf {
        self.folder.path().join(front)
    }

    /// What the proxy uses now.
    pub(crate) fn proxy(&self) -> Use {
        self.proxy.usage()
    }

    /// What the device host uses now.
    pub(crate) fn host(&self) -> Use {
        self.host.usage()
    }

    pub(crate) fn before(&self) -> Use {
        self.proxy.before
    }

    /// Shows that a device works.
    pub(crate) fn use_front(&self, front: &str) {
        let mut guest = Guest::new(&self.socket(front));
        if front != NET {
            for _ in 0..5 {
                guest.request();
            }
        }
    }

    /// Ends the attack: the honest guest had no trouble, and everything is as before.
    pub(crate) fn finish(mut self) {
        let (requests, longest) = self.honest.as_ref().unwrap().so_far();
        for front in [LENT, ISOLATED, NET] {
            self.use_front(front);
        }
        self.honest
            .as_ref()
            .unwrap()
            .pause
            .store(true, Ordering::Relaxed);
        self.proxy.assert_calm("proxy");
        self.host.assert_calm("host");
        let longest = longest.max(self.honest.take().unwrap().finish());
        assert!(requests > 0);
        assert!(longest < LONGEST, "an honest access took {longest:?}");
        eprintln!("honest: {requests} requests, longest access {longest:?}");
        self.proxy.finish("proxy");
        self.host.finish("host");
    }
}

/// A guest that keeps to the rules.
pub(crate) struct Guest {
    vmm: Vmm,
    ram: Ram,
    next: u16,
}

impl Guest {
    fn new(socket: &std::path::Path) -> Guest {
        let mut vmm = Vmm::new(socket);
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        vmm.start(0, 16, GUEST);
        assert_eq!(vmm.status(), 0xf);
        Guest { vmm, ram, next: 0 }
    }

    /// 32 random bytes, awaited by looking.
    fn request(&mut self) -> Duration {
        let slot = usize::from(self.next % 16);
        let at = 0x1_0000;
        self.ram.write(at, &[0; 32]);
        let request = descriptor(GUEST + at as u64, 32, 2, 0);
        self.ram.write(0, &request);
        let [_, driver, device] = rings(0).map(|at| at as usize);
        self.ram.write(driver + 4 + 2 * slot, &0u16.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.ram.write(driver + 2, &self.next.to_le_bytes());
        self.vmm.kick(0);
        let begin = Instant::now();
        while self.ram.read(device + 2, 2) != self.next.to_le_bytes() {
            assert!(begin.elapsed() < PATIENCE, "no answer");
            std::thread::sleep(Duration::from_micros(200));
        }
        assert_ne!(self.ram.read(at, 32), [0; 32]);
        assert_eq!(self.vmm.status(), 0xf);
        self.vmm.longest
    }
}

struct Honest {
    stop: Arc<AtomicBool>,
    pause: Arc<AtomicBool>,
    so_far: Arc<std::sync::Mutex<(u64, Duration)>>,
    thread: JoinHandle<Duration>,
}

impl Honest {
    fn start(socket: PathBuf) -> Honest {
        let stop = Arc::new(AtomicBool::new(false));
        let pause = Arc::new(AtomicBool::new(false));
        let so_far: Arc<std::sync::Mutex<(u64, Duration)>> = Arc::default();
        let (until, pauses, tell) = (stop.clone(), pause.clone(), so_far.clone());
        let (ready, wait) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut guest = Guest::new(&socket);
            guest.request();
            ready.send(()).unwrap();
            loop {
                // The last request comes after the attack.
                let last = until.load(Ordering::Acquire);
                if last || !pauses.load(Ordering::Relaxed) {
                    let longest = guest.request();
                    let mut so_far = tell.lock().unwrap();
                    so_far.0 += 1;
                    so_far.1 = longest;
                }
                if last {
                    return guest.vmm.longest;
                }
                // Honest guests leave some of the processor to others.
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        wait.recv().unwrap();
        Honest {
            stop,
            pause,
            so_far,
            thread,
        }
    }

    fn so_far(&self) -> (u64, Duration) {
        *self.so_far.lock().unwrap()
    }

    fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}
