// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg trace`, and `trace=` of the commands that use a bus.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use vmsg_bus::trace::Layout;

use crate::program::{output, vmsg};
use crate::{direction, interface, samples};

/// What it prints; it must end well.
fn lines(folder: &Path, args: &[&str]) -> Vec<String> {
    let output = output(folder, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(str::to_owned).collect()
}

fn json(folder: &Path, trace: &str) -> Vec<Value> {
    lines(folder, &["trace", trace, "--json"])
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// A command that runs on; killed at the end.
struct Running(Child, BufReader<ChildStdout>);

impl Running {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let mut child = vmsg(folder, args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("vmsg starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self(child, stdout)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    fn serve(folder: &Path, bus: &str) -> Self {
        let args = ["serve", "--bus", bus, "--device", "rng,id=dice"];
        let mut serve = Self::start(folder, &args);
        assert!(serve.line().starts_with("ready "));
        serve
    }

    fn kill(&mut self) {
        self.0.kill().expect("a child");
        self.0.wait().expect("a child");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const BUS: &str = "unix,path=b0.sock";

#[test]
fn both_ends_of_a_bus_record_the_same_messages() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let _serve = Running::serve(folder, "unix,path=b0.sock,trace=host.pcapng");
    // While it is followed: what is read is there, whenever it was written.
    let mut follow = Running::start(folder, &["trace", "host.pcapng", "--follow"]);
    lines(
        folder,
        &["ls", "--bus", "unix,path=b0.sock,trace=driver.pcapng"],
    );
    let mut shown = Vec::new();
    while !shown
        .last()
        .is_some_and(|line: &String| line.contains("← dev 0 #6 GET_VQUEUE"))
    {
        shown.push(follow.line());
    }
    assert!(
        shown[0].starts_with("# interface 0: b0/vmsg (pid "),
        "{}",
        shown[0]
    );
    assert!(
        shown
            .iter()
            .any(|line| line.ends_with(r#"DEVICE_NAME response: device 0, "dice""#))
    );
    let (host, driver) = (json(folder, "host.pcapng"), json(folder, "driver.pcapng"));
    assert!(host.len() > 5);
    assert_eq!(host.len(), driver.len());
    for (host, driver) in host.iter().zip(&driver) {
        for key in ["bytes", "direction", "fds", "text"] {
            assert_eq!(host[key], driver[key]);
        }
        let is_response = host["kind"] == "response";
        assert_eq!(host["response_time_ns"].is_u64(), is_response, "{host}");
    }
    assert!(
        driver[0]["interface_name"]
            .as_str()
            .is_some_and(|name| name.starts_with("b0/"))
    );
}

#[test]
fn connections_of_a_host_share_its_file_and_a_killed_host_goes_on_in_it() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let bus = "unix,path=b0.sock,trace=host.pcapng";
    let mut serve = Running::serve(folder, bus);
    let mut follow = Running::start(
        folder,
        &["trace", "host.pcapng", "--type", "PING", "--json", "-f"],
    );
    for _ in 0..2 {
        lines(folder, &["ping", "--bus", BUS, "-c", "1"]);
    }
    let interface = |line: String| {
        let line: Value = serde_json::from_str(&line).expect("JSON");
        line["interface"].as_u64().expect("a number")
    };
    for expected in [0, 0, 1, 1] {
        assert_eq!(interface(follow.line()), expected);
    }
    serve.kill();
    // As if it had been killed in mid-write.
    let trace = folder.join("host.pcapng");
    let mut file = OpenOptions::new()
        .append(true)
        .open(trace)
        .expect("the trace");
    file.write_all(&[6, 0, 0, 0, 200, 0, 0, 0, 1])
        .expect("room");
    drop(file);
    let cut = output(folder, &["trace", "host.pcapng"]);
    assert_eq!(cut.status.code(), Some(1));
    let error = String::from_utf8_lossy(&cut.stderr);
    assert!(
        error.contains("the file ends in the middle of a block"),
        "{error}"
    );
    let _serve = Running::serve(folder, bus);
    lines(folder, &["ping", "--bus", BUS, "-c", "1"]);
    for expected in [2, 2] {
        assert_eq!(interface(follow.line()), expected);
    }
    assert_eq!(
        lines(folder, &["trace", "host.pcapng", "--type", "ping"]).len(),
        3 + 6
    );
}

#[test]
fn a_file_that_cannot_be_a_trace_is_told_before_anything_runs() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    std::fs::write(folder.join("letter"), "dear friend").expect("a file");
    let _serve = Running::serve(folder, "unix,path=b0.sock,trace=host.pcapng");
    let other = "unix,path=other.sock";
    let rng = ["--device", "rng"];
    let front = ["--front", "vhost-user,socket=n.sock,dev=0"];
    for (args, trace, reason) in [
        (
            vec!["serve", "--bus", other, rng[0], rng[1]],
            "letter",
            "no section header",
        ),
        (
            vec!["serve", "--bus", other, rng[0], rng[1]],
            "host.pcapng",
            "another process records",
        ),
        (
            vec!["proxy", "--bus", BUS, front[0], front[1]],
            "letter",
            "no section header",
        ),
        (vec!["ls", "--bus", BUS], "letter", "no section header"),
        (
            vec!["ping", "--bus", BUS, "-c", "1"],
            "no/t",
            "No such file",
        ),
    ] {
        let bus = format!("{},trace={trace}", args[2]);
        let args: Vec<&str> = args
            .iter()
            .map(|arg| if arg.starts_with("unix") { &bus } else { *arg })
            .collect();
        let output = output(folder, &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(
            error.contains(reason) && error.contains(trace),
            "{args:?}: {error}"
        );
    }
    let letter = std::fs::read(folder.join("letter")).expect("the letter");
    assert_eq!(letter, b"dear friend");
}

#[test]
fn messages_are_selected_by_device_and_name() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let path = folder.join("t");
    let mut trace = interface(&path, Layout::Revision1);
    let mut samples = samples::transport();
    samples.extend(samples::bus());
    for sample in &samples {
        trace.record(direction(sample.to_device), &sample.bytes, sample.fds);
    }
    drop(trace);
    let shown = lines(folder, &["trace", "t"]);
    // And one that names the interface.
    assert_eq!(shown.len(), samples.len() + 1);
    for (line, sample) in shown[1..].iter().zip(&samples) {
        assert!(line.contains(sample.name), "{line}");
        assert!(
            line.contains(if sample.to_device { " → " } else { " ← " }),
            "{line}"
        );
        assert_eq!(line.contains("(2 descriptors)"), sample.fds == 2, "{line}");
        let is_response = sample.bytes[0] & 1 == 1;
        assert_eq!(line.contains(" +"), is_response, "{line}");
    }
    let count = |args: &[&str]| lines(folder, &[&["trace", "t"], args].concat()).len() - 1;
    assert_eq!(count(&["--dev", "5"]), samples::transport().len());
    // EVENT_DEVICE, and seven pairs of the unix bus.
    assert_eq!(count(&["--dev", "3"]), 15);
    assert_eq!(count(&["--type", "view_add"]), 2);
    assert_eq!(count(&["--type", "claim", "--type", "GET_SHM"]), 4);
    assert_eq!(count(&["--type", "CLAIM", "--dev", "3"]), 2);
    let wrong = output(folder, &["trace", "t", "--type", "GET_CONFIGS"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("GET_CONFIG,"));
}

#[test]
fn hostile_bytes_are_shown_and_do_nothing() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let mut trace = interface(&folder.join("t"), Layout::Revision1);
    trace.record(direction(false), b"\x1b[2J\r\nab", 0);
    trace.record(direction(false), &[], 0);
    // The name of a device host's device.
    let name = b"\x03\x85\0\0\x01\0\x16\0\x03\0\0\0\0\0\0\0\x1b[2J\xc2\x9b";
    trace.record(direction(false), name, 0);
    trace.set_layout(Layout::R1);
    trace.record(direction(false), &[1; 8], 0);
    drop(trace);
    let shown = lines(folder, &["trace", "t"]);
    assert!(
        shown[1].contains("undecodable (") && shown[1].ends_with("): 1b5b324a0d0a6162"),
        "{}",
        shown[1]
    );
    assert!(shown[2].contains("cut off after 0"), "{}", shown[2]);
    assert!(shown[4].contains("cut off after 8"), "{}", shown[4]);
    for line in &shown {
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    let objects = json(folder, "t");
    assert_eq!(objects[0]["bytes"], "1b5b324a0d0a6162");
    assert!(objects[0]["error"].is_string() && objects[0]["name"].is_null());
}

#[test]
fn all_before_a_fault_of_the_file_is_shown() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let path = folder.join("t");
    let mut trace = interface(&path, Layout::Revision1);
    for sample in &samples::transport()[..4] {
        trace.record(direction(sample.to_device), &sample.bytes, 0);
    }
    drop(trace);
    let mut bytes = std::fs::read(&path).expect("the trace");
    let len = bytes.len();
    bytes.extend_from_slice(&[0xee; 64]);
    std::fs::write(&path, &bytes).expect("room");
    let shown = output(folder, &["trace", "t"]);
    assert_eq!(shown.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&shown.stdout).lines().count(), 5);
    let error = String::from_utf8_lossy(&shown.stderr);
    assert!(
        error.contains(&format!("t: at offset {len}: a block of impossible length")),
        "{error}"
    );
    std::fs::write(&path, "dear friend").expect("room");
    let foreign = output(folder, &["trace", "t"]);
    assert!(String::from_utf8_lossy(&foreign.stderr).contains("no trace"));
    assert_eq!(foreign.status.code(), Some(1));
    assert_eq!(output(folder, &["trace", "missing"]).status.code(), Some(1));
}

#[test]
fn a_reader_that_leaves_ends_it_quietly_even_if_nothing_more_happens() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path();
    let mut trace = interface(&folder.join("t"), Layout::Revision1);
    trace.record(direction(true), &samples::transport()[0].bytes, 0);
    drop(trace);
    let mut follow = vmsg(folder, &["trace", "t", "--follow"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmsg starts");
    let mut stdout = BufReader::new(follow.stdout.take().expect("piped"));
    for _ in 0..2 {
        stdout.read_line(&mut String::new()).expect("text");
    }
    drop(stdout);
    let output = follow.wait_with_output().expect("a child");
    assert!(output.status.success());
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
