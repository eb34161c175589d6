// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qemu-img and qemu-io.

use std::path::Path;
use std::process::{Command, Output};

/// Whether the tools are there.
pub(crate) fn there() -> bool {
    super::held::has_tool("qemu-img") && super::held::has_tool("qemu-io")
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// Runs a tool that must succeed.
pub(crate) fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

pub(crate) fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn create(path: &Path, options: &str, size: &str) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([name(path), size]);
    must("qemu-img", &arguments);
}

/// qemu-img finds nothing wrong, no leaks either.
///
/// A process that another test just begins has the descriptors of this one for a moment, and so the locks of an image.
pub(crate) fn check(path: &Path) {
    let arguments = ["check", "-f", "qcow2", name(path)];
    for _ in 0..100 {
        let output = run("qemu-img", &arguments);
        if !String::from_utf8_lossy(&output.stderr).contains("lock") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    must("qemu-img", &arguments);
}

/// The contents, as QEMU sees them.
pub(crate) fn contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    must(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            name(path),
            name(&raw),
        ],
    );
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}
