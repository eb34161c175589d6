// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads what `lspci -D -nvv` says about a function, and tells what is wrong with it as a virtio device.
//!
//! Structure: "Virtio Over PCI Bus" in the virtio standard. lspci knows the names of four of the five kinds of
//! capability; the one for access through configuration space is `<unknown>` to it.

use std::collections::BTreeMap;

/// What a function ought to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// The number of the class and subclass, as `0200`.
    pub(crate) class: &'static str,
    /// Vendor and device, as `1af4:1041`.
    pub(crate) ids: &'static str,
    /// Virtqueues: MSI-X has a vector for each, and one for changes of the configuration.
    pub(crate) queues: u32,
    /// There is a configuration of this kind of device.
    pub(crate) config: bool,
    /// The guest has enabled MSI-X.
    pub(crate) msix: bool,
}

/// What was read.
#[derive(Debug, Default)]
struct Function {
    /// `0200: 1af4:1041 (rev 01)`.
    head: String,
    /// Text by number.
    regions: BTreeMap<u32, String>,
    /// Each capability with the lines below it.
    capabilities: Vec<(String, Vec<String>)>,
    interrupt: bool,
    driver: String,
}

/// The kinds of virtio capability as lspci names them.
const KINDS: [&str; 5] = ["CommonCfg", "Notify", "ISR", "DeviceCfg", "<unknown>"];

/// What is wrong, a sentence each.
pub(crate) fn problems(text: &str, expected: &Expected) -> Vec<String> {
    let function = parse(text);
    let mut wrong = Vec::new();
    let mut hold = |holds: bool, what: String| {
        if !holds {
            wrong.push(what);
        }
    };
    let head = &function.head;
    let start = format!("{}: {}", expected.class, expected.ids);
    hold(head.starts_with(&start), format!("{head} is not {start}"));
    let revision = head
        .split_once("(rev ")
        .map(|(_, r)| r.trim_end_matches(')'));
    hold(
        revision.is_some_and(|r| u8::from_str_radix(r, 16).is_ok_and(|r| r >= 1)),
        format!("{head} is not a modern device by its revision"),
    );
    hold(
        !text.contains("<chain") && !text.contains("!!!") && !text.contains("<access denied>"),
        "the list of capabilities is broken".to_owned(),
    );
    hold(function.interrupt, "no interrupt pin".to_owned());
    hold(
        function.driver == "virtio-pci",
        format!("driver '{}'", function.driver),
    );

    let virtio: Vec<_> = function
        .capabilities
        .iter()
        .filter_map(|(head, lines)| {
            let kind = head.split_once("Vendor Specific Information: VirtIO: ")?.1;
            Some((kind, lines.join(" ")))
        })
        .collect();
    for kind in KINDS {
        let found = virtio.iter().filter(|(k, _)| *k == kind).count();
        // A device without a configuration of its own need not say where it is.
        let optional = kind == "DeviceCfg" && !expected.config;
        hold(
            found == 1 || (optional && found == 0),
            format!("{found} virtio capabilities {kind}"),
        );
    }
    for (kind, place) in virtio.iter().filter(|(kind, _)| *kind != "<unknown>") {
        hold(
            inside(&function, place),
            format!("{kind} lies outside: {place}"),
        );
    }
    hold(
        virtio.len() <= KINDS.len(),
        format!("{} virtio capabilities", virtio.len()),
    );

    let msix = function
        .capabilities
        .iter()
        .find(|(head, _)| head.contains("MSI-X: "));
    match msix {
        Some((head, lines)) => {
            hold(
                head.contains(if expected.msix { "Enable+" } else { "Enable-" }),
                format!("not as wanted: {head}"),
            );
            hold(head.contains("Masked-"), format!("masked: {head}"));
            let count = field(head, "Count=").and_then(|c| c.parse::<u32>().ok());
            hold(
                count.is_some_and(|c| c > expected.queues),
                format!(
                    "not a vector for each of {} queues: {head}",
                    expected.queues
                ),
            );
            hold(lines.len() == 2, format!("table and PBA: {lines:?}"));
            for (line, bytes) in lines.iter().zip([16, 0]) {
                let size = count.unwrap_or(0) * bytes;
                let place = format!("{line} size={:x}", size.max(8));
                hold(inside(&function, &place), format!("lies outside: {line}"));
            }
        }
        None => hold(false, "no MSI-X".to_owned()),
    }
    let regions: Vec<_> = function.regions.iter().collect();
    hold(
        matches!(regions[..], [(1, low), (4, high)]
            if low.contains("(32-bit, non-prefetchable)") && high.contains("(64-bit, ")),
        format!("other regions: {regions:?}"),
    );
    hold(
        !text.contains("[disabled]") && !text.contains("[virtual]"),
        "a region is not in use".to_owned(),
    );
    wrong
}

/// Whether `BAR=n offset=… size=…` (hexadecimal) lies in the region of that number.
fn inside(function: &Function, place: &str) -> bool {
    let number = |name| field(place, name).and_then(|v| u64::from_str_radix(v, 16).ok());
    let (Some(bar), Some(offset), Some(size)) =
        (number("BAR="), number("offset="), number("size="))
    else {
        return false;
    };
    let region = u32::try_from(bar)
        .ok()
        .and_then(|b| function.regions.get(&b));
    let bytes = region.and_then(|r| bytes(field(r, "[size=")?.trim_end_matches(']')));
    size > 0 && bytes.is_some_and(|b| offset + size <= b)
}

/// `4K` as a number.
fn bytes(size: &str) -> Option<u64> {
    let (number, shift) = match size.as_bytes().last()? {
        b'K' => (&size[..size.len() - 1], 10),
        b'M' => (&size[..size.len() - 1], 20),
        b'G' => (&size[..size.len() - 1], 30),
        _ => (size, 0),
    };
    Some(number.parse::<u64>().ok()? << shift)
}

/// The word that begins with `name`, without that.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split_whitespace()
        .find_map(|word| word.strip_prefix(name))
}

fn parse(text: &str) -> Function {
    let mut function = Function::default();
    for line in text.lines() {
        let trimmed = line.trim();
        if !line.starts_with([' ', '\t']) {
            if let Some((_, head)) = trimmed.split_once(' ') {
                function.head = head.to_owned();
            }
        } else if let Some(rest) = trimmed.strip_prefix("Region ") {
            if let Some((number, what)) = rest.split_once(": ")
                && let Ok(number) = number.parse()
            {
                function.regions.insert(number, what.to_owned());
            }
        } else if trimmed.starts_with("Capabilities: ") {
            function.capabilities.push((trimmed.to_owned(), Vec::new()));
        } else if trimmed.starts_with("Interrupt: pin ") {
            function.interrupt = true;
        } else if let Some(driver) = trimmed.strip_prefix("Kernel driver in use: ") {
            function.driver = driver.to_owned();
        } else if let Some((_, lines)) = function.capabilities.last_mut() {
            lines.push(trimmed.to_owned());
        }
    }
    function
}

#[cfg(test)]
#[path = "lspci_test.rs"]
mod tests;
