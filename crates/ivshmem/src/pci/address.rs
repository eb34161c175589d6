// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a PCI function is.

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function: `0000:00:04.0`. The domain may be left out where it is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// This is not the address of a PCI function.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not the address of a PCI function, such as 0000:00:04.0")]
pub struct BadAddress(String);

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        parse(text).ok_or_else(|| BadAddress(text.into()))
    }
}

fn parse(text: &str) -> Option<Address> {
    let (rest, function) = text.split_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let hex = |digits: &str, range: std::ops::RangeInclusive<usize>| {
        let all = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        (all && range.contains(&digits.len()))
            .then(|| u32::from_str_radix(digits, 16).ok())
            .flatten()
    };
    Some(Address {
        domain: hex(domain, 4..=8)?,
        bus: u8::try_from(hex(bus, 2..=2)?).ok()?,
        device: u8::try_from(hex(device, 2..=2)?)
            .ok()
            .filter(|device| *device < 32)?,
        function: u8::try_from(hex(function, 1..=1)?)
            .ok()
            .filter(|function| *function < 8)?,
    })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

#[cfg(test)]
#[path = "address_test.rs"]
mod tests;
