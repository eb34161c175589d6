// SPDX-License-Identifier: Apache-2.0 OR MIT
use crate::{
    cross, demo, dirs,
    http::{FILE_SIZE, Server},
    inner, kit,
    machine::Machine,
    outer::{self, Outer},
    scene::Scene,
};
use anyhow::Result;
use std::time::Duration;
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    #[command(flatten)]
    kit: kit::Options,
}
pub(crate) fn run(options: &Options) -> bool {
    match play(options) {
        Ok(()) => {
            println!("TEST PASSED");
            true
        }
        Err(e) => {
            println!("{e:#}");
            false
        }
    }
}
fn play(options: &Options) -> Result<()> {
    let kit = outer::kit(options.machine, &options.kit)?;
    let vmsg = match std::env::var_os("VMSG_TRY") {
        Some(p) => p.into(),
        None => cross::vmsg(options.machine)?,
    };
    let dir = dirs::run_folder("demo-2b", None)?;
    println!("logs: {}", dir.display());
    let mut scene = Scene::new(dir);
    let server = Server::start(FILE_SIZE)?;
    let settings = demo::settings(&server, 10);
    let inside = inner::Inside::new(&kit, demo::SCRIPT, &settings)?;
    let mut a = Outer::start(
        &mut scene,
        "a",
        &kit,
        &vmsg,
        &outer::Options {
            ram_mib: 768,
            inside: Some(inside),
            ..Default::default()
        },
    )?;
    println!("{:?} started", scene.now());
    let v = a.booted(&mut scene)?;
    println!("{:?} booted {v}", scene.now());
    for l in a.run(&mut scene, "uname -a; free -m; vmsg --version; ls /dev/kvm")? {
        println!("  {l}");
    }
    let mut inner = a.spawn(
        &mut scene,
        "inner",
        &inner::command(options.machine, &inner::Hardware::new(None, None)),
    )?;
    for m in [
        "booted", "nic", "lease", "pinged", "fetched", "sum", "random", "done",
    ] {
        let (d, at) = inner.mark(&mut scene, m, Duration::from_secs(100))?;
        println!("{at:?} {m} {d}");
    }
    a.power_off(&mut scene)?;
    println!("{:?} off", scene.now());
    Ok(())
}
