// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A TFTP server (RFC 1350) on the host's loopback: the UDP traffic of the guests' tests.
//!
//! It keeps no state: an acknowledgement of block N is answered with block N + 1. All answers come from the port that
//! was asked, which RFC 1350 does not demand but allows, so that they pass any address translation.

use std::net::{Ipv4Addr, UdpSocket};
use std::thread;

use anyhow::{Context, Result};

/// The size of the only file in bytes: not a multiple of the block size.
pub(crate) const FILE_SIZE: usize = 40_000;
/// A block's size in bytes; a shorter one is the last.
const BLOCK: usize = 512;

const READ_REQUEST: u16 = 1;
const DATA: u16 = 3;
const ACKNOWLEDGEMENT: u16 = 4;

/// Starts a server on a free port of 127.0.0.1 and gives the port. Its thread ends with the program.
pub(crate) fn start() -> Result<u16> {
    let socket =
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot open a UDP port on 127.0.0.1")?;
    let port = socket.local_addr()?.port();
    thread::spawn(move || {
        let mut request = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut request) {
            if let Some(answer) = answer(&request[..length]) {
                // A lost answer is asked for again.
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    Ok(port)
}

/// The answer to a packet, if it is due one.
fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let field = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let block = match field(0)? {
        READ_REQUEST => 1,
        ACKNOWLEDGEMENT => field(2)?.checked_add(1)?,
        _ => return None,
    };
    let start = usize::from(block).checked_sub(1)? * BLOCK;
    let content = content();
    let data = content.get(start..)?;
    let mut answer = Vec::with_capacity(4 + BLOCK);
    answer.extend_from_slice(&DATA.to_be_bytes());
    answer.extend_from_slice(&block.to_be_bytes());
    answer.extend_from_slice(&data[..data.len().min(BLOCK)]);
    Some(answer)
}

/// The file: `content()[i]` differs from block to block.
pub(crate) fn content() -> Vec<u8> {
    (0..FILE_SIZE)
        .map(|i| ((i * 31) ^ (i / BLOCK)).to_le_bytes()[0])
        .collect()
}

#[cfg(test)]
#[path = "tftp_test.rs"]
mod tests;
