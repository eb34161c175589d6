// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Consoles over vfio-user, and through QEMU's generic vhost-user device: a login shell with several watchers, sizes, a named port, logs, and a device host that is
//! killed while output flows.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{ALL_CHECKS, STEP, Stage};
use crate::guest::Guest;
use crate::http;
use crate::machine::Machine;
use crate::qemu::{Backend, Board, Hardware};
use crate::report::Report;
use crate::scene::{Id, Stream};
use crate::vmsg::{BUS, Vmsg};

const CONSOLE: &str = include_str!("../guest/console.sh");
const CONTROL: &str = "control.sock";
/// Most that is logged twice around a kill: what one turn of the device takes, and a little.
const TWICE: usize = 128 * 1024;

/// Whole PCI devices.
pub(super) fn vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, "vfio-user")
}

/// Queues and configuration only.
pub(super) fn generic(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, "vhost-user")
}

fn play(stage: &mut Stage, report: &mut Report, front: &str) -> Result<()> {
    let kit = super::vfio_user::kit(stage.kit, false, false)?.with_modules(&["virtio_console"]);
    let vmsg = stage.vmsg()?;
    let machine = kit.machine.name();
    let serve_options = [
        ("--bus", BUS),
        ("--device", "console,id=con0,log=con0.log,pty=con0.pty"),
        ("--device", "console,id=con1,log=con1.log,port=agent"),
        ("--control", CONTROL),
    ];
    let serve = vmsg.run(&mut stage.scene, "serve", "serve", &serve_options, 1)?;
    let fronts = ["con0", "con1"].map(|name| format!("{front},socket={name}.sock,dev={name}"));
    vmsg.proxy_on(
        &mut stage.scene,
        BUS,
        &fronts.each_ref().map(String::as_str),
    )?;

    // Before there is a guest.
    let agent = attach(stage, &vmsg, "agent", "con1:agent")?;
    stage.scene.tell(agent, "said before anybody listened")?;

    let mut board = Board::new(Backend::Qemu, Backend::Qemu);
    // The script stays on the serial line, which is named last, also where the driver is a part of the kernel.
    board.words.push("console=hvc0");
    board.words.push(match kit.machine {
        Machine::X86 => "console=ttyS0",
        Machine::Arm64 => "console=ttyAMA0",
    });
    // The console, and with another port the control queues.
    let mut devices = [("con0", 2), ("con1", 6)];
    if kit.machine == Machine::Arm64 && front != "vfio-user" {
        // The kernel finds virtio-mmio devices from the last one on.
        devices.reverse();
    }
    board.more = devices
        .iter()
        .flat_map(|(name, queues)| match front {
            "vfio-user" => vfio_user_device(name),
            _ => generic_device(kit.machine, name, *queues),
        })
        .collect();
    let guest = Guest::start(
        &mut stage.scene,
        "consoles",
        &kit,
        Hardware::Board(&board),
        CONSOLE,
        &[],
    )?;
    let kernel = guest.booted(&mut stage.scene)?;
    println!("      kernel {kernel}, {}", kit.qemu);

    // Two who type on one login shell, and both see all of it.
    guest.mark(&mut stage.scene, "shell", ALL_CHECKS)?;
    let first = attach(stage, &vmsg, "first", "con0")?;
    let second = attach(stage, &vmsg, "second", "con0")?;
    // Before it, getty would throw away what was typed.
    see(stage, first, "built-in shell")?;
    see(stage, second, "built-in shell")?;
    for (typist, word) in [(first, "one"), (second, "two")] {
        stage
            .scene
            .tell(typist, &format!("echo {word} $((40+2))"))?;
        for watcher in [first, second] {
            see(stage, watcher, &format!("{word} 42"))?;
        }
    }
    report.check(&format!("{machine}/console/two-clients"), true, String::new);
    terminal(stage, report, machine)?;
    guest.tell(&mut stage.scene, "go on")?;

    guest.mark(&mut stage.scene, "size", ALL_CHECKS)?;
    set_size(stage, "con0", 123, 45)?;
    set_size(stage, "con1", 111, 33)?;
    guest.tell(&mut stage.scene, "go on")?;
    see(stage, agent, "heard: said before anybody listened")?;
    guest.mark(&mut stage.scene, "agent", ALL_CHECKS)?;

    // Nobody watches it, and its log is changed while it runs.
    control(stage, &vmsg, &["log", "con1", "flood.log"])?;
    guest.tell(&mut stage.scene, "go on")?;
    let (sum, _) = guest.mark(&mut stage.scene, "flood", ALL_CHECKS)?;
    guest.mark(&mut stage.scene, "flooded", ALL_CHECKS)?;
    let logged = fs::read(stage.scene.dir().join("flood.log"))?;
    let logged_sum = http::sum_of(logged.as_slice())?;
    report.check(
        &format!("{machine}/console/log-of-1-MiB"),
        logged_sum == sum && logged.len() == 1 << 20,
        || {
            format!(
                "{} bytes, sha256 {logged_sum} instead of {sum}",
                logged.len()
            )
        },
    );
    control(stage, &vmsg, &["log", "con1", "off"])?;
    control(stage, &vmsg, &["log", "con1", "con1.log"])?;
    let before = fs::metadata(stage.scene.dir().join("con1.log"))?.len();
    guest.tell(&mut stage.scene, "go on")?;

    // Killed in the middle: those who are attached are cut off, the guest goes on.
    guest.mark(&mut stage.scene, "kill", ALL_CHECKS)?;
    grown(stage, "con1.log", before + (256 << 10))?;
    for client in [first, second, agent] {
        stage.scene.may_end(client);
    }
    stage.scene.kill(serve, Signal::KILL)?;
    vmsg.run(&mut stage.scene, "serve-again", "serve", &serve_options, 1)?;
    guest.mark(&mut stage.scene, "survived", ALL_CHECKS)?;
    let all = fs::read(stage.scene.dir().join("con1.log"))?;
    let log = &all[usize::try_from(before)?..];
    let twice = said_twice(log, &logged);
    report.check(
        &format!("{machine}/console/log-over-kill"),
        twice.is_some_and(|twice| twice <= TWICE),
        || format!("{} bytes, of which {twice:?} are there twice", log.len()),
    );
    println!(
        "      {} bytes were logged twice",
        twice.unwrap_or_default()
    );
    guest.tell(&mut stage.scene, "go on")?;
    let third = attach(stage, &vmsg, "third", "con0")?;
    stage.scene.tell(third, "echo three $((40+2))")?;
    see(stage, third, "three 42")?;
    report.check(
        &format!("{machine}/console/shell-after-kill"),
        true,
        String::new,
    );
    let agent = attach(stage, &vmsg, "agent-again", "con1:agent")?;
    stage.scene.tell(agent, "said after the kill")?;
    see(stage, agent, "heard: said after the kill")?;
    set_size(stage, "con0", 80, 24)?;
    stage.scene.tell(third, "stty size; echo size-$?")?;
    see(stage, third, "24 80")?;
    guest.mark(&mut stage.scene, "again", ALL_CHECKS)?;
    let con0 = fs::read_to_string(stage.scene.dir().join("con0.log"))?;
    for words in [
        "said by the kernel",
        "one 42",
        "two 42",
        "from-pty 42",
        "three 42",
    ] {
        report.check(
            &format!("{machine}/console/log-has-{}", words.replace(' ', "-")),
            con0.contains(words),
            || "con0.log lacks it".to_owned(),
        );
    }
    guest.tell(&mut stage.scene, "go on")?;
    stage.finish(guest, report)
}

/// A device that is served over vfio-user.
fn vfio_user_device(name: &str) -> Vec<String> {
    let device = crate::qemu::vfio_user(&format!("{name}.sock"));
    vec!["-device".to_owned(), device]
}

/// A console whose queues are served over vhost-user.
fn generic_device(machine: Machine, name: &str, queues: u32) -> Vec<String> {
    let device = match machine {
        Machine::X86 => "vhost-user-test-device-pci",
        Machine::Arm64 => "vhost-user-test-device",
    };
    vec![
        "-chardev".to_owned(),
        format!("socket,id={name},path={name}.sock"),
        "-device".to_owned(),
        format!("{device},chardev={name},virtio-id=3,num_vqs={queues},config_size=12"),
    ]
}

/// `vmsg console … attach`, whose input and output are the console.
fn attach(stage: &mut Stage, vmsg: &Vmsg, name: &str, console: &str) -> Result<Id> {
    let command = vmsg.words(["console", CONTROL, "attach", console]);
    stage.scene.start(name, &command)
}

/// Waits for `words` as what a console shows; the echo of what was typed is not it.
fn see(stage: &mut Stage, watcher: Id, words: &str) -> Result<()> {
    let out = (watcher, Stream::Out);
    let what = format!("'{words}' on the console");
    let line = |text: &str| text.contains(words).then_some(());
    stage.scene.expect(out, &what, STEP, |l| line(&l.text))
}

fn control(stage: &Stage, vmsg: &Vmsg, words: &[&str]) -> Result<()> {
    let output = vmsg
        .words(["console", CONTROL].iter().chain(words).copied())
        .current_dir(stage.scene.dir())
        .output()?;
    ensure!(
        output.status.success(),
        "vmsg console {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// As a terminal's window that has another size.
fn set_size(stage: &Stage, console: &str, cols: u16, rows: u16) -> Result<()> {
    let mut control = UnixStream::connect(stage.scene.dir().join(CONTROL))?;
    control.set_read_timeout(Some(STEP))?;
    let request = serde_json::json!({
        "command": "console-size", "console": console, "cols": cols, "rows": rows,
    });
    writeln!(control, "{request}")?;
    let mut answer = String::new();
    BufReader::new(control).read_line(&mut answer)?;
    ensure!(answer.contains("done"), "{answer}");
    Ok(())
}

/// The console's pseudoterminal, as a program of this machine has it.
fn terminal(stage: &mut Stage, report: &mut Report, machine: &str) -> Result<()> {
    let mut shell = std::process::Command::new("sh");
    shell.args([
        "-c",
        "exec 3<>con0.pty; echo 'echo from-pty $((40+2))' >&3; grep -m 1 'from-pty 42' <&3",
    ]);
    let id = stage.scene.start("pty", &shell)?;
    let status = stage.scene.wait_end(id, STEP)?;
    report.check(&format!("{machine}/console/pty"), status.success(), || {
        status.to_string()
    });
    Ok(())
}

/// Waits until a file has this length.
fn grown(stage: &Stage, file: &str, length: u64) -> Result<()> {
    let path = stage.scene.dir().join(file);
    let due = std::time::Instant::now() + ALL_CHECKS;
    // Nothing tells of it but the file.
    while fs::metadata(&path).with_context(|| file.to_owned())?.len() < length {
        ensure!(std::time::Instant::now() < due, "{file} does not grow");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// How many bytes of `text` stand twice in `log`, next to each other; `None` if that is not all that is different.
fn said_twice(log: &[u8], text: &[u8]) -> Option<usize> {
    let begin = log.iter().zip(text).take_while(|(a, b)| a == b).count();
    let end = log.iter().rev().zip(text.iter().rev());
    let end = end.take_while(|(a, b)| a == b).count();
    (begin + end >= log.len() && log.len() >= text.len()).then(|| log.len() - text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_twice_is_told_from_what_is_missing() {
        let text = b"0123456789";
        assert_eq!(said_twice(text, text), Some(0));
        assert_eq!(said_twice(b"012343456789", text), Some(2));
        assert_eq!(said_twice(b"012356789", text), None);
        assert_eq!(said_twice(b"01234xx56789", text), None);
    }
}
