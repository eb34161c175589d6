// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that answers on the control socket.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SocketType;
use virtio_msg::feature;
use vmsg_bus::unix::Address;
use vmsg_device::device::Operation;
use vmsg_device::host::{Handle, HandleError, LogLimit, Report};

use super::protocol::{Device, FailureKind, Holder, Link, LinkState, Request, Response};

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Bytes of a request, with the end of its line.
const MAX_LINE: usize = 4096;

/// A running control socket. Dropping it ends the thread and removes the socket.
#[derive(Debug)]
pub(crate) struct Server {
    _address: Address,
    /// The thread ends when this is closed.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers at `path` for the host behind `handle`, whose buses have these names, in the order
    /// of their indices.
    pub(crate) fn start(path: &Path, handle: Handle, buses: Vec<String>) -> anyhow::Result<Self> {
        let (address, listener) = listen(path)?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                let service = Service::new(handle, buses);
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

/// What requests are carried out with.
#[derive(Debug)]
struct Service {
    handle: Handle,
    buses: Vec<String>,
    began: Instant,
    log: RefCell<LogLimit>,
}

/// One client.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The rest of a line that was too long is still to come.
    skipping: bool,
    /// Nothing more will come.
    ended: bool,
}

fn serve(listener: &UnixListener, stop: &UnixStream, service: &Service) -> io::Result<()> {
    let mut clients: Vec<Client> = Vec::new();
    let mut pausing = false;
    loop {
        let (stopped, accepting, ready) = wait(listener, stop, &clients, pausing)?;
        if stopped {
            return Ok(());
        }
        pausing = accepting && !accept(listener, &mut clients);
        let mut ready = ready.into_iter();
        // Those that came just now are not among the ready ones.
        clients.retain_mut(|client| !ready.next().unwrap_or(false) || client.go_on(service));
    }
}

/// Waits for something to do: the end, a new client, and which of the clients. `pausing`: new
/// clients are not looked for, and it does not wait for long.
fn wait(
    listener: &UnixListener,
    stop: &UnixStream,
    clients: &[Client],
    pausing: bool,
) -> io::Result<(bool, bool, Vec<bool>)> {
    let mut fds = vec![
        PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(
            listener.as_fd(),
            if pausing {
                PollFlags::empty()
            } else {
                PollFlags::IN
            },
        ),
    ];
    let timeout = pausing.then_some(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    fds.extend(clients.iter().map(Client::interest));
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
    let stopped = ready.next().unwrap_or(true);
    let accepting = ready.next().unwrap_or(false);
    Ok((stopped, accepting, ready.collect()))
}

/// Takes a new client; false if that cannot be, so that others should not be looked for at once.
fn accept(listener: &UnixListener, clients: &mut Vec<Client>) -> bool {
    match listener.accept() {
        Ok((mut stream, _)) => {
            if let Err(error) = stream.set_nonblocking(true) {
                tracing::warn!(%error, "control socket: client dropped");
                return true;
            }
            if clients.len() >= MAX_CLIENTS {
                let message = format!("there are {MAX_CLIENTS} clients already");
                let line = Response::error(FailureKind::Busy, message).line();
                // One that does not take it does not need it.
                let _ = stream.write(&line);
                return true;
            }
            clients.push(Client::new(stream));
            true
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
        Err(error) => {
            // Out of descriptors, most likely: the client still waits, and would wake us at once.
            tracing::warn!(%error, "control socket: cannot accept");
            false
        }
    }
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            skipping: false,
            ended: false,
        }
    }

    /// A client that does not take its answers is not read from.
    fn interest(&self) -> PollFd<'_> {
        let fd: BorrowedFd<'_> = self.stream.as_fd();
        let flags = if self.output.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        };
        PollFd::from_borrowed_fd(fd, flags)
    }

    /// Reads, answers and writes as far as that goes; false when the client is gone.
    fn go_on(&mut self, service: &Service) -> bool {
        match self.step(service) {
            Ok(()) => !(self.ended && self.output.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(_) => false,
        }
    }

    fn step(&mut self, service: &Service) -> io::Result<()> {
        self.write()?;
        // Those that waited for that.
        self.answer(service)?;
        if !self.ended {
            let mut bytes = [0; MAX_LINE];
            let count = self.stream.read(&mut bytes)?;
            self.ended = count == 0;
            self.input.extend_from_slice(&bytes[..count]);
        }
        self.answer(service)
    }

    /// One line after another: the answer to one may be long, and is to be gone before the next is made.
    fn answer(&mut self, service: &Service) -> io::Result<()> {
        while let Some(line) = self.line() {
            self.output.extend(answer(&line, service).line());
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            let count = self.stream.write(&self.output)?;
            self.output.drain(..count);
        }
        Ok(())
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

fn answer(line: &Result<Vec<u8>, ()>, service: &Service) -> Response {
    let Ok(line) = line else {
        let message = format!("a line may have {} bytes", MAX_LINE - 1);
        return Response::error(FailureKind::BadRequest, message);
    };
    match serde_json::from_slice(line) {
        Ok(request) => carry_out(request, service),
        Err(error) => Response::error(FailureKind::BadRequest, error),
    }
}

/// Does what is asked for.
fn carry_out(request: Request, service: &Service) -> Response {
    match request {
        Request::List {} => match service.handle.list() {
            Ok(reports) => {
                let describe = |report| describe(report, &service.buses);
                Response::Devices(reports.into_iter().map(describe).collect())
            }
            Err(error) => failed(&error),
        },
        Request::Link { device, bus, state } => {
            let operation = Operation::SetLink(state == LinkState::Up);
            service.operate(&device, bus.as_deref(), operation)
        }
        Request::Announce { device, bus } => {
            service.operate(&device, bus.as_deref(), Operation::Announce)
        }
    }
}

impl Service {
    fn new(handle: Handle, buses: Vec<String>) -> Self {
        Self {
            handle,
            buses,
            began: Instant::now(),
            log: RefCell::default(),
        }
    }

    /// Whether what an operator did is logged: not thousands of times.
    fn is_logged(&self) -> bool {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.log.borrow_mut().admit(virtio_msg::Instant(now))
    }

    fn operate(&self, device: &str, bus: Option<&str>, operation: Operation) -> Response {
        let index = match bus {
            None => None,
            Some(name) => match self.buses.iter().position(|bus| bus == name) {
                Some(index) => Some(index),
                None => {
                    let known = self.buses.join("`, `");
                    let message = format!("there is no bus `{name}`; there is `{known}`");
                    return Response::error(FailureKind::NotFound, message);
                }
            },
        };
        match self.handle.operate(index, device, operation) {
            Ok(()) => {
                if self.is_logged() {
                    tracing::info!(device, ?operation, "done for the operator");
                }
                Response::Done {}
            }
            Err(error) => failed(&error),
        }
    }
}

fn failed(error: &HandleError) -> Response {
    let kind = match error {
        HandleError::NoDevice(_) | HandleError::Ambiguous(_) => FailureKind::NotFound,
        HandleError::Refused { .. } => FailureKind::Refused,
        _ => FailureKind::Unavailable,
    };
    Response::error(kind, error)
}

fn describe(report: Report, buses: &[String]) -> Device {
    let device_id = report.device_id;
    let name =
        |bit| feature::name(device_id, bit).map_or_else(|| format!("bit {bit}"), ToOwned::to_owned);
    let counters = |list: Vec<(&str, u64)>| {
        let list = list.into_iter();
        list.map(|(name, value)| (name.to_owned(), value)).collect()
    };
    let snapshot = report.snapshot.unwrap_or_default();
    Device {
        bus: buses.get(report.bus).cloned().unwrap_or_default(),
        id: report.name,
        number: report.number.0,
        kind: feature::device_name(device_id)
            .map_or_else(|| format!("type {device_id}"), ToOwned::to_owned),
        worker: report.worker,
        status: report.status.to_string(),
        features: report.features.iter().map(name).collect(),
        holder: report.holder.map(|holder| Holder {
            name: holder.name,
            pid: holder.pid,
        }),
        link: snapshot.link.map(|link| Link {
            up: link.up,
            carrier: link.carrier,
        }),
        counters: counters(snapshot.counters),
        pairs: snapshot.pairs.into_iter().map(counters).collect(),
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
