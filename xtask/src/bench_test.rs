// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs;
use std::path::Path;

use super::{BENCHES, DOCUMENT, MARK, cpu_model, program, with_figures};
use crate::dirs;

#[test]
fn figures_are_replaced_and_the_introduction_stays() {
    let first = with_figures(&format!("# Title\n\nWords.\n\n{MARK}\n"), "| 1 |\n").unwrap();
    assert_eq!(first, format!("# Title\n\nWords.\n\n{MARK}\n\n| 1 |\n"));
    let second = with_figures(&first, "| 2 |\n").unwrap();
    assert_eq!(second, format!("# Title\n\nWords.\n\n{MARK}\n\n| 2 |\n"));
    assert!(with_figures("# Title\n", "| 1 |\n").is_err());
}

#[test]
fn the_document_can_take_figures() {
    let document = fs::read_to_string(dirs::workspace().join(DOCUMENT)).unwrap();
    assert!(with_figures(&document, "").is_ok());
}

#[test]
fn every_benchmark_is_there() {
    for bench in BENCHES {
        let package = dirs::workspace().join("crates").join(bench.package);
        let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
        let name = format!("name = \"{}\"", bench.name);
        let declared = manifest
            .split("[[")
            .filter(|table| table.starts_with("bench]]"))
            .any(|table| table.contains(&name) && table.contains("harness = false"));
        assert!(declared, "{}", bench.name);
    }
}

#[test]
fn the_processor_is_named() {
    let cpuinfo = "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Some CPU @ 2 GHz\n";
    assert_eq!(cpu_model(cpuinfo), "Some CPU @ 2 GHz");
    assert_eq!(cpu_model("processor : 0\n"), "unknown CPU");
}

#[test]
fn the_program_is_found_in_what_cargo_says() {
    let messages = r#"{"reason":"compiler-artifact","target":{"name":"spsc"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/target/other"}
{"reason":"compiler-artifact","target":{"name":"spsc"},"executable":"/target/spsc-1"}
{"reason":"build-finished","success":true}"#;
    let found = program(messages, "spsc");
    assert_eq!(found.as_deref(), Some(Path::new("/target/spsc-1")));
    assert_eq!(program(messages, "tcp"), None);
}
