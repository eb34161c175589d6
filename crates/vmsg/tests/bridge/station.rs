// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes of a test: `vmsg serve`, daemons, and what they say.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmsg_bus::DriverBus;
use vmsg_bus::unix::Connector;
use vmsg_driver::{BusClient, DmaPool};
use vmsg_mem::BusAddr;

/// Nothing takes so long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const BASE: BusAddr = BusAddr(0x1_0000_0000);

/// A process that is ended with the test.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("started"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// SIGTERM, and waits until it has ended.
    pub(crate) fn end(&mut self) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Signal::TERM).expect("told");
        assert!(self.0.wait().expect("waited for").success());
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("waited for");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for something that has no event: a socket that another program makes, a line in its log.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory with everything in it.
pub(crate) struct Station {
    pub(crate) dir: tempfile::TempDir,
}

impl Station {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a directory"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts `vmsg serve` with a device on `bus`, and waits until it is ready. What it says is in `serve.log`.
    pub(crate) fn serve_on(&self, bus: &str, device: &str) -> Process {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("serve.log"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(["serve", "--bus", bus, "--device", device])
            .env("VMSG_LOG", "info")
            .stdout(Stdio::piped())
            .stderr(log.expect("a log"))
            .spawn()
            .expect("started");
        let out = child.stdout.take().expect("piped");
        let process = Process(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("ready"), "{line:?}: {}", self.log());
        process
    }

    /// The same on a `unix` bus.
    pub(crate) fn serve(&self, device: &str) -> Process {
        self.serve_on(&format!("unix,path={}", self.path("bus").display()), device)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("serve.log")).unwrap_or_default()
    }

    pub(crate) fn connect(&self) -> DriverBus {
        let connector = Connector::new(self.path("bus"), "test");
        until("a bus", || connector.connect().ok())
    }

    /// A client with `pool` lent.
    pub(crate) fn client(&self, pool: &DmaPool) -> BusClient {
        let mut client = BusClient::on_bus(self.connect());
        client.set_timeout(PATIENCE);
        pool.lend(&mut client, 1).expect("lent");
        client
    }

    /// Starts qemu-storage-daemon with `image` as a disk at the socket `disk`.
    pub(crate) fn storage(&self, image: &Path, more: &str) -> Process {
        let blockdev = format!(
            "driver=file,node-name=f0,filename={},locking=off",
            image.display()
        );
        let socket = self.path("disk");
        let _ = std::fs::remove_file(&socket);
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=f0,writable=on,addr.type=unix,addr.path={}{more}",
            socket.display()
        );
        let process = Process::start(
            Command::new("qemu-storage-daemon")
                .args(["--blockdev", &blockdev, "--export", &export])
                .stdin(Stdio::null()),
        );
        until("the daemon's socket", || socket.exists().then_some(()));
        process
    }

    /// An image of `sectors` sectors.
    pub(crate) fn image(&self, sectors: u64) -> PathBuf {
        let path = self.path("image");
        let file = File::create(&path).expect("an image");
        file.set_len(sectors * 512).expect("long enough");
        path
    }

    pub(crate) fn disk_spec(&self) -> String {
        format!(
            "vhost-user,id=disk,type=blk,socket={}",
            self.path("disk").display()
        )
    }
}

/// Whether a program can be started. Without it a test is left out, unless `VMSG_REQUIRE_TOOLS=1`.
pub(crate) fn has(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&paths).any(|dir| dir.join(program).exists());
    if !there {
        let required = std::env::var_os("VMSG_REQUIRE_TOOLS").is_some_and(|value| value == "1");
        assert!(!required, "{program} is not installed");
        eprintln!("{program} is not installed: not tried");
    }
    there
}
