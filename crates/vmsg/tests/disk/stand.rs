// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host with disks, and what drives them.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use virtio_msg::DevNum;
use vmsg_bus::BusSpec;
use vmsg_driver::blk::{BlkDriver, BlkOptions};
use vmsg_driver::{BusClient, DmaPool, Sleep};
use vmsg_mem::BusAddr;

/// Nothing takes so long unless it hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// A driver on a bus of this workspace.
pub(super) type Driver<'p> = BlkDriver<'p, vmsg_bus::DriverBus, Sleep, Vec<u8>>;

/// A folder with a bus and a control socket in it.
pub(super) struct Stand {
    dir: tempfile::TempDir,
}

impl Stand {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self { dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of `size` bytes, all zero.
    pub(super) fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("created");
        file.set_len(size).expect("sized");
        path
    }

    fn command(&self, devices: &[String]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        let bus = format!("unix,path={}", self.path("bus").display());
        command.args(["serve", "--bus", &bus]);
        command.arg("--control").arg(self.path("ctl"));
        for device in devices {
            command.args(["--device", device]);
        }
        command
    }

    /// Starts `vmsg serve`; it has said that it is ready.
    pub(super) fn serve(&self, devices: &[String]) -> Host {
        Host::start(self.command(devices).env("VMSG_LOG", "error"))
    }

    /// The same, by a shell that does `before` at first.
    pub(super) fn serve_after(&self, before: &str, devices: &[String]) -> Host {
        let inner = self.command(devices);
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(format!("{before}; exec \"$@\""))
            .arg("sh");
        shell.arg(inner.get_program()).args(inner.get_args());
        Host::start(shell.stderr(Stdio::piped()))
    }

    /// Starts one that must not come up: its exit code and what it says.
    pub(super) fn refused(&self, devices: &[String]) -> (i32, String) {
        let mut command = self.command(devices);
        command.env("VMSG_LOG", "info").stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("started");
        let end = Instant::now() + PATIENCE;
        while child.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < end, "it runs");
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output().expect("ended");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().expect("no signal"), text)
    }

    pub(super) fn ctl(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command.arg("ctl").arg(self.path("ctl")).args(args);
        command.output().expect("run")
    }

    /// The counters of a device.
    pub(super) fn counter(&self, device: &str, name: &str) -> u64 {
        let output = self.ctl(&["list", "--json"]);
        let list: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let devices = list.as_array().expect("a list");
        let found = devices.iter().find(|known| known["id"] == device);
        let counters = &found.expect("there")["counters"];
        counters[name].as_u64().expect("a counter")
    }

    /// A connection, or none if nobody is there.
    pub(super) fn try_connect(&self) -> Option<BusClient> {
        let bus: BusSpec = format!("unix,path={}", self.path("bus").display())
            .parse()
            .expect("a bus");
        let connector = bus.connector("test").timeout(PATIENCE);
        let mut client = BusClient::on_bus(connector.connect().ok()?);
        client.set_timeout(PATIENCE);
        Some(client)
    }

    pub(super) fn driver<'p>(&self, number: u16, pool: &'p DmaPool) -> Driver<'p> {
        self.driver_with(number, pool, &BlkOptions::default())
    }

    pub(super) fn driver_with<'p>(
        &self,
        number: u16,
        pool: &'p DmaPool,
        options: &BlkOptions,
    ) -> Driver<'p> {
        let mut client = self.try_connect().expect("it listens");
        pool.lend(&mut client, 1).expect("lent");
        BlkDriver::new(client, DevNum(number), pool, options).expect("a disk")
    }
}

pub(super) fn pool() -> DmaPool {
    DmaPool::new("test", BusAddr(0x1_0000_0000), 8 << 20).expect("memory")
}

/// A running `vmsg serve`; it is killed at the end.
pub(super) struct Host {
    child: Child,
}

impl Host {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("started");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("ready"), "{line:?}");
        Self { child }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL; gives what it has said on stderr, if that is a pipe.
    pub(super) fn kill(mut self) -> String {
        self.end()
    }

    fn end(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

/// What is said of a program that is not installed: its test is left out, unless `VMSG_REQUIRE_TOOLS=1`.
fn leave_out(program: &str) {
    let required = std::env::var_os("VMSG_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "{program} is not there");
    eprintln!("{program} is not there: left out");
}

/// Runs a program of QEMU's; `None` if it is not installed.
pub(super) fn tool(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            leave_out(program);
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A program that is killed at the end.
pub(super) struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An NBD server for a raw image; `None` if there is no qemu-nbd.
pub(super) fn nbd_server(image: &Path, socket: &Path) -> Option<Program> {
    let _ = std::fs::remove_file(socket);
    // Several clients: the connection of one that was killed may not be over when the next one comes.
    let options = [
        "-t",
        "-e",
        "8",
        "-f",
        "raw",
        "-k",
        text(socket),
        text(image),
    ];
    let mut command = Command::new("qemu-nbd");
    let server = command.args(options).stderr(Stdio::null()).spawn();
    let server = match server {
        Ok(server) => Program(server),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            leave_out("qemu-nbd");
            return None;
        }
        Err(error) => panic!("qemu-nbd: {error}"),
    };
    let end = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < end, "it does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    Some(server)
}
