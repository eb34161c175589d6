// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg up`: everything that a description names, started, watched over and ended together.
//!
//! [`tables`] reads the text, [`read`] finds all that is wrong and makes a [`description`], [`plan`] makes processes of it,
//! [`supervisor`] runs them. [`control`] is the socket on which the running description is looked at and changed.

mod args;
mod control;
mod description;
mod desired;
#[cfg(any(test, fuzzing))]
#[allow(unreachable_pub, reason = "for fuzzing")]
pub mod exercise;
mod guard;
mod host;
mod log;
mod part;
mod plan;
mod process;
mod qmp;
mod read;
mod runtime;
mod source;
mod status;
mod supervisor;
mod tables;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
pub(crate) use args::{UpArgs, UpPartArgs};
pub(crate) use guard::run as run_guard;
pub(crate) use log::Unhurried;
pub(crate) use part::run as run_part;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, access};
use rustix::process::{Pid, Signal, kill_process_group};
use vmsg_proxy::front::qemu::Arch;

use self::control::Operator;
use self::description::{Description, World};
use self::guard::Guard;
use self::runtime::Runtime;
use self::source::{Mistakes, Source};
use self::status::Shared;
use self::supervisor::{Outcome, Supervisor};
use self::tables::{Tables, Variables};
use crate::control::{Server, Service};
use crate::out::Out;
use crate::{Usage, descriptors};

/// Bytes of a description.
const LONGEST: u64 = 4 << 20;

/// How long a QEMU may take to tell its version, and how many bytes of that are read.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);
const VERSION_BYTES: usize = 64 << 10;

/// Runs what the description names.
pub(crate) fn run(args: UpArgs) -> anyhow::Result<()> {
    let file = std::path::absolute(&args.file)?;
    let text = read_text(&file)
        .map_err(|error| Usage(format!("cannot read {}: {error}", args.file.display())))?;
    let source = Source::new(args.file.display().to_string(), text);
    let program = std::env::current_exe().context("where is this program?")?;
    let folder = file.parent().unwrap_or(Path::new("/")).to_owned();
    let versions = RefCell::new(HashMap::new());
    let world = World {
        runs: &|program| runs(program, &folder),
        program: program.to_string_lossy().into_owned(),
        exists: &|path| folder.join(path).is_file(),
        qemu_version: &|qemu| {
            let mut versions = versions.borrow_mut();
            let known = versions.entry(qemu.to_owned());
            known.or_insert_with(|| qemu_version(qemu, &folder)).clone()
        },
        kvm: kvm(),
        runtimes: runtime::runtimes(),
    };
    let environment = |key: &str| std::env::var(key).ok();
    let (description, mistakes) = describe(&file, &source, &args.set, &environment, &world);
    let shown = source.show_all(&mistakes);
    let Some(description) = description else {
        return Err(Usage(format!("{} cannot be:\n{shown}", args.file.display())).into());
    };
    if !mistakes.is_empty() {
        // Nobody may be reading.
        let _ = writeln!(std::io::stderr(), "{shown}");
    }
    let plan = plan::plan(&description, &program.to_string_lossy());
    if args.check {
        return Ok(());
    }
    if args.print {
        write!(Out::lock(), "{}", plan::to_shell(&plan))?;
        return Ok(());
    }
    // Where all parts run: what is relative means the same to all.
    std::env::set_current_dir(&plan.folder)?;
    descriptors::raise_limit();
    let runtime = Runtime::take(&plan.runtime, &plan.name)?;
    let (shared, inbox) = Shared::new(Guard::start()?)?;
    let supervisor = Supervisor::new(&plan, shared.clone(), inbox, args.quiet)?;
    let operator = Operator::new(&plan, &program.to_string_lossy(), shared.clone());
    let server = Server::start(&plan.control, Arc::clone(&operator) as Arc<dyn Service>)?;
    let beginning = std::thread::Builder::new()
        .name("begin".to_owned())
        .spawn(move || operator.begin())?;
    let control = std::path::absolute(&plan.control)?;
    let outcome = supervisor.run(|| {
        // A reader that has gone away is no reason to stop.
        let _ = writeln!(std::io::stdout(), "ready control={}", control.display());
        let _ = std::io::stdout().flush();
    });
    shared.end();
    beginning.join().expect("it does not panic");
    drop(server);
    let outcome = outcome?;
    drop(runtime);
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Failed => bail!("a part has failed for good"),
    }
}

/// Reads a file, unless it is longer than any description.
fn read_text(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let mut file = std::fs::File::open(file)?.take(LONGEST + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > LONGEST {
        let message = format!("it is longer than {} KiB", LONGEST >> 10);
        return Err(std::io::Error::new(
            std::io::ErrorKind::FileTooLarge,
            message,
        ));
    }
    Ok(text)
}

/// Reads a description; none if something in it is wrong.
fn describe(
    file: &Path,
    source: &Source,
    set: &[(String, String)],
    environment: &dyn Fn(&str) -> Option<String>,
    world: &World<'_>,
) -> (Option<Description>, Mistakes) {
    let mut mistakes = Mistakes::default();
    let mut variables = Variables::new(set, environment);
    let tables = Tables::read(source.text(), &mut variables, &mut mistakes);
    for key in variables.unused() {
        mistakes.error(None, format!("--set {key}=…: there is no ${{{key}}} in it"));
    }
    let description = read::read(file, &tables, world, &mut mistakes);
    ((!mistakes.are_fatal()).then_some(description), mistakes)
}

/// Whether there is a program that can be run by this name from `folder`.
fn runs(program: &str, folder: &Path) -> bool {
    let is = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if program.contains('/') {
        return is(&folder.join(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| is(&folder.join(dir).join(program)))
}

/// The machine whose guests this one runs without emulation.
fn kvm() -> Option<Arch> {
    let can = access("/dev/kvm", Access::READ_OK | Access::WRITE_OK);
    match std::env::consts::ARCH {
        _ if can.is_err() => None,
        "x86_64" => Some(Arch::X86),
        "aarch64" => Some(Arch::Arm64),
        _ => None,
    }
}

/// Asks a QEMU for its version.
fn qemu_version(qemu: &str, folder: &Path) -> Result<(u32, u32), String> {
    let (out, err) = ask_version(qemu, folder)
        .map_err(|error| format!("cannot run {qemu} --version: {error}"))?;
    let text = String::from_utf8_lossy(&out);
    let mut numbers = text
        .split("version ")
        .nth(1)
        .unwrap_or_default()
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => {
            let error = String::from_utf8_lossy(&err);
            let error = error.lines().next().unwrap_or("set `qemu-version`");
            Err(format!("{qemu} --version does not tell a version: {error}"))
        }
    }
}

/// What a program says when it is asked for its version. It may be none that knows what that is: it is not waited for without end.
fn ask_version(program: &str, folder: &Path) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("--version")
        .current_dir(folder)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().expect("stdout is piped");
    let err = child.stderr.take().expect("stderr is piped");
    let result = read_both(&out, &err, Instant::now() + VERSION_PATIENCE);
    // It has said all that is wanted of it, and is still a child of this process, whose number is nobody else's.
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    child.wait()?;
    result
}

/// Reads two outputs to their ends.
fn read_both(
    out: &(impl AsFd + ?Sized),
    err: &(impl AsFd + ?Sized),
    due: Instant,
) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let streams = [out.as_fd(), err.as_fd()];
    let mut texts = [Vec::new(), Vec::new()];
    let mut open = [true; 2];
    while open.contains(&true) && texts.iter().all(|text| text.len() < VERSION_BYTES) {
        let left = due.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let wanted = |open: bool| {
            if open {
                PollFlags::IN
            } else {
                PollFlags::empty()
            }
        };
        let mut fds = [0, 1].map(|at| PollFd::from_borrowed_fd(streams[at], wanted(open[at])));
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(std::io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = fds.map(|fd| !fd.revents().is_empty());
        for at in 0..2 {
            if !ready[at] || !open[at] {
                continue;
            }
            let mut chunk = [0; 4096];
            let count = rustix::io::read(streams[at], &mut chunk)?;
            texts[at].extend_from_slice(&chunk[..count]);
            open[at] = count > 0;
        }
    }
    let [out, err] = texts;
    Ok((out, err))
}
