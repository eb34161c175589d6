// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any text as a description, for tests and fuzzing.

use std::path::{Path, PathBuf};

use vmsg_proxy::front::qemu::Arch;

use super::description::World;
use super::source::Source;
use super::{describe, plan};

/// Bytes of all that may be said of a text.
const SAID: usize = 200_000;

/// Reads any text; what can be is planned, and what is said is bounded.
pub fn one(text: &str) {
    let world = World {
        runs: &|program| !program.contains("none"),
        program: "/bin/vmsg".to_owned(),
        exists: &|path| !path.to_string_lossy().contains("none"),
        qemu_version: &|qemu| match qemu {
            "old" => Ok((6, 0)),
            "new" => Ok((11, 1)),
            _ => Ok((7, 2)),
        },
        kvm: Some(Arch::X86),
        runtimes: PathBuf::from("/run/vmsg"),
    };
    let environment = |key: &str| match key {
        "LONG" => Some("x".repeat(100_000)),
        "ODD" => Some("\u{1b}[2J,=\n\"${HOME}".to_owned()),
        "HOME" => Some("/root".to_owned()),
        _ => None,
    };
    let source = Source::new("d.toml", text);
    let (description, mistakes) =
        describe(Path::new("/d/d.toml"), &source, &[], &environment, &world);
    let said = source.show_all(&mistakes);
    assert!(said.len() <= SAID, "{} bytes are said", said.len());
    assert!(
        said.chars().all(|c| c == '\n' || !c.is_control()),
        "a terminal would do something else than print this"
    );
    assert_eq!(description.is_none(), mistakes.are_fatal());
    if let Some(description) = description {
        let plan = plan::plan(&description, "vmsg");
        assert!(!plan::to_shell(&plan).is_empty());
        for part in &plan.parts {
            assert!(!part.argv.is_empty());
            assert!(!part.argv.iter().any(|word| word.contains('\0')));
        }
    }
}

#[cfg(test)]
#[path = "exercise_test.rs"]
mod tests;
