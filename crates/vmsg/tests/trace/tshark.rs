// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Wireshark without its window, with our dissector.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

/// Whether tshark is there. Without it a test is left out, unless `VMSG_REQUIRE_TOOLS=1`.
pub(crate) fn is_there() -> bool {
    let found = Command::new("tshark")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    let required = std::env::var("VMSG_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(found || !required, "tshark is required and missing");
    if !found {
        eprintln!("skipped: there is no tshark");
    }
    found
}

/// Runs tshark on a trace.
pub(crate) fn run(trace: &Path, args: &[&str]) -> String {
    let home = TempDir::new().expect("a folder");
    let dissector =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/wireshark/virtio-msg.lua");
    let output = Command::new("tshark")
        // Nothing of what the user has set up, which may be this dissector.
        .env("HOME", home.path())
        .env("XDG_CONFIG_HOME", home.path())
        .env("WIRESHARK_CONFIG_DIR", home.path())
        .arg("-X")
        .arg(format!("lua_script:{}", dissector.display()))
        .arg("-r")
        .arg(trace)
        .args(args)
        .output()
        .expect("tshark runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(!errors.contains("Lua"), "{errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// All fields of a packet with their values, in order.
#[derive(Debug)]
pub(crate) struct Packet(Vec<(String, String)>);

/// The packets of a trace.
pub(crate) fn packets(trace: &Path) -> Vec<Packet> {
    // Twice over the file: only then a request knows its response.
    let json = run(trace, &["-2", "-T", "json", "--no-duplicate-keys"]);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let packets = json.as_array().expect("packets");
    packets
        .iter()
        .map(|packet| {
            let mut fields = Vec::new();
            flatten("", &packet["_source"]["layers"], &mut fields);
            Packet(fields)
        })
        .collect()
}

fn flatten(key: &str, value: &Value, fields: &mut Vec<(String, String)>) {
    match value {
        Value::Object(object) => {
            // The branch itself, without a value.
            fields.push((key.to_owned(), String::new()));
            for (key, value) in object {
                flatten(key, value, fields);
            }
        }
        Value::Array(array) => array.iter().for_each(|value| flatten(key, value, fields)),
        Value::String(text) => fields.push((key.to_owned(), text.clone())),
        other => panic!("{key} is {other}"),
    }
}

impl Packet {
    /// The values of a field.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.0.iter().filter(|(key, _)| key == name);
        fields.map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a field that is there once.
    pub(crate) fn text(&self, name: &str) -> &str {
        match self.all(name)[..] {
            [one] => one,
            ref other => panic!("{name} is there {} times: {self:?}", other.len()),
        }
    }

    /// The same as a number; a flag is 0 or 1.
    pub(crate) fn number(&self, name: &str) -> u64 {
        number(self.text(name))
    }

    /// Whether anything is wrong with it.
    pub(crate) fn is_malformed(&self) -> bool {
        const WRONG: [&str; 5] = [
            "_ws.malformed",
            "_ws.lua.error",
            "virtio_msg.bad_head",
            "virtio_msg.bad_size",
            "virtio_msg.bad_id",
        ];
        self.0.iter().any(|(key, _)| WRONG.contains(&key.as_str()))
    }
}

/// A number as one of the versions of tshark writes it.
pub(crate) fn number(text: &str) -> u64 {
    let parsed = match text {
        "True" | "true" => Ok(1),
        "False" | "false" => Ok(0),
        _ => match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        },
    };
    parsed.unwrap_or_else(|_| panic!("`{text}` is no number"))
}
