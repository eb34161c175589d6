// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where an export is: the NBD URI format (`doc/uri.md` beside the protocol's text).

use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::str::FromStr;

/// The port that IANA has given to NBD.
const PORT: u16 = 10809;
/// Longest export name, in bytes, that servers have to take (protocol, "string limits").
pub(super) const LONGEST_NAME: usize = 4096;
/// Longest name of a Unix socket, in bytes: what `sockaddr_un` holds, with its NUL.
const LONGEST_SOCKET: usize = 107;

/// Where a server is and which of its exports is wanted.
///
/// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, with `%xx` for bytes that have a meaning in URIs. IPv6
/// addresses stand in brackets. A socket's path that begins with `%00` is a name in the abstract namespace. Shown as it may be
/// written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: NbdAddress,
    /// The export's name; the empty one is the server's default.
    pub export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// TCP.
    Tcp {
        /// A name or an address; IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket; in the abstract namespace if the first byte is NUL.
    Unix(PathBuf),
}

/// What is wrong with an NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NbdUriError {
    /// Another scheme, or none.
    #[error("not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH is")]
    Scheme,
    /// `nbds://`, `nbds+unix://` or a `tls-…` parameter.
    #[error("NBD with TLS is not supported; a local nbdkit or stunnel can be put between")]
    Tls,
    /// `nbd://` without a host.
    #[error("an nbd:// URI needs a host")]
    NoHost,
    /// The host has characters that none has, or a bracket is missing.
    #[error("{0:?} is not a host")]
    Host(String),
    /// Not a number from 1 to 65535.
    #[error("{0:?} is not a port")]
    Port(String),
    /// `nbd+unix://` with something before the path.
    #[error("nbd+unix:// has no host: it is nbd+unix:///EXPORT?socket=PATH")]
    HostOfSocket,
    /// `nbd+unix://` without `socket=`.
    #[error("an nbd+unix:// URI needs ?socket=PATH")]
    NoSocket,
    /// Empty, too long for a socket's address, or with a NUL inside.
    #[error("the socket's path is empty, longer than {LONGEST_SOCKET} bytes, or has a NUL inside")]
    Socket,
    /// A parameter that is not known, stands there twice, or does not belong to this scheme.
    #[error("the parameter {0:?} is not known here, or given twice")]
    Parameter(String),
    /// `%` without two hexadecimal digits, or bytes that are not UTF-8 where text is needed.
    #[error("bad %-encoding in {0:?}")]
    Encoding(String),
    /// The export's name is longer than the protocol allows or contains NUL.
    #[error("the export's name is longer than {LONGEST_NAME} bytes or has a NUL inside")]
    Export,
    /// `#…` means nothing here.
    #[error("an NBD URI has no fragment: write # as %23")]
    Fragment,
}

impl NbdUri {
    /// Whether `text` is meant as an NBD URI (well-formed or not), rather than as a path.
    pub fn is_meant(text: &str) -> bool {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| {
            let scheme = scheme.to_ascii_lowercase();
            scheme.starts_with("nbd") && !scheme.contains('/')
        })
    }
}

impl FromStr for NbdUri {
    type Err = NbdUriError;

    fn from_str(text: &str) -> Result<Self, NbdUriError> {
        let (scheme, rest) = text.split_once("://").ok_or(NbdUriError::Scheme)?;
        let unix = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => false,
            "nbd+unix" => true,
            "nbds" | "nbds+unix" | "nbds+vsock" => return Err(NbdUriError::Tls),
            _ => return Err(NbdUriError::Scheme),
        };
        if rest.contains('#') {
            return Err(NbdUriError::Fragment);
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, query),
            None => (rest, ""),
        };
        let (authority, path) = match rest.split_once('/') {
            Some((authority, path)) => (authority, path),
            None => (rest, ""),
        };
        let export = decode_text(path)?;
        if export.len() > LONGEST_NAME || export.contains('\0') {
            return Err(NbdUriError::Export);
        }
        let socket = parameters(query, unix)?;
        let address = if unix {
            if !authority.is_empty() {
                return Err(NbdUriError::HostOfSocket);
            }
            NbdAddress::Unix(socket.ok_or(NbdUriError::NoSocket)?)
        } else {
            tcp(authority)?
        };
        Ok(Self { address, export })
    }
}

/// The socket, if the parameters name one.
fn parameters(query: &str, unix: bool) -> Result<Option<PathBuf>, NbdUriError> {
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name.starts_with("tls-") {
            return Err(NbdUriError::Tls);
        }
        if name != "socket" || !unix || socket.is_some() {
            return Err(NbdUriError::Parameter(name.to_owned()));
        }
        let path = decode(value)?;
        let inside = path.get(1..).unwrap_or_default();
        if path.is_empty() || path == [0] || path.len() > LONGEST_SOCKET || inside.contains(&0) {
            return Err(NbdUriError::Socket);
        }
        socket = Some(PathBuf::from(std::ffi::OsString::from_vec(path)));
    }
    Ok(socket)
}

fn tcp(authority: &str) -> Result<NbdAddress, NbdUriError> {
    // A user's name is for TLS alone.
    if authority.contains('@') {
        return Err(NbdUriError::Tls);
    }
    let bad = || NbdUriError::Host(authority.to_owned());
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(bad)?;
        // A zone (`fe80::1%25eth0`, RFC 6874) is encoded like all else.
        let host = decode_text(host)?;
        let address = host
            .split_once('%')
            .map_or(host.as_str(), |(address, _)| address);
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(bad());
        }
        let port = match after.strip_prefix(':') {
            Some(port) => Some(port),
            None if after.is_empty() => None,
            None => return Err(bad()),
        };
        (host, port)
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        (decode_text(host)?, port)
    };
    if host.is_empty() {
        return Err(NbdUriError::NoHost);
    }
    if host
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || "/?#[]".contains(c))
    {
        return Err(bad());
    }
    let port = match port {
        None | Some("") => PORT,
        Some(digits) => match digits.parse::<u16>() {
            Ok(port) if port > 0 && digits.bytes().all(|c| c.is_ascii_digit()) => port,
            _ => return Err(NbdUriError::Port(digits.to_owned())),
        },
    };
    Ok(NbdAddress::Tcp { host, port })
}

fn decode_text(text: &str) -> Result<String, NbdUriError> {
    String::from_utf8(decode(text)?).map_err(|_| NbdUriError::Encoding(text.to_owned()))
}

fn decode(text: &str) -> Result<Vec<u8>, NbdUriError> {
    let bad = || NbdUriError::Encoding(text.to_owned());
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || {
            let digit = bytes
                .next()
                .and_then(|digit| char::from(digit).to_digit(16));
            digit.and_then(|digit| u8::try_from(digit).ok())
        };
        let high = digit().ok_or_else(bad)?;
        let low = digit().ok_or_else(bad)?;
        decoded.push(high << 4 | low);
    }
    Ok(decoded)
}

/// Bytes with `%xx` for those that are not plain characters of a path.
struct Encoded<'b>(&'b [u8]);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
                write!(f, "{}", char::from(byte))?;
            } else {
                write!(f, "%{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Encoded(self.export.as_bytes());
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd://[{}]", Encoded(host.as_bytes()))?;
                } else {
                    write!(f, "nbd://{}", Encoded(host.as_bytes()))?;
                }
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
            NbdAddress::Unix(path) => {
                let path = Encoded(path.as_os_str().as_bytes());
                write!(f, "nbd+unix:///{export}?socket={path}")
            }
        }
    }
}

#[cfg(test)]
#[path = "uri_test.rs"]
mod tests;
