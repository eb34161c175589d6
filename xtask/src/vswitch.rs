// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Demo vswitch: three stock guests, each behind a bus of its own, on one switch.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::demo::{self, tell};
use crate::dirs;
use crate::kit::{self, Kit};
use crate::lan::{self, Pings};
use crate::machine::Machine;
use crate::scene::Scene;
use crate::stream;

/// How often one guest pings another to measure, and the seconds between.
const PINGS: u32 = 100;
const PAUSE: &str = "0.1";
/// The guests' file system, relative to the run's folder.
const INITRD: &str = "guest.initrd";

/// Options of `demo vswitch`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Machine type of the guests
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    /// Leave out the same pings over QEMU's own `-netdev stream`
    #[arg(long)]
    switch_only: bool,
    /// Keep logs and captures in this folder, new or empty [default: a new one under target/xtask]
    #[arg(long, value_name = "DIR")]
    keep_dir: Option<PathBuf>,
    #[command(flatten)]
    kit: kit::Options,
}

/// Runs the demo; prints `TEST PASSED` or `TEST FAILED` as last line and gives whether it passed.
pub(crate) fn run(options: &Options) -> bool {
    demo::told(play(options))
}

fn play(options: &Options) -> Result<String> {
    let mut kits = kit::gather(&[options.machine], &options.kit)?;
    let kit = kits.pop().expect("one kit for one machine");
    let name = format!("demo-vswitch-{}", options.machine.name());
    let dir = dirs::run_folder(&name, options.keep_dir.as_deref())?;
    println!("logs: {}", dir.display());
    let mut scene = Scene::new(dir);
    fs::write(scene.dir().join(INITRD), lan::initrd(&kit, true)?)
        .context("cannot write the guests' initrd")?;
    let (pings, seconds) = baseline(&mut scene, &kit)?;
    Ok(format!("{pings} {seconds:.1}"))
}

/// What the guests see over QEMU's own network: round trips, and the seconds of a transfer.
fn baseline(scene: &mut Scene, kit: &Kit) -> Result<(Pings, f64)> {
    let mut hosts = stream::pair(scene, kit, INITRD)?;
    tell(scene, "two guests run, joined by QEMU's own -netdev stream");
    lan::reach(scene, &mut hosts, |_, _| true)?;
    let [a, b] = &mut hosts;
    let pings = a.ping(scene, b.address, PINGS, PAUSE)?;
    tell(scene, &format!("over QEMU's stream: {pings}"));
    let (_, seconds) = lan::transfer(scene, a, b)?;
    stream::end(scene, hosts)?;
    Ok((pings, seconds))
}
