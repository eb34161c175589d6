// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::Scene;
use super::Stream::{Err, Out};

const SOON: Duration = Duration::from_secs(20);

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn scene() -> (tempfile::TempDir, Scene) {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::new(dir.path().to_owned());
    (dir, scene)
}

#[test]
fn a_line_is_met_once_and_kept() {
    let (_dir, mut scene) = scene();
    let id = scene
        .start("talker", &shell("echo one; echo two; read x; echo got $x"))
        .unwrap();
    scene
        .expect((id, Out), "two", SOON, |l| (l.text == "two").then_some(()))
        .unwrap();
    scene.tell(id, "three").unwrap();
    let got = scene
        .expect((id, Out), "got", SOON, |l| {
            l.text.strip_prefix("got ").map(str::to_owned)
        })
        .unwrap();
    assert_eq!(got, "three");
    assert!(scene.wait_end(id, SOON).unwrap().success());
    assert_eq!(scene.lines(id, Out).len(), 3);
}

#[test]
fn the_end_of_a_process_is_told_with_its_last_words() {
    let (_dir, mut scene) = scene();
    let id = scene
        .start("short", &shell("echo hello; echo sorry >&2; exit 3"))
        .unwrap();
    let error = scene
        .expect((id, Out), "more", SOON, |l| {
            (l.text == "more").then_some(())
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("ended before more"), "{error}");
    assert!(
        error.contains("hello") && error.contains("sorry"),
        "{error}"
    );
    scene
        .expect((id, Err), "sorry", SOON, |l| {
            (l.text == "sorry").then_some(())
        })
        .unwrap();
}

#[test]
fn the_end_of_another_needed_process_ends_the_wait() {
    let (_dir, mut scene) = scene();
    let waits = scene.start("waits", &shell("read x")).unwrap();
    scene.start("dies", &shell("exit 1")).unwrap();
    let error = scene
        .expect((waits, Out), "x", SOON, |_| Some(()))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("dies:"), "{error}");
}

#[test]
fn killing_waits_for_the_end_and_a_dead_process_cannot_be_killed() {
    let (_dir, mut scene) = scene();
    let id = scene.start("victim", &shell("echo up; read x")).unwrap();
    scene.expect((id, Out), "up", SOON, |_| Some(())).unwrap();
    scene.kill(id, Signal::KILL).unwrap();
    assert!(scene.kill(id, Signal::KILL).is_err());
}

#[test]
fn processes_die_with_the_run() {
    let (_dir, mut scene) = scene();
    let id = scene.start("orphan", &shell("echo up; read x")).unwrap();
    scene.expect((id, Out), "up", SOON, |_| Some(())).unwrap();
    let proc = format!("/proc/{}", scene.pid(id));
    drop(scene);
    assert!(!std::path::Path::new(&proc).exists());
}

#[test]
fn a_process_that_leaves_another_behind_has_ended_and_the_other_ends_with_the_run() {
    let (_dir, mut scene) = scene();
    let id = scene
        .start("parent", &shell("sleep 1000 & echo $!; read x"))
        .unwrap();
    let child: String = scene
        .expect((id, Out), "a number", SOON, |l| Some(l.text.clone()))
        .unwrap();
    scene.kill(id, Signal::KILL).unwrap();
    let proc = std::path::PathBuf::from(format!("/proc/{child}/cwd"));
    assert!(std::fs::read_link(&proc).is_ok());
    drop(scene);
    // Killed; who takes in orphans may let it wait as a zombie, which has no working folder.
    while std::fs::read_link(&proc).is_ok() {
        std::thread::yield_now();
    }
}
