// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A plan as lines for a shell.

use std::fmt::Write as _;

use super::{Kind, Part, Plan, Ready, Sockets};
use vmsg_proxy::front::qemu;

/// Lines that a person can paste into a shell, in this order, to have the same without supervision.
pub(in super::super) fn to_shell(plan: &Plan) -> String {
    let runtime = quote(&plan.runtime.to_string_lossy());
    let mut text = format!(
        "# {}: its parts, each behind those that it waits for. `vmsg up` also restarts what fails, and ends all together.\ncd {}\nmkdir -p -m 700 {runtime}\nrm -f {runtime}/*.out\n",
        plan.name,
        quote(&plan.folder.to_string_lossy()),
    );
    for part in &plan.parts {
        let _ = writeln!(text, "\n# {}: {}", part.name, about(part));
        for other in &part.after {
            if let Some(other) = plan.parts.iter().find(|part| part.name == *other) {
                text.push_str(&wait_for(other, &runtime));
            }
        }
        let argv = match &part.kind {
            Kind::Guest(machine) => machine.argv(&[], Sockets::Listen),
            _ => part.argv.clone(),
        };
        let log = match part.ready {
            Ready::Lines(..) | Ready::Text(_) => format!(" > {runtime}/{}.out", part.name),
            Ready::Started | Ready::Qmp => String::new(),
        };
        let _ = writeln!(text, "{}{log} &", command(&argv));
    }
    text
}

fn about(part: &Part) -> String {
    let after = match part.after.as_slice() {
        [] => "waits for nothing".to_owned(),
        after => format!("waits for {}", after.join(", ")),
    };
    match &part.kind {
        Kind::Guest(machine) if machine.has_serial() => {
            format!(
                "{after}; its serial line: socat -,raw,echo=0 UNIX-CONNECT:{}",
                quote(&machine.serial().to_string_lossy())
            )
        }
        _ => after,
    }
}

/// Lines that wait until a part is ready.
fn wait_for(part: &Part, runtime: &str) -> String {
    let wait = |condition: String| format!("until {condition}; do sleep 0.1; done\n");
    let log = format!("{runtime}/{}.out", part.name);
    match &part.ready {
        Ready::Started => String::new(),
        Ready::Lines(text, count) => wait(format!(
            "[ \"$(grep -c {} {log})\" -ge {count} ]",
            quote(&format!("^{text}"))
        )),
        Ready::Text(text) => wait(format!("grep -qF {} {log}", quote(text))),
        Ready::Qmp => match &part.kind {
            Kind::Guest(machine) => wait(format!(
                "[ -S {} ]",
                quote(&machine.qmp().to_string_lossy())
            )),
            _ => String::new(),
        },
    }
}

/// A command with an option and its value on a line.
fn command(argv: &[String]) -> String {
    let mut lines = vec![String::new()];
    for word in argv {
        if word.starts_with('-') && lines.len() <= argv.len() {
            lines.push(String::new());
        }
        let line = lines.last_mut().expect("there is one");
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&quote(word));
    }
    lines.join(" \\\n  ")
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    if word.is_empty() {
        return "''".to_owned();
    }
    qemu::to_shell(&[word.to_owned()])
}
