// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads that answer on the control socket.
//!
//! One thread takes clients in, and each client has one of its own: what takes long for one, such as
//! opening an interface, is not waited for by the others.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SocketType;
use vmsg_bus::unix::Address;

use super::protocol::{FailureKind, Request, Response};

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Threads for them: who asks for much, goes away and comes again has to wait.
const MAX_THREADS: usize = 2 * MAX_CLIENTS;
/// Bytes of a request, with the end of its line.
const MAX_LINE: usize = 65536;
/// Bytes read at a time.
const CHUNK: usize = 4096;

/// What requests are carried out with; several at a time.
pub(crate) trait Service: Send + Sync + 'static {
    /// Does what is asked for, however long that takes.
    fn carry_out(&self, request: Request) -> Response;
}

/// A running control socket. Dropping it ends the threads, after what they are just doing, and
/// removes the socket.
#[derive(Debug)]
pub(crate) struct Server {
    _address: Address,
    /// The threads end when this is closed.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers at `path`, for this user alone, what `service` says.
    pub(crate) fn start(path: &Path, service: Arc<dyn Service>) -> anyhow::Result<Self> {
        let (address, listener) = listen(path)?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                if let Err(error) = serve(&listener, &stopped, &service) {
                    tracing::error!(%error, "the control socket is not served any more");
                }
            })?;
        Ok(Self {
            _address: address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Listens at `path`, where a socket that nobody serves may be left, for this user alone.
fn listen(path: &Path) -> anyhow::Result<(Address, UnixListener)> {
    let address = Address::bind(path, 0o600, SocketType::STREAM).context("no control socket")?;
    let socket = address.as_fd().try_clone_to_owned()?;
    Ok((address, UnixListener::from(socket)))
}

/// A client as the thread that takes them in knows it.
#[derive(Debug)]
struct Client {
    /// To end it by. Its own thread has the descriptor, which is closed when that ends.
    stream: Weak<UnixStream>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Client {
    /// Whether nobody is at the other end, and its thread has only not seen it yet.
    fn has_hung_up(&self) -> bool {
        let Some(stream) = self.stream.upgrade() else {
            return true;
        };
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn end(self) {
        if let Some(stream) = self.stream.upgrade() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = self.thread.join();
    }
}

fn serve(listener: &UnixListener, stop: &UnixStream, service: &Arc<dyn Service>) -> io::Result<()> {
    let mut clients: Vec<Client> = Vec::new();
    let mut pausing = false;
    let result = loop {
        let (stopped, accepting) = match wait(listener, stop, pausing) {
            Ok(ready) => ready,
            Err(error) => break Err(error),
        };
        if stopped {
            break Ok(());
        }
        clients.retain(|client| !client.ended.load(Ordering::Acquire));
        pausing = accepting && !accept(listener, &mut clients, service);
    };
    clients.into_iter().for_each(Client::end);
    result
}

/// Waits for the end, or a new client. `pausing`: clients are not looked for, and it does not wait for long.
fn wait(listener: &UnixListener, stop: &UnixStream, pausing: bool) -> io::Result<(bool, bool)> {
    let looked_for = if pausing {
        PollFlags::empty()
    } else {
        PollFlags::IN
    };
    let mut fds = [
        PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(listener.as_fd(), looked_for),
    ];
    let timeout = pausing.then_some(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let [stop, listener] = fds.map(|fd| !fd.revents().is_empty());
    Ok((stop, listener))
}

/// Takes a new client; false if that cannot be, so that others should not be looked for at once.
fn accept(listener: &UnixListener, clients: &mut Vec<Client>, service: &Arc<dyn Service>) -> bool {
    let mut stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Err(error) => {
            // Out of descriptors, most likely: the client still waits, and would wake us at once.
            tracing::warn!(%error, "control socket: cannot accept");
            return false;
        }
    };
    let there = clients.iter().filter(|client| !client.has_hung_up());
    if there.count() >= MAX_CLIENTS || clients.len() >= MAX_THREADS {
        let message = format!("there are {MAX_CLIENTS} clients already");
        let line = Response::error(FailureKind::Busy, message).line();
        // One that does not take it does not need it.
        let _ = stream.set_nonblocking(true);
        let _ = stream.write(&line);
        return true;
    }
    match start(stream, Arc::clone(service)) {
        Ok(client) => clients.push(client),
        Err(error) => tracing::warn!(%error, "control socket: client dropped"),
    }
    true
}

fn start(stream: UnixStream, service: Arc<dyn Service>) -> io::Result<Client> {
    stream.set_nonblocking(false)?;
    let ended = Arc::new(AtomicBool::new(false));
    let stream = Arc::new(stream);
    let to_end = Arc::downgrade(&stream);
    let mut conversation = Conversation {
        stream,
        input: Vec::new(),
        skipping: false,
        ended: Arc::clone(&ended),
    };
    let thread = std::thread::Builder::new()
        .name("control client".to_owned())
        .spawn(move || {
            // Whatever is wrong with the connection ends it.
            let _ = conversation.hold(&*service);
        })?;
    Ok(Client {
        stream: to_end,
        ended,
        thread,
    })
}

/// What is said with one client.
#[derive(Debug)]
struct Conversation {
    stream: Arc<UnixStream>,
    input: Vec<u8>,
    /// The rest of a line that was too long is still to come.
    skipping: bool,
    ended: Arc<AtomicBool>,
}

/// However it ends: the client's place is free.
impl Drop for Conversation {
    fn drop(&mut self) {
        // Before the other end can see that it is over, and come again.
        self.ended.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Conversation {
    /// One line after another: a client that does not take its answers is not read from.
    fn hold(&mut self, service: &dyn Service) -> io::Result<()> {
        let mut bytes = [0; CHUNK];
        loop {
            while let Some(line) = self.line() {
                (&*self.stream).write_all(&answer(&line, service).line())?;
            }
            match (&*self.stream).read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the next whole line out of the input; `Err` stands for one that was too long.
    fn line(&mut self) -> Option<Result<Vec<u8>, ()>> {
        while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
            let mut line: Vec<u8> = self.input.drain(..=end).collect();
            line.pop();
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if line.len() >= MAX_LINE {
                return Some(Err(()));
            } else if !line.iter().all(u8::is_ascii_whitespace) {
                return Some(Ok(line));
            }
        }
        if self.input.len() < MAX_LINE {
            return None;
        }
        self.input.clear();
        (!std::mem::replace(&mut self.skipping, true)).then_some(Err(()))
    }
}

fn answer(line: &Result<Vec<u8>, ()>, service: &dyn Service) -> Response {
    let Ok(line) = line else {
        let message = format!("a line may have {} bytes", MAX_LINE - 1);
        return Response::error(FailureKind::BadRequest, message);
    };
    match serde_json::from_slice(line) {
        Ok(request) => service.carry_out(request),
        Err(error) => Response::error(FailureKind::BadRequest, error),
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
