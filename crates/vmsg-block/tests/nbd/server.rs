// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server as the test wants it.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use vmsg_block::{NbdAddress, NbdConfig, NbdUri};

pub(crate) const FLUSH: u16 = 1 << 2;
pub(crate) const FUA: u16 = 1 << 3;
pub(crate) const TRIM: u16 = 1 << 5;
pub(crate) const ZEROES: u16 = 1 << 6;
pub(crate) const READ_ONLY: u16 = 1 << 1;

/// The URI of a socket.
pub(crate) fn uri(socket: &Path) -> NbdUri {
    NbdUri {
        address: NbdAddress::Unix(socket.to_owned()),
        export: String::new(),
    }
}

pub(crate) fn config(socket: &Path, timeout: Duration) -> NbdConfig {
    NbdConfig {
        timeout,
        ..NbdConfig::new(uri(socket))
    }
}

pub(crate) fn read_exact<const N: usize>(socket: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The negotiation, up to where requests come; structured replies as told.
pub(crate) fn greet(
    socket: &mut UnixStream,
    size: u64,
    flags: u16,
    structured: bool,
) -> io::Result<()> {
    greet_with(socket, size, flags, structured, (1, 4096, 32 << 20))
}

pub(crate) fn greet_with(
    socket: &mut UnixStream,
    size: u64,
    flags: u16,
    structured: bool,
    blocks: (u32, u32, u32),
) -> io::Result<()> {
    socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    read_exact::<4>(socket)?;
    loop {
        let head = read_exact::<16>(socket)?;
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(head[12..16].try_into().unwrap());
        io::copy(&mut (&mut *socket).take(u64::from(len)), &mut io::sink())?;
        match option {
            8 if structured => answer(socket, option, 1, &[])?,
            7 => {
                let mut export = vec![0, 0];
                export.extend_from_slice(&size.to_be_bytes());
                export.extend_from_slice(&(flags | 1).to_be_bytes());
                answer(socket, option, 3, &export)?;
                let mut sizes = vec![0, 3];
                for size in [blocks.0, blocks.1, blocks.2] {
                    sizes.extend_from_slice(&size.to_be_bytes());
                }
                answer(socket, option, 3, &sizes)?;
                return answer(socket, option, 1, &[]);
            }
            _ => answer(socket, option, 0x8000_0001, b"not this one")?,
        }
    }
}

pub(crate) fn answer(
    socket: &mut UnixStream,
    option: u32,
    kind: u32,
    data: &[u8],
) -> io::Result<()> {
    let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    socket.write_all(&bytes)
}

/// A request of the client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

pub(crate) fn ask(socket: &mut UnixStream) -> io::Result<Asked> {
    let head = read_exact::<28>(socket)?;
    assert_eq!(head[..4], 0x2560_9513u32.to_be_bytes());
    Ok(Asked {
        flags: u16::from_be_bytes(head[4..6].try_into().unwrap()),
        command: u16::from_be_bytes(head[6..8].try_into().unwrap()),
        cookie: u64::from_be_bytes(head[8..16].try_into().unwrap()),
        offset: u64::from_be_bytes(head[16..24].try_into().unwrap()),
        len: u32::from_be_bytes(head[24..28].try_into().unwrap()),
    })
}

pub(crate) fn simple(cookie: u64, error: u32) -> Vec<u8> {
    let mut bytes = 0x6744_6698u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&error.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes
}

pub(crate) fn chunk(cookie: u64, last: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(last).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A disk whose writes are in memory until they are flushed; all connections see the same.
#[derive(Debug)]
pub(crate) struct Medium {
    /// What survives.
    pub(crate) durable: Vec<u8>,
    /// What is read.
    pub(crate) cached: Vec<u8>,
}

/// A server that breaks connections, and forgets what it was not told to keep.
pub(crate) struct Forgetful {
    pub(crate) medium: Arc<Mutex<Medium>>,
    stop: Arc<AtomicBool>,
    socket: std::path::PathBuf,
    thread: Option<thread::JoinHandle<()>>,
}

/// How a [`Forgetful`] server is.
#[derive(Clone, Debug)]
pub(crate) struct Habits {
    pub(crate) flags: u16,
    pub(crate) structured: bool,
    /// Requests after which each connection breaks, one after the other; then none does.
    pub(crate) breaks: Vec<u32>,
    /// Replies come in another order, reads in pieces.
    pub(crate) seed: u64,
    /// Bytes of a request at most.
    pub(crate) maximum: u32,
}

impl Forgetful {
    pub(crate) fn new(socket: &Path, size: usize, habits: Habits) -> Self {
        let medium = Arc::new(Mutex::new(Medium {
            durable: vec![0; size],
            cached: vec![0; size],
        }));
        let listener = UnixListener::bind(socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let shared = (Arc::clone(&medium), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let (medium, stop) = shared;
            let mut breaks = habits.breaks.iter().copied();
            while let Ok((socket, _)) = listener.accept() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let life = breaks.next();
                let served = serve(socket, &habits, life.unwrap_or(u32::MAX), &medium);
                if served.is_ok() || stop.load(Ordering::Relaxed) {
                    return;
                }
                // As if it had been killed, and the machine with it.
                let mut medium = medium.lock().unwrap_or_else(PoisonError::into_inner);
                let Medium { durable, cached } = &mut *medium;
                cached.copy_from_slice(durable);
            }
        });
        Self {
            medium,
            stop,
            socket: socket.to_owned(),
            thread: Some(thread),
        }
    }

    /// What is on the medium for good.
    pub(crate) fn durable(&self) -> Vec<u8> {
        self.medium.lock().unwrap().durable.clone()
    }
}

impl Drop for Forgetful {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves a connection; an error if it ends without a goodbye.
fn serve(
    mut socket: UnixStream,
    habits: &Habits,
    mut life: u32,
    medium: &Mutex<Medium>,
) -> io::Result<()> {
    let size = medium.lock().unwrap().cached.len();
    let blocks = (1, 512, habits.maximum);
    greet_with(
        &mut socket,
        size as u64,
        habits.flags,
        habits.structured,
        blocks,
    )?;
    let mut dice = habits.seed | 1;
    let mut roll = move |sides: u64| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        (dice >> 20) % sides
    };
    // Replies that are held back, in pieces that must stay in order.
    let mut held: Vec<Vec<Vec<u8>>> = Vec::new();
    loop {
        let asked = ask(&mut socket)?;
        let (from, len) = (usize::try_from(asked.offset).unwrap(), asked.len as usize);
        let mut data = vec![0; if asked.command == 1 { len } else { 0 }];
        socket.read_exact(&mut data)?;
        if life == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        life -= 1;
        let mut guard = medium.lock().unwrap();
        let Medium { durable, cached } = &mut *guard;
        let mut pieces = Vec::new();
        match asked.command {
            0 if habits.structured => {
                let mut at = from;
                while at < from + len {
                    let piece = usize::try_from(roll(len as u64) + 1)
                        .unwrap()
                        .min(from + len - at);
                    let mut payload = (at as u64).to_be_bytes().to_vec();
                    if cached[at..at + piece].iter().all(|&byte| byte == 0) {
                        payload.extend_from_slice(&u32::try_from(piece).unwrap().to_be_bytes());
                        pieces.push(chunk(asked.cookie, at + piece == from + len, 2, &payload));
                    } else {
                        payload.extend_from_slice(&cached[at..at + piece]);
                        pieces.push(chunk(asked.cookie, at + piece == from + len, 1, &payload));
                    }
                    at += piece;
                }
            }
            0 => {
                let mut reply = simple(asked.cookie, 0);
                reply.extend_from_slice(&cached[from..from + len]);
                pieces.push(reply);
            }
            1 => cached[from..from + len].copy_from_slice(&data),
            6 => cached[from..from + len].fill(0),
            4 => {}
            3 => durable.copy_from_slice(cached),
            2 => return Ok(()),
            other => panic!("command {other}"),
        }
        if asked.flags & 1 != 0 {
            durable[from..from + len].copy_from_slice(&cached[from..from + len]);
        }
        drop(guard);
        if pieces.is_empty() {
            pieces.push(simple(asked.cookie, 0));
        }
        held.push(pieces);
        // Nobody waits for ever: something is sent as long as nothing else is there.
        socket.set_nonblocking(true)?;
        while !held.is_empty() {
            let more = match rustix::net::recv(&socket, &mut [0; 1], rustix::net::RecvFlags::PEEK) {
                Ok((count, _)) => count > 0,
                Err(_) => false,
            };
            if more && held.len() < 4 {
                break;
            }
            let which = usize::try_from(roll(held.len() as u64)).unwrap();
            let piece = held[which].remove(0);
            if held[which].is_empty() {
                held.remove(which);
            }
            socket.set_nonblocking(false)?;
            socket.write_all(&piece)?;
            socket.set_nonblocking(true)?;
        }
        socket.set_nonblocking(false)?;
    }
}
