// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A description that `vmsg up` runs: started, talked to, and seen to end without leaving anything behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::dirs;
use crate::guest_files::Variables;
use crate::scene::{Id, Scene, Stream};
use crate::shell::Shell;
use crate::vmsg::Vmsg;

/// Longest time from the start until every part has been started and those that say so are ready.
const READY: Duration = Duration::from_secs(90);
/// Longest time from ^C to the end.
const END: Duration = Duration::from_secs(60);
/// Longest time that something stays that `vmsg up` had started.
const LINGER: Duration = Duration::from_secs(10);
/// Where sockets and logs are, in the run's folder.
const RUNTIMES: &str = "run";
/// A variable that all parts inherit, by which they are found.
const MARK: &str = "VMSG_XTASK_RUN";

/// A running `vmsg up`.
#[derive(Debug)]
pub(crate) struct Up {
    /// Its process.
    pub(crate) id: Id,
    vmsg: Vmsg,
    control: String,
    mark: String,
    /// Goes with this: a short way to the folder of sockets, whose paths are limited.
    _short: tempfile::TempDir,
}

/// The description `name` of `demos/`.
pub(crate) fn demo(name: &str) -> PathBuf {
    dirs::workspace().join(format!("demos/{name}/{name}.toml"))
}

impl Up {
    /// Runs the description `name` of `demos/` as the process `process` of the run, and waits until it is ready.
    pub(crate) fn start(
        scene: &mut Scene,
        process: &str,
        vmsg: &Vmsg,
        name: &str,
        variables: &Variables,
    ) -> Result<Self> {
        Self::start_file(scene, process, vmsg, &demo(name), variables)
    }

    /// The same for any description.
    pub(crate) fn start_file(
        scene: &mut Scene,
        process: &str,
        vmsg: &Vmsg,
        file: &Path,
        variables: &Variables,
    ) -> Result<Self> {
        let runtimes = scene.dir().join(RUNTIMES);
        fs::create_dir_all(&runtimes)?;
        fs::set_permissions(&runtimes, fs::Permissions::from_mode(0o700))?;
        let short = tempfile::tempdir()?;
        let link = short.path().join("r");
        symlink(&runtimes, &link)?;
        let mut command = vmsg.words(["up"]);
        command.arg(file);
        // What the description does not ask for would be refused.
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        for (key, value) in variables {
            if text.contains(&format!("${{{key}}}")) {
                command.arg("--set").arg(format!("{key}={value}"));
            }
        }
        let mark = short.path().display().to_string();
        command.env("XDG_RUNTIME_DIR", &link).env(MARK, &mark);
        let id = scene.start(process, &command)?;
        let control = scene.expect((id, Stream::Out), "its line 'ready'", READY, |line| {
            line.text.strip_prefix("ready control=").map(str::to_owned)
        })?;
        Ok(Self {
            id,
            vmsg: vmsg.clone(),
            control,
            mark,
            _short: short,
        })
    }

    /// `vmsg ctl` with these words, which must do what they say; gives what it prints.
    pub(crate) fn ctl(&self, scene: &Scene, words: &[&str]) -> Result<String> {
        let output = self.vmsg.control(scene.dir(), &self.control, words)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "vmsg ctl {}: {}: {said}{}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said)
    }

    /// The same for what answers with JSON.
    pub(crate) fn ask(&self, scene: &Scene, words: &[&str]) -> Result<Value> {
        let mut words = words.to_vec();
        words.push("--json");
        let said = self.ctl(scene, &words)?;
        serde_json::from_str(&said)
            .with_context(|| format!("vmsg ctl {} is no JSON: {said}", words.join(" ")))
    }

    /// The console of a guest, as `vmsg console` shows it where no terminal is.
    pub(crate) fn console(&self, scene: &mut Scene, guest: &str) -> Result<Shell> {
        let command = self.vmsg.words(["console", &self.control, "attach", guest]);
        let id = scene.start(guest, &command)?;
        Ok(Shell::new(id, guest))
    }

    /// Ends it as ^C does; nothing that it has started may be left.
    pub(crate) fn end(self, scene: &mut Scene) -> Result<()> {
        scene.may_end(self.id);
        scene.signal(self.id, Signal::INT)?;
        let status = scene
            .wait_end(self.id, END)
            .context("vmsg up does not end on ^C")?;
        ensure!(status.success(), "vmsg up ended with {status} after ^C");
        // The device host tells its keeper to end, and does not wait for that.
        self.leaves_nothing()
    }

    /// Kills it, which leaves it no time to end anything: nothing that it has started may stay for long.
    pub(crate) fn kill(self, scene: &mut Scene) -> Result<()> {
        scene.kill(self.id, Signal::KILL)?;
        self.leaves_nothing()
    }

    /// Waits until all processes that it has started are gone.
    fn leaves_nothing(&self) -> Result<()> {
        let deadline = Instant::now() + LINGER;
        loop {
            let left = self.parts()?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "left of vmsg up: {}",
                left.join("; ")
            );
            // Nobody tells of the end of processes that others have started.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The command lines of all processes that it has started, and those have, but for itself.
    fn parts(&self) -> Result<Vec<String>> {
        let mark = format!("{MARK}={}", self.mark);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let path = entry.path();
            // One that ends while it is looked at has no environment any more.
            let Ok(environment) = fs::read(path.join("environ")) else {
                continue;
            };
            if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
                let line = fs::read(path.join("cmdline")).unwrap_or_default();
                let text = String::from_utf8_lossy(&line).replace('\0', " ");
                found.push(format!("{} {text}", entry.file_name().to_string_lossy()));
            }
        }
        Ok(found)
    }

    /// The process id of a part.
    pub(crate) fn pid(&self, scene: &Scene, part: &str) -> Result<u32> {
        let parts = self.ask(scene, &["parts"])?;
        let list = parts
            .as_array()
            .with_context(|| format!("no list of parts: {parts}"))?;
        for entry in list {
            if entry.get("name").and_then(Value::as_str) == Some(part) {
                let pid = entry.get("pid").and_then(Value::as_u64);
                return pid
                    .and_then(|pid| pid.try_into().ok())
                    .with_context(|| format!("{part} does not run: {entry}"));
            }
        }
        bail!("no part {part}: {parts}")
    }
}
