// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network namespace for a run, so that interfaces and addresses of a test are nobody else's.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::scene::{Scene, Stream};

/// A network namespace; it lasts as long as the process that was started in it.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    holder: u32,
    /// Not being root, it belongs to a user namespace of its own.
    user: bool,
}

impl Namespace {
    /// Makes one in `scene`, with its loopback up; `script` is run in it by the shell.
    ///
    /// # Errors
    /// The system does not let us, or the script fails.
    pub(crate) fn new(scene: &mut Scene, script: &str) -> Result<Self> {
        let user = !rustix::process::geteuid().is_root();
        let mut command = Command::new("unshare");
        command.arg("--net");
        if user {
            command.arg("--map-root-user");
        }
        // It ends with its standard input, at the latest with this program.
        command.args([
            "sh",
            "-ec",
            &format!("ip link set lo up\n{script}\necho made\nexec cat"),
        ]);
        let id = scene.start("namespace", &command)?;
        scene
            .expect(
                (id, Stream::Out),
                "the network namespace",
                crate::e2e::STEP,
                |line| (line.text == "made").then_some(()),
            )
            .context("cannot make a network namespace with a tap interface")?;
        // `sh` has become `cat` under the same number; `unshare` has become `sh`.
        let this = Self {
            holder: scene.pid(id),
            user,
        };
        let status = this.enter(&Command::new("true")).status()?;
        ensure!(status.success(), "cannot enter the network namespace");
        Ok(this)
    }

    /// The same command inside.
    pub(crate) fn enter(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        if self.user {
            inside.args(["--preserve-credentials", "--user"]);
        }
        inside
            .args(["--net", "-t", &self.holder.to_string()])
            .arg(command.get_program())
            .args(command.get_args());
        inside
    }
}
