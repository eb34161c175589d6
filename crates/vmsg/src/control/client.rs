// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other end of the control socket: one that asks.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::protocol::{Request, Response};
use crate::trace::clean;

/// Longer than the server waits for the device host, or a switch.
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer that takes longer is waited for, which a person may want to know.
const AT_ONCE: Duration = Duration::from_millis(300);
/// Bytes of an answer: that of a few thousand devices.
const MAX_ANSWER: u64 = 64 << 20;

/// A connection to the control socket of `vmsg serve` or `vmsg up`.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to whom listens at `path`.
    pub(crate) fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = connect(path, PATIENCE)
            .with_context(|| format!("nobody answers at {}", path.display()))?;
        let client = Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
        };
        client.set_patience(PATIENCE)?;
        Ok(client)
    }

    /// How long an answer may take; ten seconds by default.
    pub(crate) fn set_patience(&self, patience: Duration) -> anyhow::Result<()> {
        let stream = self.stream.get_ref();
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(())
    }

    /// Asks, and waits for the answer. After an error the connection is of no more use.
    pub(crate) fn ask(&mut self, request: &Request) -> anyhow::Result<Response> {
        self.ask_and_wait(request, || ())
    }

    /// The same. `wait` is called if the answer does not come at once.
    pub(crate) fn ask_and_wait(
        &mut self,
        request: &Request,
        wait: impl FnOnce(),
    ) -> anyhow::Result<Response> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A server that is busy has said so and closed; its words are better than a broken pipe.
        let sent = self.stream.get_mut().write_all(&line);
        if !self.is_answered(AT_ONCE) {
            wait();
        }
        let mut answer = Vec::new();
        let count = (&mut self.stream)
            .take(MAX_ANSWER)
            .read_until(b'\n', &mut answer);
        count.with_context(|| {
            let path = self.path.display();
            format!("no answer at {path}; is it the --control socket of vmsg serve or vmsg up?")
        })?;
        if answer.is_empty() {
            sent.context("the request was not taken")?;
            let path = self.path.display();
            bail!("{path} closed the connection without an answer");
        }
        serde_json::from_slice(&answer).map_err(|error| {
            let error = error.to_string();
            anyhow!("the answer is not understood: {}", clean(&error))
        })
    }

    /// Waits for the beginning of an answer, or the end of the connection.
    fn is_answered(&self, time: Duration) -> bool {
        let mut fds = [PollFd::new(self.stream.get_ref(), PollFlags::IN)];
        // However it ends, it is looked at what has come.
        let _ = poll(&mut fds, Timespec::try_from(time).ok().as_ref());
        !fds[0].revents().is_empty()
    }

    /// As [`ask`](Self::ask); that it was not done is an error, in the server's words.
    pub(crate) fn have(&mut self, request: &Request) -> anyhow::Result<Response> {
        self.ask(request).and_then(done)
    }
}

/// The answer; that something was not done is an error, in the server's words.
pub(super) fn done(response: Response) -> anyhow::Result<Response> {
    match response {
        Response::Error(failure) => bail!("{}", clean(&failure.message)),
        response => Ok(response),
    }
}

/// As [`UnixStream::connect`], which waits for ever where somebody listens and takes no connection.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(patience))?;
    match net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(Errno::AGAIN) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "who listens there takes no connection",
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[path = "client_test.rs"]
mod tests;
